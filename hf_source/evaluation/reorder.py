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
"""A recorded stage in another order: the same batches, visits and learning rates, with the rows changed about."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..recording import MicroBatch, StageRecord, StepTable


class ReorderedSteps:
    """The steps of a stage with row `m` where row `order[m]` was.

    A normalizer changes as the count of the rows that are now in its batch: over the step where the loss is divided by
    the step's count, over the micro-batch otherwise.

    Args:
        steps: as recorded.
        order: int64 `[rows]`, a permutation.
        items: int64 `[rows]`, loss items of every row.
        counts: int64 `[rows]`, what the Trainer counted of every row to divide by.
        per_step: whether micro-batches of a step share their normalizer.
    """

    def __init__(
        self, steps: StepTable, order: np.ndarray, items: np.ndarray, counts: np.ndarray, per_step: bool
    ) -> None:
        self._steps = steps
        self.micro_batches = [_reordered(step, order, items, counts, per_step) for step in steps.micro_batches]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._steps, name)

    def __len__(self) -> int:
        return len(self._steps)


def _reordered(
    step: list[MicroBatch], order: np.ndarray, items: np.ndarray, counts: np.ndarray, per_step: bool
) -> list[MicroBatch]:
    before = [np.asarray(micro.rows, dtype=np.int64) for micro in step]
    now = [order[rows] for rows in before]
    was, becomes = (np.asarray([counts[rows].sum() for rows in part], dtype=np.float64) for part in (before, now))
    if per_step:
        was, becomes = np.full(len(step), was.sum()), np.full(len(step), becomes.sum())
    factors = np.divide(becomes, was, out=np.ones(len(step)), where=(was > 0) & (becomes > 0))
    return [
        replace(micro, rows=rows.tolist(), normalizer=micro.normalizer * float(factor), items=int(items[rows].sum()))
        for micro, rows, factor in zip(step, now, factors, strict=True)
    ]


def reordered(
    stage: StageRecord, numbers: np.ndarray, items: np.ndarray, labels: np.ndarray, seed: int
) -> StageRecord:
    """The stage with its rows in the order of another seed.

    Args:
        stage: as recorded.
        numbers: rows that trained; they change places among themselves.
        items: int64 `[rows]`, loss items.
        labels: int64 `[rows]`, all labels, the first one included: what transformers divides a language model's loss
            by, though nothing predicts the first.
        seed: of the order.
    """
    order = np.arange(stage.num_rows)
    order[numbers] = np.random.default_rng(seed).permutation(numbers)
    other = copy.copy(stage)
    per_step = stage.loss["normalization"] == "tokens"
    steps = stage.steps()
    counts = labels if per_step and _divided_by(steps, labels) else items
    other.__dict__["_step_table"] = ReorderedSteps(steps, order, items, counts, per_step)
    return other


def _divided_by(steps: StepTable, counts: np.ndarray) -> bool:
    """Whether every step's loss was divided by the sum of these counts over its rows."""
    return all(
        abs(sum(counts[batch.rows].sum() for batch in step) - step[0].normalizer) < 0.5
        for step in steps.micro_batches
        if step
    )


def fresh_weights(stage: StageRecord, seed: int) -> Mapping[str, torch.Tensor]:
    """Weights of the stage's model as its class initialises them, under a seed."""
    built = stage.build_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(built)(built.config)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
