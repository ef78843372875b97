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
"""Per-row gradients, projected batch by batch to few dimensions: no gradient of a whole row is ever stored.

`DenseProjection` multiplies the gradient of all parameters with one random matrix, whose blocks are drawn anew from
their seed whenever they are needed: what is held is one block, never `[parameters, dimensions]`. `SidedProjection`
multiplies every parameter's gradient matrix from both sides, `L G R^T`. For a weight of a Linear, Conv1D or embedding,
`G = sum over tokens of l_t r_t^T`: the first needs only a block's entries of all rows at a time, the second projects
what went in and the gradient that came back, and forms no `G`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from .rows import Pass, RowGradients, as_rows
from .rules import Call, Rule, by_row, conv1d_weight, embedding_weight, linear_weight


KINDS = ("rademacher", "normal")
"""Entries of a random matrix: signs, or a normal distribution."""

_BLOCK_ENTRIES = 2**23  # of a dense random matrix held at once: 32 MiB


class Projector(Protocol):
    """What turns a finished pass into features of its rows."""

    size: int

    def project(self, gradients: RowGradients, done: Pass) -> torch.Tensor:
        """Features of the pass's rows, `[rows, size]`."""


def random_matrix(
    rows: int, columns: int, kind: str, seed: int, key: str, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Float32 `[rows, columns]` with independent entries of mean 0 and variance 1.

    Args:
        rows, columns: its shape.
        kind: one of `KINDS`.
        seed, key: the same matrix for the same pair, in every process and batch (on the same kind of device).
        device: where it is drawn.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    if kind == "normal":
        return torch.randn(rows, columns, generator=generator, device=device)
    bits = torch.randint(0, 2, (rows, columns), generator=generator, device=device, dtype=torch.int8)
    return bits.float().mul_(2).sub_(1)


class DenseProjection:
    """`g -> P^T g / sqrt(size)` of the gradient of all parameters; keeps inner products on average.

    Args:
        size: dimensions.
        kind: one of `KINDS`.
        seed: of `P`.
    """

    def __init__(self, size: int, kind: str = "rademacher", seed: int = 0) -> None:
        self.size = size
        self.kind = kind
        self.seed = seed
        self.step = max(1, _BLOCK_ENTRIES // size)

    def matrix(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Rows `start` to `stop` of `P` for a parameter, one block: `start` is a multiple of `step`."""
        return random_matrix(stop - start, self.size, self.kind, self.seed, f"{name}/{start // self.step}", device)

    def project(self, gradients: RowGradients, done: Pass) -> torch.Tensor:
        """See `Projector`."""
        result = done.losses.new_zeros(done.num_rows, self.size)
        explicit = []
        for name, parameter in gradients.parameters.items():
            calls = _calls(gradients, name, done)
            if calls is None:
                explicit.append(name)
                continue
            columns = matrix_shape(parameter.shape)[1]
            for start, stop, block in self._blocks(name, parameter.numel(), result):
                for rule, call in calls:
                    result.addmm_(_entries(rule, call, done.num_rows, columns, start, stop), block)
        for name, rows, grads in gradients.blocks(done, explicit):
            flat = as_rows(grads)
            for start, stop, block in self._blocks(name, flat.shape[1], result):
                result[rows].addmm_(flat[:, start:stop], block)
        return result / self.size**0.5

    def _blocks(self, name: str, size: int, like: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        for start in range(0, size, self.step):
            stop = min(start + self.step, size)
            yield start, stop, self.matrix(name, start, stop, like.device).to(like)


Sides = Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]]
"""name -> `L [k, m]` and `R [k', n]` for its gradient seen as `[m, n]`; `None` is the identity."""


class SidedProjection:
    """`G -> L G R^T` of every parameter, one after the other in `[rows, size]`.

    Args:
        gradients: engine, for the shapes.
        sides: the parameters that count, with their matrices.
        scale: name -> object with `apply(gradients)`: what gradients are multiplied with before they are projected.

    Attributes:
        size: dimensions in all.
        parts: name -> its columns.
    """

    def __init__(self, gradients: RowGradients, sides: Sides, scale: Mapping | None = None) -> None:
        self.sides = sides
        self.scale = scale
        self.size = 0
        self.parts: dict[str, slice] = {}
        for name, (left, right) in sides.items():
            rows, columns = matrix_shape(gradients.parameters[name].shape)
            size = (rows if left is None else len(left)) * (columns if right is None else len(right))
            self.parts[name] = slice(self.size, self.size + size)
            self.size += size

    def project(self, gradients: RowGradients, done: Pass) -> torch.Tensor:
        """See `Projector`."""
        result = done.losses.new_zeros(done.num_rows, self.size)
        explicit = []
        for name, sides in self.sides.items():
            calls = _calls(gradients, name, done) if self.scale is None else None
            if calls is None:
                explicit.append(name)
                continue
            for rule, call in calls:
                left, right = _TOKEN_SIDES[rule](call, done.num_rows, *sides)
                result[:, self.parts[name]] += torch.bmm(left.transpose(1, 2), right).flatten(1)
        for name, rows, grads in gradients.blocks(done, explicit):
            grads = grads if self.scale is None else self.scale[name].apply(grads)
            left, right = self.sides[name]
            matrices = grads.reshape(len(grads), *matrix_shape(grads.shape[1:]))
            matrices = matrices if left is None else left.to(matrices) @ matrices
            matrices = matrices if right is None else matrices @ right.to(matrices).T
            result[rows, self.parts[name]] = matrices.flatten(1)
        return result


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """A parameter's shape as that of a matrix; a vector is a column."""
    rows = shape[0] if shape else 1
    return rows, shape[1:].numel() if len(shape) > 1 else 1


def random_side(size: int, length: int, kind: str, seed: int, key: str, like: torch.Tensor) -> torch.Tensor | None:
    """One side of a projection, `[size, length] / sqrt(size)`; the identity if it would not make anything smaller."""
    if size >= length:
        return None
    return (random_matrix(size, length, kind, seed, key, like.device) / size**0.5).to(like)


def _calls(gradients: RowGradients, name: str, done: Pass) -> list[tuple[Rule, Call]] | None:
    """The calls that make a parameter's gradient, if each is a sum of outer products over tokens."""
    calls = gradients.calls(name, done)
    return None if calls is None or any(rule not in _TOKEN_SIDES for rule, _ in calls) else calls


def _entries(rule: Rule, call: Call, rows: int, columns: int, start: int, stop: int) -> torch.Tensor:
    """Entries `start` to `stop` of every row's flattened gradient, of all rows of the batch and nothing more."""
    first = start // columns
    left, right = _TOKEN_SIDES[rule](call, rows, slice(first, -(-stop // columns)), None)
    flat = torch.bmm(left.transpose(1, 2), right).flatten(1)
    return flat[:, start - first * columns : stop - first * columns]


def _linear_sides(call: Call, rows: int, left, right) -> tuple[torch.Tensor, torch.Tensor]:
    return _times(by_row(call.grad, rows), left), _times(by_row(call.input, rows), right)


def _conv1d_sides(call: Call, rows: int, left, right) -> tuple[torch.Tensor, torch.Tensor]:
    return _times(by_row(call.input, rows), left), _times(by_row(call.grad, rows), right)


def _embedding_sides(call: Call, rows: int, left, right) -> tuple[torch.Tensor, torch.Tensor]:
    """A token is a one-hot vector, which picks a column of `L`."""
    tokens, grads = call.input.reshape(rows, -1), by_row(call.grad, rows)
    if call.module.padding_idx is not None:
        grads = grads * (tokens != call.module.padding_idx)[..., None]
    if isinstance(left, slice):
        picked = tokens[..., None] == torch.arange(left.start, left.stop, device=tokens.device)
    else:
        picked = F.one_hot(tokens, len(call.module.weight)) if left is None else left.T[tokens]
    return picked.to(grads), _times(grads, right)


def _times(tokens: torch.Tensor, side: torch.Tensor | slice | None) -> torch.Tensor:
    """Tokens times one side of the projection; a slice picks features."""
    if isinstance(side, slice):
        return tokens[..., side]
    return tokens if side is None else tokens @ side.to(tokens).T


_TOKEN_SIDES: dict[Rule, object] = {
    linear_weight: _linear_sides,
    conv1d_weight: _conv1d_sides,
    embedding_weight: _embedding_sides,
}
