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
"""Curvature across all layers at once, in the space of `n` sampled-label gradients.

With `H = S^T S`, the flow never leaves `q + span(S^T)`: everything it needs is the `n x n` matrix `K = S P S^T` and
`b = S P q`. Without weight decay, `K = U diag(e) U^T`, and

    exp(-s P H)^T q = q - S^T U diag(f(e)) U^T b,                 f(e) = (1 - exp(-s e)) / e
    F_r^T q         = P (s q + S^T U diag((f(e) - s) / e) U^T b).

Weight decay that differs between parameters is treated exactly: parameters that share a rate `l` form a group, each
group has its own `K_l` and `b_l`, and the flow closes on the groups' spans (`SampleSpace`).

Two passes over the samples, one group of parameters at a time, so that `S` is never stored: the first accumulates `K`
and `b`, the second `S^T (coefficients)`. Directions that the samples do not span get their curvature from the *tail*:
each parameter's eigenvalue-corrected block (`block.py`), fitted on the same samples and applied to `q` first,
`exp ~ exp_joint exp_block`, `F_r ~ F_r,joint F_r,block / s` (a splitting of the flow).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..gradients.rows import as_rows
from .block import fit_block
from .flow import Flow, decayed, forced, forced_integral, integral
from .sample import FisherSample, combine


Vectors = dict[str, torch.Tensor]

# Weight-decay rates whose effects over the segment differ by less than this are treated as one in the samples' span
# (not in the free decay, which stays exact): half the modes, for an error far below that of sampling labels.
_MERGE_RATES = 1e-3

# Modes of K below this share of the largest carry no more than rounding.
_RANK_TOLERANCE = 1e-12


class SampleSpace:
    """The flow on the span of the samples.

    Args:
        grams: weight-decay rate `l` -> `K_l = S_l P_l S_l^T` over the parameters with that rate, float64 `[n, n]`.
        projections: rate -> `b_l = S_l P_l q_l`, float64 `[n, vectors]`.
        length: `s`.
    """

    def __init__(
        self, grams: Mapping[float, torch.Tensor], projections: Mapping[float, torch.Tensor], length: float
    ) -> None:
        self.length = length
        if (max(grams) - min(grams)) * length < _MERGE_RATES:
            mean = sum(float(gram.trace()) * rate for rate, gram in grams.items())
            mean /= sum(float(gram.trace()) for gram in grams.values()) or 1.0
            grams, projections = {mean: sum(grams.values())}, {mean: sum(projections.values())}
        bases, rates, start = [], [], []
        for rate, gram in grams.items():
            values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
            keep = values > _RANK_TOLERANCE * values.max().clamp_min(torch.finfo(values.dtype).tiny)
            values, vectors = values[keep], vectors[:, keep]
            bases.append(vectors * values.sqrt())  # P^{1/2} S_l^T has the orthonormal basis S_l^T U E^{-1/2}
            rates.append(torch.full_like(values, rate))
            start.append((vectors / values.sqrt()).T @ projections[rate])
        joined = torch.cat(bases, dim=1)  # (n, modes)
        # P^{1/2} H P^{1/2} + Lambda on the groups' spans; with one group it is diagonal already.
        if len(bases) == 1:
            self.modes, self.response, self.start = joined.square().sum(dim=0) + rates[0], joined, start[0]
        else:
            generator = joined.T @ joined + torch.diag(torch.cat(rates))
            self.modes, rotation = torch.linalg.eigh(generator)
            self.response = joined @ rotation  # S P^{1/2} times the eigenmodes, (n, modes)
            self.start = rotation.T @ torch.cat(start)  # P^{1/2} q in the eigenmodes, (modes, vectors)

    def propagated(self, rate: float) -> torch.Tensor:
        """`C` with `q' = exp(-s l) q + S^T C` on parameters that decay at `rate`: `[n, vectors]`."""
        return -self.response @ (forced(self.modes, rate, self.length)[:, None] * self.start)

    def scoring(self, rate: float) -> torch.Tensor:
        """`C` with `x = P (integral(l) q + S^T C)` on parameters that decay at `rate`: `[n, vectors]`."""
        return -self.response @ (forced_integral(self.modes, rate, self.length)[:, None] * self.start)


@dataclass
class JointCurvature:
    """`joint` curvature (see the module).

    Attributes:
        tail: apply the block-diagonal tail first.
        memory_budget: bytes that the columns of `S` held at once may take.
    """

    tail: bool = True
    memory_budget: int = 2**30

    def propagate(self, vectors: Vectors, flow: Flow, sample: FisherSample) -> tuple[Vectors, Vectors]:
        """Carry query vectors through a segment.

        Args:
            vectors: `q`, name -> `[queries, *parameter.shape]`; left unchanged.
            flow: the segment's constants.
            sample: `S` at the segment's weights.

        Returns:
            `x = F_r^T q` (only on parameters that the segment trains) and `q' = exp(-s (P H + Lambda))^T q`.
        """
        groups = groups_within(self.memory_budget, vectors, sample)
        grams: dict[float, torch.Tensor] = {}
        projections: dict[float, torch.Tensor] = {}
        scoring, carried, kept = {}, {}, {}
        for names in groups:
            trained = [name for name in names if flow.trains(name)]
            columns = sample.matrices(trained if len(groups) > 1 else names)
            for name in trained:
                scoring[name], carried[name] = self._tail(name, vectors[name], columns[name], flow, sample)
                self._accumulate(name, columns[name], scoring[name], carried[name], flow, grams, projections)
            carried.update({name: vectors[name].clone() for name in names if name not in carried})
            kept = columns if len(groups) == 1 else {}
        space = SampleSpace(grams, projections, flow.length)
        count = len(next(iter(vectors.values())))
        for names in groups:
            self._finish(names, kept, space, count, scoring, carried, flow, sample)
        return scoring, carried

    def _tail(self, name: str, q: torch.Tensor, columns: torch.Tensor, flow: Flow, sample: FisherSample):
        """`q` after the split-off factors, once for scoring and once for carrying on; always fresh tensors."""
        scoring, carried = q, q
        decay, length = flow.decay[name].to(q), flow.length
        if decay.dim():  # elementwise decay has no common rate with anything: split it off
            scoring = scoring * (integral(decay, length) / length)
            carried = carried * decayed(decay, length)
        if self.tail:
            block = fit_block(columns, flow.preconditioner[name], name in sample.gradients.vocabulary)
            scoring = block.apply(scoring, lambda mu: integral(mu, length) / length)
            carried = block.apply(carried, lambda mu: decayed(mu, length))
        return (scoring.clone() if scoring is q else scoring), (carried.clone() if carried is q else carried)

    def _accumulate(self, name, columns, scoring, carried, flow, grams, projections) -> None:
        """Add one parameter's share of `K` and `b`; float64, as thousands of terms of one sign add up."""
        rate = _common_rate(flow, name)
        weighted = as_rows(flow.preconditioner[name].apply(columns))
        gram = (weighted @ as_rows(columns).T).double()
        both = as_rows(torch.cat([scoring, carried]))
        projection = (weighted @ both.T.to(weighted)).double()
        grams[rate] = grams[rate] + gram if rate in grams else gram
        projections[rate] = projections[rate] + projection if rate in projections else projection

    def _finish(self, names, kept, space, count, scoring, carried, flow, sample) -> None:
        """Second pass over one group: add `S^T (coefficients)`."""
        rates = {name: _common_rate(flow, name) for name in names}
        by_rate = {
            rate: torch.cat([space.scoring(rate)[:, :count], space.propagated(rate)[:, count:]], dim=1)
            for rate in set(rates.values())
        }
        coefficients = {name: by_rate[rate] for name, rate in rates.items()}
        moved = {} if kept else sample.combine(coefficients)
        for name in names:
            change = combine(kept.pop(name), coefficients[name]) if kept else moved.pop(name)
            rate = torch.tensor(rates[name], dtype=torch.float64)
            carried[name].mul_(float(decayed(rate, flow.length))).add_(change[count:])
            if name in scoring:
                scoring[name].mul_(float(integral(rate, flow.length))).add_(change[:count])
                scoring[name] = flow.preconditioner[name].apply(scoring[name])

    def num_passes(self, sizes: Sequence[int], num_samples: int, element_size: int = 4) -> int:
        """Passes over the samples for parameters of the given sizes: 1 if `S` fits the budget, else 2 per group."""
        groups, room = 1, self.memory_budget
        for size in sizes:
            needed = size * num_samples * element_size
            if needed > room and room < self.memory_budget:
                groups, room = groups + 1, self.memory_budget
            room -= needed
        return 1 if groups == 1 else 2 * groups


def groups_within(memory_budget: int, vectors: Vectors, sample: FisherSample) -> list[list[str]]:
    """Parameters in groups whose columns of `S` fit the memory budget; one of them alone may exceed it."""
    groups: list[list[str]] = [[]]
    room = memory_budget
    for name in vectors:
        parameter = sample.gradients.parameters[name]
        size = sample.size * parameter.numel() * parameter.element_size()
        if size > room and groups[-1]:
            groups.append([])
            room = memory_budget
        groups[-1].append(name)
        room -= size
    return groups


def _common_rate(flow: Flow, name: str) -> float:
    decay = flow.decay[name]
    return 0.0 if decay.dim() else float(decay)
