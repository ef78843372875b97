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

from ..budget import Parts
from ..data import ROW, take_rows
from ..errors import DataError, UnsupportedError
from ..gradients import CausalLMTask, PairTask, RowGradients, RowLayout, RowLossTask, Task
from ..gradients.changes import without_changes
from ..recording import StageRecord
from ..recording.rows.columns import with_columns
from ..recording.rows.matching import match_rows
from ..recording.rows.packing import split


class StageRows:
    """The rows of one stage, and the *pieces* that they were trained on.

    A piece is what has a loss of its own: a row, or a row's part of a packed sequence. Pieces are numbered, and a
    piece that is a whole row has the row's number.

    Args:
        stage: what was recorded.
        dataset: the dataset as the Trainer took it, raw, tokenised or streamed, in any order if it carries
            `source_row`, rows that the Trainer filtered out included; `None` for the rows that the record holds.
        processing_class: tokenizer for raw text.
        data_collator: makes model inputs of rows; the task's by default.
        max_tokens_per_batch: padded tokens of one batch.
        task: what defines a row's loss; `None` where only texts are compared.

    Attributes:
        given: the dataset that scores are shown with.
        numbers: int64, the row number of each row of `given`; some may never have trained.
        row: int64 `[pieces]`, the row that a piece's score is credited to.
        example: int64 `[pieces]`, what the record's weights say of the piece: its row, or its packed sequence.
        trained: int64, numbers of the pieces that exist.
        lengths, items: int64 `[pieces]`, tokens and loss items.

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
        task: Task | None = None,
    ) -> None:
        self.stage = stage
        self.task = task
        self.max_tokens_per_batch = max_tokens_per_batch
        own = task if isinstance(task, RowLossTask) else CausalLMTask() if task else RowLayout()
        self.columns = own.columns
        pairs = isinstance(task, PairTask)  # they lay sequences out in a way of their own
        self.collate = own.collator(processing_class) if pairs or data_collator is None else data_collator
        matched = match_rows(stage, dataset, processing_class, self.collate)
        self.dataset, self.trained = matched.dataset, matched.numbers
        self.given, self.numbers = matched.given, matched.given_numbers
        self._packed = None
        if stage.packing is None:
            self._count_pieces(own)
        else:
            self._split_pieces(own)
        if task is not None:
            self._check_items()

    def _count_pieces(self, task: RowLayout) -> None:
        """One piece for each row."""
        count = self.stage.num_rows
        self.row = self.example = np.arange(count)
        self.positions = np.full(count, -1)
        self.positions[self.trained] = np.arange(len(self.dataset))
        self.lengths, self.items = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        for number, row in zip(self.trained, _features(self.dataset, self.columns), strict=True):
            self.lengths[number], self.items[number] = task.length(row), task.count_items(row)

    def _split_pieces(self, task: RowLayout) -> None:
        """The pieces of packed sequences."""
        examples = sorted(self.dataset, key=lambda example: example[ROW])
        found = [(number, piece) for number, example in enumerate(examples) for piece in split(example)]
        self.example = np.array([number for number, _ in found], dtype=np.int64)
        self._packed = [piece for _, piece in found]
        self.row = np.array([piece["row"] for piece in self._packed], dtype=np.int64)
        self.trained = np.arange(len(found))
        self.lengths = np.array([task.length(piece) for piece in self._packed], dtype=np.int64)
        self.items = np.array([task.count_items(piece) for piece in self._packed], dtype=np.int64)
        self._first_piece = np.searchsorted(self.example, np.arange(len(examples) + 1))
        if self.given is self.dataset:
            self.given = self._unpacked()
            self.numbers = np.asarray(self.given[ROW])

    def _unpacked(self) -> Dataset:
        """The rows that were trained on, put together again from their pieces."""
        tokens: dict[int, list[int]] = {int(row): [] for row in np.unique(self.row)}
        for row, piece in zip(self.row, self._packed, strict=True):
            tokens[int(row)] += piece["input_ids"][piece["context"] :]
        rows = Dataset.from_dict({ROW: list(tokens), "input_ids": list(tokens.values())})
        return with_columns(self.stage, rows, np.asarray(list(tokens), dtype=np.int64))

    def _check_items(self) -> None:
        """The loss items of each micro-batch must be those that training counted: same labels, same masking."""
        items = np.bincount(self.example, weights=self.items, minlength=self.example.max(initial=-1) + 1)
        for micro_batches in self.stage.steps().micro_batches[:64]:
            for micro_batch in micro_batches:
                counted = int(items[np.asarray(micro_batch.rows)].sum())
                if counted != micro_batch.items:
                    raise DataError(
                        f"In stage {self.stage.name!r} a batch trained on {micro_batch.items} loss items (label "
                        f"tokens), but its rows now have {counted}: the Trainer's collator masked labels differently. "
                        "Pass it with `data_collator=`, and give the dataset a `labels` column with the same masking."
                    )

    def prepare(self, gradients: RowGradients) -> None:
        """Before the stage is walked through: what the task has to compute first, and whether it fits the training.

        Raises:
            UnsupportedError: if the rows' losses do not add up to the loss that was trained.
        """
        with without_changes():
            if isinstance(self.task, RowLossTask):
                self.task.prepare(gradients.model, self)
            self._check_first_loss(gradients)

    def _check_first_loss(self, gradients: RowGradients) -> None:
        trained = self.stage.loss.get("first_micro_batch")
        other = ("dropout", "neftune_noise_alpha", "router_loss", "bf16", "fp16")
        noisy = any(self.stage.training.get(key) for key in other)
        narrow = any(self.stage.tensor_info[n]["dtype"] not in ("float32", "float64") for n in self.stage.trainable)
        if trained is None or noisy or narrow:
            return
        first = self.stage.steps().micro_batches[0][0]
        self.stage.load_weights(gradients.model, "initial")
        if isinstance(self.task, RowLossTask):
            self.task.at_epochs((0,))
        device, parts = next(gradients.model.parameters()).device, Parts()
        loss = lambda pieces: float(gradients.run(self.collated(pieces, device), ()).losses.sum())  # noqa: E731
        summed = sum(part for batch in self.batches(self.pieces_of(first.rows)) for _, part in parts(loss, batch))
        found = summed / first.normalizer
        if abs(found - trained) > 1e-2 * max(abs(trained), 1e-3):
            raise UnsupportedError(
                f"The rows of the first batch of stage {self.stage.name!r} have a loss of {found:.6g} by "
                f"{type(self.task).__name__}, but training computed {trained:.6g}: it minimised something else. "
                "Pass `task=` with the loss of a row as it was trained (see `hf_source.RowLossTask`), summed over its "
                "items."
            )

    def pieces_of(self, examples: Sequence[int]) -> np.ndarray:
        """Pieces of what a batch drew, one example after the other."""
        if self._packed is None:
            return np.asarray(examples, dtype=np.int64)
        spans = [np.arange(self._first_piece[e], self._first_piece[e + 1]) for e in examples]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    def batches(self, pieces: Iterable[int]) -> list[np.ndarray]:
        """Pieces cut into batches of similar length under the token budget."""
        pieces = np.asarray(list(pieces), dtype=np.int64)
        pieces = pieces[np.argsort(self.lengths[pieces], kind="stable")[::-1]]
        batches, start = [], 0
        while start < len(pieces):
            count = max(1, self.max_tokens_per_batch // max(1, int(self.lengths[pieces[start]])))
            batches.append(pieces[start : start + count])
            start += count
        return batches

    def collated(self, pieces: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Model inputs of the given pieces."""
        if self._packed is None:
            rows = take_rows(self.dataset, self.positions[np.asarray(pieces)])
        else:
            rows = [self._packed[int(piece)] for piece in pieces]
        return collate(self.collate, rows, device, self.columns)

    @property
    def trained_rows(self) -> np.ndarray:
        """int64, the numbers of the rows that trained, ascending."""
        return np.unique(self.row[self.trained])

    def as_given(self, scores: np.ndarray) -> np.ndarray:
        """Scores by row number `[queries, rows]`, in the order of the given dataset; 0 for rows that never trained."""
        missing = max(int(self.numbers.max(initial=-1)) + 1 - scores.shape[1], 0)
        return np.pad(scores, ((0, 0), (0, missing)))[:, self.numbers]

    def shortest(self, count: int) -> list[int]:
        """A few short pieces of different length, with loss items: enough to compare gradient rules with autograd."""
        order = self.trained[np.argsort(self.lengths[self.trained], kind="stable")]
        asked = order[self.items[order] > 0]
        order = asked if len(asked) else order
        places = np.linspace(0, len(order) // 2, count).astype(int)
        return [int(piece) for piece in order[places]]

    def text(self, row: int, processing_class: Any = None) -> str:
        """A row as people read it, by its number."""
        if self._packed is None:
            return row_text(self.dataset[int(self.positions[row])], processing_class)
        return row_text(self.given[int(np.flatnonzero(self.numbers == row)[0])], processing_class)


def collate(
    data_collator: Any,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
    columns: Sequence[str] | None = CausalLMTask.columns,
) -> dict[str, torch.Tensor]:
    """Model inputs from rows; columns that the task does not read are left out."""
    batch = data_collator([_chosen(row, columns) for row in rows])
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def _chosen(row: Mapping[str, Any], columns: Sequence[str] | None) -> dict[str, Any]:
    return {key: value for key, value in row.items() if (key in columns if columns else key != ROW)}


def _features(dataset: Dataset, columns: Sequence[str] | None) -> Iterable[dict[str, Any]]:
    """Every row's columns that training reads."""
    wanted = [name for name in dataset.column_names if (name in columns if columns else name != ROW)]
    yield from dataset.select_columns(wanted).with_format(None)


def row_text(row: Mapping[str, Any], processing_class: Any = None) -> str:
    """The text of a row: its `text`, its `prompt` and `completion`, or its decoded tokens."""
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"] + row["completion"]
    for name in ("input_ids", "chosen_ids"):
        if processing_class is not None and name in row:
            return processing_class.decode(list(row.get("prompt_ids", ())) + row[name], skip_special_tokens=True)
    return ""
