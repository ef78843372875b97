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
"""Datasets as the Parquet files of a repository: one split per stage, with the same columns in each."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Value, concatenate_datasets
from datasets.table import embed_table_storage, table_cast

from ..data import ROW
from ..errors import DataError
from .columns import add_score_columns, check_names


SCORES = "source_scores"
"""One list per row with the scores of all queries, in the order of the queries."""

_SHARD_BYTES = 500_000_000
_ROW_GROUP = 2_000  # rows that a reader decodes at once; the Hub's viewer wants small ones
_NULL = Value("null")


def split_names(stages: Iterable[str]) -> dict[str, str]:
    """Stage -> name of its split. `datasets` allows letters, digits and `_`, and keeps `all` for itself."""
    found: dict[str, str] = {}
    for stage in stages:
        plain = re.sub(r"\W", "_", stage)
        name, number = plain if plain != "all" else "all_", 2
        while name in found.values():
            name, number = f"{plain}_{number}", number + 1
        found[stage] = name
    return found


def check_columns(rows: Dataset, names: list[str], max_columns: int) -> None:
    """Refuse rows that have a column of a score's name, before any score is computed.

    Raises:
        DataError: naming the column and the fix.
    """
    if len(names) <= max_columns:
        check_names(rows, names)
    elif SCORES in rows.column_names:
        raise DataError(
            f"The scores of {len(names)} queries need a column {SCORES!r}, which the dataset has already: drop it "
            "with `dataset.remove_columns`."
        )


def stage_table(
    rows: Dataset | None, numbers: np.ndarray, scores: np.ndarray, names: list[str], max_columns: int
) -> Dataset:
    """A stage's rows with their numbers and scores.

    Args:
        rows: the rows, or `None` to leave their content out.
        numbers: int64 `[rows]`.
        scores: float32 `[queries, rows]`.
        names: of the queries.
        max_columns: with more queries than that, scores are one list per row (`source_scores`).

    Raises:
        DataError: if the rows have a column of a score's name.
    """
    table = Dataset(pa.table({ROW: pa.array(np.asarray(numbers, dtype=np.int64))})) if rows is None else rows
    if len(names) <= max_columns:
        return add_score_columns(table, scores, names)
    check_columns(table, names, max_columns)
    table = add_score_columns(table, scores[:0], [])
    values = pa.array(np.ascontiguousarray(scores.T, dtype=np.float32).reshape(-1))
    listed = pa.FixedSizeListArray.from_arrays(values, len(names))
    return concatenate_datasets([table, Dataset(pa.table({SCORES: listed}))], axis=1)


def aligned(datasets: Mapping[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, dict[str, str]]]:
    """The splits of one config need the same columns: what a stage lacks is null in its split.

    A column of the same name and another type is renamed to `<column>_<split>`.

    Args:
        datasets: by split.

    Returns:
        The datasets, and for each split its own columns as `{their name: the name in the files}`.
    """
    features: dict[str, object] = {}
    names: dict[str, dict[str, str]] = {}
    for split, dataset in datasets.items():
        names[split] = {}
        for column, feature in dataset.features.items():
            name, known = column, features.get(column, _NULL)
            if _NULL not in (known, feature) and known != feature:
                name = f"{column}_{split}"
                while name in features or name in dataset.features:
                    name += "_"
            if features.get(name, _NULL) == _NULL:
                features[name] = feature
            names[split][column] = name
    whole = Features(features)
    return {split: _filled(dataset, names[split], whole) for split, dataset in datasets.items()}, names


def _filled(dataset: Dataset, names: Mapping[str, str], features: Features) -> Dataset:
    if dataset.features == features:
        return dataset
    table, schema = dataset.with_format("arrow")[:], features.arrow_schema
    columns = {names[column]: table[column] for column in dataset.column_names}
    for field in schema:
        if field.name not in columns:
            columns[field.name] = pa.nulls(len(table), type=field.type)
    found = table_cast(pa.table({name: columns[name] for name in features}), schema)
    return Dataset(found, info=DatasetInfo(features=features))


def write_parquet(dataset: Dataset, folder: Path, split: str) -> list[Path]:
    """Write a dataset to `<folder>/<split>-*.parquet`, in files of at most about 500 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = dataset.features.arrow_schema
    count = max(1, min(len(dataset), -(-_estimated_bytes(dataset) // _SHARD_BYTES)))
    paths = [folder / f"{split}-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    for index, path in enumerate(paths):
        part = dataset.shard(count, index, contiguous=True).with_format("arrow")
        with pq.ParquetWriter(path, schema) as file:
            for table in part.iter(_ROW_GROUP):
                # Images and sounds that are files elsewhere go along.
                file.write_table(embed_table_storage(table.cast(schema)).cast(schema))
    return paths


def _estimated_bytes(dataset: Dataset) -> int:
    share = len(dataset) / max(1, len(dataset.data))  # of a selection only a part of the table is written
    return int(dataset.data.nbytes * share)


def read_parquet(folder: Path, split: str) -> Dataset:
    """What `write_parquet` wrote.

    Raises:
        DataError: if there is nothing, or a file is torn or missing.
    """
    paths = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    expected = int(paths[0].stem.rsplit("-", 1)[-1]) if paths else 1
    if len(paths) != expected:
        raise DataError(
            f"{folder} has {len(paths)} of {expected} files of {split!r}: copy the whole repository again."
        )
    try:
        return Dataset(pa.concat_tables([pq.read_table(path, memory_map=True) for path in paths]))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder}/{split} cannot be read ({error}): copy the whole repository again.") from error


def score_array(dataset: Dataset, columns: list[str]) -> np.ndarray:
    """Scores of a stage's dataset as float32 `[queries, rows]`."""
    table = dataset.with_format("arrow")[:]
    if SCORES in table.column_names and not set(columns) <= set(table.column_names):
        values = table[SCORES].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.ascontiguousarray(values.astype(np.float32).reshape(len(table), -1).T)
    return np.stack([table[column].to_numpy().astype(np.float32) for column in columns])
