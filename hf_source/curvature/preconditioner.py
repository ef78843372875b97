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
"""The preconditioner `P` of one parameter as a linear map, symmetric and positive semi-definite.

Curvature works in the whitened coordinates `P^{-1/2} theta`, so it needs `P`, `P^{1/2}` and `P^{-1/2}` on gradients
and nothing else. Most optimizers' `P` is a number per entry (`Diagonal`); Muon's is a matrix on one side (`OneSided`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch

from .eigen import eigh


class Preconditioner(ABC):
    """`P` of one parameter; vectors are `[count, *parameter.shape]`."""

    @property
    @abstractmethod
    def is_zero(self) -> bool:
        """Whether nothing moves the parameter."""

    @abstractmethod
    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        """`P v`."""

    is_elementwise = False
    """Whether `P` acts on each entry alone, so that parts of the first axis may be taken apart."""

    is_constant = False
    """Whether `P` is one number, so that what is said of gradients' factors holds for the whitened ones."""

    def root_of(self, vectors: torch.Tensor, part: slice) -> torch.Tensor:
        """`P^{1/2} v` of a part of the parameter's first axis; of all of it if `P` is not elementwise."""
        return self.root(vectors)

    def forget(self) -> None:
        """Let go of what was worked out of `P` and can be again: roots are as large as it is."""
        for name in ("_root", "_roots", "_inverse_root", "_sides"):
            self.__dict__.pop(name, None)

    @abstractmethod
    def root(self, vectors: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """`scale P^{1/2} v`."""

    @abstractmethod
    def inverse_root(self, vectors: torch.Tensor) -> torch.Tensor:
        """`P^{-1/2} v`, 0 where `P` is 0."""

    @abstractmethod
    def moves(self, shape: torch.Size) -> torch.Tensor:
        """Which entries the segment moves: bool, broadcastable to `shape`."""

    @abstractmethod
    def whitened_sides(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of `P^{1/2} G` for gradients `G = left_t right_t^T`: `[tokens, m]` and `[tokens, k]`."""


class Diagonal(Preconditioner):
    """A number per entry.

    Args:
        values: of the parameter's shape, or 0-dim.
    """

    is_elementwise = True

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @property
    def is_constant(self) -> bool:
        """See `Preconditioner`."""
        return self.values.dim() == 0

    def root_of(self, vectors, part):
        """See `Preconditioner`."""
        return vectors * (self._root[part] if self.values.dim() else self._root).to(vectors)

    @property
    def is_zero(self) -> bool:
        """See `Preconditioner`."""
        return not bool((self.values != 0).any())

    def apply(self, vectors):
        """See `Preconditioner`."""
        return vectors * self.values.to(vectors)

    def root(self, vectors, scale=1.0):
        """See `Preconditioner`."""
        root = self._root.to(vectors)
        return vectors * (root if scale == 1.0 else root * scale)

    def inverse_root(self, vectors):
        """See `Preconditioner`."""
        return vectors * self._inverse_root.to(vectors)

    def moves(self, shape):
        """See `Preconditioner`."""
        return self.values > 0

    def whitened_sides(self, left, right):
        """See `Preconditioner`; by the rank-one factorisation of `P`, which is exact for a `P` of rank one."""
        if self.values.dim() == 0:
            return left, right
        rows, columns = self._sides
        return left * rows.to(left), right * columns.to(right)

    def roots_of_sides(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`sqrt(u) [m]` and `sqrt(v) [k]` with `P ~ u v^T`, for a parameter `[m, k]`."""
        if self.values.dim():
            return tuple(side.to(like) for side in self._sides)
        return self.values.to(like).sqrt().expand(len(like)), like.new_ones(like.shape[1])

    @cached_property
    def _root(self) -> torch.Tensor:
        return self.values.sqrt()

    @cached_property
    def _inverse_root(self) -> torch.Tensor:
        return torch.where(self._root > 0, 1 / self._root, torch.zeros_like(self._root))

    @cached_property
    def _sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = rank_one(self.values)
        return rows.sqrt(), columns.sqrt()


class OneSided(Preconditioner):
    """A matrix on one side of a parameter `[m, k]`: `P G = M G` (`"left"`) or `G M` (`"right"`).

    Args:
        matrix: `M`, symmetric and positive semi-definite.
        side: `"left"` or `"right"`.
    """

    def __init__(self, matrix: torch.Tensor, side: str) -> None:
        self.matrix = matrix
        self.side = side

    @property
    def is_zero(self) -> bool:
        """See `Preconditioner`."""
        return not bool((self.matrix != 0).any())

    def apply(self, vectors):
        """See `Preconditioner`."""
        return self._times(self.matrix, vectors)

    def root(self, vectors, scale=1.0):
        """See `Preconditioner`."""
        return self._times(self._roots[0], vectors if scale == 1.0 else vectors * scale)

    def inverse_root(self, vectors):
        """See `Preconditioner`."""
        return self._times(self._roots[1], vectors)

    def moves(self, shape):
        """See `Preconditioner`; a matrix mixes the entries of a side."""
        return torch.tensor(not self.is_zero)

    def whitened_sides(self, left, right):
        """See `Preconditioner`."""
        root = self._roots[0].to(left)
        return (left @ root, right) if self.side == "left" else (left, right @ root)

    def _times(self, matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        matrix = matrix.to(vectors)
        return matrix @ vectors if self.side == "left" else vectors @ matrix

    @cached_property
    def _roots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`M^{1/2}` and `M^{-1/2}`, the latter 0 on what `M` does not move."""
        matrix = self.matrix.double()
        values, vectors = eigh((matrix + matrix.T) / 2)
        moved = values > values.max() * len(values) * torch.finfo(self.matrix.dtype).eps
        roots = torch.where(moved, values, 0).sqrt()
        inverse = torch.where(moved, 1 / roots, 0)
        return tuple(((vectors * scale) @ vectors.T).to(self.matrix) for scale in (roots, inverse))


def as_preconditioners(
    tensors: Mapping[str, torch.Tensor | Preconditioner], sides: Mapping[str, str] | None = None
) -> dict[str, Preconditioner]:
    """Preconditioners of tensors by name: a matrix on one side for those in `sides`, else a number per entry."""
    sides = sides or {}
    return {
        name: value
        if isinstance(value, Preconditioner)
        else OneSided(value, sides[name])
        if name in sides
        else Diagonal(value)
        for name, value in tensors.items()
    }


def rank_one(preconditioner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`u [m]`, `v [k]` with `P ~ u v^T`: row and column means over the overall mean (exact for a rank-one `P`)."""
    matrix = preconditioner.double().flatten(1)
    mean = matrix.mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix.mean(dim=1) / mean).to(preconditioner), matrix.mean(dim=0).to(preconditioner)
