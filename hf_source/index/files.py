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
"""An index on disk: `index.json`, `coordinates.safetensors` and a few thousand rows to a file below `rows/`.

Every file is written beside its place and moved there, so that a killed build goes on where it was: `building.json`
says what is being built, and a file of rows that exists is whole. `index.json` comes last and lists size and SHA-256
of every file; without it nothing can be loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import ConfigError, DataError
from ..hub import dataset_snapshot
from ..paths import checked_path
from ..recording.writer import atomic_write, file_entry, write_json
from .sparse import SparseRows


MANIFEST, PLAN, COORDINATES = "index.json", "building.json", "coordinates.safetensors"
VERSION = 1


def rows_file(stage: int, number: int) -> str:
    """Path of a stage's rows in the folder."""
    return f"rows/{stage}-{number:05d}.safetensors"


def begin(folder: Path, content: Mapping[str, Any]) -> None:
    """Say what is being built in a folder, or check that it is what was begun there.

    Raises:
        ConfigError: if an index of other settings or of another record is there, or something else.
    """
    ready = json.loads(json.dumps(content))
    if not (folder / PLAN).exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds something else already: choose an empty folder for the index.")
        write_json(folder / PLAN, ready)
        return
    # Rows to a file follow from the memory budget; an index that was begun goes on with its own.
    before = {**plan_of(folder), "rows_per_file": ready["rows_per_file"]}
    if before != ready:
        keys = sorted(key for key in ready.keys() | before.keys() if ready.get(key) != before.get(key))
        raise ConfigError(
            f"{folder} holds an index built with another {keys[0]}: {before.get(keys[0])!r} there, "
            f"{ready.get(keys[0])!r} now. Choose another folder, or delete that one."
        )


def plan_of(folder: Path) -> dict[str, Any]:
    """What is being built in a folder.

    Raises:
        DataError: if the file that says so is damaged.
    """
    file = folder / PLAN
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}): delete {folder} and build again.") from error


def write_rows(file: Path, rows: SparseRows, numbers: np.ndarray, exact: np.ndarray) -> None:
    """Write some rows.

    Args:
        file: to write.
        rows: their coordinates.
        numbers: int64 `[rows]`, their numbers in training.
        exact: float32 `[checks, rows]`, their true scores for the queries that the accuracy is measured with.
    """
    tensors = {**rows.arrays(), "numbers": numbers, "exact": exact}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    atomic_write(file, lambda temporary: save_file(tensors, temporary))


def read_rows(file: Path) -> tuple[SparseRows, np.ndarray, np.ndarray]:
    """What `write_rows` wrote: rows, numbers, exact scores.

    Raises:
        DataError: if the file is torn or missing, naming it.
    """
    found = read_tensors(file, "np")
    try:
        rows = SparseRows(*(found[name] for name in ("values", "gaps", "starts", "scales")))
        return rows, found["numbers"], found["exact"]
    except KeyError as error:
        raise DataError(f"{file} lacks {error}: it is no file of rows. Copy the index again.") from error


def read_tensors(file: Path, framework: str = "pt") -> dict[str, Any]:
    """All tensors of a safetensors file.

    Raises:
        DataError: if it is torn or missing, naming it.
    """
    try:
        with safe_open(file, framework=framework) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"{file} is torn or missing ({error}): copy the index again, or delete the file and build again."
        ) from error


def finish(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, with size and digest of every file."""
    files = sorted(path for path in folder.rglob("*.safetensors") if not path.name.startswith("."))
    entries = {path.relative_to(folder).as_posix(): file_entry(path) for path in files}
    write_json(folder / MANIFEST, {"schema_version": VERSION, **content, "files": entries})


def open_folder(path: str | Path, revision: str | None, token: str | bool | None) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of an index, from this machine or the Hub; the sizes of its files are checked.

    Raises:
        DataError: if there is none, it is not finished, torn or of another version.
    """
    folder = checked_path(path, "An index", "pass the folder that build_index wrote, or its id on the Hub")
    if not folder.exists():
        folder = dataset_snapshot(
            "index", str(path), "Build one with `hf-source index RECORD FOLDER`.", revision=revision, token=token
        )
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, files = content["schema_version"], dict(content["files"])
    except FileNotFoundError as error:
        unfinished = " Its build was cut off: run it again with the same settings." if (folder / PLAN).exists() else ""
        raise DataError(f"{file} does not exist: {folder} holds no index.{unfinished}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error!r}): copy the index again.") from error
    if version != VERSION:
        raise DataError(f"{file} has schema version {version}, this hf_source reads {VERSION}: install a newer one.")
    for name, entry in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            there = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise DataError(f"{folder / name} {there}: copy the index again, or delete {file} and build again.")
    return folder, content


def verified(folder: Path, name: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """A file of the index, after its content was compared with the manifest.

    Raises:
        DataError: if it was changed, naming it.
    """
    file = folder / name
    if name not in entries or file_entry(file)["sha256"] != entries[name]["sha256"]:
        raise DataError(f"{file} is not what was built (its SHA-256 differs): copy the index again.")
    return file
