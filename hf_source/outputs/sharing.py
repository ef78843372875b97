# Copyright 2026 The hf_source team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From an attributor to what is shared: what goes along, who may see it, one commit."""

import re
import tempfile
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..attribution.methods import METHODS
from ..attribution.queries import Queries, same_queries
from ..errors import ConfigError, DataError
from ..hub import CARD_FILE, HubError, check_repo_id, commit, is_open, present_card, refuse_public, source_of
from ..logs import get_logger
from ..recording import StageRecord
from ..recording.digest import record_digest
from .attribution_files import FOLDERS, MANIFEST, Attribution, save_attribution
from .attribution_tables import check_columns, stage_table
from .shading import Shading


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor

logger = get_logger(__name__)

MAX_COLUMNS = 100
"""With more queries than this, scores are one list per row: the Hub's viewer shows at most about 1,000 columns."""


def collect(
    attributor: "SourceAttributor",
    queries: Queries | None = None,
    stages: Iterable[str] | None = None,
    k: int = 10,
    *,
    texts: Iterable[str] | None = None,
    sources: Mapping[str, str] | None = None,
    max_columns: int = MAX_COLUMNS,
    shaded: int | None = None,
) -> Attribution:
    """Scores, strongest rows and settings of an attributor, as one object.

    Args:
        attributor: computes the scores, unless it has them.
        queries: what to explain; those last attributed by default.
        stages: names; those attributed with these queries by default, or all.
        k: rows per query, stage and direction in `top`.
        texts: stages whose rows go along; all by default. Of the others row numbers do.
        sources: stage -> id of its dataset on the Hub, for the card.
        max_columns: see `MAX_COLUMNS`.
        shaded: answers whose tokens are scored, with those of their strongest rows; `None` for what a report of these
            queries has scored.

    Raises:
        ConfigError: if nothing was attributed and no queries are given, or k is below 1.
        DataError, RecordError: as `SourceAttributor.scores`.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ConfigError(f"k={k!r}: at least one row per query, stage and direction is needed (10 is usual).")
    queries, names = _asked(attributor, queries, stages)
    texts = set(names if texts is None else texts)
    queries = attributor.encode(queries)
    for name in names:  # before any score is computed
        given = attributor.rows(attributor.record.stage(name)).given
        if name in texts:
            check_columns(given, queries.names, max_columns)
    shading = Shading(attributor, queries, shaded)
    found = {}
    for name in reversed(names):  # the walk goes backwards
        rows = attributor.rows(attributor.record.stage(name))
        given = rows.given if name in texts else None
        scores = attributor.scores(attributor.datasets.get(name), queries, name)
        found[name] = stage_table(given, rows.numbers, scores, queries.names, max_columns)
    top = attributor.top(queries, k, stages=names)
    tokens = shading.of(top, texts)
    if texts != set(names):
        shown = [text if stage in texts else None for stage, text in zip(top["stage"], top["text"], strict=True)]
        top = top.remove_columns("text").add_column("text", shown, feature=top.features["text"])
    if queries.are_rows and texts != set(names):  # they may be training rows themselves
        queries = Queries(queries.names, queries.prompts, queries.completions, None, True)
    return Attribution(
        queries,
        {name: found[name] for name in names},
        top,
        attributor.settings(),
        attributor.note,
        attributor.trust(names),
        {
            "hf_source": __version__,
            "layout": "list" if len(queries) > max_columns else "columns",
            "k": k,
            **_meaning(attributor),
            "record": {"digest": record_digest(attributor.record), "repo_id": attributor.record.repo_id},
            "stages": {
                name: _about(attributor.record.stage(name), name in texts, (sources or {}).get(name)) for name in names
            },
            "remark": shading.remark,
        },
        tokens,
    )


def _asked(
    attributor: "SourceAttributor", queries: Queries | None, stages: Iterable[str] | None
) -> tuple[Queries, list[str]]:
    """What to share: the queries, and stages in the order of the record."""
    last, done = attributor.attributed or (None, [])
    if queries is None and last is None:
        raise ConfigError(
            "Nothing was attributed yet: pass `queries=`, or call `attribute`, `scores` or `top` with them first."
        )
    every = [stage.name for stage in attributor.record.stages]
    if stages is not None:
        named = [stages] if isinstance(stages, str) else stages
        chosen = [attributor.record.stage(name).name for name in named]
        if not chosen:
            raise ConfigError(f"stages is empty: name some of {every}, or leave it out.")
    else:
        chosen = done if queries is None or _same(attributor, queries, last) else every
    return last if queries is None else queries, [name for name in every if name in chosen]


def _same(attributor: "SourceAttributor", queries: Queries, last: Queries | None) -> bool:
    return last is not None and same_queries(attributor.encode(queries), last)


def _meaning(attributor: "SourceAttributor") -> dict[str, str]:
    """Unit of the scores, and what they predict the change of."""
    if not METHODS[attributor.method].nats:
        return {"unit": "", "measured": ""}
    measurement = attributor.settings().get("measurement")
    if measurement is None:
        return {"unit": "nats", "measured": "the query's loss (the negative log-likelihood of its completion)"}
    return {"unit": "the unit of that measurement", "measured": f"the query's measurement {measurement}"}


def _about(stage: StageRecord, texts: bool, source: str | None) -> dict[str, Any]:
    return {
        "texts": texts,
        "source": source,
        "steps": stage.num_steps,
        "segments": len(stage.segments),
        "model": stage.model["class"] + (" with PEFT" if stage.model["peft"] else ""),
        "optimizer": stage.optimizer["name"],
        "visits": stage.data["visits"],
    }


def push_attribution(
    attributor: "SourceAttributor",
    repo_id: str,
    queries: Queries | None,
    stages: Iterable[str] | None,
    k: int,
    *,
    include_rows: bool | None,
    private: bool | None,
    source_datasets: str | Mapping[str, str] | None,
    max_columns: int,
    shaded: int | None,
    **commit_settings: Any,
) -> str:
    """Publish. See `SourceAttributor.push_to_hub`, which has the defaults, and `commit` for its settings."""
    token, revision = commit_settings["token"], commit_settings["revision"]
    check_repo_id(repo_id)
    queries, names = _asked(attributor, queries, stages)
    said = _said(source_datasets, [stage.name for stage in attributor.record.stages])
    sources = {name: said.get(name) or _source(attributor, name) for name in names}
    readable = {source: is_open(source, "dataset") for source in set(sources.values()) if source is not None}
    if private is None:
        private = not all(readable.get(sources[name], False) for name in names) or not _records_are_open(attributor)
    if include_rows is None:
        # A dataset that merely came from an open repository may have gained columns since: its owner has to say.
        texts = [name for name in names if name in said and readable[sources[name]]]
        if withheld := [name for name in names if name not in texts]:
            logger.warning(
                f"The rows of {', '.join(withheld)} are not pushed, only their numbers and scores: whether anybody "
                "may read them is not known. Say include_rows=True to push them, or name open datasets on the Hub "
                "that they come from with source_datasets=."
            )
    else:
        texts = names if include_rows else []
    try:
        if private:
            refuse_public(repo_id, "dataset", token)
        given = {"texts": texts, "sources": sources, "max_columns": max_columns, "shaded": shaded}
        attribution = collect(attributor, queries, names, k, **given)
        if not attributor.accelerator.is_main_process:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            return commit(
                repo_id,
                "dataset",
                lambda api, present: _operations(api, attribution, Path(folder), repo_id, present, revision),
                private=private,
                **commit_settings,
            )
    except HubError as error:
        raise DataError(
            f"The attribution could not be pushed to {repo_id} ({error}). Check the name, and that you are logged in "
            "with a token that may write there (`hf auth login`)."
        ) from error


def _source(attributor: "SourceAttributor", name: str) -> str | None:
    """Where the rows of a stage come from: those that were given, or that trained."""
    stage = attributor.record.stage(name)
    given = attributor.datasets.get(name)
    return stage.dataset.get("source") if given is None else source_of(given)


def _said(source_datasets: str | Mapping[str, str] | None, stages: list[str]) -> dict[str, str]:
    said = dict.fromkeys(stages, source_datasets) if isinstance(source_datasets, str) else dict(source_datasets or {})
    for name, source in said.items():
        if name not in stages:
            raise ConfigError(f"source_datasets names stage {name!r}; the record has {stages}.")
        check_repo_id(source)
    return said


def _records_are_open(attributor: "SourceAttributor") -> bool:
    records = [attributor.record] if attributor.ensemble is None else attributor.ensemble.records
    return all(is_open(record.repo_id, "model") for record in records if record.repo_id is not None)


def _operations(
    api: Any, attribution: Attribution, folder: Path, repo_id: str, present: list[str], revision: str | None
) -> list[Any]:
    """Add the files, delete those of an earlier attribution; nothing else in the repository is touched."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    save_attribution(attribution, folder, repo_id, present_card(api, repo_id, "dataset", present, revision))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name != CARD_FILE)  # the card comes first
    ours = re.compile(rf"(?:{'|'.join(FOLDERS)})/[^/]+-\d+-of-\d+\.parquet|{re.escape(MANIFEST)}")
    stale = [name for name in present if ours.fullmatch(name) and name not in names]
    return [CommitOperationAdd(name, str(folder / name)) for name in names] + list(map(CommitOperationDelete, stale))
