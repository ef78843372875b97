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
"""Which row of a dataset given later is which row of training.

Rows are told apart by number: their `source_row`, or their position. That the numbers mean the same rows as in
training is checked by content, against the whole training set or, for a stream, row by row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from ...data import ROW, CausalLMCollator, content_fingerprint, prepare_rows
from ...errors import DataError
from .columns import with_columns
from .stored import is_given, rows_dataset, trained_numbers
from .streamed import batch_tokens, by_number, read_stream_rows, row_hash
from .streams import is_stream, number_rows


if TYPE_CHECKING:
    from ..reading.stage import StageRecord

_BATCH = 1024
_TOKENS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class MatchedRows:
    """A dataset and what it is of a stage's training set.

    Attributes:
        dataset: the rows that the stage trained on, tokenised.
        numbers: int64, their numbers in training.
        given: the dataset that was given, for scores to be shown with. It may hold more rows.
        given_numbers: int64, the number of each of its rows.
    """

    dataset: datasets.Dataset
    numbers: np.ndarray
    given: datasets.Dataset
    given_numbers: np.ndarray


def match_rows(
    stage: "StageRecord",
    dataset: Any,
    processing_class: Any = None,
    data_collator: Callable[[list], Mapping[str, Any]] | None = None,
) -> MatchedRows:
    """Find a stage's training rows in a dataset.

    Args:
        stage: what was recorded.
        dataset: the rows as the Trainer took them: in memory, on disk, streamed, or `None` for those of the record. In
            any order, and with others between them, if they carry their `source_row`.
        processing_class: tokenizer for raw text.
        data_collator: the Trainer's, if it was not the default one; needed of streams.

    Raises:
        DataError: if a row that trained is missing or has another content.
    """
    if dataset is None:
        return _recorded_rows(stage)
    if is_stream(dataset):
        given = prepared = _collect(stage, prepare_rows(_numbered(dataset), processing_class, _max_length(stage)))
    else:
        given, prepared = _in_memory(dataset)
        if not stage.dataset.get("stream") and is_given(given, stage) and (stored := stage.rows()) is not None:
            return MatchedRows(stored, _numbers(stage, stored), given, _numbers(stage, given))
        if stage.dataset["kind"] != "custom":
            prepared = prepare_rows(prepared, processing_class, _max_length(stage))
    numbers = _numbers(stage, given)
    if stage.dataset.get("stream"):
        wanted = _same_stream_rows(stage, prepared, numbers, data_collator or CausalLMCollator(processing_class))
    else:
        wanted = _same_rows(stage, prepared, numbers)
    rows = prepared if wanted is None else prepared.select(wanted)
    return MatchedRows(rows, numbers if wanted is None else numbers[wanted], given, numbers)


def _max_length(stage: "StageRecord") -> int | None:
    return stage.dataset.get("max_length")


def _recorded_rows(stage: "StageRecord") -> MatchedRows:
    rows = stage.rows()
    if rows is None:
        raise DataError(
            f"The rows of stage {stage.name!r} are needed, and the record does not hold them: pass "
            f"`datasets={{{stage.name!r}: ...}}` to from_record, or `dataset` to replay, as the Trainer took it."
        )
    numbers = _numbers(stage, rows)
    # Rows of packed sequences are put together again from their pieces first.
    given = rows if stage.packing else with_columns(stage, rows, numbers)
    return MatchedRows(rows, numbers, given, numbers)


def _numbers(stage: "StageRecord", dataset: datasets.Dataset) -> np.ndarray:
    """Number of every row."""
    if ROW not in dataset.column_names:
        # Rows of a stream are compared one by one anyway.
        if stage.dataset["row_numbers"] == "column" and not stage.dataset.get("stream"):
            raise DataError(
                f"Stage '{stage.name}' numbered its rows by the column `{ROW}`, which the dataset lacks. Pass the "
                "dataset with that column."
            )
        return np.arange(len(dataset))
    numbers = np.asarray(dataset.with_format(None)[ROW])
    if not np.issubdtype(numbers.dtype, np.integer) or len(np.unique(numbers)) != len(numbers) or numbers.min() < 0:
        raise DataError(
            f"Column `{ROW}` must hold a different whole number for every row: it says which row was which in "
            "training. Restore it, or drop it if the rows are in their original order."
        )
    return numbers.astype(np.int64)


def _numbered(dataset: Any) -> datasets.IterableDataset:
    numbered = number_rows(dataset)
    if isinstance(numbered, datasets.IterableDataset):
        return numbered
    return datasets.IterableDataset.from_generator(_each, gen_kwargs={"stream": numbered})


def _each(stream: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    yield from stream


def _collect(stage: "StageRecord", stream: datasets.IterableDataset) -> datasets.Dataset:
    """A stream's rows, up to the last that trained; what does not fit in little memory is on disk."""
    wanted = set(trained_numbers(stage).tolist())

    def until_all_are_found() -> Iterator[Mapping[str, Any]]:
        for row in stream:
            yield row
            wanted.discard(int(row[ROW]))
            if not wanted:
                return

    return rows_dataset(until_all_are_found())


def _in_memory(dataset: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The dataset to show scores with, and the one to read tokens from."""
    if not isinstance(dataset, datasets.Dataset):
        rows = rows_dataset(dataset[index] for index in range(len(dataset)))
        return rows, rows
    if dataset.format["type"] == "custom":  # a transform makes the tokens
        shown = dataset.with_format(None)
        tokens = rows_dataset(dataset[index] for index in range(len(dataset)))
        if ROW in shown.column_names and ROW not in tokens.column_names:
            tokens = tokens.add_column(ROW, shown[ROW])
        return shown, tokens
    return dataset, dataset


def _same_rows(stage: "StageRecord", rows: datasets.Dataset, numbers: np.ndarray) -> np.ndarray | None:
    """Positions of the rows that trained, `None` if all did; their content is the recorded one."""
    if content_fingerprint(rows) == stage.dataset["fingerprint"]:
        return None
    trained = trained_numbers(stage)
    if len(rows) < len(trained) or (len(rows) > stage.num_rows and ROW not in rows.column_names):
        raise DataError(
            f"The dataset has {len(rows)} rows, but stage {stage.name!r} was trained on {stage.num_rows}, so it is "
            f"not the one that stage {stage.name!r} trained on: pass the dataset exactly as the Trainer took it "
            "(before or after tokenising)."
        )
    wanted = np.flatnonzero(np.isin(numbers, trained))
    if len(wanted) == len(trained) < len(rows):
        chosen = rows.select(wanted)
        chosen = chosen if ROW in chosen.column_names else chosen.add_column(ROW, numbers[wanted])
        if content_fingerprint(chosen) == stage.dataset["fingerprint"]:
            return wanted
    raise DataError(
        f"The dataset ({len(rows)} rows) is not the one that stage {stage.name!r} trained on ({stage.num_rows} rows): "
        "its content hash differs. Pass the same rows in the same order, tokenised by the same tokenizer. If it was "
        f"shuffled since, keep the `{ROW}` column that numbers the rows."
    )


def _same_stream_rows(
    stage: "StageRecord", rows: datasets.Dataset, numbers: np.ndarray, collate: Callable[[list], Mapping[str, Any]]
) -> np.ndarray:
    """Positions of the rows that trained, each with the tokens it had then."""
    recorded = read_stream_rows(stage, [ROW, "hash"])
    recorded = recorded.take(pa.array(by_number(recorded)))
    trained, hashes = (recorded[name].to_numpy() for name in (ROW, "hash"))
    order = np.argsort(numbers, kind="stable")
    places = np.searchsorted(numbers[order], trained)
    missing = (places >= len(order)) | (numbers[order[np.minimum(places, len(order) - 1)]] != trained)
    if missing.any():
        raise DataError(
            f"The dataset lacks row {trained[missing][0]}, which stage {stage.name!r} trained on ({missing.sum()} "
            "rows are missing). Pass the stream as the Trainer took it."
        )
    wanted = order[places]
    tokens = rows.select_columns([name for name in _TOKENS if name in rows.column_names]).with_format(None)
    for start in range(0, len(wanted), _BATCH):
        part = [tokens[int(place)] for place in wanted[start : start + _BATCH]]
        found = batch_tokens(collate(part), len(part))
        if found is None:
            return wanted  # no tokens: nothing was hashed
        for place, row in enumerate(found, start):
            if hashes[place] and row_hash(row) != hashes[place]:
                raise DataError(
                    f"In the dataset, row {trained[place]} is not the one that stage {stage.name!r} trained on: its "
                    "tokens or labels differ. Pass the stream as the Trainer took it, unshuffled or with its "
                    f"`{ROW}` column, with the same tokenizer and `data_collator`."
                )
    return wanted
