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
"""Rows that do not fit in memory: tables one after the other, of which what is too much goes to disk.

The files are Arrow's own format in the cache of `datasets`, and mapped into memory: the system reads what is touched
and drops it when it needs the room. They have no name any more once they are mapped, so that nothing is left behind.
"""

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


HELD = 64 * 2**20
"""Bytes of rows held in memory before they go to disk."""

_BATCH = 4096


def spilled(tables: Iterable[pa.Table], held: int | None = None) -> pa.Table:
    """The tables as one, of which at most `held` bytes (`HELD` by default) are in memory; columns may be missing."""
    limit = HELD if held is None else held
    waiting, size, mapped = [], 0, []
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size > limit:
            mapped.append(_mapped(_joined(waiting)))
            waiting, size = [], 0
    return _joined([*mapped, *waiting])


def parquet_tables(files: Sequence[Path], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of Parquet files, some after another."""
    for path in files:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                yield file.read(columns=columns)
            for batch in file.iter_batches(_BATCH, columns=columns):
                yield pa.Table.from_batches([batch])


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def _mapped(table: pa.Table) -> pa.Table:
    """The same table, on disk."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="hf_source-rows-", dir=cache))
    file = folder / "rows.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=_BATCH)
    found = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():  # where a mapped file keeps its name
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return found
