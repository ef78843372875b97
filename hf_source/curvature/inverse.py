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
"""Damped inverse curvature `(H + lambda)^{-1} q`, as influence functions need it (Koh & Liang 2017, arXiv 1703.04730).

The damping is a share of the mean eigenvalue, as in Grosse et al. 2023 (arXiv 2308.03296, section 2.2): of each block
for `ekfac`, of the sample space for `joint`.
"""

from collections.abc import Iterable

import torch

from ..gradients.contraction import products
from ..gradients.rows import as_rows
from .ekfac import EKFACCurvature
from .flow import Flow
from .joint import groups_within
from .preconditioner import Diagonal
from .sample import FisherSample, combine


Vectors = dict[str, torch.Tensor]


class EKFACInverse:
    """`(H + lambda)^{-1}` with eigenvalue-corrected Kronecker blocks, `lambda` from each block's mean eigenvalue.

    Args:
        names: parameters.
        sample: `S` at the weights in question.
        damping: share of the mean eigenvalue.
        basis: see `EKFACCurvature`.

    Attributes:
        strengths: `lambda` by name; 0 for a block that no row has a gradient in, whose inverse is taken as 0.
    """

    def __init__(self, names: Iterable[str], sample: FisherSample, damping: float = 0.1, basis: str = "kfac") -> None:
        names = list(names)
        like = sample.gradients.parameters[names[0]]
        one, zero = Diagonal(like.new_ones(())), like.new_zeros(())
        flow = Flow(1.0, dict.fromkeys(names, one), dict.fromkeys(names, zero))
        self.blocks = EKFACCurvature(basis).fit(names, flow, sample)
        self.strengths = {name: damping * float(block.eigenvalues.mean()) for name, block in self.blocks.items()}

    def __call__(self, vectors: Vectors) -> Vectors:
        """The inverse times each of `[vectors, *parameter.shape]`."""
        return {name: self._solve(name, vector) for name, vector in vectors.items()}

    def _solve(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        # A block that no row has a gradient in cannot change anything: its scores are 0 whatever its inverse is.
        if not self.blocks[name].eigenvalues.any():
            return torch.zeros_like(vector)

        def inverted(eigenvalues: torch.Tensor) -> torch.Tensor:
            return 1 / (eigenvalues + self.strengths[name]).clamp_min(torch.finfo(eigenvalues.dtype).tiny)

        return self.blocks[name].apply(vector, inverted)


class JointInverse:
    """`(S^T S + lambda)^{-1} = (1 - S^T (K + lambda)^{-1} S) / lambda`, `K = S S^T`, over all parameters at once.

    Args:
        names: parameters.
        sample: `S [n, p]` at the weights in question.
        damping: `lambda` is this share of the mean eigenvalue of `K`.
        memory_budget: bytes that the columns of `S` held at once may take; if all fit, they are kept.

    Attributes:
        strengths: `lambda` by name.
    """

    def __init__(
        self, names: Iterable[str], sample: FisherSample, damping: float = 0.1, memory_budget: int = 2**30
    ) -> None:
        self.sample = sample
        self.groups = groups_within(memory_budget, dict.fromkeys(names), sample)
        self.kept: Vectors | None = None
        gram = 0.0
        for group in self.groups:
            matrices = sample.matrices(group)
            for columns in map(as_rows, matrices.values()):
                gram = gram + products(columns, columns).double()
            if len(self.groups) == 1:
                self.kept = matrices
        self.strength = damping * float(gram.diagonal().mean())
        self.strengths = {name: self.strength for group in self.groups for name in group}
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.system = torch.linalg.lu_factor(gram + self.strength * eye)

    def __call__(self, vectors: Vectors) -> Vectors:
        """The inverse times each of `[vectors, *parameter.shape]`."""
        if self.strength == 0:  # no row has a gradient
            return {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        projection = 0.0
        for group in self.groups:
            columns = self.sample.matrices(group) if self.kept is None else self.kept
            for name in group:
                projection = (
                    projection + products(as_rows(columns[name]), as_rows(vectors[name]).to(columns[name])).double()
                )
        coefficients = -torch.linalg.lu_solve(*self.system, projection) / self.strength
        if self.kept is None:
            moved = self.sample.combine(dict.fromkeys(vectors, coefficients))
        else:
            moved = {name: combine(columns, coefficients) for name, columns in self.kept.items()}
        return {name: q / self.strength + moved[name] for name, q in vectors.items()}


def ekfac_inverse(vectors: Vectors, sample: FisherSample, damping: float = 0.1, basis: str = "kfac") -> Vectors:
    """`EKFACInverse` of vectors, name -> `[queries, *parameter.shape]`."""
    return EKFACInverse(vectors, sample, damping, basis)(vectors)


def joint_inverse(vectors: Vectors, sample: FisherSample, damping: float = 0.1, memory_budget: int = 2**30) -> Vectors:
    """`JointInverse` of vectors, name -> `[queries, *parameter.shape]`."""
    return JointInverse(vectors, sample, damping, memory_budget)(vectors)
