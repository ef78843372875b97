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
"""Scores as dataset columns, and as one long table of the rows that matter."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..data import ROW
from ..errors import DataError


PREFIX = "source_"
"""Score columns are `source_<query name>`."""


def column_name(query: str) -> str:
    """The score column of a query."""
    return PREFIX + query


def std_name(query: str) -> str:
    """The column of how far an ensemble's members differ about the query's scores."""
    return f"{column_name(query)}_std"


def check_names(dataset: Dataset, names: Sequence[str], std: bool = False) -> None:
    """Refuse query names whose column the dataset already has, before any score is computed.

    Raises:
        DataError: naming the column and the fix.
    """
    taken = set(dataset.column_names) | {ROW}
    for name in names:
        for column in (column_name(name), std_name(name))[: 1 + std]:
            if column in taken:
                raise DataError(
                    f"Query name {name!r} would need column {column!r}, which the dataset has already: rename the "
                    "query, or drop the column with `dataset.remove_columns`."
                )
            taken.add(column)


def add_score_columns(
    dataset: Dataset, scores: np.ndarray, names: Sequence[str], std: np.ndarray | None = None
) -> Dataset:
    """The dataset with `source_row` and one float32 column per query.

    Columns are made of Arrow arrays that share the scores' memory; no Python list is built.

    Args:
        dataset: rows.
        scores: float32 `[queries, rows]` in the dataset's order.
        names: of the queries.
        std: like the scores, for a column `source_<name>_std` beside each.

    Raises:
        DataError: if a column exists already.
    """
    check_names(dataset, names, std is not None)
    arrays, fields = [], []
    if ROW not in dataset.column_names:
        arrays.append(pa.array(np.arange(len(dataset), dtype=np.int64)))
        fields.append(ROW)
    columns = [np.ascontiguousarray(part, dtype=np.float32) for part in (scores, std) if part is not None]
    for name, *values in zip(names, *columns, strict=True):
        arrays += map(pa.array, values)
        fields += [column_name(name), std_name(name)][: len(values)]
    return concatenate_datasets([dataset, Dataset(pa.table(arrays, names=fields))], axis=1)


def top_table(
    stages: Sequence[tuple[str, np.ndarray, np.ndarray, Callable[[int], str]]],
    names: Sequence[str],
    k: int,
    opposing: bool = True,
) -> Dataset:
    """Long table of the strongest rows.

    Args:
        stages: per stage its name, scores `[queries, rows]`, the rows' numbers, and the text of a row by number.
        names: of the queries.
        k: rows per query, stage and direction.
        opposing: include the most negative scores, ranked -1, -2, ...; a row is listed once, so a stage with fewer
            than `2 k` rows has fewer of them.

    Returns:
        Columns `query`, `stage`, `row`, `rank`, `score`, `text`.
    """
    columns: dict[str, list] = {key: [] for key in ("query", "stage", "row", "rank", "score", "text")}
    for position, query in enumerate(names):
        for stage, scores, numbers, text in stages:
            order = np.argsort(-scores[position], kind="stable")
            chosen = [(rank + 1, place) for rank, place in enumerate(order[:k])]
            if opposing:
                chosen += [(-rank - 1, place) for rank, place in enumerate(order[k:][::-1][:k])]
            for rank, place in chosen:
                row = int(numbers[place])
                found = (query, stage, row, rank, scores[position, place], text(row))
                for key, value in zip(columns, found, strict=True):
                    columns[key].append(value)
    columns["score"] = np.asarray(columns["score"], dtype=np.float32)
    return Dataset.from_dict(columns)


def with_note(dataset: Dataset, note: str) -> Dataset:
    """The dataset with a sentence in its description that says how its scores came about."""
    if note:
        dataset.info.description = "\n".join(part for part in (dataset.info.description, note) if part)
    return dataset
