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
"""Row numbers for streams: datasets that are read in order and have no rows to ask for by index.

A row's number is its position in the stream as it was given. That is a name only if the stream yields the same rows in
the same order each time: Hugging Face streams do so once they are read as one piece, see `number_rows`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import torch

from ...data import ROW
from ...errors import DataError, UnsupportedError
from ...logs import get_logger
from .numbering import RowDataset, with_row_numbers


logger = get_logger(__name__)


def number_rows(dataset: Any) -> Any:
    """The dataset with a column `source_row`: 0, 1, 2, ... Number rows before you shuffle or filter them.

    A dataset that has the column keeps it. The shards of a stream are read one after the other, in the same order in
    every epoch and by one dataloader worker; a stream whose files hold a `source_row` column has no such limits.

    Args:
        dataset: rows in memory, on disk, or streamed (`datasets.IterableDataset`, `torch.utils.data.IterableDataset`).

    Raises:
        UnsupportedError: if it is a stream that was shuffled already.

    Example:
        >>> stream = load_dataset("roneneldan/TinyStories", split="train", streaming=True)  # doctest: +SKIP
        >>> stream = number_rows(stream).shuffle(seed=0, buffer_size=10_000)  # doctest: +SKIP
    """
    if not is_stream(dataset):
        return with_row_numbers(dataset)
    if carries_numbers(dataset):
        return dataset
    if not isinstance(dataset, datasets.IterableDataset):
        return RowStream(dataset)
    if _is_shuffled(dataset):
        raise UnsupportedError(
            "The stream was shuffled before its rows were numbered. It is shuffled anew in every epoch, so a row's "
            "position does not say which row it is. Number the rows first: `dataset = number_rows(dataset)"
            ".shuffle(...)` (from hf_source import number_rows), or give the stream a `source_row` column of its own."
        )
    if dataset.num_shards > 1:
        logger.warning(
            f"The stream's {dataset.num_shards} shards are read in their order, by one dataloader worker, so that "
            "rows can be numbered by position. A `source_row` column in its files lets workers share them."
        )
    return datasets.IterableDataset.from_generator(_numbered, gen_kwargs={"stream": dataset})


def _numbered(stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    # iter() rather than __iter__: in a dataloader worker the latter yields this worker's share of the shards only.
    for row, batch in enumerate(stream.iter(batch_size=1)):
        yield {**{name: values[0] for name, values in batch.items()}, ROW: row}


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read in order."""
    return isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset))


def carries_numbers(dataset: Any) -> bool:
    """Whether a dataset's rows have their numbers; reads one row of a Hugging Face stream if it must."""
    if isinstance(dataset, (RowDataset, RowStream)):
        return True
    return ROW in column_names(dataset)


def column_names(dataset: Any) -> list[str]:
    """Names of the columns; of a mapped stream, those of its first row. Empty for datasets of torch."""
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return []
    if dataset.column_names is None:
        return list(next(iter(dataset.take(1)), {}))
    return list(dataset.column_names)


def _is_shuffled(stream: datasets.IterableDataset) -> bool:
    # Nothing public tells; without the attribute, rows are compared when they come again (`StreamRows`).
    waiting = [getattr(stream, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if "Shuffled" in type(part).__name__:
            return True
        inside = [getattr(part, "ex_iterable", None), *(getattr(part, "ex_iterables", None) or [])]
        waiting += [piece for piece in inside if piece is not None]
    return False


class RowStream(torch.utils.data.IterableDataset):
    """A torch stream of dictionaries, each with its row number added: its own `source_row`, or its position."""

    def __init__(self, dataset: torch.utils.data.IterableDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        for position, row in enumerate(self.dataset):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"The stream yields a {type(row).__name__}, not a dictionary, so its rows cannot carry their "
                    "number. Yield dictionaries such as {'input_ids': ..., 'labels': ...}."
                )
            if ROW not in row and worker is not None and worker.num_workers > 1:
                raise UnsupportedError(
                    f"{worker.num_workers} dataloader workers read the stream, each its own copy or part, so a "
                    "position is no row's name. Yield a `source_row` with each row, or set dataloader_num_workers=1."
                )
            yield {**row, ROW: row.get(ROW, position)}

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError if the stream's length is unknown

    def __getattr__(self, name: str) -> Any:
        # Such as set_epoch, which Accelerate looks for.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)
