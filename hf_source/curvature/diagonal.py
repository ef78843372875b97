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
"""`diagonal`: the diagonal of the whitened curvature, from sampled gradients.

For an optimizer with a number per entry, `P^{1/2} H P^{1/2}` has the diagonal `P diag(H)`: every entry of a parameter
forgets on its own, at the rate `P_j H_jj`, and weight decay of any kind adds to it exactly. For a matrix `P` (Muon) it
is the diagonal in whitened coordinates. The cheapest curvature there is: one pass over the sample, no eigenvectors.
"""

from dataclasses import dataclass

import torch

from .block import Block, as_matrices
from .ekfac import Vectors, through_blocks
from .flow import Flow
from .sample import FisherSample


@dataclass
class DiagonalCurvature:
    """`diagonal` curvature (see the module)."""

    def propagate(self, vectors: Vectors, flow: Flow, sample: FisherSample) -> tuple[Vectors, Vectors]:
        """Carry query vectors through a segment; see `JointCurvature.propagate`."""
        trained = [name for name in vectors if flow.trains(name)]
        return through_blocks(vectors, flow, self.fit(trained, flow, sample))

    def fit(self, names: list[str], flow: Flow, sample: FisherSample) -> dict[str, Block]:
        """One pass over the samples: second moment of every entry of the whitened gradients."""
        found = sample.anew(lambda: self._squares(names, flow, sample))
        return {name: Block(None, None, found[name], flow.preconditioner[name]) for name in names}

    def _squares(self, names: list[str], flow: Flow, sample: FisherSample) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for _, done in sample.passes(names):
            for name, _, grads in sample.gradients.blocks(done, names):
                whitened = as_matrices(flow.preconditioner[name].root(grads, sample.scale))
                part = whitened.square().sum(dim=0)
                found[name] = part if name not in found else found[name].add_(part)
        return found
