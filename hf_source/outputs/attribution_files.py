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
"""An attribution as people share it: queries, scores of every row of some stages, and the strongest rows.

It is a folder, or a dataset repository on the Hub, of Parquet files with a card, and one JSON file that says how the
scores came about. Its configs are `default` (rows and scores, one split per stage), `scores` (one list per row, where
queries are many), `top_influences`, `queries` and, where tokens were scored too, `token_influences`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..attribution.queries import Queries
from ..attribution.tokens import TokenInfluence
from ..data import ROW
from ..errors import DataError
from ..hub import CARD_FILE, dataset_snapshot
from ..paths import checked_path
from .attribution_card import attribution_card
from .attribution_tables import SCORES, aligned, read_parquet, score_array, split_names, write_parquet
from .columns import column_name, with_note
from .shading import read_tokens, token_table


MANIFEST = "attribution.json"
FOLDERS = ("data", "scores", "top_influences", "queries", "token_influences")
_VERSION = 1
_TEXTS = ("name", "prompt", "completion")
_OF_A_ROW = "row_"  # before the columns of queries that are rows, which may have a `prompt` of their own


@dataclass
class Attribution:
    """Scores of training rows and what is needed to read them.

    Attributes:
        queries: what was asked.
        stages: stage -> its rows with `source_row` and one float32 column `source_<name>` per query; with many queries
            one list `source_scores`. Where rows are not to be shown, only their numbers.
        top: the strongest rows, as `SourceAttributor.top` gives them.
        settings: of the attributor: method, curvature, ...
        note: on what assumption the scores rest; empty if on none.
        trust: what was measured of scores of these settings on this run; empty if nothing was.
        about: record, unit, versions, and a description of each stage; JSON-able.
        tokens: influence by token, of the answers and of their strongest rows, where it was computed.
    """

    queries: Queries
    stages: dict[str, Dataset]
    top: Dataset
    settings: dict[str, Any]
    note: str = ""
    trust: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    tokens: TokenInfluence = field(default_factory=TokenInfluence)

    def scores(self, stage: str | None = None) -> np.ndarray:
        """Scores of a stage: float32 `[queries, rows]`, in the order of its dataset.

        Args:
            stage: its name; may be left out if there is only one.

        Raises:
            DataError: if there is no such stage.
        """
        if stage is None and len(self.stages) == 1:
            stage = next(iter(self.stages))
        if stage not in self.stages:
            raise DataError(f"There are no scores of stage {stage!r}: choose `stage=` from {list(self.stages)}.")
        return score_array(self.stages[stage], [column_name(name) for name in self.queries.names])

    @property
    def listed(self) -> bool:
        """Whether scores are one list per row instead of one column per query."""
        return self.about["layout"] == "list"


def save_attribution(
    attribution: Attribution, folder: str | Path, repo_id: str | None = None, old_card: str | None = None
) -> Path:
    """Write an attribution to a folder, in place of one that is there.

    Args:
        attribution: from `SourceAttributor`, or `load_attribution`.
        folder: to write to. Files of others in it stay, and so does what somebody wrote in its card.
        repo_id: repository that the card speaks of.
        old_card: card to keep, if it is not in the folder.

    Returns:
        The folder.

    Raises:
        ConfigError: if the header of the card that is there cannot be read.
    """
    folder = checked_path(folder, "Saving scores", "pass the folder to write to")
    if old_card is None and (folder / CARD_FILE).is_file():
        old_card = (folder / CARD_FILE).read_text(encoding="utf-8")
    splits = split_names(attribution.stages)
    card = attribution_card(_card_content(attribution, splits), repo_id, old_card)
    folder.mkdir(parents=True, exist_ok=True)
    # Without this file nothing can be loaded: a folder that was left half written is noticed.
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in FOLDERS:
        for old in (folder / name).glob("*-*-of-*.parquet"):
            old.unlink()
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    columns = _write_stages(attribution, folder, splits)
    write_parquet(_with_texts(attribution.top, attribution.queries), folder / "top_influences", "train")
    write_parquet(_query_table(attribution.queries), folder / "queries", "train")
    if attribution.tokens:
        write_parquet(token_table(attribution.tokens), folder / "token_influences", "train")
    content = {
        "schema_version": _VERSION,
        "are_rows": attribution.queries.are_rows,
        "tokens": bool(attribution.tokens),
        "settings": attribution.settings,
        "note": attribution.note,
        "trust": attribution.trust,
        "about": attribution.about,
        "stages": [{"name": stage, "split": split, "columns": columns[split]} for stage, split in splits.items()],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return folder


def _write_stages(attribution: Attribution, folder: Path, splits: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Configs `default` and `scores`; what each split's columns are called in the files."""
    own = {splits[stage]: dataset for stage, dataset in attribution.stages.items()}
    if attribution.listed:
        for split, dataset in own.items():
            write_parquet(dataset.select_columns([ROW, SCORES]), folder / "scores", split)
        own = {split: dataset.remove_columns(SCORES) for split, dataset in own.items()}
    tables, columns = aligned(own)
    for split, dataset in tables.items():
        write_parquet(dataset, folder / "data", split)
    return columns


def _with_texts(top: Dataset, queries: Queries) -> Dataset:
    """The strongest rows with the text of their query beside their own."""
    texts = {name: (prompt, completion) for name, prompt, completion in queries}
    for position, column in enumerate(("prompt", "completion")):
        top = top.add_column(column, [texts[name][position] for name in top["query"]])
    return top


def _query_table(queries: Queries) -> Dataset:
    columns: dict[str, Any] = dict(zip(_TEXTS, (queries.names, queries.prompts, queries.completions), strict=True))
    mark = _OF_A_ROW if queries.are_rows else ""
    if queries.rows is not None:
        columns |= {mark + key: [row[key] for row in queries.rows] for key in queries.rows[0]}
    return Dataset.from_dict(columns)


def _card_content(attribution: Attribution, splits: Mapping[str, str]) -> dict[str, Any]:
    about = attribution.about
    stages = [
        {**about["stages"][stage], "name": stage, "split": split, "num_rows": len(attribution.stages[stage])}
        for stage, split in splits.items()
    ]
    return {
        "queries": list(attribution.queries),
        "method": attribution.settings["method"],
        "unit": about["unit"],
        "measured": about["measured"],
        "listed": attribution.listed,
        "stages": stages,
        "withheld": [stage["name"] for stage in stages if not stage["texts"]],
        "k": about["k"],
        "num_top": len(attribution.top),
        "num_shaded": len(attribution.tokens.answers) + len(attribution.tokens.rows),
        "note": attribution.note,
        "trust": attribution.trust,
        "record": about["record"],
        "settings": attribution.settings,
    }


def load_attribution(path: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Attribution:
    """Open what `SourceAttributor.push_to_hub` or `save` left.

    Args:
        path: folder, or id of the dataset repository.
        revision, token: branch, tag or commit on the Hub, and what authenticates there.

    Raises:
        DataError: if there is nothing, it is not whole, or another version wrote it.
    """
    folder = checked_path(path, "load_attribution", "pass the folder that `save` wrote, or a dataset's id on the Hub")
    if not folder.exists():
        folder = dataset_snapshot("attribution", str(path), revision=revision, token=token)
    content = _read_manifest(folder)
    try:
        parts = [(str(stage["name"]), str(stage["split"]), stage["columns"]) for stage in content["stages"]]
        settings, about = dict(content["settings"]), dict(content["about"])
        note, trust, are_rows = str(content["note"]), str(content["trust"]), bool(content["are_rows"])
        listed, has_tokens = about["layout"] == "list", bool(content.get("tokens"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error!r}): copy the whole repository again.") from error
    stages = {name: _read_stage(folder, split, columns, listed) for name, split, columns in parts}
    top = read_parquet(folder / "top_influences", "train").remove_columns(["prompt", "completion"])
    queries = _read_queries(read_parquet(folder / "queries", "train"), are_rows)
    tokens = read_tokens(read_parquet(folder / "token_influences", "train")) if has_tokens else TokenInfluence()
    said = "\n".join(part for part in (note, trust) if part)
    for dataset in (top, *stages.values()):
        with_note(dataset, said)
    return Attribution(queries, stages, top, settings, note, trust, about, tokens)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["schema_version"]
    except FileNotFoundError as error:
        hint = ""
        if (folder / "record.json").is_file():
            hint = " It is a training record: open it with SourceAttributor.from_record."
        raise DataError(
            f"{file} does not exist: {folder} holds no attribution, or only a part of it.{hint}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}): copy the whole repository again.") from error
    if version != _VERSION:
        raise DataError(f"{file} has schema version {version}, this hf_source reads {_VERSION}: install a newer one.")
    return content


def _read_stage(folder: Path, split: str, columns: Mapping[str, str], listed: bool) -> Dataset:
    if not re.fullmatch(r"\w+", split):
        raise DataError(
            f"{folder / MANIFEST} names a split {split!r}, which cannot be: it was not written by hf_source."
        )
    table = read_parquet(folder / "data", split)
    lacking = set(columns.values()) - set(table.column_names)
    if lacking:
        raise DataError(f"{folder / 'data'} lacks column {sorted(lacking)[0]!r} of {split!r}: copy it again.")
    found = table.select_columns(list(columns.values()))
    found = found.rename_columns({stored: own for own, stored in columns.items() if stored != own})
    if not listed:
        return found
    scores = read_parquet(folder / "scores", split)
    if scores[ROW][:] != found[ROW][:]:
        raise DataError(f"Rows and scores of {split!r} in {folder} differ: copy the whole repository again.")
    return concatenate_datasets([found, scores.remove_columns(ROW)], axis=1)


def _read_queries(table: Dataset, are_rows: bool) -> Queries:
    names, prompts, completions = (list(table[column]) for column in _TEXTS)
    mark = _OF_A_ROW if are_rows else ""
    own = [column for column in table.column_names if column not in _TEXTS]
    rows = [{key.removeprefix(mark): row[key] for key in own} for row in table] if own else None
    return Queries(names, prompts, completions, rows, are_rows)
