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

from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.parquet as pq

from ..data import ROW, TRAINED_COLUMNS, dataset_digest
from .writer import RecordWriter, atomic_write


if TYPE_CHECKING:
    from .stage import StageRecord

ROWS_FILE = "rows.parquet"

# What trains and what people read. Other columns stay with their owner.
_COLUMNS = (*TRAINED_COLUMNS, "seq_lengths", "attention_mask", "text", "prompt", "completion", ROW)


def write_rows(dataset: Any, writer: RecordWriter) -> None:
    """Write the prepared rows to `<stage>/rows.parquet`; a dataset that is not a `datasets.Dataset` is left out."""
    if not isinstance(dataset, datasets.Dataset):
        return
    columns = [name for name in _COLUMNS if name in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("arrow")

    def write(path: Any) -> None:
        file = None
        for batch in rows.iter(batch_size=4096):
            file = file or pq.ParquetWriter(path, batch.schema)
            file.write_table(batch)
        if file is not None:
            file.close()

    atomic_write(writer.folder / ROWS_FILE, write)
    writer.list_file(ROWS_FILE)


def read_rows(stage: "StageRecord") -> datasets.Dataset | None:
    """The rows as they were trained on, with their numbers, or `None` if the record does not hold them."""
    key = (stage.path / ROWS_FILE).relative_to(stage.record.path).as_posix()
    if key not in stage.data["files"]:
        return None
    stage.record.check_size(stage.data["files"], key)
    return datasets.Dataset(pq.read_table(stage.path / ROWS_FILE, memory_map=True))


def is_given(dataset: datasets.Dataset, stage: "StageRecord") -> bool:
    """Whether a dataset is the one that the Trainer was given, before the Trainer prepared it."""
    given = stage.dataset.get("given")
    if given is None or not set(given["columns"]) <= set(dataset.column_names):
        return False
    return dataset_digest(dataset, given["columns"]) == given["digest"]
