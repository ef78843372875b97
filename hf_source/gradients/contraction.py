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
"""What per-row gradients are wanted for, taken from a module's call without holding them: products and weighted sums.

The gradient of a Linear weight for one row is `dy^T x`, a sum over the row's tokens. `pieces` gives it for all rows,
some of the parameter's first axis at a time, so that memory stays small however large the parameter. For dot products
with `Q` vectors, and for `Q` weighted sums over rows, there is a second way that makes no gradients, by the factors
themselves: `Q T o i` multiplications a row instead of `(T + Q) o i`, so it wins for one vector or one token. An
embedding's vectors are looked up, never spread over the vocabulary.
"""

from collections.abc import Iterator

import torch

from .rules import Call, Rule, by_row, conv1d_weight, embedding_weight, linear_weight


PIECE_BYTES = 16 * 2**20
"""Gradients held at once: small enough to stay in a processor's cache, large enough for efficient products."""

FACTORED = (linear_weight, conv1d_weight, embedding_weight)
"""Rules whose gradients are sums over tokens of outer products, which a call holds in less than the gradients take."""


def factors(rule: Rule, call: Call, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(u, v)`, `[rows, tokens, m]` and `[rows, tokens, k]`, with gradients `sum over tokens of u v^T`."""
    pair = by_row(call.grad, rows), by_row(call.input, rows)
    return pair if rule is linear_weight else pair[::-1]


def pieces(
    rule: Rule, call: Call, rows: int, first: slice | None = None, max_bytes: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Per-row gradients of a parameter in parts of its first axis.

    Args:
        rule: how the parameter enters the call.
        call: with its gradient.
        rows: of the batch.
        first: the part of the first axis that is wanted; all by default.
        max_bytes: largest part, `PIECE_BYTES` by default; at least one entry of the first axis.

    Yields:
        The part of the first axis, and gradients `[rows, part, ...]`.
    """
    if rule not in FACTORED:
        whole = rule(call, rows)
        first = first or slice(0, whole.shape[1] if whole.dim() > 1 else 1)
        yield first, whole if whole.dim() == 1 else whole[:, first]
        return
    shape = call.module.weight.shape
    first = first or slice(0, shape[0])
    step = max(1, int((max_bytes or PIECE_BYTES) // max(1, rows * shape[1] * call.grad.element_size())))
    for start in range(first.start, first.stop, step):
        part = slice(start, min(start + step, first.stop))
        if rule is embedding_weight:
            yield part, _embedding_piece(call, rows, part)
        else:
            left, right = factors(rule, call, rows)
            yield part, torch.bmm(left[..., part].transpose(1, 2), right)


def add_piece(
    rule: Rule, call: Call, rows: int, part: slice, scale: float, target: torch.Tensor, fresh: bool = False
) -> None:
    """Add a part of the per-row gradients to a tensor, without making them apart first.

    Args:
        rule, call, rows: see `pieces`; the rule is one of `FACTORED`.
        part: of the parameter's first axis.
        scale: of the gradients.
        target: `[rows, part, ...]`, contiguous.
        fresh: whether the target holds nothing yet, not even zeros.
    """
    if rule is not embedding_weight:
        left, right = factors(rule, call, rows)
        left = left if part == slice(0, left.shape[-1]) else left[..., part]
        if left.dtype != target.dtype:
            own = torch.bmm(left.transpose(1, 2), right)
            torch.mul(own, scale, out=target) if fresh else target.add_(own, alpha=scale)
            return
        torch.baddbmm(target, left.transpose(1, 2), right, beta=0 if fresh else 1, alpha=scale, out=target)
        return
    if fresh:
        target.zero_()
    number, position, entry = _entries(call, rows, part)
    flat = target.view(-1, target.shape[-1])
    grads = by_row(call.grad, rows)[number, position].to(target)
    flat.index_add_(0, number * (part.stop - part.start) + entry, grads, alpha=scale)


def _entries(call: Call, rows: int, part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that are among some entries of a vocabulary: their row, position and place among the entries."""
    tokens = call.input.reshape(rows, -1)
    inside = (tokens >= part.start) & (tokens < part.stop) & counted(call, tokens)
    number, position = inside.nonzero(as_tuple=True)
    return number, position, tokens[number, position] - part.start


def _embedding_piece(call: Call, rows: int, part: slice) -> torch.Tensor:
    """Gradients of some entries of a vocabulary, `[rows, entries, hidden]`."""
    if part == slice(0, len(call.module.weight)):
        return embedding_weight(call, rows)
    result = call.grad.new_empty((rows, part.stop - part.start, call.grad.shape[-1]))
    add_piece(embedding_weight, call, rows, part, 1.0, result, fresh=True)
    return result


def counted(call: Call, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens that train the embedding: not its padding."""
    padding = call.module.padding_idx
    return torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding


def add_dots(rule: Rule, call: Call, rows: int, vectors: torch.Tensor, total: torch.Tensor) -> None:
    """Add the dot products of each row's gradient with each vector.

    Args:
        rule, call, rows: see `pieces`.
        vectors: `[vectors, *parameter.shape]`; if they are narrower than the gradients, so are the factors that are
            multiplied with each other and with them.
        total: `[vectors, rows]`, added to.
    """
    if rule is embedding_weight:
        _add_looked_up(call, rows, vectors, total)
        return
    if rule in FACTORED:
        if vectors.dtype.itemsize < call.grad.element_size():
            call = call.with_tensors(call.input.to(vectors.dtype), call.grad.to(vectors.dtype))
        left, right = factors(rule, call, rows)
        if _contracts(left.shape[1], len(vectors)):
            add_factor_dots(left, right, vectors, total)
        else:
            _add_dots_in_pieces(left, right, vectors, total)
        return
    for part, grads in pieces(rule, call, rows):
        _add_products(grads, vectors[:, part] if vectors.dim() > 1 else vectors, total)


def _add_dots_in_pieces(left: torch.Tensor, right: torch.Tensor, vectors: torch.Tensor, total: torch.Tensor) -> None:
    """The same for factors `[rows, tokens, m]` and `[rows, tokens, k]`, by gradients in parts of their longer side."""
    first = left.shape[2] >= right.shape[2]
    longer, other = (left, right) if first else (right, left)
    step = max(1, PIECE_BYTES // max(1, len(left) * other.shape[2] * left.element_size()))
    for start in range(0, longer.shape[2], step):
        part = slice(start, start + step)
        pair = (left[..., part], right) if first else (left, right[..., part])
        own = vectors[:, part] if first else vectors[..., part]
        _add_products(torch.bmm(pair[0].transpose(1, 2), pair[1]), own, total)


def _add_products(grads: torch.Tensor, vectors: torch.Tensor, total: torch.Tensor) -> None:
    """Add the products of `[rows, ...]` with `[vectors, ...]`."""
    flat = grads.reshape(len(grads), -1)
    own = vectors.reshape(len(vectors), -1).to(flat)
    # Of a narrow type the fewer first: it is them that a product of tall matrices keeps at hand.
    rows_first = len(flat) < len(own) or flat.element_size() >= 4
    total += products(flat, own).T if rows_first else products(own, flat)


NARROW_TERMS = 2**15
"""Terms of a sum that is rounded to a narrow type."""


def products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`[rows, others]` of `[rows, size]` and `[others, size]`; of a narrow type in float32.

    That is summed in parts: each is rounded to the narrow type, and torch 2.13 ends the process where it multiplies
    some long ones at once on a CPU, such as `[24, 65536]`.
    """
    if rows.element_size() >= 4:
        return rows @ others.T
    parts = zip(rows.split(NARROW_TERMS, dim=1), others.split(NARROW_TERMS, dim=1), strict=True)
    return sum((own @ other.T).float() for own, other in parts)


def _contracts(tokens: int, vectors: int) -> bool:
    """Whether vectors are better multiplied by the factors than by gradients that are made of them."""
    return vectors * tokens <= vectors + tokens


def add_factor_dots(left: torch.Tensor, right: torch.Tensor, vectors: torch.Tensor, total: torch.Tensor) -> None:
    """Add `<u v^T, Q>` to `total [vectors, rows]` for factors `[rows, tokens, m]` and `[rows, tokens, k]`."""
    for number, vector in enumerate(vectors):
        total[number] += ((left @ vector.to(left)) * right).sum(dim=(1, 2))


def add_factor_sums(left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
    """Add `sum over rows of w u v^T` to `total [vectors, m, k]` for `weights [vectors, rows]`."""
    flat = right.flatten(0, 1)
    for own, weight in zip(total, weights, strict=True):
        own += (left * weight[:, None, None]).flatten(0, 1).T @ flat


def _add_looked_up(call: Call, rows: int, vectors: torch.Tensor, total: torch.Tensor) -> None:
    tokens, grads = _looked_up(call, rows)
    if tokens.stride(0) == 0:  # positions, which are the same in every row
        step = max(1, PIECE_BYTES // max(1, grads[0].numel() * grads.element_size()))
        for some, sums in zip(vectors.split(step), total.split(step), strict=True):
            sums += products(some[:, tokens[0]].to(grads).flatten(1), grads.flatten(1))
        return
    for vector, sums in zip(vectors, total, strict=True):  # what one of them needs stays in a processor's cache
        sums += vector[tokens].to(grads).mul_(grads).sum(dim=(1, 2))


def _looked_up(call: Call, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding's tokens and their gradients, `[rows, tokens]` and `[rows, tokens, hidden]`; 0 for its padding."""
    tokens, grads = call.input.reshape(rows, -1), by_row(call.grad, rows)
    if call.module.padding_idx is not None:
        grads = grads * counted(call, tokens)[..., None]
    return tokens, grads


def add_combined(rule: Rule, call: Call, rows: int, coefficients: torch.Tensor, total: torch.Tensor) -> None:
    """Add sums of the rows' gradients with coefficients.

    Args:
        rule, call, rows: see `pieces`.
        coefficients: `[rows, vectors]`.
        total: `[vectors, *parameter.shape]`, added to.
    """
    weights = coefficients.T.to(call.grad)
    if rule is embedding_weight:
        tokens, grads = _looked_up(call, rows)
        for weight, sums in zip(weights, total, strict=True):
            sums.index_add_(0, tokens.flatten(), (grads * weight[:, None, None]).flatten(0, 1).to(sums))
        return
    if rule in FACTORED:
        left, right = factors(rule, call, rows)
        if _contracts(left.shape[1], len(weights)):
            add_factor_sums(left, right, weights, total)
            return
    for part, grads in pieces(rule, call, rows):
        own = total[:, part] if total.dim() > 1 else total
        own += (weights @ grads.reshape(rows, -1)).view(own.shape)
