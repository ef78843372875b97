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
from .unrolled import RecordedRun, unfused
from .updates import Snapshot


_DRAWS, _QUERIES = 2, 6
"""Draws and queries that steps are timed with."""

_LONG = 0.5
"""Seconds that are told apart from noise at once, and with two queries."""


@dataclass(frozen=True)
class ReplayCost:
    """Seconds of one step.

    Attributes:
        forward: repeating it, as often as is needed.
        backward: going back through it, without products with its curvature.
        draw: of `SampledProducts`, for all queries.
        first: going back through it with exact products, for one query; infinite without second derivatives, or where
            they were not timed.
        query: the same for each other query.
        tokens: of its rows, or what else the lengths of rows count.
    """

    forward: float
    backward: float
    draw: float
    first: float
    query: float
    tokens: int

    def sampled(self, draws: int) -> float:
        """Seconds a token of `stepwise`."""
        return (self.forward + self.backward + draws * self.draw) / self.tokens

    def exact(self, queries: int) -> float:
        """Seconds a token of `unrolled`."""
        return (self.forward + self.first + (queries - 1) * self.query) / self.tokens


def replay_cost(
    stages: Sequence[StageRecord],
    rows: Mapping[str, Any],
    num_queries: int,
    settings: WalkSettings,
    models: Callable[[StageRecord], nn.Module],
    exact: bool = True,
) -> ReplayCost:
    """Time a step of the last stage, of average size, twice if it is short; the shorter times count.

    Args:
        stages, rows, settings, models: see `walk`.
        num_queries: asked.
        exact: whether exact products are timed, which take the memory that they will take in the replay.
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
    ones = {name: torch.ones((), dtype=p.dtype, device=p.device) for name, p in run.trained.items()}

    def sampled() -> None:
        for _, batch, normalizer in run.micro_batches(step):
            SampledProducts(_DRAWS, probes=settings.probes)(gradients, batch, forces, normalizer, ones)

    def back(products: Products, queries: int) -> None:
        run.products = products
        asked = {name: vector[:queries].clone() for name, vector in vectors.items()}
        run.step_back(step, state, asked, {}, scores[:queries])

    first = more = float("inf")
    several = min(_QUERIES, num_queries)
    try:
        if exact:
            first = _shortest(lambda: back(ExactProducts(), 1), device)
            several = min(several, 2) if first > _LONG else several
            more = _shortest(lambda: back(ExactProducts(), several), device) if several > 1 else first
    except RuntimeError:  # an operation whose derivative cannot be differentiated, or too little memory
        first = more = float("inf")
    return ReplayCost(
        (1 if run.stride == 1 else 2) * _shortest(lambda: run.next(step, before), device),
        _shortest(lambda: back(_NoProducts(), num_queries), device),
        _shortest(sampled, device) / _DRAWS,
        first,
        max(0.0, more - first) / max(several - 1, 1) if first < float("inf") else float("inf"),
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
    while len(seconds) < 2 and sum(seconds) < _LONG:
        start = clock(device)
        work()
        seconds.append(clock(device) - start)
    return min(seconds)
