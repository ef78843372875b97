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
"""Scores of the tokens of rows as dataset columns: a list for each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..data import ROW
from ..errors import DataError
from .columns import column_name


TOKENS = "source_tokens"
"""Column of the tokens, which the scores of every query are aligned with."""


def token_column(query: str) -> str:
    """The column of a query's scores of tokens."""
    return f"{column_name(query)}_tokens"


def token_texts(processing_class: Any, ids: Sequence[int]) -> list[str]:
    """Each token as a text, or its number where there is no tokenizer."""
    if processing_class is None:
        return [str(token) for token in ids]
    return [processing_class.decode([token]) for token in ids]


def check_token_names(dataset: Dataset, names: Sequence[str]) -> None:
    """Refuse names whose column is there already, before anything is computed.

    Raises:
        DataError: naming the column and the fix.
    """
    wanted = [TOKENS, *map(token_column, names)]
    taken = [column for column in wanted if column in dataset.column_names]
    if taken or len(set(wanted)) < len(wanted):
        raise DataError(
            f"The dataset has the column {(taken or wanted)[0]!r} already, or two queries would share one: rename the "
            "query, or drop the column with `dataset.remove_columns`."
        )


def add_token_columns(
    dataset: Dataset,
    numbers: np.ndarray,
    tokens: Sequence[Sequence[str]],
    scores: Sequence[np.ndarray],
    names: Sequence[str],
) -> Dataset:
    """The dataset with `source_row`, `source_tokens` and `source_<name>_tokens`.

    Args:
        dataset: rows.
        numbers: int64 `[rows]`, of the rows in training.
        tokens: of each row.
        scores: of each row, float32 `[queries, tokens]`.
        names: of the queries.

    Raises:
        DataError: if a column exists already.
    """
    check_token_names(dataset, names)
    offsets = pa.array(np.cumsum([0, *map(len, tokens)]), pa.int64())
    columns: dict[str, pa.Array] = {}
    if ROW not in dataset.column_names:
        columns[ROW] = pa.array(np.asarray(numbers, dtype=np.int64))
    flat = pa.array([token for row in tokens for token in row], pa.large_string())
    columns[TOKENS] = pa.LargeListArray.from_arrays(offsets, flat)
    for query, name in enumerate(names):
        values = [row[query] for row in scores] or [np.zeros(0, np.float32)]
        columns[token_column(name)] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(values)))
    return concatenate_datasets([dataset, Dataset(pa.table(columns))], axis=1)
