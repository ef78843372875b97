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
"""Writing a record: every file appears whole or not at all, and `record.json` knows its size and hash."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from .. import __version__
from ..errors import RecordError
from .schema import SCHEMA_VERSION, upgraded


RECORD_FILE = "record.json"

STEP_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.float64()),
        ("learning_rate", pa.list_(pa.float64())),
        ("grad_norm", pa.float64()),
        ("clip_factor", pa.float64()),
        ("skipped", pa.bool_()),
        (
            "micro_batches",
            pa.list_(pa.struct([("rows", pa.list_(pa.int64())), ("normalizer", pa.float64()), ("items", pa.int64())])),
        ),
        ("weights", pa.list_(pa.float64())),  # in a few steps, see weight_samples.py
    ]
)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that nobody else can read
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlast a power failure, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    atomic_write(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write safetensors atomically, from any device."""
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt"}))


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as `record.json` lists them."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of what a record's numbers depend on."""
    found = {"hf_source": __version__}
    for name in ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_record_json(path: Path) -> dict[str, Any]:
    """Read and check `record.json`.

    Raises:
        RecordError: if it is missing, torn, or of a newer schema version; an older one is brought up to date.
    """
    file = path / RECORD_FILE
    if not file.is_file():
        near = [folder for folder in (path / "record", path.parent) if (folder / RECORD_FILE).is_file()]
        raise RecordError(
            f"There is no training record at {path}: {file} does not exist. Pass the `record_dir` of a training run "
            "made with SourceTrainer (by default `<output_dir>/record`)."
            + (f" There is one at {near[0]}." if near else "")
            + (" These are scores: open them with load_attribution." if (path / "attribution.json").is_file() else "")
        )
    try:
        return upgraded(json.loads(file.read_text(encoding="utf-8")), file)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise RecordError(
            f"{file} is damaged ({error}). Restore it from a copy of the record, or move the folder away and train "
            "again."
        ) from error


class RecordWriter:
    """One stage of a record, being written.

    Args:
        root: folder of the record.
        stage: the stage's description; must hold `name`, `index` and `files`.
    """

    def __init__(self, root: Path, stage: dict[str, Any]) -> None:
        self.root = Path(root)
        self.stage = stage
        self.folder = self.root / stage_folder(stage["index"], stage["name"])

    @staticmethod
    def read(root: Path) -> dict[str, Any]:
        """The record's present content; an empty record if there is none yet."""
        if not (Path(root) / RECORD_FILE).exists():
            return {"schema_version": SCHEMA_VERSION, "library_versions": {}, "files": {}, "stages": []}
        return read_record_json(Path(root))

    def create(self) -> None:
        """Make room for the stage: drop whatever is there from this index on, leftovers of dead runs included."""
        self.remove_leftovers()
        data = self.read(self.root)
        kept = [stage for stage in data["stages"] if stage["index"] < self.stage["index"]]
        if len(kept) < len(data["stages"]):
            write_json(self.root / RECORD_FILE, {**data, "stages": kept})
        known = {stage_folder(stage["index"], stage["name"]) for stage in kept}
        for folder in sorted((self.root / "stages").glob("*")):
            if folder.relative_to(self.root).as_posix() not in known:
                shutil.rmtree(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def commit(self) -> None:
        """Write `record.json` with this stage's present state."""
        data = self.read(self.root)
        stages = [stage for stage in data["stages"] if stage["index"] != self.stage["index"]]
        stages = sorted([*stages, self.stage], key=lambda stage: stage["index"])
        data |= {"library_versions": library_versions(), "stages": stages}
        write_json(self.root / RECORD_FILE, data)

    def add_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `<stage>/<name>` and list it."""
        write_tensors(self.folder / name, tensors)
        self.list_file(name)

    def add_steps(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Write a shard of consecutive optimizer steps and list it."""
        if not steps:
            return
        name = f"steps/{steps[0]['step']:08d}-{steps[-1]['step'] + 1:08d}.parquet"
        table = pa.Table.from_pylist(list(steps), schema=STEP_SCHEMA)
        atomic_write(self.folder / name, lambda temporary: pq.write_table(table, temporary))
        self.list_file(name)

    def list_file(self, name: str) -> None:
        """Enter a file of the stage into its list."""
        path = self.folder / name
        self.stage["files"][path.relative_to(self.root).as_posix()] = file_entry(path)

    def file_names(self, folder: str) -> list[str]:
        """Listed files below a folder of the stage, relative to the stage."""
        prefix = f"{self.folder.relative_to(self.root).as_posix()}/"
        names = [name.removeprefix(prefix) for name in self.stage["files"]]
        return sorted(name for name in names if name.startswith(f"{folder}/"))

    def share_folder(self, name: str, save: Callable[[Path], None]) -> None:
        """Let `save` fill a folder at the record's root (the tokenizer), and list its files in the record's own list.

        A folder of the same content stays as it is. Another is taken off the list before it is replaced, so that a
        process killed in between leaves files that are not listed, never listed ones that are torn.
        """
        new, folder = self.root / f".{name}.{os.getpid()}.tmp", self.root / name
        save(new)
        files = {
            f"{name}/{path.relative_to(new).as_posix()}": file_entry(path)
            for path in sorted(new.rglob("*"))
            if path.is_file()
        }
        data = self.read(self.root)
        others = {file: entry for file, entry in data["files"].items() if not file.startswith(f"{name}/")}
        if data["files"] == others | files and all((self.root / file).is_file() for file in files):
            shutil.rmtree(new)
            return
        write_json(self.root / RECORD_FILE, data | {"files": others})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
        write_json(self.root / RECORD_FILE, data | {"files": others | files})

    def remove_leftovers(self) -> None:
        """Remove temporary files of writers that were killed; nobody else writes to the record now."""
        for path in [*self.root.glob(".*.tmp"), *self.root.glob("stages/**/.*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def cut_back(self, step: int, segment_start: int) -> None:
        """Forget everything from optimizer step `step` on, and commit that.

        Args:
            step: first step to forget.
            segment_start: first step of the segment that was open then; a run that stopped early closed it too soon.
        """
        self.remove_leftovers()
        dropped = ["final.safetensors"]
        kept_steps: list[dict[str, Any]] = []
        for name in self.file_names("steps"):
            first, end = (int(part) for part in Path(name).stem.split("-"))
            if end > step:
                dropped.append(name)
                rows = pq.read_table(self.folder / name).to_pylist() if first < step else []
                kept_steps += [row for row in rows if row["step"] < step]
        segments = self.stage["segments"]
        for index, segment in enumerate(segments):
            if segment["end_step"] > segment_start:
                dropped += [name for name in self.file_names(f"segments/{index}") if checkpoint_step(name) is None]
        # Those of the segment that is open again were made on the way to the step.
        steps = {name: checkpoint_step(name) for name in self.file_names("segments")}
        dropped += [name for name, made in steps.items() if made is not None and made >= step]
        self.stage["segments"] = [segment for segment in segments if segment["end_step"] <= segment_start]
        self.stage["status"] = "running"
        self.add_steps(kept_steps)
        # First the list, then the files: a process killed in between leaves unlisted files, never missing ones.
        for name in dropped:
            self.stage["files"].pop((self.folder / name).relative_to(self.root).as_posix(), None)
        self.commit()
        for name in dropped:
            (self.folder / name).unlink(missing_ok=True)


def checkpoint_file(segment: int, step: int) -> str:
    """Weights before a step of a segment, relative to the stage."""
    return f"segments/{segment}/weights-{step:08d}.safetensors"


def checkpoint_step(name: str) -> int | None:
    """Which step's weights a file holds, if it is one of `checkpoint_file`."""
    stem = Path(name).stem
    return int(stem.removeprefix("weights-")) if stem.startswith("weights-") else None


def stage_folder(index: int, name: str) -> str:
    """Folder of a stage, relative to the record."""
    return f"stages/{index}-{name}"
