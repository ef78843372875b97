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
"""One parameter's block of the whitened curvature `A = P^{1/2} H P^{1/2}`, diagonal in a Kronecker basis.

A parameter is seen as a matrix `[m, k]` (a vector as `[m, 1]`). The block is `(L x R) diag(mu) (L x R)^T` with
orthogonal `L [m, m]` and `R [k, k]`, and `mu` the second moment of the whitened sampled-label gradients in that basis
(eigenvalue correction: George et al. 2018, arXiv 1806.03884). In whitened coordinates `P^{-1/2} theta` Adam is plain
gradient flow, so no damping is needed and no inverse is taken.

Two choices of basis: `gradient`, eigenvectors of the second moments `E[G G^T]`, `E[G^T G]` of the whitened gradient
matrices (Shampoo: Gupta et al. 2018, arXiv 1802.09568), exact for a vector; `kfac`, eigenvectors of the covariances of
a module's inputs and output gradients (Martens & Grosse 2015, arXiv 1503.05671; Grosse et al. 2023, arXiv 2308.03296).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from .eigen import eigh
from .preconditioner import Diagonal, Preconditioner


MAX_FULL_SIDE = 4096
"""Largest side of a parameter that gets a full basis; a longer one (a vocabulary) stays diagonal."""

LARGE_SIDE = 512

_NEGLIGIBLE = 100
"""Times the rounding of the data type."""


def negligible(dtype: torch.dtype) -> float:
    """Changes of a direction that are not made: of a narrow type half of what its own rounding changes an entry by."""
    eps = torch.finfo(dtype).eps
    return _NEGLIGIBLE * eps if eps < 1e-4 else eps / 4


@dataclass
class Block:
    """A parameter's block in its basis.

    Attributes:
        left: `L [m, m]`, or `None` for the identity.
        right: `R [k, k]`, or `None` for the identity.
        eigenvalues: `mu [m, k]`, in whitened coordinates.
        preconditioner: `P`.
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    eigenvalues: torch.Tensor
    preconditioner: Preconditioner

    @property
    def is_elementwise(self) -> bool:
        """Whether functions of the block act on each entry alone."""
        return self.left is None and self.right is None and isinstance(self.preconditioner, Diagonal)

    def apply(self, vectors: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`P^{-1/2} function(A) P^{1/2}` on `[vectors, *parameter.shape]`; entries with `P = 0` stay as they are."""
        return self.apply_all(vectors, [function])[0]

    def apply_all(
        self, vectors: torch.Tensor, functions: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The same for several functions, turning the vectors into the block's basis once."""
        return self.moving(functions, vectors.dtype).apply(vectors)

    def moving(self, functions: Sequence[Callable[[torch.Tensor], torch.Tensor]], dtype: torch.dtype) -> "Moving":
        """What functions of the block do to vectors of a type, to be applied to some of them after others.

        Directions of a basis along which no function differs from 1 by more than rounding of sums like these
        (`negligible`) stay as they are, and are not turned: of large blocks that are most.
        """
        changes = [function(self.eigenvalues) - 1 for function in functions]
        least, left, right = max(negligible(changes[0].dtype), negligible(dtype)), self.left, self.right
        if not self.eigenvalues.numel():
            return Moving(None, None, [None for _ in functions], self.preconditioner)
        if left is not None or right is not None:
            moved = sum(change.abs() > least for change in changes) > 0
            rows = _some(moved.any(dim=1), left)
            columns = _some(moved.any(dim=0), right)
            if (rows is not None and not len(rows)) or (columns is not None and not len(columns)):
                return Moving(None, None, [None for _ in functions], self.preconditioner)
            if rows is not None:
                left, changes = left[:, rows], [change[rows] for change in changes]
            if columns is not None:
                right, changes = right[:, columns], [change[:, columns] for change in changes]
        left, right = (None if side is None else side.to(dtype) for side in (left, right))
        return Moving(left, right, [change.to(dtype) for change in changes], self.preconditioner)


@dataclass
class Moving:
    """What functions of a block do.

    Attributes:
        left, right: directions that move, as in `Block`.
        changes: of each function, what it adds along them; `None` where nothing moves.
        preconditioner: `P`.
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    changes: list[torch.Tensor | None]
    preconditioner: Preconditioner

    def apply(self, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Each function on vectors `[count, *parameter.shape]`."""
        if self.changes[0] is None:
            return [vectors.clone() for _ in self.changes]
        turned = rotate(as_matrices(self.preconditioner.root(vectors)), self.left, self.right)
        result = []
        for number, change in enumerate(self.changes):
            own = turned.mul_(change) if number == len(self.changes) - 1 else turned * change
            back = unrotate(own, self.left, self.right).reshape(vectors.shape)
            result.append(self.preconditioner.inverse_root(back).add_(vectors))
        return result


def _some(moved: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor | None:
    """Numbers of the directions of a basis that move; `None` if it is no basis, or all do."""
    return None if basis is None or moved.all() else moved.nonzero()[:, 0]


def as_matrices(vectors: torch.Tensor) -> torch.Tensor:
    """`[count, *shape]` as `[count, m, k]`."""
    if vectors.dim() <= 2:
        return vectors.reshape(len(vectors), -1, 1)
    return vectors.flatten(2)


def rotate(matrices: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """`L^T G R` for each `G` in `[count, m, k]`."""
    if right is not None:
        matrices = matrices @ right
    return matrices if left is None else _from_left(left.T, matrices)


def unrotate(matrices: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """`L G R^T` for each `G` in `[count, m, k]`."""
    if left is not None:
        matrices = _from_left(left, matrices)
    return matrices if right is None else matrices @ right.T


_NARROW = 64
"""Columns of matrices up to which one product with all of them side by side is faster than one with each: thirteen
times for the 8 columns of an adapter on a side of 1,536, not at all from 128 columns on."""


def _from_left(side: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """`side [a, m]` times each of `[count, m, k]`."""
    count, m, k = matrices.shape
    if k == 1:
        return (matrices[..., 0] @ side.T)[..., None]
    if k > _NARROW:
        return side @ matrices
    return (side @ matrices.transpose(0, 1).reshape(m, count * k)).view(len(side), count, k).transpose(0, 1)


class GradientMoments:
    """Accumulates `sum_i G_i G_i^T` and `sum_i G_i^T G_i` of whitened gradient matrices.

    Args:
        shape: the parameter's shape.
        diagonal_left: keep the left side diagonal (a vocabulary, whose entries rarely share a row).
        hold: hold on to matrices while they are few for a side, see `Moment`; they must stay as they are.
    """

    def __init__(self, shape: torch.Size, diagonal_left: bool = False, hold: bool = False) -> None:
        rows = shape[0] if shape else 1
        columns = max(1, shape.numel() // max(rows, 1))
        self.want_left = rows > 1 and rows <= MAX_FULL_SIDE and not diagonal_left
        self.want_right = columns > 1 and columns <= MAX_FULL_SIDE
        self._sides = Moment(hold), Moment(hold)

    @property
    def left(self) -> torch.Tensor | None:
        """`sum_i G_i G_i^T`, `[m, m]`; `None` before anything was added, or if it is not wanted."""
        return self._sides[0].total()

    @property
    def right(self) -> torch.Tensor | None:
        """`sum_i G_i^T G_i`, `[k, k]`; `None` before anything was added, or if it is not wanted."""
        return self._sides[1].total()

    def add(self, matrices: torch.Tensor) -> None:
        """Add `[count, m, k]` matrices."""
        if self.want_left:
            self._sides[0].add(matrices.transpose(0, 1).flatten(1))
        if self.want_right:
            self._sides[1].add(matrices.flatten(0, 1).T)

    def bases(self, least: float = 0.0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Eigenvectors of both moments; those of eigenvalues that exceed `least`, if it is not 0."""
        if not least:
            return leading_bases((self.left, self.right), least)
        left, right = (moment.leading(least) for moment in self._sides)
        return left, right


class Moment:
    """`sum_i F_i F_i^T` of `F_i [side, columns]`, of one side.

    Args:
        hold: hold the `F_i` while their columns are few for the side: samples of an adapter span a part of its long
            side only, whose directions a small eigenproblem finds.
    """

    def __init__(self, hold: bool = False) -> None:
        self._most = FEW_COLUMNS if hold else 0.0
        self._factors: list[torch.Tensor] = []
        self._total: torch.Tensor | None = None

    def add(self, factor: torch.Tensor) -> None:
        """Add an `F_i`."""
        self._factors.append(factor)
        if sum(each.shape[1] for each in self._factors) > self._most * len(factor):
            self.total()

    def total(self) -> torch.Tensor | None:
        """The sum; `None` before anything was added."""
        for factor in self._factors:
            product = factor @ factor.T
            self._total = product if self._total is None else self._total.add_(product)
        self._factors = []
        return self._total

    def leading(self, least: float) -> torch.Tensor | None:
        """Eigenvectors whose eigenvalues exceed `least`; `None` before anything was added."""
        if self._total is not None:
            return leading_eigenvectors(self.total(), least)
        return _eigenvectors_of_few(torch.cat(self._factors, dim=1), least)[0] if self._factors else None


FEW_COLUMNS = 0.5
"""Share of a side's length up to which the eigenproblem of the columns is the smaller one."""


def eigenvectors(moment: torch.Tensor | None) -> torch.Tensor | None:
    """Eigenvectors of a symmetric second moment; `None` stays `None`.

    Computed in float64: repeated eigenvalues and ranks far below the size are the rule here, and float32 solvers are
    known to fail on them. Of large ones, where it takes twice as long, only if the float32 solver did fail.
    """
    if moment is None:
        return None
    if len(moment) >= LARGE_SIDE and moment.dtype == torch.float32:
        with suppress(torch.linalg.LinAlgError):
            vectors = torch.linalg.eigh((moment + moment.T) / 2).eigenvectors
            if torch.isfinite(vectors).all():
                return vectors
    symmetric = moment.double()
    symmetric = (symmetric + symmetric.T) / 2
    return eigh(symmetric)[1].to(moment.dtype)


LEADING_SHARES = 1 / 24, 1 / 3
"""Shares of a side's directions that are looked for first; a third takes half as long as all of them."""

_ITERATIONS = 3


def leading_eigenvectors(moment: torch.Tensor, least: float) -> torch.Tensor:
    """Eigenvectors whose eigenvalues exceed `least`, `[m, number]`, of a positive semi-definite matrix.

    By subspace iteration from random vectors, in more dimensions until some are left over; where those are more than
    a third, all are found at once. Of eigenvalues close to `least` some may be missed, or mixed.
    """
    size = len(moment)
    if float(moment.trace()) <= least:
        return moment.new_empty((size, 0))
    generator = torch.Generator(device=moment.device).manual_seed(size)
    symmetric = (moment + moment.T) / 2
    for number in [int(share * size) for share in LEADING_SHARES] if size >= LARGE_SIDE else ():
        basis = torch.randn((size, number), generator=generator, dtype=moment.dtype, device=moment.device)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(symmetric @ basis).Q
        values, rotation = eigh((basis.T @ symmetric @ basis).double())
        if torch.isfinite(values).all() and values[0] <= least:
            return basis @ rotation[:, values > least].to(basis)
    vectors = eigenvectors(moment)
    return vectors[:, (vectors * (symmetric @ vectors)).sum(dim=0) > least]


def leading_bases(
    moments: Sequence[torch.Tensor | None], least: float
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`leading_eigenvectors` of each, and all of them if `least` is 0; `None` stays `None`."""
    find = (lambda moment: leading_eigenvectors(moment, least)) if least else eigenvectors
    left, right = (None if moment is None else find(moment) for moment in moments)
    return left, right


def fit_block(
    samples: torch.Tensor, preconditioner: Preconditioner | torch.Tensor, diagonal_left: bool = False
) -> Block:
    """The block of one parameter from its columns of `S`, with the `gradient` basis.

    Args:
        samples: `[n, *parameter.shape]`.
        preconditioner: `P`; a tensor stands for a `Diagonal`.
        diagonal_left: see `GradientMoments`.
    """
    return fit_block_in_parts(lambda: [samples], samples.shape[1:], preconditioner, diagonal_left)


def fit_block_in_parts(
    parts: Callable[[], Iterable[torch.Tensor]],
    shape: torch.Size,
    preconditioner: Preconditioner | torch.Tensor,
    diagonal_left: bool = False,
    least: float = 0.0,
) -> Block:
    """The same from some samples after another.

    Args:
        parts: gives the samples, `[some, *parameter.shape]`; called twice.
        shape: of the parameter.
        preconditioner, diagonal_left: see `fit_block`.
        least: see `fit_whitened`.
    """
    if isinstance(preconditioner, torch.Tensor):
        preconditioner = Diagonal(preconditioner)
    return fit_whitened(lambda: map(preconditioner.root, parts()), shape, preconditioner, diagonal_left, least)


def _eigenvectors_of_few(factor: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors and eigenvalues above `least` of `F F^T`, for `F [size, columns]` with fewer columns than rows.

    It has the eigenvalues of the small `F^T F`, and `F` makes its eigenvectors of those.
    """
    wide = factor.double()
    values, vectors = eigh(wide.T @ wide)
    kept = values > max(least, float(values[-1]) * len(values) * torch.finfo(values.dtype).eps)
    values = values[kept]
    return (wide @ (vectors[:, kept] / values.sqrt())).to(factor), values.to(factor)


def fit_whitened(
    parts: Callable[[], Iterable[torch.Tensor]],
    shape: torch.Size,
    preconditioner: Preconditioner,
    diagonal_left: bool = False,
    least: float = 0.0,
) -> Block:
    """The same from samples that are whitened already, `P^{1/2} g`; they are left unchanged.

    With `least`, directions of a side whose eigenvalue does not exceed it are left out: no entry of the block is
    larger than the eigenvalues of its row and of its column.
    """
    moments = GradientMoments(shape, diagonal_left, hold=least > 0)
    if least and moments.want_left and not moments.want_right:
        samples = torch.cat(list(parts())).flatten(1)
        if len(samples) < samples.shape[1]:
            left, values = _eigenvectors_of_few(samples.T, least)
            return Block(left, None, values[:, None], preconditioner)
    eigenvalues, first, number = None, None, 0
    for number, part in enumerate(parts(), start=1):
        first = part if number == 1 else None  # of one part, once is enough
        moments.add(as_matrices(part))
    left, right = moments.bases(least)
    for part in [first] if number == 1 else parts():
        turned = rotate(as_matrices(part), left, right)
        own = (turned.square() if left is None and right is None else turned.square_()).sum(dim=0)
        eigenvalues = own if eigenvalues is None else eigenvalues.add_(own)
    return Block(left, right, eigenvalues, preconditioner)
