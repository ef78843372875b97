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

One pass over the samples for each group of parameters whose columns of `S` fit the memory budget (`columns.py`)
accumulates `K` and `b`, and one more pass `S^T (coefficients)`; where all fit at once, the columns serve for both.
Directions that the samples do not span get their curvature from the *tail*: each parameter's eigenvalue-corrected
block (`block.py`), fitted on the same samples and applied to `q` first, `exp ~ exp_joint exp_block`,
`F_r ~ F_r,joint F_r,block / s` (a splitting of the flow). Of a large parameter held factored the block is that of the
samples whitened by the rank-one factorisation of `P` (`factored.py`), at a fraction of the cost.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol, TypeVar

import torch
from scipy.linalg.lapack import dpstrf

from ..budget import give_back
from ..gradients.contraction import add_combined, add_factor_dots, add_factor_sums, products
from ..gradients.rows import as_rows
from ..gradients.rules import Call, Rule
from .block import Block, fit_block_in_parts, fit_whitened, negligible
from .columns import Columns, column_bytes
from .eigen import eigh
from .factored import fit_factored, is_cheaper, outer_products
from .flow import Flow, decayed, forced, forced_integral, integral
from .preconditioner import Preconditioner
from .sample import FisherSample, combine


Vectors = dict[str, torch.Tensor]
_Name = TypeVar("_Name", bound=Hashable)

PIECE_BYTES = 2**25
"""Dense columns that are made of factored ones at once, at most: few enough to stay in a processor's cache."""

# Weight-decay rates whose effects over the segment differ by less than this are treated as one in the samples' span
# (not in the free decay, which stays exact): half the modes, for an error far below that of sampling labels.
_MERGE_RATES = 1e-3

# Modes of K below this share of the largest carry no more than rounding.
_RANK_TOLERANCE = 1e-12


_SPREAD = 8
"""An eigenvalue of a side is the sum of the block's entries along the other side, so that where it is negligible, they
are. For vectors in a narrow type it is enough that they would be if the sum were spread over so many."""


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
        if len(grams) == 1:
            ((rate, gram),) = grams.items()
            values, vectors = eigh((gram + gram.T) / 2)
            keep = values > _RANK_TOLERANCE * values.max().clamp_min(torch.finfo(values.dtype).tiny)
            values, vectors = values[keep], vectors[:, keep]
            self.response = vectors * values.sqrt()  # P^{1/2} S^T has the orthonormal basis S^T U E^{-1/2}
            self.modes = values + rate
            self.start = (vectors / values.sqrt()).T @ projections[rate]
            return
        bases, starts = zip(*(orthonormal_span(gram, projections[rate]) for rate, gram in grams.items()), strict=True)
        joined = torch.cat(bases, dim=1)  # (n, modes)
        rates = torch.cat([joined.new_full((own.shape[1],), rate) for rate, own in zip(grams, bases, strict=True)])
        # P^{1/2} H P^{1/2} + Lambda on the groups' spans.
        self.modes, rotation = eigh(joined.T @ joined + torch.diag(rates))
        self.response = joined @ rotation  # S P^{1/2} times the eigenmodes, (n, modes)
        self.start = rotation.T @ torch.cat(starts)  # P^{1/2} q in the eigenmodes, (modes, vectors)

    def propagated(self, rate: float) -> torch.Tensor:
        """`C` with `q' = exp(-s l) q + S^T C` on parameters that decay at `rate`: `[n, vectors]`."""
        return -self.response @ (forced(self.modes, rate, self.length)[:, None] * self.start)

    def scoring(self, rate: float) -> torch.Tensor:
        """`C` with `x = P (integral(l) q + S^T C)` on parameters that decay at `rate`: `[n, vectors]`."""
        return -self.response @ (forced_integral(self.modes, rate, self.length)[:, None] * self.start)


def orthonormal_span(gram: torch.Tensor, projections: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and vectors in an orthonormal basis of the samples' span, by Gram-Schmidt on the longest that is left.

    That is the pivoted Cholesky decomposition of their products, an order of magnitude cheaper than an eigenbasis.

    Args:
        gram: products of the samples with each other, float64 `[n, n]`.
        projections: of the samples with the vectors, `[n, vectors]`.

    Returns:
        Coordinates of the samples `[n, rank]` and of the vectors `[rank, vectors]`.

    Raises:
        torch.linalg.LinAlgError: if the products are not finite.
    """
    if not torch.isfinite(gram).all():
        raise torch.linalg.LinAlgError("the products of the samples are not finite: are their gradients?")
    own = gram.cpu().numpy()
    factor, order, rank, _ = dpstrf(own, tol=_RANK_TOLERANCE * max(own.diagonal().max(), 0.0), lower=1)
    chosen, rows = torch.from_numpy(order - 1).to(gram.device), torch.from_numpy(factor[:, :rank]).to(gram).tril()
    basis = torch.empty_like(rows)
    basis[chosen] = rows
    start = torch.linalg.solve_triangular(rows[:rank], projections[chosen[:rank]], upper=False)
    return basis, start


class Processes(Protocol):
    """Processes that each have some of the parameters."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over them."""

    def union(self, numbers: Iterable[float], device: torch.device) -> list[float]:
        """The different numbers that they have."""


@dataclass
class JointCurvature:
    """`joint` curvature (see the module).

    Attributes:
        tail: apply the block-diagonal tail first.
        memory_budget: bytes that the columns of `S` held at once may take.
    """

    tail: bool = True
    memory_budget: int = 2**30

    def propagate(
        self,
        vectors: Vectors,
        flow: Flow,
        sample: FisherSample,
        *,
        carry: bool = True,
        consume: bool = False,
        carried: MutableMapping[str, torch.Tensor] | None = None,
        together: Processes | None = None,
    ) -> tuple[Vectors, Vectors]:
        """Carry query vectors through a segment.

        Args:
            vectors: `q`, name -> `[queries, *parameter.shape]`; left unchanged.
            flow: the segment's constants.
            sample: `S` at the segment's weights.
            carry: whether `q'` is wanted; else it is empty, and costs neither time nor memory.
            consume: take the vectors out of `vectors` and use their memory.
            carried: where to put `q'`; a new dictionary by default. If it gives copies, they are held one at a time,
                but where the sample does not fit the memory budget.
            together: processes that have the vectors of other parameters.

        Returns:
            `x = F_r^T q` (only on parameters that the segment trains) and `q' = exp(-s (P H + Lambda))^T q`.
        """
        groups = sample_groups(self.memory_budget, vectors, sample)
        grams: dict[float, torch.Tensor] = {}
        projections: dict[float, torch.Tensor] = {}
        scoring, kept = {}, {}
        carried = {} if carried is None else carried
        count = len(next(iter(vectors.values())))
        wanted = [name for name in vectors if carry or flow.trains(name)]
        for names in groups:
            trained = [name for name in names if flow.trains(name)]
            needed = trained if len(groups) > 1 else [name for name in names if name in wanted]
            columns = sample.columns(needed, self._piece_bytes) if needed else {}
            give_back()
            for name in names:
                q = vectors.pop(name) if consume else vectors[name].clone()
                if name not in trained:
                    carried.update({name: q} if carry else {})
                    continue
                own = Whitened(columns[name], flow.preconditioner[name], self.memory_budget // 2)
                scoring[name], after = self._tail(name, q, own, flow, sample, carry)
                self._accumulate(name, own, [scoring[name], *after], flow, grams, projections)
                del own
                flow.preconditioner[name].forget()
                if after:
                    (carried[name],) = after
                    del after
                give_back(now=False)
                if len(groups) > 1:
                    del columns[name]
            kept = columns if len(groups) == 1 else {}
        if together is not None:
            width, device = count * (2 if carry else 1), next(iter(flow.decay.values())).device
            grams, projections = _of_all(grams, projections, (sample.size, width), device, together)
        grams = {rate: gram.tril() + gram.tril(-1).T for rate, gram in grams.items()}
        space = SampleSpace(grams, projections, flow.length)
        self._finish(wanted, kept, space, count, scoring, carried, flow, sample)
        del columns, kept
        give_back()
        return scoring, carried

    @property
    def _piece_bytes(self) -> int:
        """Dense columns made at once of factored ones, beside what is held."""
        return max(1, min(self.memory_budget // 4, PIECE_BYTES))

    def _tail(
        self, name: str, q: torch.Tensor, samples: "Whitened", flow: Flow, sample: FisherSample, carry: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`q` after the split-off factors, for scoring and, if wanted, for carrying on; `q` itself is changed."""
        decay, length = flow.decay[name].to(sample.gradients.parameters[name]), flow.length
        narrow = q.dtype.itemsize < decay.element_size()
        least = (_SPREAD * negligible(q.dtype) if narrow else negligible(decay.dtype)) / length
        block = samples.fit(name in sample.gradients.vocabulary, least) if self.tail else None
        functions, result = ([decayed] if carry else []) + [_mean_over_time], [q.clone()] if carry else []
        result.append(q)
        if decay.dim():  # elementwise decay has no common rate with anything: split it off
            for function, vectors in zip(functions, result, strict=True):
                vectors.mul_(function(decay, length))
        if block is not None:
            of_modes = [partial(function, length=length) for function in functions]
            together = [[function] for function in of_modes] if decay.dim() else [of_modes]
            moving = [block.moving(some, q.dtype) for some in together]
            del block
            at_once = _vectors_at_once(q, self._piece_bytes)
            parts = [vectors.split(at_once) for vectors in result]
            for own in zip(*parts, strict=True):
                # Without elementwise decay the same vectors for both.
                pairs = zip(own[-len(moving) :], moving, strict=True)
                found = [after for part, each in pairs for after in each.apply(part)]
                for part, after in zip(own, found, strict=True):
                    part.copy_(after)
        return result[-1], result[:-1]

    @staticmethod
    def _accumulate(name, samples: "Whitened", both: list[torch.Tensor], flow: Flow, grams, projections) -> None:
        """Add one parameter's share of `K` (its lower half) and `b`; float64, for thousands of terms of one sign."""
        rate, preconditioner = common_rate(flow, name), flow.preconditioner[name]
        if rate not in grams:
            size, like = samples.columns.size, dict(dtype=torch.float64, device=both[0].device)
            grams[rate] = torch.zeros((size, size), **like)
            projections[rate] = torch.zeros((size, sum(map(len, both))), **like)
        if (outer := samples.outer_products()) is not None:
            dots = outer[0].new_zeros((sum(map(len, both)), samples.columns.size))
            for vectors, own in zip(both, dots.split([len(each) for each in both]), strict=True):
                add_factor_dots(*(factor[:, None] for factor in outer), vectors, own)
            projections[rate] += preconditioner.root(dots).T
            add_gram(outer, grams[rate])
            return
        for part, own in samples.slices(both[0].dtype):
            add_gram([as_rows(own)], grams[rate])
            vectors = torch.cat([each[:, part] if each.dim() > 1 else each for each in both]).to(own)
            projections[rate] += products(as_rows(own), as_rows(preconditioner.root_of(vectors, part)))

    def _finish(
        self,
        names: list[str],
        kept: dict[str, Columns],
        space: SampleSpace,
        count: int,
        scoring: Vectors,
        carried: MutableMapping[str, torch.Tensor],
        flow: Flow,
        sample: FisherSample,
    ) -> None:
        """Add `S^T (coefficients)` to the vectors, in place: from the columns if they were kept, else in a pass."""
        rates = {name: common_rate(flow, name) for name in names}
        of_scoring = {rate: space.scoring(rate)[:, :count] for rate in set(rates.values())}
        # After the scoring vectors come those that are carried on, if they are.
        of_carried = {rate: space.propagated(rate)[:, count:] for rate in set(rates.values())}

        def targets_of(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
            rate, found = torch.tensor(rates[name], dtype=torch.float64), []
            if name in scoring:
                vectors = scoring[name].mul_(float(integral(rate, flow.length)))
                found.append((of_scoring[rates[name]], vectors))
            if name in carried:
                vectors = carried[name].mul_(float(decayed(rate, flow.length)))
                found.append((of_carried[rates[name]], vectors))
            return found

        if kept:
            for name in names:
                own = targets_of(name)
                _add_columns(kept.pop(name), own)
                if name in carried:
                    carried[name] = own[-1][1]
        else:
            targets = {name: targets_of(name) for name in names}
            _add_by_pass(sample, targets)
            carried.update({name: targets[name][-1][1] for name in names if name in carried})
        for name, vectors in scoring.items():
            for part in vectors.split(_vectors_at_once(vectors, self._piece_bytes)):
                part.copy_(flow.preconditioner[name].apply(part))

    def num_passes(self, sizes: Sequence[int]) -> int:
        """Passes over the samples: 1 if `S` fits the budget, else one for each group of parameters and one more.

        Args:
            sizes: bytes that each parameter's columns of `S` take (`column_bytes`).
        """
        groups = len(grouped(self.memory_budget, dict(enumerate(sizes))))
        return 1 if groups == 1 else groups + 1


class Whitened:
    """One parameter's columns of `S P^{1/2}`: what the tail's block, `K` and `b` are made of.

    Args:
        columns: of `S`.
        preconditioner: `P`.
        max_bytes: all of them are made once, and not once for each use, if they take no more than this.
    """

    def __init__(self, columns: Columns, preconditioner: Preconditioner, max_bytes: int) -> None:
        self.columns, self.preconditioner = columns, preconditioner
        self.whole = not preconditioner.is_elementwise
        self.from_factors = is_cheaper(columns, preconditioner)
        self.held: torch.Tensor | None = None
        size = columns.size * columns.like.numel() * columns.like.element_size()
        if not self.from_factors and size <= max_bytes:
            self.held = preconditioner.root(columns.whole())

    def fit(self, diagonal_left: bool, least: float = 0.0) -> Block:
        """The tail's block; `least` as `fit_factored` has it."""
        if self.from_factors:
            return fit_factored(self.columns, self.preconditioner, diagonal_left, least)
        shape = self.columns.shape
        if self.held is not None:
            return fit_whitened(lambda: [self.held], shape, self.preconditioner, diagonal_left, least)
        parts = lambda: (part for _, part in self.columns.samples())  # noqa: E731
        return fit_block_in_parts(parts, shape, self.preconditioner, diagonal_left, least)

    def outer_products(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`U` and `V` of columns `u v^T`, whose products with each other are those of the factors; else `None`."""
        pair = outer_products(self.columns) if self.preconditioner.is_constant else None
        return None if pair is None else (self.preconditioner.root(pair[0]), pair[1])

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of the parameter's first axis, and their columns `[samples, part, ...]`; in `dtype`, if narrower."""
        if self.held is not None:
            yield slice(None), _narrower(self.held, dtype)
            return
        narrow = dtype if dtype.itemsize < self.columns.like.element_size() else None
        for part, own in self.columns.slices(whole=self.whole, dtype=narrow):
            yield part, self.preconditioner.root_of(own, part)


def _of_all(
    grams: Mapping[float, torch.Tensor],
    projections: Mapping[float, torch.Tensor],
    shape: tuple[int, int],
    device: torch.device,
    together: Processes,
) -> tuple[dict[float, torch.Tensor], dict[float, torch.Tensor]]:
    """`K` and `b` summed over processes, each of which may have no parameter of some rates."""
    like, sizes = dict(dtype=torch.float64, device=device), ((shape[0], shape[0]), shape)
    rates = together.union(grams, device)
    return tuple(
        {rate: together.total(own[rate] if rate in own else torch.zeros(size, **like)) for rate in rates}
        for own, size in zip((grams, projections), sizes, strict=True)
    )


GRAM_BLOCK = 256
"""Samples whose products with each other are taken at once: fewer are no faster, more do what symmetry saves."""


def add_gram(factors: Sequence[torch.Tensor], total: torch.Tensor) -> None:
    """Add `R R^T` to `total`, in blocks: those of its lower half only, for it is symmetric.

    Args:
        factors: `[rows, size]`; several stand for the rows' outer products, whose products multiply.
        total: `[rows, rows]`.
    """
    for start in range(0, len(total), GRAM_BLOCK):
        own = slice(start, min(start + GRAM_BLOCK, len(total)))
        total[own, : own.stop] += prod(products(rows[own], rows[: own.stop]) for rows in factors)


def _mean_over_time(rate: torch.Tensor, length: float) -> torch.Tensor:
    return integral(rate, length) / length


def _vectors_at_once(vectors: torch.Tensor, max_bytes: int) -> int:
    """How many of the vectors take so many bytes."""
    return max(1, int(max_bytes // max(1, vectors[0].numel() * vectors.element_size())))


def _add_columns(columns: Columns, targets: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Add `S^T C` of one parameter to vectors, for pairs of `C [samples, vectors]` and the vectors."""
    if (outer := outer_products(columns)) is not None:
        for coefficients, vectors in targets:
            add_factor_sums(*(factor[:, None] for factor in outer), coefficients.T.to(vectors), vectors)
        return
    narrow = targets and targets[0][1].dtype.itemsize < columns.like.element_size()
    for part, own in columns.slices(dtype=targets[0][1].dtype if narrow else None):
        for coefficients, vectors in targets:
            target = vectors[:, part] if vectors.dim() > 1 else vectors
            target += combine(own, coefficients)


def _narrower(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another type, if that is narrower."""
    return tensor.to(dtype) if dtype.itemsize < tensor.element_size() else tensor


def _add_by_pass(sample: FisherSample, targets: Mapping[str, Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """The same for all parameters by one pass that stores no `S`."""

    def add(name: str, samples: slice, rule: Rule, call: Call) -> None:
        for coefficients, vectors in targets[name]:
            own = coefficients[samples] * sample.scale
            add_combined(rule, call, samples.stop - samples.start, own, vectors)

    def add_rows(name: str, samples: slice, grads: torch.Tensor) -> None:
        for coefficients, vectors in targets[name]:
            vectors += combine(grads, coefficients[samples] * sample.scale)

    sample.stream(list(targets), add, add_rows)


def sample_groups(memory_budget: int, names: Iterable[str], sample: FisherSample) -> list[list[str]]:
    """Parameters in groups whose columns of `S`, held as what takes less, fit the memory budget."""
    gradients = sample.gradients
    sizes = {
        name: column_bytes(
            gradients.parameters[name], sample.size, sample.tokens_of(name), gradients.rules(name), sample.dtype
        )
        for name in names
    }
    return grouped(memory_budget, sizes)


def groups_within(memory_budget: int, vectors: Iterable[str], sample: FisherSample) -> list[list[str]]:
    """Parameters in groups whose dense columns of `S` fit the memory budget."""
    parameters = sample.gradients.parameters
    sizes = {name: sample.size * parameters[name].numel() * parameters[name].element_size() for name in vectors}
    return grouped(memory_budget, sizes)


def grouped(memory_budget: int, sizes: Mapping[_Name, int]) -> list[list[_Name]]:
    """Names in groups, in order, whose sizes add up to no more than the budget; one alone may exceed it."""
    groups: list[list[_Name]] = [[]]
    room = memory_budget
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = memory_budget
        groups[-1].append(name)
        room -= size
    return groups


def common_rate(flow: Flow, name: str) -> float:
    """A parameter's decay rate; elementwise decay is split off and has none."""
    decay = flow.decay[name]
    return 0.0 if decay.dim() else float(decay)
