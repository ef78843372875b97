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
"""`ekfac-hybrid`: the Source paper's form for adaptive optimizers, for comparison with the whitened `ekfac`.

Bae et al. 2024 (arXiv 2405.12186, the part on preconditioned optimizers) write `F_r = (I - exp(-s P H)) H^{-1}`. `P H`
is not symmetric and has no Kronecker form, so they take exponentials with the diagonal approximation `P diag(H)` and
keep EK-FAC for `H^{-1}`. The two approximations of `H` do not cancel where curvature is small, so the inverse must be
damped, and how much matters. With weight decay `Lambda`,

    q' = exp(-s (P D + Lambda)) q
    x  = (H_ekfac + damping)^{-1} P D (1 - exp(-s (P D + Lambda))) / (P D + Lambda) q

with `D = diag(H)`, elementwise: were `H` diagonal and the damping 0, this would be the flow itself. `s -> infinity`
without decay is the EK-FAC influence function; `s -> 0` is *not* the preconditioned dot product, which the other
curvatures give. A parameter whose `P` is one number (SGD) has no such problem: there it is the paper's form for SGD,
which is that of `ekfac`.
"""

from dataclasses import dataclass

from .diagonal import DiagonalCurvature
from .ekfac import EKFACCurvature, Vectors, through_blocks
from .flow import Flow, decayed, integral
from .inverse import ekfac_inverse
from .preconditioner import Diagonal
from .sample import FisherSample


@dataclass
class EKFACHybridCurvature:
    """`ekfac-hybrid` curvature (see the module).

    Attributes:
        damping: of the inverse, as a share of each block's mean eigenvalue. At 1e-8 small eigenvalues drown the rest.
        basis: of the inverse; see `EKFACCurvature`.
    """

    damping: float = 0.1
    basis: str = "kfac"

    def propagate(self, vectors: Vectors, flow: Flow, sample: FisherSample) -> tuple[Vectors, Vectors]:
        """Carry query vectors through a segment; see `JointCurvature.propagate`."""
        plain = [name for name in vectors if flow.trains(name) and _is_number(flow, name)]
        blocks = EKFACCurvature(self.basis).fit(plain, flow, sample) if plain else {}
        scoring, carried = through_blocks(vectors, flow, blocks)
        adaptive = [name for name in vectors if flow.trains(name) and name not in blocks]
        learnt = {}
        for name, block in DiagonalCurvature().fit(adaptive, flow, sample).items() if adaptive else ():
            decay = flow.decay[name].to(block.eigenvalues)
            if decay.dim():
                decay = decay.view_as(block.eigenvalues)
            share = block.eigenvalues * integral(block.eigenvalues + decay, flow.length)
            if block.is_elementwise:  # no detour through 1, which would round small shares away
                learnt[name] = vectors[name] * share.view(vectors[name].shape[1:])
            else:
                learnt[name] = block.apply(vectors[name], lambda mu, found=share: found)
            carried[name] = block.apply(carried[name], lambda mu: decayed(mu, flow.length))
        if learnt:
            solved = ekfac_inverse(learnt, sample, self.damping, self.basis)
            for name, found in solved.items():
                scoring[name] = found * flow.preconditioner[name].moves(found.shape[1:]).to(found)
        return scoring, carried


def _is_number(flow: Flow, name: str) -> bool:
    preconditioner = flow.preconditioner[name]
    return isinstance(preconditioner, Diagonal) and preconditioner.values.dim() == 0
