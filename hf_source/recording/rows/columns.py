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
"""What people know of a row besides what trains: its label, its source, who contributed it.

`<stage>/columns.parquet` holds these columns by row number, beside the rows as they were trained on, so that scores of
a record can be summed by them without the dataset.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data import ROW
from ...errors import DataError
from ...logs import get_logger
from ..writer import RecordWriter, atomic_write
from .numbering import RowDataset, with_row_numbers
from .spilled import parquet_tables, spilled


if TYPE_CHECKING:
    from ..reading.stage import StageRecord

logger = get_logger(__name__)

COLUMNS_FILE = "columns.parquet"

LONGEST = 500
"""Characters: columns of longer texts, on average, are kept only if they are named."""

_SAMPLE = 1000  # rows that this is judged by
_BATCH = 4096


def check_columns(given: datasets.Dataset | None, prepared: Any, wanted: Sequence[str] | None) -> None:
    """Refuse columns to keep that a training set does not have, or that are no plain values, before training starts.

    Args:
        given, prepared, wanted: see `write_columns`.

    Raises:
        DataError: naming the column, and those that can be kept.
    """
    if not wanted:
        return
    rows = _owned(given, prepared, 1)
    known = [] if rows is None else _plain_columns(rows)
    for name in wanted:
        if name not in known:
            raise DataError(
                f"record_columns names {name!r}, which is no column of texts, numbers, truth values or dates of the "
                f"training set; those are {known}. Name some of these, or leave record_columns out."
            )


def _owned(given: datasets.Dataset | None, prepared: Any, count: int | None = None) -> datasets.Dataset | None:
    """The training set as its owner has it, or its first rows of a list; `None` if rows are only made when asked."""
    if given is not None or not (isinstance(prepared, RowDataset) and isinstance(prepared.dataset, list)):
        return given
    from .stored import rows_dataset

    return rows_dataset({ROW: number} | dict(row) for number, row in enumerate(prepared.dataset[:count]))


def write_columns(
    given: datasets.Dataset | None, prepared: Any, stored: Sequence[str], writer: RecordWriter, wanted: Any
) -> None:
    """Write the columns of the training set that its stored rows lack.

    Args:
        given: the training set as its owner has it.
        prepared: what the Trainer made of it; read where it is a list.
        stored: columns of the stored rows.
        writer: writer of the stage.
        wanted: columns to keep; `None` for all of plain values, short texts only.
    """
    given = _owned(given, prepared)
    if given is None or not len(given):
        return
    names = [name for name in _plain_columns(given) if name not in stored]
    names = _short(given, names) if wanted is None else [name for name in names if name in wanted]
    if not names:
        return
    rows = with_row_numbers(given.with_format(None)).select_columns([ROW, *names])
    schema = rows.features.arrow_schema

    def write(path: Any) -> None:
        with pq.ParquetWriter(path, schema) as file:
            for table in rows.with_format("arrow").iter(batch_size=_BATCH):
                file.write_table(table.cast(schema))

    atomic_write(writer.folder / COLUMNS_FILE, write)
    writer.list_file(COLUMNS_FILE)


def _plain_columns(dataset: datasets.Dataset) -> list[str]:
    """Columns of one value each; not the scores of an earlier attribution, whose names new ones would take."""
    kinds = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_temporal,
    )
    schema = dataset.features.arrow_schema
    found = [field.name for field in schema if any(kind(field.type) for kind in kinds) and field.name != ROW]
    return [
        name for name in found if not (name.startswith("source_") and pa.types.is_floating(schema.field(name).type))
    ]


def _short(dataset: datasets.Dataset, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    first = dataset.with_format(None).select(range(min(len(dataset), _SAMPLE))).select_columns(list(names))
    table = first.with_format("arrow")[:]
    kept = []
    for name in names:
        text = pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)
        length = (pc.mean(pc.utf8_length(table[name])).as_py() or 0) if text else 0
        if length <= LONGEST:
            kept.append(name)
    if left := [name for name in names if name not in kept]:
        logger.info(
            f"The record does not keep the long texts of column {', '.join(left)}: name them in record_columns if "
            "they are wanted."
        )
    return kept


def with_columns(stage: "StageRecord", rows: datasets.Dataset, numbers: np.ndarray) -> datasets.Dataset:
    """Rows of the record together with the columns that it keeps beside them.

    Args:
        stage: that trained on them.
        rows: dataset.
        numbers: int64, number of each row.

    Raises:
        RecordError: if the file is damaged.
    """
    key = (stage.path / COLUMNS_FILE).relative_to(stage.record.path).as_posix()
    if key not in stage.data["files"]:
        return rows
    stage.record.check_hash(stage.data["files"], key)
    table = spilled(parquet_tables([stage.path / COLUMNS_FILE]))
    own = table[ROW].to_numpy()
    table = table.select([name for name in table.column_names if name != ROW and name not in rows.column_names])
    if not np.array_equal(own, numbers):
        order = np.argsort(own, kind="stable")
        places = order[np.minimum(np.searchsorted(own[order], numbers), len(own) - 1)]
        if not np.array_equal(own[places], numbers):
            raise stage.record.damaged(key, "it lacks rows that trained")
        table = table.take(pa.array(places))
    return datasets.concatenate_datasets([rows, datasets.Dataset(table)], axis=1) if table.num_columns else rows
