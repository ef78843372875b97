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
"""A segment seen from the rows: how the weights at its end answer to what enters it.

`propagate` carries a query backwards, `q -> x = F_r^T q` and `q' = exp(-s (P H + Lambda))^T q`. The transpose of the
same linear map goes forwards: a row's gradient `g` of the segment and a displacement `y` of the weights at its start
become the displacement at its end,

    y' = F_r g + exp(-s (P H + Lambda)) y,        so that  <q, y'> = <x, g> + <q', y>  for every q.

Carried on to the end of training, `y` is the predicted change of the final weights had the row been left out (up to
the sign convention of scores), and a query is answered by one dot product with it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..gradients.contraction import products
from ..gradients.rows import as_rows
from .block import Block, as_matrices, rotate, unrotate
from .diagonal import DiagonalCurvature
from .ekfac import EKFACCurvature
from .flow import Flow, decayed, forced, forced_integral, integral
from .joint import JointCurvature, SampleSpace, Whitened, groups_within
from .sample import FisherSample, combine
from .simple import IdentityCurvature


Vectors = dict[str, torch.Tensor]
Response = Callable[[Vectors, Vectors], Vectors]
"""`(g, y) -> y'`: name -> `[rows, *parameter.shape]`; `g` of the parameters that the segment trains, `y` of all."""


def make_response(curvature: Any, flow: Flow, sample: FisherSample) -> Response:
    """The transpose of `curvature.propagate` for one segment; what it fits on the sample is fitted once.

    The segment's weights have to be in the model whenever it is called.
    """
    if type(curvature) is JointCurvature:
        return JointResponse(curvature, flow, sample)
    if type(curvature) is IdentityCurvature:
        return partial(_through_blocks, flow, {})
    if type(curvature) in (EKFACCurvature, DiagonalCurvature):
        names = [name for name in sample.gradients.parameters if flow.trains(name)]
        return partial(_through_blocks, flow, curvature.fit(names, flow, sample))
    return partial(_by_autograd, curvature, flow, sample)


class JointResponse:
    """The transpose of `JointCurvature.propagate`: of the joint step first, then of the tail.

    Args:
        curvature, flow, sample: as `propagate` takes them.
    """

    def __init__(self, curvature: JointCurvature, flow: Flow, sample: FisherSample) -> None:
        self.curvature, self.flow, self.sample = curvature, flow, sample
        self.blocks: dict[str, Block] = {}
        self.space: SampleSpace | None = None
        self.lifts: dict[float, torch.Tensor] = {}

    def __call__(self, own: Vectors, arrived: Vectors) -> Vectors:
        """See `Response`."""
        groups = groups_within(self.curvature.memory_budget, arrived, self.sample)
        fitting, grams = self.space is None, {}
        dots: dict[float, list] = {}  # rate -> S P g and S y, [samples, rows]
        columns: Vectors = {}
        for names in groups:
            columns, made = {}, self.sample.columns(names)
            for name in names:
                columns[name] = made[name].whole()
                if fitting and self.curvature.tail and name in own:
                    whitened = Whitened(made[name], self.flow.preconditioner[name], 0)
                    self.blocks[name] = whitened.fit(name in self.sample.gradients.vocabulary)
                self._measure(name, columns[name], own, arrived, dots, grams if fitting else None)
                del made[name]
                if len(groups) > 1:
                    del columns[name]
        if fitting:
            self._fit(grams)
        coefficients = self._coefficients(own, dots, len(next(iter(arrived.values()))))
        by_name = {name: coefficients[_rate(self.flow, name)] for name in own}
        if len(groups) == 1:
            moved = {name: combine(columns[name], by_name[name]) for name in own}
        else:
            moved = self.sample.combine(by_name)
        del columns
        return {name: self._finish(name, own, arrived, moved) for name in list(arrived)}

    def _measure(self, name: str, columns: torch.Tensor, own: Vectors, arrived: Vectors, dots, grams) -> None:
        """Products of the samples with the rows, and on the first call what the curvature needs of the samples."""
        rate, preconditioner = _rate(self.flow, name), self.flow.preconditioner[name]
        of_own, of_arrived = dots.setdefault(rate, [0, 0])
        if name in own:
            weighted = as_rows(preconditioner.apply(columns))
            of_own = of_own + products(weighted, as_rows(own[name])).double()
            if grams is not None:
                grams[rate] = grams.get(rate, 0) + products(weighted, as_rows(columns)).double()
        dots[rate] = [of_own, of_arrived + products(as_rows(columns), as_rows(arrived[name])).double()]

    def _fit(self, grams: dict[float, torch.Tensor]) -> None:
        """`lifts[l]`: what turns `b_l = S_l P_l q_l` into the eigenmodes, `[modes, samples]`."""
        size, rates = self.sample.size, list(grams)
        like = next(iter(grams.values()))
        spread = {rate: like.new_zeros(size, size * len(rates)) for rate in rates}
        for place, rate in enumerate(rates):
            spread[rate][:, place * size : (place + 1) * size] = torch.eye(size).to(like)
        self.space = SampleSpace(grams, spread, self.flow.length)
        parts = self.space.start.split(size, dim=1)
        self.lifts = dict(zip(rates, parts, strict=True))

    def _coefficients(self, own: Vectors, dots: dict[float, list], count: int) -> dict[float, torch.Tensor]:
        """Rate -> `D` with `y' = ... + P S^T D`: for the rows' own gradients, then for what arrived."""
        space, length = self.space, self.flow.length
        result = []
        for position, kernel in enumerate((forced_integral, forced)):
            modes = space.modes.new_zeros(len(space.modes), count)
            for rate, found in dots.items():
                if isinstance(found[position], torch.Tensor):
                    modes -= kernel(space.modes, rate, length)[:, None] * (space.response.T @ found[position])
            result.append(modes)
        both = torch.cat(result, dim=1)
        return {rate: lift.T @ both for rate, lift in self.lifts.items()}

    def _finish(self, name: str, own: Vectors, arrived: Vectors, moved: Vectors) -> torch.Tensor:
        flow, length = self.flow, self.flow.length
        rate = torch.tensor(_rate(flow, name), dtype=torch.float64)
        carried = arrived[name] * float(decayed(rate, length))
        if name not in own:
            return carried
        change, preconditioner = moved.pop(name), flow.preconditioner[name]
        count = len(carried)
        carried += preconditioner.apply(change[count:])
        answer = preconditioner.apply(change[:count].add_(own[name], alpha=float(integral(rate, length))))
        if name in self.blocks:
            block = self.blocks[name]
            answer = transposed(block, answer, lambda mu: integral(mu, length) / length)
            carried = transposed(block, carried, lambda mu: decayed(mu, length))
        decay = flow.decay[name].to(carried)
        if decay.dim():
            answer, carried = answer * (integral(decay, length) / length), carried * decayed(decay, length)
        return carried.add_(answer)


def transposed(block: Block, vectors: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The transpose of `Block.apply`: `P^{1/2} function(A) P^{-1/2}`."""
    change = rotate(as_matrices(block.preconditioner.inverse_root(vectors)), block.left, block.right)
    change.mul_(function(block.eigenvalues) - 1)
    change = unrotate(change, block.left, block.right).reshape(vectors.shape)
    return vectors + block.preconditioner.root(change)


def _through_blocks(flow: Flow, blocks: dict[str, Block], own: Vectors, arrived: Vectors) -> Vectors:
    """The transpose of `through_blocks`, or without blocks that of no curvature."""
    result, length = {}, flow.length
    for name, y in arrived.items():
        decay = flow.decay[name].to(y)
        block = blocks.get(name)
        carried = y if block is None else transposed(block, y, lambda mu: decayed(mu, length))
        result[name] = carried * decayed(decay, length)
        if name not in own:
            continue
        answer = flow.preconditioner[name].apply(own[name])
        if block is None:
            result[name] += answer * integral(decay, length)
            continue
        rate, after = decay, None
        if decay.dim() and block.is_elementwise:
            rate = decay.view_as(block.eigenvalues)
        elif decay.dim():
            rate, after = torch.zeros_like(decay.sum()), integral(decay, length) / length
        answer = transposed(block, answer, lambda mu, r=rate: integral(mu + r, length))
        result[name] += answer if after is None else answer * after
    return result


def _by_autograd(curvature: Any, flow: Flow, sample: FisherSample, own: Vectors, arrived: Vectors) -> Vectors:
    """Of any curvature: the transpose of a linear map is its vector-Jacobian product."""
    with torch.enable_grad():
        queries = {name: torch.zeros_like(y).requires_grad_(True) for name, y in arrived.items()}
        scoring, carried = curvature.propagate(queries, flow, sample)
        total = sum((carried[name] * y).sum() for name, y in arrived.items())
        total = total + sum((scoring[name] * g).sum() for name, g in own.items())
        found = torch.autograd.grad(total, list(queries.values()), allow_unused=True)
    return {name: torch.zeros_like(y) if g is None else g for (name, y), g in zip(arrived.items(), found, strict=True)}


def _rate(flow: Flow, name: str) -> float:
    """A parameter's decay rate; elementwise decay is split off and has none."""
    decay = flow.decay[name]
    return 0.0 if decay.dim() else float(decay)
