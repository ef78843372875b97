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

import torch

from ..gradients.rows import as_rows
from .ekfac import EKFACCurvature
from .flow import Flow
from .joint import groups_within
from .preconditioner import Diagonal
from .sample import FisherSample


Vectors = dict[str, torch.Tensor]


def ekfac_inverse(vectors: Vectors, sample: FisherSample, damping: float = 0.1, basis: str = "kfac") -> Vectors:
    """`(H + lambda)^{-1} q` with eigenvalue-corrected Kronecker blocks, `lambda` from each block's mean eigenvalue.

    Args:
        vectors: `q`, name -> `[queries, *parameter.shape]`.
        sample: `S` at the weights in question.
        damping: share of the mean eigenvalue.
        basis: see `EKFACCurvature`.
    """
    like = next(iter(vectors.values()))
    one, zero = Diagonal(like.new_ones(())), like.new_zeros(())
    flow = Flow(1.0, dict.fromkeys(vectors, one), dict.fromkeys(vectors, zero))
    blocks = EKFACCurvature(basis).fit(list(vectors), flow, sample)

    def inverted(eigenvalues: torch.Tensor) -> torch.Tensor:
        return 1 / (eigenvalues + damping * eigenvalues.mean()).clamp_min(torch.finfo(eigenvalues.dtype).tiny)

    # A block that no row has a gradient in cannot change anything: its scores are 0 whatever its inverse is.
    return {
        name: block.apply(vectors[name], inverted) if block.eigenvalues.any() else torch.zeros_like(vectors[name])
        for name, block in blocks.items()
    }


def joint_inverse(vectors: Vectors, sample: FisherSample, damping: float = 0.1, memory_budget: int = 2**30) -> Vectors:
    """`(S^T S + lambda)^{-1} q = (q - S^T (K + lambda)^{-1} S q) / lambda`, `K = S S^T`, over all parameters at once.

    Args:
        vectors: `q`, name -> `[queries, *parameter.shape]`.
        sample: `S [n, p]` at the weights in question.
        damping: `lambda` is this share of the mean eigenvalue of `K`.
        memory_budget: bytes that the columns of `S` held at once may take.
    """
    gram = projection = 0.0
    for names in groups_within(memory_budget, vectors, sample):
        for name, columns in sample.matrices(names).items():
            columns = as_rows(columns)
            gram = gram + (columns @ columns.T).double()
            projection = projection + (columns @ as_rows(vectors[name]).T.to(columns)).double()
    strength = damping * float(gram.diagonal().mean())
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    coefficients = -torch.linalg.solve(gram + strength * eye, projection) / strength
    moved = sample.combine(dict.fromkeys(vectors, coefficients))
    return {name: q / strength + moved[name] for name, q in vectors.items()}
