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
"""The optimizer steps of a stage, as they are read back."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of an optimizer step.

    Attributes:
        rows: row numbers, in the order in which they were collated.
        normalizer: what the summed loss of the rows was divided by.
        items: number of loss items in the rows.
    """

    rows: list[int]
    normalizer: float
    items: int


class StepTable:
    """Every optimizer step of a stage, as arrays over steps.

    Attributes:
        step: int64 `[steps]`, counted from 0.
        epoch: float64 `[steps]`, epochs done before the step.
        learning_rate: float64 `[steps, groups]`.
        reference_learning_rate: float64 `[steps]`, the largest over the groups that train anything.
        grad_norm: float64 `[steps]`, before clipping.
        clip_factor: float64 `[steps]`.
        skipped: bool `[steps]`.
    """

    def __init__(self, table: pa.Table, groups_in_use: list[int]) -> None:
        self._table = table
        self.step = table["step"].to_numpy()
        self.epoch = table["epoch"].to_numpy()
        self.grad_norm = table["grad_norm"].to_numpy()
        self.clip_factor = table["clip_factor"].to_numpy()
        self.skipped = table["skipped"].to_numpy()
        rates = table["learning_rate"].combine_chunks()
        self.learning_rate = rates.flatten().to_numpy().reshape(len(self.step), -1 if len(self.step) else 0)
        self.reference_learning_rate = (
            self.learning_rate[:, groups_in_use].max(axis=1) if len(self.step) else np.zeros(0)
        )

    def __len__(self) -> int:
        return len(self.step)

    @property
    def effective_learning_rate(self) -> np.ndarray:
        """float64 `[steps]`: reference learning rate times clip factor; 0 for a skipped step."""
        return np.where(self.skipped, 0.0, self.reference_learning_rate * self.clip_factor)

    def weight_sample(self, step: int) -> np.ndarray | None:
        """What the record holds of the weights after a step (see `weight_samples.py`): float64, or `None`."""
        values = self._table["weights"][step]
        return np.asarray(values.as_py()) if values.is_valid else None

    @cached_property
    def micro_batches(self) -> list[list[MicroBatch]]:
        """The micro-batches of every step."""
        return [[MicroBatch(**batch) for batch in step] for step in self._table["micro_batches"].to_pylist()]

    def visits(
        self, first_step: int = 0, end_step: int | None = None, rate: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every time a row was trained on, as flat arrays, without a Python object per row.

        Args:
            first_step, end_step: steps wanted.
            rate: float64, by step; used in the weights instead of `eta c`.

        Returns:
            `row` and `step` (int64 `[visits]`), and `weight` (float64 `[visits]`): `eta c / normalizer`.
        """
        batches, step_of_batch = self._batches(first_step, len(self) if end_step is None else end_step)
        rows = batches.field("rows")
        batch_of_row = np.repeat(np.arange(len(batches)), rows.value_lengths().to_numpy())
        rate = self.effective_learning_rate if rate is None else rate
        weight = rate[step_of_batch] / batches.field("normalizer").to_numpy()
        return {
            "row": rows.flatten().to_numpy(),
            "step": step_of_batch[batch_of_row],
            "weight": weight[batch_of_row],
        }

    def _batches(self, first_step: int, end_step: int) -> tuple[pa.StructArray, np.ndarray]:
        """The micro-batches of some steps in one array, and the step of each."""
        column = self._table["micro_batches"].slice(first_step, end_step - first_step).combine_chunks()
        return column.flatten(), np.repeat(np.arange(first_step, end_step), column.value_lengths().to_numpy())
