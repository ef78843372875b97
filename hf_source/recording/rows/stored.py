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
"""The rows of a stage inside its record: attribution walks back through every stage and needs the rows of each."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ...data import ROW, TOKENS, TRAINED_COLUMNS, dataset_digest
from ...gradients.preference import REFERENCE
from ..heads import HEAD
from ..writer import RecordWriter, atomic_write
from .columns import COLUMNS_FILE
from .numbering import RowDataset
from .spilled import parquet_tables, spilled
from .streamed import FOLDER, by_number, read_stream_rows
from .streams import is_stream


if TYPE_CHECKING:
    from ..reading.stage import StageRecord

ROWS_FILE = "rows.parquet"
_BATCH = 4096

# What trains and what people read of prepared rows.
_COLUMNS = (*TRAINED_COLUMNS, "seq_lengths", *REFERENCE, "attention_mask", "text", "prompt", "completion", ROW)


def write_rows(dataset: Any, writer: RecordWriter, store: bool = True) -> list[str]:
    """Write the prepared rows to `<stage>/rows.parquet`, or, where some were filtered out, at least their numbers.

    Rows of streams are written as they come, see `streamed.py`; what else is known of rows, see `columns.py`.

    Args:
        dataset: the training set, numbered.
        writer: writer of the stage.
        store: write the rows; else only the numbers of a filtered training set.

    Returns:
        The columns that were written.
    """
    if is_stream(dataset):
        return []
    if store and isinstance(dataset, RowDataset):
        tables: Iterable[pa.Table] = _tables(dataset, writer.stage["loss"]["kind"] == HEAD)
    elif isinstance(dataset, datasets.Dataset):
        prepared = any(name in dataset.column_names for name in TOKENS) and writer.stage["loss"]["kind"] != HEAD
        # Rows that the collator tokenises (sentence-transformers) are stored as they are.
        columns = [name for name in dataset.column_names if not prepared or name in _COLUMNS]
        columns = columns if store else [ROW]
        if not store and len(dataset) == writer.stage["dataset"]["num_rows"]:
            return []
        tables = dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH)
    else:
        return []
    columns = []

    def write(path: Any) -> None:
        file = None
        for table in tables:
            file = file or pq.ParquetWriter(path, table.schema)
            file.write_table(table.cast(file.schema))
            columns[:] = table.column_names
        if file is not None:
            file.close()

    atomic_write(writer.folder / ROWS_FILE, write)
    writer.list_file(ROWS_FILE)
    return columns


def _tables(dataset: RowDataset, whole: bool) -> Iterator[pa.Table]:
    for start in range(0, len(dataset), _BATCH):
        rows = [dataset[index] for index in range(start, min(start + _BATCH, len(dataset)))]
        part = rows_dataset(row if whole else {name: row[name] for name in _COLUMNS if name in row} for row in rows)
        yield part.data.table


NUMBERS = (ROW, "hash", "step")
"""Columns that say which rows trained, and nothing of what is in them."""


def row_files(stage: "StageRecord") -> list[Path]:
    """Files with the content of rows: as they trained, what else is known of them, those of a stream."""
    folder = stage.path.relative_to(stage.record.path).as_posix()
    own = {f"{folder}/{ROWS_FILE}", f"{folder}/{COLUMNS_FILE}"}
    names = [name for name in stage.data["files"] if name in own or name.startswith(f"{folder}/{FOLDER}/")]
    paths = [stage.record.path / name for name in names]
    return [path for path in paths if not set(pq.read_schema(path).names) <= set(NUMBERS)]


def trained_numbers(stage: "StageRecord") -> np.ndarray:
    """Numbers of the rows in the training set, after what the Trainer filtered out: int64, in no order."""
    if stage.dataset.get("stream"):
        table = read_stream_rows(stage, [ROW])
        return np.zeros(0, dtype=np.int64) if table is None else np.sort(table[ROW].to_numpy())
    table = _read(stage, [ROW])
    return np.arange(stage.num_rows) if table is None else table[ROW].to_numpy()


def read_rows(stage: "StageRecord") -> datasets.Dataset | None:
    """The rows as they were trained on, with their numbers, or `None` if the record does not hold them."""
    if stage.dataset.get("stream"):
        table = read_stream_rows(stage)
        if table is None or "input_ids" not in table.column_names:
            return None
        return datasets.Dataset(table.drop_columns(["hash", "step"])).select(by_number(table))
    table = _read(stage)
    return None if table is None or table.column_names == [ROW] else datasets.Dataset(table)


def _read(stage: "StageRecord", columns: list[str] | None = None) -> pa.Table | None:
    key = (stage.path / ROWS_FILE).relative_to(stage.record.path).as_posix()
    if key not in stage.data["files"]:
        return None
    stage.record.check_size(stage.data["files"], key)
    return spilled(parquet_tables([stage.path / ROWS_FILE], columns))


def is_given(dataset: datasets.Dataset, stage: "StageRecord") -> bool:
    """Whether a dataset is the one that the Trainer was given, before the Trainer prepared it."""
    given = stage.dataset.get("given")
    if given is None or not set(given["columns"]) <= set(dataset.column_names):
        return False
    return dataset_digest(dataset, given["columns"]) == given["digest"]


def rows_dataset(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Rows from anywhere as a dataset: numbers, texts, and lists of them; others are left out."""
    return datasets.Dataset(spilled(_plain_tables(iter(rows))))


def _plain_tables(rows: Iterator[Mapping[str, Any]]) -> Iterator[pa.Table]:
    while batch := list(islice(rows, _BATCH)):
        plain = [{name: _plain(value) for name, value in row.items()} for row in batch]
        names = [name for name, value in plain[0].items() if value is not None]
        yield pa.table({name: pa.array([row.get(name) for row in plain]) for name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    simple = (bool, int, float, str)
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return None if any(item is None for item in items) else items
    return value if isinstance(value, simple) else None
