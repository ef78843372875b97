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
"""Records on the Hub: a record is pushed in one commit, with a card, and pulled as it was."""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from ...data import ROW
from ...errors import ConfigError, RecordError
from ...hub import (
    CARD_FILE,
    HubError,
    NoRepositoryError,
    check_repo_id,
    commit,
    is_open,
    present_card,
    refuse_public,
    snapshot,
)
from ...logs import get_logger
from ..rows.columns import COLUMNS_FILE
from ..rows.stored import NUMBERS, row_files
from ..rows.streamed import FOLDER as STREAM_FOLDER
from ..writer import RECORD_FILE


if TYPE_CHECKING:
    from .record import TrainingRecord
    from .stage import StageRecord

logger = get_logger(__name__)

_TEMPLATES = {"record": "templates/record_card.md.j2", "model": "templates/model_card.md.j2"}


def push_record(record: "TrainingRecord", repo_id: str, include_rows: bool | None, **commit_settings: Any) -> str:
    """Publish a record. See `TrainingRecord.push_to_hub`, and `commit` for its settings."""
    check_repo_id(repo_id)
    record.require_complete()
    if problems := record.verify():
        raise RecordError("A damaged record is not published. " + " ".join(problems))
    data, changed = _published(record, include_rows)
    return _commit(
        record,
        repo_id,
        lambda api, present: _operations(
            record,
            data,
            changed,
            record_card(record, data, repo_id, _card(api, repo_id, present, commit_settings)),
            present,
        ),
        "The record",
        **commit_settings,
    )


def push_model(
    record: "TrainingRecord", repo_id: str, stage: "StageRecord", record_id: str | None, **commit_settings: Any
) -> str:
    """Publish the model of a stage. See `TrainingRecord.push_model_to_hub`."""
    from huggingface_hub import CommitOperationAdd

    check_repo_id(repo_id)
    if record_id is not None:
        check_repo_id(record_id)
    model, tokenizer = stage.build_model(), record.processing_class()

    def operations(api: Any, present: list[str]) -> list[Any]:
        old = _card(api, repo_id, present, commit_settings)
        text = model_card(stage, repo_id, record_id or record.repo_id, bool(tokenizer), old)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD_FILE)
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
        return [CommitOperationAdd(CARD_FILE, text.encode()), *added]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (model, tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        return _commit(record, repo_id, operations, "The model", **commit_settings)


def _commit(
    record: "TrainingRecord", repo_id: str, operations: Callable, what: str, private: bool | None, **settings: Any
) -> str:
    """One commit, to a private repository unless all that the record comes from is open."""
    private = not sources_are_open(record) if private is None else private
    try:
        if private:
            refuse_public(repo_id, "model", settings["token"])
        return commit(repo_id, "model", operations, private=private, **settings)
    except HubError as error:
        raise RecordError(
            f"{what} could not be pushed to {repo_id} ({error}). Check the name, and that you are logged in with "
            "a token that may write there (`hf auth login`)."
        ) from error


def _card(api: Any, repo_id: str, present: list[str], settings: Mapping[str, Any]) -> str | None:
    return present_card(api, repo_id, "model", present, settings["revision"])


def sources_are_open(record: "TrainingRecord") -> bool:
    """Whether anybody can read the rows of every stage, and the model that the first one started from, on the Hub.

    Not of rows or weights that come from elsewhere: what they are is not known.
    """
    sources = {stage.dataset.get("source") for stage in record.stages}
    base = record.stages[0].model.get("base")
    if None in (*sources, base) or not all(is_open(source, "dataset") for source in sources):
        return False
    return not base or (not Path(base).exists() and is_open(base, "model"))


def _published(record: "TrainingRecord", include_rows: bool | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of `record.json` as it is published, and the files that differ from the record's own."""
    holding = [stage.name for stage in record.stages if row_files(stage)]
    if holding and include_rows is None:
        raise ConfigError(
            f"The record holds the training rows of {', '.join(holding)}, whose license and privacy it does not know. "
            "Say include_rows=True to publish them with it (attribution then works from the record alone), or "
            "include_rows=False to leave them out (attribution then needs the datasets)."
        )
    data, changed = json.loads(json.dumps(record.data)), {}
    for stage, entry in zip(record.stages, data["stages"], strict=True):
        for name in () if include_rows else row_files(stage):
            del entry["files"][name.relative_to(record.path).as_posix()]
            if (left := _numbers_only(name)) is not None:
                key = name.relative_to(record.path).as_posix()
                changed[key] = left
                entry["files"][key] = {"sha256": hashlib.sha256(left).hexdigest(), "bytes": len(left)}
    return data, changed


def _numbers_only(file: Path) -> bytes | None:
    """What is left of a file of rows: of a stream the numbers are kept nowhere else."""
    if file.parent.name != STREAM_FOLDER:
        return None
    buffer = io.BytesIO()
    pq.write_table(pq.read_table(file, columns=list(NUMBERS)), buffer)
    return buffer.getvalue()


def _operations(
    record: "TrainingRecord", data: Mapping[str, Any], changed: Mapping[str, bytes], card: str, present: list[str]
) -> list[Any]:
    """Add what is listed, delete what an earlier record left; nothing else in the repository is touched."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    listed = sorted(name for part in (data, *data["stages"]) for name in part.get("files", {}))
    content = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    operations: list[Any] = [CommitOperationAdd(CARD_FILE, card.encode())]  # the card comes first
    operations += [CommitOperationAdd(name, changed.get(name, str(record.path / name))) for name in listed]
    operations.append(CommitOperationAdd(RECORD_FILE, content.encode()))
    stale = [name for name in present if name.startswith(("stages/", "tokenizer/")) and name not in set(listed)]
    return operations + [CommitOperationDelete(name) for name in stale]


def record_card(record: "TrainingRecord", data: Mapping[str, Any], repo_id: str, old: str | None = None) -> str:
    """The repository's README: what is in it, how to load it, and what is not known; `old` as far as it is another's.

    Raises:
        ConfigError: if the header of the old card is no YAML.
    """
    stages = []
    for stage, entry in zip(record.stages, data["stages"], strict=True):
        shown = [name for name in row_files(stage) if _published_whole(stage, entry, name)]
        stages.append(
            {
                "name": stage.name,
                "steps": stage.num_steps,
                "rows": stage.num_rows,
                "rows_stored": any(name.name != COLUMNS_FILE for name in shown),
                "columns": [column for name in shown if name.name == COLUMNS_FILE for column in _columns(name)],
                "segments": len(stage.segments),
                "optimizer": stage.optimizer["name"],
                "model": stage.model["class"],
                "peft": stage.model["peft"],
                "trained": sum(_numel(stage.tensor_info[name]["shape"]) for name in stage.trainable),
                "frozen_omitted": stage.data["frozen"] == "omitted",
                "visits": stage.data.get("visits", "recorded"),
            }
        )
    content = {"stages": stages, "versions": data["library_versions"], "schema": data["schema_version"]}
    tags = ["hf_source", "training-record", "training-data-attribution"]
    return _rendered("record", tags, old, repo_id=repo_id, **content)


def model_card(stage: "StageRecord", repo_id: str, record_id: str | None, tokenizer: bool, old: str | None) -> str:
    """The README of a model: where it comes from, and how to ask which rows made it say something."""
    about = {"class": stage.model["class"], "peft": stage.model["peft"], "tokenizer": tokenizer}
    about |= {"stage": stage.name, "before": [s.name for s in stage.record.stages[: stage.index]]}
    tags = ["hf_source", "training-data-attribution"]
    return _rendered("model", tags, old, repo_id=repo_id, record_id=record_id, **about)


def _rendered(kind: str, tags: list[str], old: str | None, **content: Any) -> str:
    from jinja2 import Environment

    from ...outputs.cards import card, markdown

    text = (files("hf_source.outputs") / _TEMPLATES[kind]).read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"text": markdown}
    header = {"library_name": "hf_source" if kind == "record" else "transformers", "license": "unknown", "tags": tags}
    return card(header, environment.from_string(text).render(**content), old)


def _published_whole(stage: Any, entry: Mapping[str, Any], name: Path) -> bool:
    key = name.relative_to(stage.record.path).as_posix()
    return entry["files"].get(key) == stage.data["files"][key]


def _columns(name: Path) -> list[str]:
    return [column for column in pq.read_schema(name).names if column != ROW]


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def download_record(
    repo_id: str, revision: str | None = None, token: str | bool | None = None, folder: Path | None = None
) -> Path:
    """A record's files from the Hub, in its cache or in a folder.

    Raises:
        RecordError: if there is no such repository, or it cannot be reached.
    """
    try:
        return snapshot(repo_id, "model", revision=revision, token=token, folder=folder)
    except NoRepositoryError as error:
        raise RecordError(
            f"There is no training record {repo_id!r}: neither a folder of that path nor a repository on the Hub. "
            "Check the spelling; for a private repository run `hf auth login`."
        ) from error
    except HubError as error:
        raise RecordError(
            f"There is no folder {repo_id!r}, and the Hub repository of that name could not be read ({error})."
        ) from error


def looks_like_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be `user/name`."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~"))
