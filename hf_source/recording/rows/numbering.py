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
"""Row numbers: how each row of the training set carries its own through shuffling and collating."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from ...data import ROW
from ...errors import DataError, UnsupportedError


# A stage's scores and weights are arrays over row numbers.
LARGEST_NUMBER = 1 << 31


class RowCollator:
    """Collates rows as `collator` does, and adds the row numbers as `batch["source_row"]` (int64 `[rows]`).

    Rows without a number (evaluation) pass through unchanged.
    """

    def __init__(self, collator: Callable[[list], Any]) -> None:
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        """Trainers read settings of their collator (sentence-transformers: which columns are labels)."""
        if name == "collator":  # not there yet, when a dataloader's worker copies the object
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Collate rows."""
        if not all(isinstance(feature, Mapping) and ROW in feature for feature in features):
            return self.collator(list(features))
        rows = torch.tensor([int(feature[ROW]) for feature in features])
        batch = self.collator([{k: v for k, v in feature.items() if k != ROW} for feature in features])
        batch[ROW] = rows
        return batch


class RowDataset(torch.utils.data.Dataset):
    """A map-style dataset of dictionaries, each with its row number added."""

    def __init__(self, dataset: Sequence[Mapping[str, Any]]) -> None:
        self.dataset = dataset
        self.numbers = None
        if isinstance(dataset, datasets.Dataset) and ROW in dataset.column_names:
            self.numbers = with_row_numbers(dataset.with_format(None)).with_format("numpy")[ROW][:]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        if not isinstance(row, Mapping):
            raise DataError(
                f"Row {index} of the training set is a {type(row).__name__}, not a dictionary, so it cannot carry its "
                "row number. Return dictionaries such as {'input_ids': ..., 'labels': ...}."
            )
        own = row.get(ROW, index) if self.numbers is None else int(self.numbers[index])
        return {**row, ROW: own}


def with_row_numbers(dataset: Any, num_rows: int | None = None) -> Any:
    """The dataset with a `source_row` column: its own if it has one, else 0, 1, 2, ...

    Args:
        dataset: map-style dataset; for streams see `streams.py`.
        num_rows: exclusive upper bound of the numbers. They need not be 0, 1, 2, ...: rows may have been filtered out
            since they were numbered.

    Raises:
        DataError: if the dataset's own numbers are not different whole numbers in `[0, num_rows)`.
        UnsupportedError: if the dataset has no length.
    """
    if not hasattr(dataset, "__len__"):
        raise UnsupportedError(
            f"A {type(dataset).__name__} has neither a length nor the interface of a stream, so its rows have no "
            "numbers. Pass a map-style dataset, or make it a torch.utils.data.IterableDataset."
        )
    # What a transform returns need not hold the number, so it is added after it.
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return dataset if isinstance(dataset, RowDataset) else RowDataset(dataset)
    if ROW not in dataset.column_names:
        return _with_positions(dataset)
    rows = np.asarray(dataset.with_format("numpy")[ROW][:])
    bound = LARGEST_NUMBER if num_rows is None else num_rows
    fine = np.issubdtype(rows.dtype, np.integer) and len(np.unique(rows)) == len(rows)
    if (not fine and len(rows)) or (len(rows) and (rows.min() < 0 or rows.max() >= bound)):
        raise DataError(
            f"The column `{ROW}` must hold a different whole number in [0, {bound}) for every row, since it says "
            f"which row is which. Remove it (`dataset.remove_columns('{ROW}')`) to have rows numbered by position."
        )
    return dataset


def _with_positions(dataset: datasets.Dataset) -> datasets.Dataset:
    """Number rows by position, without copying them.

    A dataset that was shuffled or selected from is a list of indices into a table; `add_column` copies that row by row
    (60 us a row). Here the table gets the numbers, and the list stays.
    """
    indices = getattr(dataset, "_indices", None)
    order = None if indices is None else indices.column(0).to_numpy()
    if order is None or len(np.unique(order)) < len(order):  # a row that was selected twice has two numbers
        return dataset.add_column(ROW, np.arange(len(dataset)))
    table = copy.copy(dataset)
    table._indices, table._fingerprint = None, f"{dataset._fingerprint}-table"
    numbers = np.full(len(table), -1)
    numbers[order] = np.arange(len(order))
    return table.add_column(ROW, numbers).select(order)


def count_numbers(dataset: Any) -> int:
    """One more than the largest number of a dataset's rows; with its own numbers, that may exceed its length."""
    if isinstance(dataset, RowDataset):
        numbers = dataset.numbers
    else:
        numbers = np.asarray(dataset.with_format("numpy")[ROW][:]) if len(dataset) else None
    return max(len(dataset), 0 if numbers is None else int(numbers.max(initial=-1)) + 1)
