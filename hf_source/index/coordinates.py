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
"""Coordinates in which a row's response is short: a rotation of each parameter, scaled by what queries see of it.

Each parameter's gradient matrix is rotated into the eigenvectors of its second moments `E[G G^T]` and `E[G^T G]`
(those of Shampoo: Gupta et al. 2018, arXiv 1802.09568; a vocabulary is not rotated), at the final weights, with labels
drawn from the model: what a typical query's gradient is. A coordinate of a query is divided by its root mean square
over that sample, that of a response multiplied by it: products stay, and the size of a response's coordinate is what
it adds to a typical score. The largest ones are kept. Rotations lose nothing, so with all of them scores are exact.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..curvature import FisherSample
from ..curvature.block import GradientMoments, as_matrices, rotate
from ..gradients.rows import as_rows
from ..recording.writer import write_tensors


Vectors = Mapping[str, torch.Tensor]

# Where the sample saw (almost) nothing of a coordinate, a query still may: the share of the parameter's mean square
# that every coordinate is taken to have.
_FLOOR = 1e-3


class Coordinates:
    """Rotation and scale of every parameter.

    Args:
        bases: name -> eigenvectors of the left and the right side, `None` for the identity.
        scales: name -> root mean square of a query's rotated gradient, flat.
    """

    def __init__(
        self, bases: Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]], scales: Mapping[str, torch.Tensor]
    ) -> None:
        self.bases, self.scales = dict(bases), dict(scales)
        self.size = sum(scale.numel() for scale in self.scales.values())

    @classmethod
    def fit(cls, sample: FisherSample) -> "Coordinates":
        """From gradients with labels drawn from the model, in two passes."""
        gradients, names = sample.gradients, list(sample.gradients.parameters)
        shapes = {name: parameter.shape for name, parameter in gradients.parameters.items()}

        def second_moments() -> dict[str, GradientMoments]:
            moments = {name: GradientMoments(shapes[name], name in gradients.vocabulary) for name in names}
            for _, done in sample.passes(names):
                for name, _, grads in gradients.blocks(done, names):
                    moments[name].add(as_matrices(grads))
            return moments

        bases = {name: moment.bases() for name, moment in sample.anew(second_moments).items()}

        def rotated_squares() -> dict[str, torch.Tensor]:
            found = {name: parameter.new_zeros(parameter.numel()) for name, parameter in gradients.parameters.items()}
            for _, done in sample.passes(names):
                for name, _, grads in gradients.blocks(done, names):
                    found[name] += as_rows(rotate(as_matrices(grads), *bases[name])).square_().sum(dim=0)
            return found

        scales, squares = {}, sample.anew(rotated_squares)
        for name, square in squares.items():
            square = square / max(sample.size, 1)
            mean = square.mean()  # 0 for what no query's loss depends on: then any scale will do
            scales[name] = (square + _FLOOR * mean).sqrt() if mean > 0 else torch.ones_like(square)
        return cls(bases, scales)

    def of_queries(self, vectors: Vectors) -> torch.Tensor:
        """Gradients of queries, `[queries, size]`."""
        return torch.cat([self._rotated(name, vectors[name]) / self.scales[name] for name in self.scales], dim=1)

    def of_responses(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Responses of rows, `[rows, size]`; they are taken out of `vectors` one parameter after the other."""
        count = len(next(iter(vectors.values())))
        like, start = next(iter(self.scales.values())), 0
        result = like.new_empty(count, self.size)
        for name, scale in self.scales.items():
            part = slice(start, start + scale.numel())
            torch.mul(self._rotated(name, vectors.pop(name)), scale, out=result[:, part])
            start = part.stop
        return result

    def _rotated(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        return as_rows(rotate(as_matrices(vectors), *self.bases[name]))

    def to(self, *where) -> "Coordinates":
        """The same on another device or in another dtype."""
        bases = {name: tuple(_moved(side, where) for side in sides) for name, sides in self.bases.items()}
        return Coordinates(bases, {name: scale.to(*where) for name, scale in self.scales.items()})

    def save(self, path: Path) -> None:
        """Write them as safetensors, atomically."""
        tensors = {f"scale/{name}": scale for name, scale in self.scales.items()}
        for name, sides in self.bases.items():
            found = zip((f"left/{name}", f"right/{name}"), sides, strict=True)
            tensors |= {key: side for key, side in found if side is not None}
        write_tensors(path, tensors)

    @classmethod
    def load(cls, tensors: Vectors) -> "Coordinates":
        """From the tensors of a file that `save` wrote."""
        scales = {key.removeprefix("scale/"): value for key, value in tensors.items() if key.startswith("scale/")}
        bases = {name: (tensors.get(f"left/{name}"), tensors.get(f"right/{name}")) for name in scales}
        return cls(bases, scales)


def _moved(side: torch.Tensor | None, where: tuple) -> torch.Tensor | None:
    return None if side is None else side.to(*where)
