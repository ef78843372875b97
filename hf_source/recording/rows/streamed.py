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
"""Rows of a stream, kept while they train: nobody can ask the stream for them later.

At a row's first visit its tokens go to `<stage>/rows/<first step>-<end step>.parquet`, with a hash of them. A later
visit under the same number must have the same hash, or the record would credit one row with what another one did.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from accelerate.utils import gather_object

from ...data import IGNORE_INDEX, ROW
from ...errors import DataError, UnsupportedError
from ...logs import get_logger
from ..processes import Processes
from ..writer import RecordWriter, atomic_write
from .numbering import LARGEST_NUMBER
from .spilled import parquet_tables, spilled


if TYPE_CHECKING:
    from ..reading.stage import StageRecord

logger = get_logger(__name__)

FOLDER = "rows"
_TOKENS_PER_SHARD = 1 << 22
_PAGE = 1 << 16


class StreamRows:
    """The rows that a stage has seen of a stream.

    Args:
        writer: writer of the stage.
        store: keep the tokens; without, only their hashes.
        processes: the processes that train together. Each looks at its own rows, the main one writes.
    """

    def __init__(self, writer: RecordWriter, store: bool, processes: Processes) -> None:
        self.writer = writer
        self.store = store
        self.processes = processes
        self._waiting: list[tuple[Any, Mapping[str, Any]]] = []
        self._forget()

    def _forget(self) -> None:
        self._pages: dict[int, np.ndarray] = {}  # hash plus 1 by row number, 0 where no row was seen
        self._new: list[dict[str, Any]] = []
        self._new_tokens = 0
        self._failure: Exception | None = None
        self._waiting.clear()
        self.num_rows = self.num_visited = 0
        self._sum = 0

    @property
    def full(self) -> bool:
        """Whether the rows in memory should be written; several processes write with the steps."""
        return self.processes.count == 1 and self._new_tokens >= _TOKENS_PER_SHARD

    def add(self, rows: Any, inputs: Mapping[str, Any]) -> None:
        """Note a micro-batch; what it holds is looked at in `visit`, when the device has come to it anyway."""
        names = ("input_ids", "attention_mask", "labels")
        self._waiting.append((rows, {name: inputs[name] for name in names if name in inputs}))

    def visit(self, step: int) -> None:
        """Look at the micro-batches of a step.

        Raises:
            UnsupportedError: if a number has come back with another row (with several processes, in `gather`).
        """
        try:
            for rows, inputs in self._waiting:
                self._visit(rows.tolist(), inputs, step)
        except (DataError, UnsupportedError) as error:
            if self.processes.count == 1:
                raise
            self._failure = self._failure or error
        self._waiting.clear()

    def _visit(self, numbers: Sequence[int], inputs: Mapping[str, Any], step: int) -> None:
        tokens = batch_tokens(inputs, len(numbers))
        if tokens is None:
            logger.warning_once(
                "The stream's batches hold no `input_ids` of one row each, so rows are not stored, and the record "
                "trusts that a number means the same row in every epoch."
            )
        for place, row in enumerate(numbers):
            digest = 0 if tokens is None else row_hash(tokens[place])
            if not self._note(row, digest, step):
                continue
            entry = {ROW: row, "hash": digest, "step": step}
            if self.store and tokens is not None:
                entry |= tokens[place]
                self._new_tokens += entry["input_ids"].size
            self._new.append(entry)

    def _note(self, row: int, digest: int, step: int) -> bool:
        """Remember a row's hash; whether it is new."""
        if not 0 <= row < LARGEST_NUMBER:
            raise DataError(
                f"The stream numbers a row {row}. Numbers must lie between 0 and {LARGEST_NUMBER:,}, since scores are "
                f"kept by number. Leave the column out (`dataset.remove_columns('{ROW}')`) to number by position."
            )
        page = self._pages.setdefault(row // _PAGE, np.zeros(_PAGE, dtype=np.uint64))
        known = int(page[row % _PAGE])
        if known and known != digest + 1:
            raise UnsupportedError(
                f"In optimizer step {step} another row came under number {row} than before: the stream gives one "
                "number to several rows, or is shuffled anew in every epoch. Number the rows before shuffling "
                "(`dataset = number_rows(dataset).shuffle(...)`, from hf_source import number_rows), give each a "
                f"`{ROW}` of its own, and prepare rows without chance."
            )
        page[row % _PAGE] = digest + 1
        return not known

    def _count(self, row: int, digest: int) -> None:
        self.num_rows = max(self.num_rows, row + 1)
        self.num_visited += 1
        self._sum = (self._sum + _signature(row, digest)) % (1 << 128)

    def drop_waiting(self) -> None:
        """Forget micro-batches whose gradient was thrown away."""
        self._waiting.clear()

    def gather(self, end_step: int) -> list[list[dict[str, Any]]]:
        """The rows that each process has first seen since the last flush, in complete steps."""
        self.processes.agree(self._raise_failure)
        done = [entry for entry in self._new if entry["step"] < end_step]
        self._new, self._new_tokens = self._new[len(done) :], 0
        return [done] if self.processes.count == 1 else gather_object([done])

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def write(self, gathered: Sequence[Sequence[Mapping[str, Any]]], end_step: int) -> None:
        """Write what was gathered.

        Raises:
            UnsupportedError: if processes saw different rows under one number.
        """
        entries = list(gathered[0]) if gathered else []
        for others in gathered[1:]:  # what another process saw may have been seen here as well
            entries += [entry for entry in others if self._note(entry[ROW], entry["hash"], entry["step"])]
        entries.sort(key=lambda entry: entry["step"])
        for entry in entries:
            self._count(entry[ROW], entry["hash"])
        if entries:
            self._write(entries, f"{FOLDER}/{entries[0]['step']:08d}-{end_step:08d}.parquet")
        self._describe()

    def _write(self, entries: Sequence[Mapping[str, Any]], name: str) -> None:
        self._write_table(_table(entries), name)

    def _write_table(self, table: pa.Table, name: str) -> None:
        atomic_write(self.writer.folder / name, lambda temporary: pq.write_table(table, temporary))
        self.writer.list_file(name)

    def _describe(self) -> None:
        self.writer.stage["dataset"] |= {
            "num_rows": self.num_rows,
            "num_visited": self.num_visited,
            "fingerprint": f"{self._sum:032x}",
        }

    def cut_back(self, step: int) -> None:
        """Forget the rows first seen from optimizer step `step` on, and remember those before it."""
        self._forget()
        dropped = []
        for name in self.writer.file_names(FOLDER):
            first, end = (int(part) for part in Path(name).stem.split("-"))
            table = pq.read_table(self.writer.folder / name)
            kept = table.filter(pa.array(table["step"].to_numpy() < step))
            for row, digest in zip(kept[ROW].to_pylist(), kept["hash"].to_pylist(), strict=True):
                self._note(row, digest, step)
                self._count(row, digest)
            if end <= step:
                continue
            dropped.append(name)
            if len(kept):
                self._write_table(kept, f"{FOLDER}/{first:08d}-{step:08d}.parquet")
        # First the list, then the files: a process killed in between leaves unlisted files, never missing ones.
        for name in dropped:
            self.writer.stage["files"].pop((self.writer.folder / name).relative_to(self.writer.root).as_posix())
        self._describe()
        self.writer.commit()
        for name in dropped:
            (self.writer.folder / name).unlink(missing_ok=True)


def batch_tokens(inputs: Mapping[str, torch.Tensor], num_rows: int) -> list[dict[str, np.ndarray]] | None:
    """`input_ids` and `labels` of each row of a batch, without padding; `None` if the batch has no such rows.

    Padding is what the attention mask says; without one, the tail of equal tokens without labels, cut to one token.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or len(ids) != num_rows:
        return None
    ids = ids.cpu().numpy()
    labels, mask = (
        None if inputs.get(name) is None else inputs[name].cpu().numpy() for name in ("labels", "attention_mask")
    )
    by_token = labels is not None and labels.shape == ids.shape
    rows = []
    for place in range(num_rows):
        if mask is not None and mask.shape == ids.shape:
            kept = mask[place] != 0
        else:
            kept = _before_tail(ids[place], labels[place] if by_token else None)
        row = {"input_ids": ids[place][kept]}
        if labels is not None:
            row["labels"] = labels[place][kept] if by_token else _unpadded(labels[place])
        rows.append(row)
    return rows


def _before_tail(ids: np.ndarray, labels: np.ndarray | None) -> slice:
    if labels is None:
        return slice(None)
    inside = np.flatnonzero((ids != ids[-1]) | (labels != IGNORE_INDEX))
    return slice(0, min(int(inside[-1]) + 2 if len(inside) else 1, len(ids)))


def _unpadded(labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 0 or labels.dtype.kind == "f":
        return labels
    asked = np.flatnonzero(labels != IGNORE_INDEX)
    return labels[: int(asked[-1]) + 1 if len(asked) else 0]


def row_hash(tokens: Mapping[str, np.ndarray]) -> int:
    """63 bits that tell a row from others, whatever the width of its integers."""
    digest = xxhash.xxh3_64()
    for name in sorted(tokens):
        values = np.asarray(tokens[name])
        values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
        digest.update(repr((name, values.shape)).encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.intdigest() >> 1


def _signature(row: int, digest: int) -> int:
    return xxhash.xxh3_128_intdigest(row.to_bytes(8, "little") + digest.to_bytes(8, "little"))


def _table(entries: Sequence[Mapping[str, Any]]) -> pa.Table:
    tokens = pa.large_list(pa.int32())
    columns: dict[str, pa.Array] = {
        ROW: pa.array([entry[ROW] for entry in entries], pa.int64()),
        "hash": pa.array([entry["hash"] for entry in entries], pa.int64()),
        "step": pa.array([entry["step"] for entry in entries], pa.int64()),
    }
    if "input_ids" in entries[0]:
        columns["input_ids"] = pa.array([entry["input_ids"] for entry in entries], tokens)
    if "labels" in entries[0]:
        labels = [entry["labels"] for entry in entries]
        in_lists = bool(labels[0].ndim)  # one per token, else one per row
        columns["labels"] = pa.array(labels, tokens) if in_lists else pa.array([label.item() for label in labels])
    return pa.table(columns)


def read_stream_rows(stage: "StageRecord", columns: list[str] | None = None) -> pa.Table | None:
    """Every row seen, in the order of first visits: `source_row`, `hash`, `step` of that visit, and tokens if stored.

    Args:
        stage: that trained on a stream.
        columns: those wanted; all by default.

    Raises:
        RecordError: if a file is damaged.
        DataError: if the files are not those that the record describes.
    """
    prefix = (stage.path / FOLDER).relative_to(stage.record.path).as_posix()
    names = sorted(name for name in stage.data["files"] if name.startswith(f"{prefix}/"))
    for name in names:
        stage.record.check_hash(stage.data["files"], name)
    if not names:
        return None
    return spilled(parquet_tables([stage.record.path / name for name in names], columns))


def by_number(table: pa.Table) -> np.ndarray:
    """Positions of rows by ascending number."""
    return np.argsort(table[ROW].to_numpy(), kind="stable")
