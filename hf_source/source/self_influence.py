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
"""Self-influence: a row's score for its own loss, for every row at the cost of a few passes.

Scoring all `N` rows as queries would take `N` query vectors through every segment. Instead each row meets itself in
each segment,

    self(m) = sum over segments of  (w_m / s)  grad l_m(theta_l)^T  F_r(H_l)  grad l_m(theta_l),

which leaves two things out: what later segments do to what was learnt (`exp(-s P H)` after the segment, which only
makes it smaller), and that the loss in question is that of the final weights rather than of the segment's. With one
segment whose weights hardly move nothing is left out. It is Source (Bae et al. 2024, arXiv 2405.12186) in the place of
the gradient's square norm of TracIn's self-influence (Pruthi et al. 2020, arXiv 2002.08484, section 4.1), which it is
for `curvature="identity"` and SGD. Unit: nats. It is used to rank rows (mislabelled, rare, memorised ones first).

For `identity` and `ekfac` a row's gradient meets each parameter's block alone. `joint` needs the rows' products with
the sample, `S P grad l_m`: as many passes over the rows as there are groups of parameters in the memory budget.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..budget import Parts
from ..curvature import EKFACCurvature, FisherSample, Flow, IdentityCurvature, JointCurvature, SampleSpace, fit_block
from ..curvature.flow import integral
from ..curvature.joint import groups_within
from ..gradients import RowGradients
from ..gradients.contraction import products
from ..gradients.rows import Pass, as_rows
from ..recording import StageRecord
from .stages import WalkSettings
from .walk import draw_sample, segment_flow


Apply = Callable[[str, torch.Tensor], torch.Tensor]
Batches = Sequence[np.ndarray]

# Rows whose modes of the sample are held at once, float64 [samples, rows].
_ROWS_AT_ONCE = 4096


def self_influence(stage: StageRecord, rows: Any, gradients: RowGradients, settings: WalkSettings) -> np.ndarray:
    """Self-influence of a stage's rows (see the module).

    Args:
        stage: complete.
        rows: its `StageRows`. Of a row in several pieces (packed sequences), each piece meets itself.
        gradients: engine over the parameters that the stage trains; its weights are changed.
        settings: of the walk.

    Returns:
        float64 `[rows]`: this process's share (zeros elsewhere).
    """
    total = np.zeros(len(rows.row))
    for segment in stage.segments:
        settings.together.settle()  # others may still need the weights of the segment before
        stage.load_weights(gradients.model, segment.index)
        flow = segment_flow(segment, gradients, settings)
        if flow.length <= 0:
            continue
        weights = segment.row_weights()[rows.example]
        sample = draw_sample(
            rows, weights, gradients, settings, settings.seed + 7919 * segment.index, segment.objective_scale()
        )
        names = [name for name in gradients.parameters if flow.trains(name)]
        parts = segment.applied_parts() if settings.momentum else [(names, segment.row_weights())]
        part_of = {name: index for index, (group, _) in enumerate(parts) for name in group}
        by_part = np.stack([by_row[rows.example] for _, by_row in parts])
        visited = np.flatnonzero(by_part.any(axis=0))
        mine, processes = settings.together.index, settings.together.count
        batches = rows.batches(visited)[mine::processes]
        title = f"self-influence {stage.name}, segment {segment.index + 1}"
        turn = _Turn(rows, gradients, settings, batches, part_of, len(parts), title)
        values = _forms(settings.curvature, turn, names, flow, sample).numpy()
        for start, pieces in zip(turn.starts, batches, strict=True):
            own = slice(start, start + len(pieces))
            total[pieces] += (values[:, own] * by_part[:, pieces]).sum(axis=0) / flow.length
    found = np.zeros(stage.num_rows)
    np.add.at(found, rows.row, total)
    return found


class _Turn:
    """Passes over the rows of a segment; rows are numbered as the batches hold them.

    Args:
        rows, gradients, settings: see `self_influence`.
        batches: of pieces.
        part_of: name -> number of the part that it belongs to (parameters with one momentum).
        num_parts: parts.
        title: of the progress bar.
    """

    def __init__(self, rows, gradients, settings, batches: Batches, part_of, num_parts: int, title: str) -> None:
        self.rows, self.gradients, self.settings, self.batches = rows, gradients, settings, batches
        self.part_of, self.num_parts, self.title = part_of, num_parts, title
        sizes = [len(pieces) for pieces in batches]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(int)
        self.count = sum(sizes)
        self._parts = Parts()

    def zeros(self, *leading: int) -> torch.Tensor:
        """float64 `[*leading, rows]`."""
        return torch.zeros((*leading, self.count), dtype=torch.float64)

    def blocks(self, names: Sequence[str]) -> Iterator[tuple[str, slice, torch.Tensor]]:
        """Row gradients of one parameter after another: name, numbers of the rows, `[rows, *shape]`."""
        for start, done in self.passes(names):
            for name, own, grads in self.gradients.blocks(done, names):
                yield name, slice(start + own.start, start + own.stop), grads

    def passes(self, names: Sequence[str]) -> Iterator[tuple[int, Pass]]:
        """Number of the first row, and the finished pass over it and those after it."""
        run = lambda pieces: self.gradients.run(self.rows.collated(pieces, self.settings.device), names)  # noqa: E731
        for start, batch in zip(self.starts, self.settings.progress(self.batches, self.title), strict=True):
            for _, done in self._parts(run, batch):
                yield start, done
                start += done.num_rows


def _forms(curvature: Any, turn: _Turn, names: list[str], flow: Flow, sample: FisherSample) -> torch.Tensor:
    """`g^T F_r g` of every row, apart for each part: float64 `[parts, rows]`."""
    if type(curvature) is IdentityCurvature:
        return _blockwise(turn, names, lambda name, g: _free(flow, name, g))
    if type(curvature) is EKFACCurvature:
        blocks = curvature.fit(names, flow, sample)
        return _blockwise(turn, names, lambda name, g: _through_block(blocks[name], flow, name, g))
    if type(curvature) is JointCurvature:
        return _joint(curvature, turn, names, flow, sample)
    return _as_queries(curvature, turn, names, flow, sample)


def _blockwise(turn: _Turn, names: list[str], apply: Apply) -> torch.Tensor:
    """Each parameter's gradient with itself, through a block of its own."""
    result = turn.zeros(turn.num_parts)
    for name, own, grads in turn.blocks(names):
        result[turn.part_of[name], own] += _dots(apply(name, grads), grads)
    return result


def _free(flow: Flow, name: str, grads: torch.Tensor) -> torch.Tensor:
    """`F_r` of no curvature."""
    return flow.preconditioner[name].apply(grads * integral(flow.decay[name].to(grads), flow.length))


def _through_block(block: Any, flow: Flow, name: str, grads: torch.Tensor) -> torch.Tensor:
    """`F_r` of one block; elementwise decay is split off, as in `EKFACCurvature.propagate`."""
    decay = flow.decay[name].to(block.eigenvalues)
    if decay.dim():
        grads = grads * (integral(decay, flow.length) / flow.length)
        decay = torch.zeros_like(decay.sum())
    return flow.preconditioner[name].apply(block.apply(grads, lambda mu: integral(mu + decay, flow.length)))


def _joint(curvature: JointCurvature, turn: _Turn, names: list[str], flow: Flow, sample: FisherSample) -> torch.Tensor:
    """The flow on the samples' span after the tail (see `curvature/joint.py`), one group of parameters at a time.

    With `x` a row's gradient `g` after the tail, `g^T F_r g = sum over parameters of integral(l) <P g, x>
    + sum over rates l of (S_l P_l g)^T C_l`, `C_l` the coefficients of `x`.
    """
    result = turn.zeros(turn.num_parts)
    grams: dict[float, torch.Tensor] = {}
    after: dict[float, torch.Tensor] = {}  # rate -> S P x, [samples, rows]
    before: dict[tuple[float, int], torch.Tensor] = {}  # rate and part -> S P g
    like = {name: gradients[None] for name, gradients in turn.gradients.parameters.items() if name in names}
    for group in groups_within(curvature.memory_budget, like, sample):
        columns = sample.matrices(group)
        weighted, blocks, rates = {}, {}, {}
        for name in group:
            decay, preconditioner = flow.decay[name], flow.preconditioner[name]
            rates[name] = 0.0 if decay.dim() else float(decay)
            weighted[name] = as_rows(preconditioner.apply(columns[name]))
            gram = products(weighted[name], as_rows(columns[name])).double().cpu()
            grams[rates[name]] = grams.get(rates[name], 0) + gram
            if curvature.tail:
                blocks[name] = fit_block(columns[name], preconditioner, name in sample.gradients.vocabulary)
        for name, own, grads in turn.blocks(group):
            rate, part, x = rates[name], turn.part_of[name], grads
            if flow.decay[name].dim():
                x = x * (integral(flow.decay[name].to(x), flow.length) / flow.length)
            if curvature.tail:
                x = blocks[name].apply(x, lambda mu: integral(mu, flow.length) / flow.length)
            alone = float(integral(torch.tensor(rate, dtype=torch.float64), flow.length))
            result[part, own] += alone * _dots(flow.preconditioner[name].apply(x), grads)
            for store, key, vectors in ((after, rate, x), (before, (rate, part), grads)):
                if key not in store:
                    store[key] = turn.zeros(sample.size)
                store[key][:, own] += products(weighted[name], as_rows(vectors).to(weighted[name])).double().cpu()
    for start in range(0, turn.count, _ROWS_AT_ONCE):
        own = slice(start, start + _ROWS_AT_ONCE)
        space = SampleSpace(grams, {rate: dots[:, own] for rate, dots in after.items()}, flow.length)
        for (rate, part), dots in before.items():
            result[part, own] += (dots[:, own] * space.scoring(rate)).sum(dim=0)
    return result


def _as_queries(curvature: Any, turn: _Turn, names: list[str], flow: Flow, sample: FisherSample) -> torch.Tensor:
    """Any curvature: a batch of rows goes through the segment as queries do. Every batch costs a propagation."""
    result = turn.zeros(turn.num_parts)
    for start, done in turn.passes(list(turn.gradients.parameters)):
        vectors = {
            name: parameter.new_empty((done.num_rows, *parameter.shape))
            for name, parameter in turn.gradients.parameters.items()
        }
        for name, own, grads in turn.gradients.blocks(done):
            vectors[name][own] = grads
        scoring, _ = curvature.propagate(vectors, flow, sample)
        for name in names:
            result[turn.part_of[name], start : start + done.num_rows] += _dots(scoring[name], vectors[name])
    return result


def _dots(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Dot product of matching rows, float64 `[rows]` on the CPU."""
    return (as_rows(first).double() * as_rows(second).double()).sum(dim=1).cpu()
