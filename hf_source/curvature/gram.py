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
"""Functions of `A^T A` for a matrix of features, in as many dimensions as the smaller of its sides."""

from collections.abc import Callable

import torch

from .eigen import eigh


_CHUNK = 4096  # rows taken to float64 at once


class GramSpectrum:
    """Eigenvalues of `A^T A`, to apply functions of it; in float64.

    With fewer rows than columns it is found from `A A^T`, which has the same eigenvalues but for zeros.

    Args:
        factors: `A`, `[rows, size]`.
    """

    def __init__(self, factors: torch.Tensor) -> None:
        self.factors = factors
        self.size = factors.shape[1]
        self.dual = len(factors) < self.size
        if self.dual:
            gram = factors.double() @ factors.double().T
        else:
            gram = sum(part.double().T @ part.double() for part in factors.split(_CHUNK))
        values, self._vectors = eigh(gram)
        # What is rounding of the features is no direction of theirs.
        cut = values.max().clamp_min(0) * max(factors.shape) * torch.finfo(factors.dtype).eps
        self.values = torch.where(values > cut, values, 0)

    @property
    def mean(self) -> float:
        """Mean eigenvalue, over all `size` of them."""
        return float(self.values.sum()) / self.size

    def apply(self, vectors: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`function(A^T A)` on vectors `[count, size]`, elementwise on eigenvalues (0 among them); of their type."""
        parts = [self._apply(part.double(), function) for part in vectors.split(_CHUNK)]
        return torch.cat(parts).to(vectors.dtype)

    def _apply(self, vectors: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if not self.dual:
            return (vectors @ self._vectors * function(self.values)) @ self._vectors.T
        rest = function(self.values.new_zeros(()))
        factors = self.factors.double()
        change = torch.where(self.values > 0, (function(self.values) - rest) / self.values.clamp_min(1e-300), 0)
        return vectors * rest + (vectors @ factors.T @ self._vectors * change) @ self._vectors.T @ factors


def pseudo_inverse(damping: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """`1 / (e + damping)`, and 0 where that is not finite."""
    return lambda values: torch.where(values + damping > 0, 1 / (values + damping).clamp_min(1e-300), 0)


def pseudo_inverse_root(damping: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """`(e + damping)^{-1/2}`, and 0 where that is not finite."""
    return lambda values: pseudo_inverse(damping)(values).sqrt()
