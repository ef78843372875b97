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
"""The rows of a stage at attribution time: the dataset that was trained on, checked against the record, in batches."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data import IGNORE_INDEX, ROW, CausalLMCollator, content_fingerprint, prepare_rows, take_rows
from ..errors import DataError
from ..recording import StageRecord


class StageRows:
    """Token rows of one stage, in the order of their row numbers.

    Args:
        stage: what was recorded.
        dataset: the dataset as the Trainer took it, raw or tokenised, in any order if it carries `source_row`; `None`
            for the rows that the record holds.
        processing_class: tokenizer for raw text.
        data_collator: makes model inputs of rows; right-padding by default.
        max_tokens_per_batch: padded tokens of one batch.

    Raises:
        DataError: if the dataset is not the one that was recorded, or there is none.
    """

    def __init__(
        self,
        stage: StageRecord,
        dataset: Dataset | None,
        processing_class: Any = None,
        data_collator: Any = None,
        max_tokens_per_batch: int = 4096,
    ) -> None:
        self.stage = stage
        self.given = dataset
        stored = "record" if dataset is None else None
        if dataset is None:
            self.given = dataset = stage.rows()
        if dataset is None:
            raise DataError(
                f"The rows of stage {stage.name!r} are needed to walk through it, and the record does not hold them: "
                f"pass `datasets={{{stage.name!r}: ...}}` to from_record."
            )
        if stored is None and len(dataset) != stage.num_rows:
            raise DataError(
                f"The dataset has {len(dataset)} rows, but stage {stage.name!r} was trained on {stage.num_rows}: pass "
                "the dataset exactly as the Trainer took it (before or after tokenising)."
            )
        prepared = prepare_rows(dataset, processing_class, stage.dataset.get("max_length"))
        if content_fingerprint(prepared) != stage.dataset["fingerprint"]:
            raise DataError(
                f"The dataset is not the one stage {stage.name!r} was trained on (its content hash differs): pass the "
                "same rows in the same order, tokenised by the same tokenizer. If it was shuffled since, keep the "
                f"`{ROW}` column that numbers the rows."
            )
        self.dataset = prepared
        self.numbers = _row_numbers(prepared, stage.num_rows)
        self.positions = np.full(stage.num_rows, -1)
        self.positions[self.numbers] = np.arange(len(prepared))
        self.collate = data_collator or CausalLMCollator(processing_class)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.lengths = np.zeros(stage.num_rows, dtype=np.int64)
        self.lengths[self.numbers] = _lengths(prepared["input_ids"])
        self._check_items()

    def _check_items(self) -> None:
        """The loss items of each micro-batch must be those that training counted: same labels, same masking."""
        labels = self.dataset["labels" if "labels" in self.dataset.column_names else "input_ids"]
        items = np.zeros(self.stage.num_rows, dtype=np.int64)
        items[self.numbers] = [sum(label != IGNORE_INDEX for label in row[1:]) for row in labels]
        for micro_batches in self.stage.steps().micro_batches[:64]:
            for micro_batch in micro_batches:
                counted = int(items[np.asarray(micro_batch.rows)].sum())
                if counted != micro_batch.items:
                    raise DataError(
                        f"In stage {self.stage.name!r} a batch trained on {micro_batch.items} label tokens, but its "
                        f"rows now have {counted}: the Trainer's collator masked labels differently. Pass it with "
                        "`data_collator=`, and give the dataset a `labels` column with the same masking."
                    )
        self.items = items

    def batches(self, rows: Iterable[int]) -> list[np.ndarray]:
        """Row numbers cut into batches of similar length under the token budget."""
        rows = np.asarray(list(rows), dtype=np.int64)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")[::-1]]
        batches, start = [], 0
        while start < len(rows):
            count = max(1, self.max_tokens_per_batch // max(1, int(self.lengths[rows[start]])))
            batches.append(rows[start : start + count])
            start += count
        return batches

    def collated(self, rows: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Model inputs of the given rows."""
        return collate(self.collate, take_rows(self.dataset, self.positions[np.asarray(rows)]), device)

    def shortest(self, count: int) -> list[int]:
        """A few short rows of different length, with loss items: enough to compare gradient rules with autograd."""
        order = self.numbers[np.argsort(self.lengths[self.numbers], kind="stable")]
        asked = order[self.items[order] > 0]
        order = asked if len(asked) else order
        places = np.linspace(0, len(order) // 2, count).astype(int)
        return [int(row) for row in order[places]]

    def text(self, row: int, processing_class: Any = None) -> str:
        """A row as people read it, by its number."""
        return row_text(self.dataset[int(self.positions[row])], processing_class)


def collate(data_collator: Any, rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs from token rows; columns that no causal language model takes are left out."""
    keep = ("input_ids", "labels", "attention_mask")
    batch = data_collator([{key: row[key] for key in keep if key in row} for row in rows])
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def row_text(row: Mapping[str, Any], processing_class: Any = None) -> str:
    """The text of a row: its `text`, its `prompt` and `completion`, or its decoded tokens."""
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"] + row["completion"]
    if processing_class is not None and "input_ids" in row:
        return processing_class.decode(row["input_ids"], skip_special_tokens=True)
    return ""


def _row_numbers(dataset: Dataset, num_rows: int) -> np.ndarray:
    """Numbers of the rows in their present order."""
    if ROW not in dataset.column_names:
        return np.arange(len(dataset))
    numbers = np.asarray(dataset[ROW], dtype=np.int64)
    if len(np.unique(numbers)) != len(numbers) or (len(numbers) and (numbers.min() < 0 or numbers.max() >= num_rows)):
        raise DataError(
            f"Column `{ROW}` must hold a different number from 0 to {num_rows - 1} for every row: it says which row "
            "was which in training. Restore it, or drop it if the rows are in their original order."
        )
    return numbers


def _lengths(rows: Iterable[Sequence[int]]) -> list[int]:
    return [len(row) for row in rows]
