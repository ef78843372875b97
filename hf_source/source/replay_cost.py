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
"""What unrolling a run would take, from one of its steps: the parts of it are timed, and the rest is arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..budget import clock
from ..recording import StageRecord
from .products import ExactProducts, Products, SampledProducts
from .stages import Vectors, WalkSettings, open_stage
from .unrolled import RecordedRun, Snapshot, unfused


_DRAWS, _QUERIES = 2, 4
"""Draws and queries that products are timed with."""


@dataclass(frozen=True)
class ReplayCost:
    """Seconds of one step.

    Attributes:
        forward: repeating it, which is done twice.
        backward: going back through it, without products with its curvature.
        draw: of `SampledProducts`, for all queries.
        query: of `ExactProducts`, for one; infinite if the model has no second derivative.
        tokens: of its rows, or what else the lengths of rows count.
    """

    forward: float
    backward: float
    draw: float
    query: float
    tokens: int

    def sampled(self, draws: int) -> float:
        """Seconds a token of `stepwise`."""
        return (2 * self.forward + self.backward + draws * self.draw) / self.tokens

    def exact(self, queries: int) -> float:
        """Seconds a token of `unrolled`."""
        return (2 * self.forward + self.backward + queries * self.query) / self.tokens


def replay_cost(
    stages: Sequence[StageRecord],
    rows: Mapping[str, Any],
    num_queries: int,
    settings: WalkSettings,
    models: Callable[[StageRecord], nn.Module],
) -> ReplayCost:
    """Time a step of the last stage, of average size, twice; the shorter times count.

    Args:
        stages, rows, settings, models: see `walk`.
        num_queries: asked.
    """

    def anything(gradients) -> Vectors:
        return {name: p.detach().expand(num_queries, *p.shape).clone() for name, p in gradients.parameters.items()}

    position, device = len(stages) - 1, settings.device
    stage, own = stages[position], rows[stages[position].name]
    gradients, _, vectors = open_stage(stages, position, rows, anything, settings, unfused(models), None)
    run = RecordedRun(stage, own, gradients, settings, _NoProducts())
    sizes = [sum(int(own.lengths[own.pieces_of(b.rows)].sum()) for b in step) for step in run.steps.micro_batches]
    usable = np.flatnonzero(~np.asarray(run.steps.skipped) & (np.asarray(sizes) > 0))
    step = int(usable[np.abs(np.asarray(sizes)[usable] - np.mean(np.asarray(sizes)[usable])).argmin()])
    stage.load_weights(gradients.model, "initial")
    before = Snapshot({name: p.detach().clone() for name, p in run.trained.items()}, run.first_state())
    state = run.next(step, before)
    scores = np.zeros((num_queries, stage.num_rows))
    forces = {name: vectors[name] for name in run.trained}
    few = {name: vector[:_QUERIES] for name, vector in forces.items()}
    ones = {name: torch.ones((), dtype=p.dtype, device=p.device) for name, p in run.trained.items()}

    def products(made: Products, vectors: Vectors) -> None:
        for _, batch, normalizer in run.micro_batches(step):
            made(gradients, batch, vectors, normalizer, ones)

    try:
        query = _shortest(lambda: products(ExactProducts(), few), device) / min(_QUERIES, num_queries)
    except RuntimeError:  # an operation whose derivative cannot be differentiated, or too little memory
        query = float("inf")
    return ReplayCost(
        _shortest(lambda: run.next(step, before), device),
        _shortest(lambda: run.step_back(step, state, vectors, None, scores), device),
        _shortest(lambda: products(SampledProducts(_DRAWS, probes=settings.probes), forces), device) / _DRAWS,
        query,
        sizes[step],
    )


class _NoProducts(Products):
    """Leaves the curvature out."""

    exact = True

    def __call__(self, gradients, batch, forces, normalizer, step_sizes=None, seed=0) -> Vectors:
        """See `Products`."""
        return {}


def _shortest(work: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(2):
        start = clock(device)
        work()
        seconds.append(clock(device) - start)
    return min(seconds)
