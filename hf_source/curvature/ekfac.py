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
"""`ekfac`: the paper's block-diagonal curvature, in whitened coordinates.

Every parameter has its own block (`block.py`): a basis from Kronecker factors, and eigenvalues corrected in it. The
flow of a segment is then an elementwise function of the eigenvalues (Bae et al. 2024, arXiv 2405.12186, section 3.3),
evaluated in `P^{-1/2} theta`, where Adam is plain gradient flow with curvature `P^{1/2} H P^{1/2}`: no damping and no
diagonal approximation of the exponential is needed. With SGD (`P` a constant) these are the paper's formulas.

Factors: Linear and Conv1D, input covariance x output-gradient covariance; convolutions without groups, the same with
patches as inputs (Grosse & Martens 2016, arXiv 1602.01407); embeddings and heads tied to them, diagonal over the
vocabulary x full over the hidden size; vectors (norms, biases), dense; anything else, the second moments of its
gradient matrix. For a `P` that is not constant the covariances are those of `sqrt(v) * input` and
`sqrt(u) * output gradient`, with `u v^T` the rank-one factorisation of `P` (Shazeer & Stern 2018, arXiv 1804.04235),
so that the basis belongs to the whitened gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..gradients.convolutions import conv_sides, conv_weight
from ..gradients.rows import Pass, RowGradients
from ..gradients.rules import Call, by_row, conv1d_weight, linear_weight
from .block import Block, GradientMoments, as_matrices, eigenvectors, rotate
from .factored import factored_columns, is_cheaper, squares_in_bases
from .flow import Flow, decayed, integral
from .preconditioner import Preconditioner
from .sample import FisherSample


Vectors = dict[str, torch.Tensor]


class KroneckerMoments:
    """Accumulates the input and output-gradient covariances of a Linear, Conv1D or convolution's weight.

    Args:
        gradients: engine whose passes are added.
        name: the weight.
        preconditioner: `P`.
    """

    def __init__(self, gradients: RowGradients, name: str, preconditioner: Preconditioner) -> None:
        (self.use,) = gradients.uses[name]
        self.transposed = self.use.rule is conv1d_weight
        self.preconditioner = preconditioner
        self.left: torch.Tensor | None = None
        self.right: torch.Tensor | None = None

    @staticmethod
    def fits(gradients: RowGradients, name: str) -> bool:
        """Whether the parameter is such a weight, used in one place only."""
        uses = gradients.uses[name]
        if not gradients.ruled(name) or len(uses) != 1:
            return False
        (use,) = uses
        return use.rule in (linear_weight, conv1d_weight) or (use.rule is conv_weight and use.module.groups == 1)

    def add(self, done: Pass, scale: float) -> None:
        """Add the sums over the pass's tokens (padding left out): inputs once, output gradients times `scale^2`."""
        for call in done.calls.get(self.use.module, ()):
            inputs, grads = self._sides(call, done.num_rows)
            mask = done.batch.get("attention_mask")
            if mask is not None and mask.shape == inputs.shape[:2]:
                inputs = inputs * mask[..., None]
            sides = (inputs, grads * scale) if self.transposed else (grads * scale, inputs)
            left, right = self.preconditioner.whitened_sides(*(side.flatten(0, 1) for side in sides))
            self.left = left.T @ left if self.left is None else self.left.add_(left.T @ left)
            self.right = right.T @ right if self.right is None else self.right.add_(right.T @ right)

    def _sides(self, call: Call, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and output gradients by token, `[rows, tokens, features]`; a token of an image is a patch."""
        if self.use.rule is conv_weight:
            return tuple(side[:, 0] for side in conv_sides(call, rows))
        return by_row(call.input, rows), by_row(call.grad, rows)

    def bases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Eigenvectors of both covariances, in the order of the weight's axes."""
        return eigenvectors(self.left), eigenvectors(self.right)


@dataclass
class EKFACCurvature:
    """`ekfac` curvature (see the module).

    Attributes:
        basis: `"kfac"` (covariances of inputs and output gradients) or `"gradient"` (second moments of gradient
            matrices, the basis of the tail of `joint`).
    """

    basis: str = "kfac"

    def propagate(self, vectors: Vectors, flow: Flow, sample: FisherSample) -> tuple[Vectors, Vectors]:
        """Carry query vectors through a segment; see `JointCurvature.propagate`.

        Different blocks do not interact, so a parameter that the segment does not train passes unchanged.
        """
        trained = [name for name in vectors if flow.trains(name)]
        return through_blocks(vectors, flow, self.fit(trained, flow, sample))

    def fit(self, names: list[str], flow: Flow, sample: FisherSample) -> dict[str, Block]:
        """Two passes over the samples: bases, then eigenvalues in them."""
        moments = sample.anew(lambda: self._moments(names, flow, sample))
        bases = {name: moments.pop(name).bases() for name in names}
        eigenvalues = sample.anew(lambda: self._eigenvalues(names, bases, flow, sample))
        return {name: Block(*bases[name], eigenvalues[name], flow.preconditioner[name]) for name in names}

    def _eigenvalues(self, names, bases, flow, sample) -> dict[str, torch.Tensor]:
        eigenvalues: dict[str, torch.Tensor] = {}

        def add(name: str, part: torch.Tensor) -> None:
            eigenvalues[name] = eigenvalues[name].add_(part) if name in eigenvalues else part

        for _, done in sample.passes(names):
            dense = []
            for name in names:
                columns = factored_columns(sample, name, done) if flow.preconditioner[name].is_constant else None
                if columns is None or not is_cheaper(columns, flow.preconditioner[name]):
                    dense.append(name)
                else:
                    add(name, flow.preconditioner[name].apply(squares_in_bases(columns, *bases[name])))
            for name, _, grads in sample.gradients.blocks(done, dense):
                matrices = as_matrices(flow.preconditioner[name].root(grads, sample.scale))
                add(name, rotate(matrices, *bases[name]).square_().sum(dim=0))
        return eigenvalues

    def _moments(self, names, flow, sample) -> dict[str, KroneckerMoments | GradientMoments]:
        gradients = sample.gradients
        kfac = [name for name in names if self.basis == "kfac" and KroneckerMoments.fits(gradients, name)]
        others = [name for name in names if name not in kfac]
        moments = {name: KroneckerMoments(gradients, name, flow.preconditioner[name]) for name in kfac}
        for name in others:
            moments[name] = GradientMoments(gradients.parameters[name].shape, name in gradients.vocabulary)
        for _, done in sample.passes(names):
            for name in kfac:
                moments[name].add(done, sample.scale)
            for name, _, grads in gradients.blocks(done, others):
                moments[name].add(as_matrices(flow.preconditioner[name].root(grads, sample.scale)))
        return moments


def through_blocks(vectors: Vectors, flow: Flow, blocks: Mapping[str, Block]) -> tuple[Vectors, Vectors]:
    """Carry query vectors through a segment whose curvature is a block per trained parameter.

    Args:
        vectors: `q`, name -> `[queries, *parameter.shape]`; left unchanged.
        flow: the segment's constants.
        blocks: of the parameters that the segment trains.

    Returns:
        `F_r^T q` (only where there is a block) and `exp(-s (P H + Lambda))^T q`.
    """
    # Decay goes outside the blocks: they leave alone what the segment does not move, but it decays all the same.
    carried = {name: q * decayed(flow.decay[name].to(q), flow.length) for name, q in vectors.items()}
    scoring = {}
    for name, block in blocks.items():
        decay = flow.decay[name].to(block.eigenvalues)
        q, rate = vectors[name], decay
        if decay.dim() and block.is_elementwise:
            rate = decay.view_as(block.eigenvalues)
        elif decay.dim():  # coupled decay under Adam is elementwise: split it off
            q = q * (integral(decay, flow.length) / flow.length)
            rate = torch.zeros_like(decay.sum())
        integrated = block.apply(q, lambda mu, r=rate: integral(mu + r, flow.length))
        scoring[name] = flow.preconditioner[name].apply(integrated)
        carried[name] = block.apply(carried[name], lambda mu: decayed(mu, flow.length))
    return scoring, carried
