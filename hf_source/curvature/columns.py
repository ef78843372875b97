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
"""Columns of the sample matrix `S` that belong to one parameter, held as what takes less: as they are, or factored.

A sample's gradient of a Linear weight is `dy^T x` over its tokens. Where the tokens are fewer than what they make up
for, `x` and `dy` are kept instead, and gradients are made of them again, a few samples or a part of the parameter at a
time: the products are a third of the pass that gave them, which is not made again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..gradients.contraction import FACTORED, add_piece, pieces
from ..gradients.rules import Call, Rule, embedding_weight


class Narrowed:
    """Holds tensors in another type; what modules share, such as the input of several, is converted once.

    Args:
        dtype: to hold floating-point tensors in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._known: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the type."""
        if not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in self._known:  # holding on to the tensor, so that no other comes to lie there
            self._known[place] = tensor, tensor.to(self.dtype)
        return self._known[place][1]

    def forget(self) -> None:
        """Let the tensors of a batch go."""
        self._known.clear()


@dataclass
class Part:
    """A call that some samples' gradients are the sum of, among others."""

    samples: slice
    rule: Rule
    call: Call


@dataclass
class Columns:
    """Columns `[samples, *shape]` of `S`.

    Attributes:
        size: samples.
        like: the parameter.
        scale: of the gradients that parts hold; `dense` is scaled already.
        piece_bytes: dense columns made at once.
        narrow: how tensors of parts are held, e.g. in `bfloat16`; as they are by default.
        dense: columns that are held as they are; parts add to it.
        parts: held factored.
    """

    size: int
    like: torch.Tensor
    scale: float
    piece_bytes: int
    narrow: Narrowed | None = None
    dense: torch.Tensor | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.like.shape

    def add(self, samples: slice, rule: Rule, call: Call) -> None:
        """A call of a pass over some samples; it is kept factored if that takes less and none was added up before."""
        count = samples.stop - samples.start
        dtype = None if self.narrow is None else self.narrow.dtype
        if self.dense is None and holds_factored(rule, call, count, self.like, dtype):
            if self.narrow is not None:
                call = call.with_tensors(self.narrow(call.input), self.narrow(call.grad))
            self.parts.append(Part(samples, rule, call))
            return
        target = self._held()[samples]
        if rule in FACTORED:
            add_piece(rule, call, count, slice(0, len(self.like)), self.scale, target)
            return
        for part, grads in pieces(rule, call, count):
            own = target[:, part] if target.dim() > 1 else target
            own.add_(grads.view(own.shape), alpha=self.scale)

    def add_rows(self, samples: slice, grads: torch.Tensor) -> None:
        """Gradients of some samples as they are."""
        self._held()[samples].add_(grads, alpha=self.scale)

    def _held(self) -> torch.Tensor:
        if self.dense is None:
            self.dense = self.like.new_zeros((self.size, *self.shape))
        return self.dense

    def whole(self) -> torch.Tensor:
        """All of them, `[samples, *shape]`."""
        if not self.parts:
            return self._held()
        return self.block(slice(0, self.size), None)

    def samples(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some samples after another: their numbers and `[samples, *shape]`."""
        step = self._step(self.like.numel())
        for start in range(0, self.size, step):
            own = slice(start, min(start + step, self.size))
            yield own, self.block(own, None)

    def slices(self, whole: bool = False, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Parts of the parameter's first axis: the part, and `[samples, part, ...]`; all at once with `whole`.

        In `dtype`, or that of the parameter.
        """
        if self.like.dim() == 0 or whole:
            yield slice(None), self.whole().to(dtype or self.like.dtype)
            return
        step = self._step(self.size * self.like[0].numel())
        for start in range(0, len(self.like), step):
            part = slice(start, min(start + step, len(self.like)))
            yield part, self.block(slice(0, self.size), part, dtype)

    def _step(self, numbers: int) -> int:
        return max(1, self.piece_bytes // max(1, numbers * self.like.element_size()))

    def block(self, samples: slice, first: slice | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Columns of some samples and of a part of the first axis."""
        dtype = dtype or self.like.dtype
        held = None
        if self.dense is not None:
            held = self.dense[samples] if first is None else self.dense[samples, first]
        if not self.parts:
            return (self._held()[samples] if held is None else held).to(dtype)
        first = first or slice(0, len(self.like))
        shape = (samples.stop - samples.start, first.stop - first.start, *self.shape[1:])
        if held is None:
            result = self.like.new_empty(shape, dtype=dtype)
        else:
            result = held.to(dtype, copy=True, memory_format=torch.contiguous_format)
        written = np.full(len(result), held is not None)
        for part in self.parts:
            low, high = max(part.samples.start, samples.start), min(part.samples.stop, samples.stop)
            if low >= high:
                continue
            own = slice(low - part.samples.start, high - part.samples.start)
            call = _rows_of(part.call, own, part.samples.stop - part.samples.start)
            place = slice(low - samples.start, high - samples.start)
            fresh = not written[place].any()
            if not fresh:
                result[place][torch.from_numpy(~written[place])] = 0
            add_piece(part.rule, call, high - low, first, self.scale, result[place], fresh)
            written[place] = True
        if not written.all():
            result[torch.from_numpy(~written)] = 0
        return result


def _rows_of(call: Call, rows: slice, num_rows: int) -> Call:
    """The part of a call that belongs to some of its rows."""
    if rows == slice(0, num_rows):
        return call
    parts = [tensor.reshape(num_rows, -1, *tensor.shape[1:])[rows] for tensor in (call.input, call.grad)]
    return call.with_tensors(*(part.flatten(0, 1) for part in parts))


def holds_factored(
    rule: Rule, call: Call, rows: int, parameter: torch.Tensor, dtype: torch.dtype | None = None
) -> bool:
    """Whether a call, held in a type, takes less than the gradients of its rows."""
    return rule in FACTORED and _num_bytes(call, dtype) < rows * parameter.numel() * parameter.element_size()


def _num_bytes(call: Call, dtype: torch.dtype | None) -> int:
    held = ((each, dtype if dtype and each.is_floating_point() else each.dtype) for each in (call.input, call.grad))
    return sum(tensor.numel() * own.itemsize for tensor, own in held)


def column_bytes(
    parameter: torch.Tensor,
    samples: int,
    tokens: float | None,
    rules: list[Rule] | None,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes that a parameter's columns of `S` take.

    Args:
        parameter: whose columns.
        samples: number of them.
        tokens: of all samples; `None` if unknown.
        rules: of the parameter's uses; `None` if no rule fits.
        dtype: that factored columns are held in; the parameter's by default.
    """
    dense = samples * parameter.numel() * parameter.element_size()
    element = (dtype or parameter.dtype).itemsize
    if tokens is None or not rules or not all(rule in FACTORED for rule in rules):
        return dense
    held = [_INDEX_BYTES + parameter.shape[1] * element if rule is embedding_weight else sum(parameter.shape) * element
            for rule in rules]  # fmt: skip
    factored = [int(tokens * size) for size in held]
    return sum(factored) if max(factored) < dense else dense


_INDEX_BYTES = 8
"""Of a token's number."""
