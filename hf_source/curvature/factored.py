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
"""The tail's block of a large parameter from factored columns of `S`, without making the gradients whole.

With `P ~ u v^T` (the rank-one factorisation, `Diagonal.whitened_sides`) the whitened gradient of a sample is
`G = sum over tokens of (sqrt(u) dy) (sqrt(v) x)^T = A^T B`, and

    G G^T = A^T (B B^T) A,    G^T G = B^T (A A^T) B,    L^T G R = (A L)^T (B R),

`O(T (m^2 + k^2))` for `T` tokens instead of `O(m k (m + k))`: several times less where a row has fewer tokens than the
parameter has columns. The linear datamodelling score stays as it was (measured on the runs of
`benchmarks/bench_lm_lds.py`: with 128 samples .763 for .762 on `wiki` and .572 for .567 on `facts`, where it is .633
for .626 with 1,024).
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..gradients.contraction import FACTORED, PIECE_BYTES, counted, factors
from ..gradients.rows import Pass
from ..gradients.rules import by_row, conv1d_weight, embedding_weight
from .block import MAX_FULL_SIDE, Block, leading_bases
from .columns import Columns, Part
from .preconditioner import Diagonal, Preconditioner
from .sample import FisherSample


FACTORED_SIZE = 2**17
"""Parameters with more entries than this may get their block from factors whatever `P`; of smaller ones it is exact.

Taking blocks of small parameters from factors, too, makes the walk a quarter cheaper and leaves the linear
datamodelling score as it is, but of the demo's 97 finetuned answers one loses the row that states it.
"""


def is_cheaper(columns: Columns, preconditioner: Preconditioner) -> bool:
    """Whether a block is to be taken from factors."""
    if not isinstance(preconditioner, Diagonal) or columns.dense is not None or not columns.parts:
        return False
    if columns.like.numel() <= FACTORED_SIZE and not preconditioner.is_constant:
        return False
    m, k = columns.shape
    full = m if m <= MAX_FULL_SIDE else 0
    return multiplications(max(map(_tokens, columns.parts)), m, k, full) < 2 * m * k * (full + k)


def multiplications(tokens: int, m: int, k: int, full: int) -> int:
    """Multiplications per sample; `full` is `m`, or 0 where the first axis stays diagonal."""
    return tokens * (2 * full**2 + 2 * k**2 + m * k) + tokens**2 * (m + k)


def fit_factored(columns: Columns, preconditioner: Diagonal, diagonal_left: bool = False, least: float = 0.0) -> Block:
    """The block of a parameter `[m, k]`; see the module.

    Args:
        columns: factored ones only.
        preconditioner: `P`.
        diagonal_left: see `GradientMoments`. Needed where an embedding is among the calls.
        least: eigenvalue below which a direction need not be told from others; all are found if it is 0. No entry of
            the block is larger than the eigenvalues of its row and of its column.
    """
    m, k = columns.shape
    by_left, by_right = (side.to(columns.parts[0].call.grad) for side in preconditioner.roots_of_sides(columns.like))
    whitened = [_scaled(part, by_left, by_right) for part in columns.parts]
    left = None if diagonal_left or m > MAX_FULL_SIDE else columns.like.new_zeros((m, m))
    right = columns.like.new_zeros((k, k)) if k <= MAX_FULL_SIDE else None
    for one, other in _pairs(whitened):
        if right is not None:
            _add_right(one, other, right)
        if left is not None:
            _add_left(one, other, left)
    scale = columns.scale**2
    left, right = leading_bases([None if moment is None else moment.mul_(scale) for moment in (left, right)], least)
    whitened = Columns(columns.size, columns.like, columns.scale, columns.piece_bytes, parts=whitened)
    return Block(left, right, squares_in_bases(whitened, left, right), preconditioner)


def factored_columns(sample: FisherSample, name: str, done: Pass) -> Columns | None:
    """The columns of `S` that a pass gives a parameter, by its calls; `None` if rules do not tell.

    Args:
        sample: whose pass it is.
        name: of the parameter. A vocabulary's first axis has no basis, another embedding's may have one, in which
            looked-up rows cannot be turned.
        done: the pass.
    """
    calls = sample.gradients.calls(name, done)
    if not calls or any(rule not in FACTORED for rule, _ in calls):
        return None
    if name not in sample.gradients.vocabulary and any(rule is embedding_weight for rule, _ in calls):
        return None
    rows = slice(0, done.num_rows)
    parts = [Part(rows, rule, call) for rule, call in calls]
    return Columns(done.num_rows, sample.gradients.parameters[name], sample.scale, PIECE_BYTES, parts=parts)


def squares_in_bases(columns: Columns, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """`sum over samples of (L^T G R)^2`, entry by entry: `[m, k]`.

    Args:
        columns: factored ones only.
        left: `L`, or `None` for the identity.
        right: `R`, or `None`.
    """
    m, k = columns.shape
    like = columns.like.new_empty((m if left is None else left.shape[1], k if right is None else right.shape[1]))
    if not like.numel():  # no direction of a side is told from others
        return like
    parts = [_rotated(part, left, right) for part in columns.parts]
    rotated = Columns(columns.size, like, columns.scale, columns.piece_bytes, parts=parts)
    if (pair := outer_products(rotated)) is not None:
        return pair[0].square_().T @ pair[1].square_()
    squares = torch.empty_like(like)
    for first, own in rotated.slices():
        squares[first] = own.square_().sum(dim=0)
    return squares


def outer_products(columns: Columns) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`U [samples, m]` and `V [samples, k]` of gradients `u v^T`, scale and all; `None` if they are sums of more.

    So they are of a linear layer that sees one vector a row, as in networks on tables and of small images.
    """
    covered = np.zeros(columns.size, dtype=int)
    for part in columns.parts:
        covered[part.samples] += 1
    if columns.dense is not None or not columns.parts or covered.max() > 1:
        return None
    if any(part.rule is embedding_weight or _tokens(part) != 1 for part in columns.parts):
        return None
    pair = tuple(columns.like.new_zeros((columns.size, side)) for side in columns.shape)
    for part in columns.parts:
        for held, own in zip(pair, factors(part.rule, part.call, _rows(part)), strict=True):
            held[part.samples] = own[:, 0]
    return pair[0].mul_(columns.scale), pair[1]


def _rows(part: Part) -> int:
    return part.samples.stop - part.samples.start


def _tokens(part: Part) -> int:
    return by_row(part.call.grad, _rows(part)).shape[1]


def _with(part: Part, inputs: torch.Tensor, grads: torch.Tensor) -> Part:
    return Part(part.samples, part.rule, part.call.with_tensors(inputs, grads))


def _scaled(part: Part, by_left: torch.Tensor, by_right: torch.Tensor) -> Part:
    """The call whose gradients are whitened: `sqrt(u)` on the parameter's first axis, `sqrt(v)` on its second."""
    call, rows = part.call, _rows(part)
    if part.rule is embedding_weight:
        tokens = call.input.reshape(rows, -1)
        known = by_left[tokens] * counted(call, tokens)
        return _with(part, tokens, by_row(call.grad, rows) * known[..., None] * by_right)
    sides = (by_right, by_left) if part.rule is not conv1d_weight else (by_left, by_right)
    return _with(part, by_row(call.input, rows) * sides[0], by_row(call.grad, rows) * sides[1])


def _rotated(part: Part, left: torch.Tensor | None, right: torch.Tensor | None) -> Part:
    """The call whose gradients are `L^T G R`."""
    times = lambda tensor, basis: tensor if basis is None else tensor @ basis.to(tensor)  # noqa: E731
    if part.rule is embedding_weight:  # its first axis has no basis but its own
        return _with(part, part.call.input, times(part.call.grad, right))
    sides = (right, left) if part.rule is not conv1d_weight else (left, right)
    return _with(part, times(part.call.input, sides[0]), times(part.call.grad, sides[1]))


def _pairs(parts: list[Part]) -> Iterator[tuple[Part, Part]]:
    """Calls of the same samples: a weight that is used twice has the sum of two for its gradient."""
    by_samples: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        by_samples.setdefault((part.samples.start, part.samples.stop), []).append(part)
    for own in by_samples.values():
        yield from ((one, other) for one in own for other in own)


def _add_right(one: Part, other: Part, moment: torch.Tensor) -> None:
    """Add `sum over samples of B_1^T (A_1 A_2^T) B_2`."""
    rows = _rows(one)
    embeds = one.rule is embedding_weight, other.rule is embedding_weight
    right = [_sides(part, rows)[1] for part in (one, other)]
    if all(embeds):
        gram = (one.call.input[:, :, None] == other.call.input[:, None, :]).to(right[0])
    elif embeds[0]:
        gram = _looked_up(_sides(other, rows)[0], one.call.input).transpose(1, 2)
    elif embeds[1]:
        gram = _looked_up(_sides(one, rows)[0], other.call.input)
    else:
        gram = torch.bmm(_sides(one, rows)[0], _sides(other, rows)[0].transpose(1, 2))
    moment += right[0].flatten(0, 1).T @ torch.bmm(gram, right[1]).flatten(0, 1)


def _add_left(one: Part, other: Part, moment: torch.Tensor) -> None:
    """Add `sum over samples of A_1^T (B_1 B_2^T) A_2`."""
    rows = _rows(one)
    (first, first_right), (second, second_right) = _sides(one, rows), _sides(other, rows)
    gram = torch.bmm(first_right, second_right.transpose(1, 2))
    moment += first.flatten(0, 1).T @ torch.bmm(gram, second).flatten(0, 1)


def _sides(part: Part, rows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`A` and `B`, `[samples, tokens, m]` and `[samples, tokens, k]`; an embedding's `A` is one-hot and not made."""
    if part.rule is embedding_weight:
        return None, part.call.grad
    return factors(part.rule, part.call, rows)


def _looked_up(left: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`A_1 A_2^T` for a one-hot `A_2`: the columns of `A_1 [samples, tokens, m]` at the other call's tokens."""
    return left.gather(2, tokens[:, None, :].expand(-1, left.shape[1], -1))
