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
"""Per-row gradients of a module that has no rule: what it did is done again, for every row by itself.

A forward and backward pass over the batch left what went into the module and the gradient that came back. The module
alone is run again on each row's part, for all rows at once where it can be, and autograd gives the gradients of the
parameters inside: of attention whose projections are one matrix, of experts stacked into one tensor, of bare
parameters. That costs one more pass of this module, where a backward pass per row through the model would cost one of
everything.

What it gives again must be what it gave: else the inputs were not taken apart as the module does, and nothing that
came out of it is used. Rows are taken apart on the first axis, as `[rows, ...]` or flattened `[rows * tokens, ...]`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .rules import Call


class NotByRow(RuntimeError):
    """The module gives something else for a row alone than it gave for it in the batch, or cannot be run for it."""


Values = dict[str, torch.Tensor]


# Of a module's output, relative: rows alone are summed in another order than in a batch, no more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The floating tensors of a module's output, whatever holds them, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [part for held in output for part in tensors_of(held)] if isinstance(output, (list, tuple)) else []


def cut(call: Call, rows: slice, num_rows: int) -> Call:
    """The part of a call that belongs to a slice of the batch's rows; what has no row axis stays whole."""
    if rows.start == 0 and rows.stop == num_rows:
        return call
    apart, rebuild = _apart(call, rows, num_rows)
    return rebuild([tensor.flatten(0, 1) for tensor in apart])


def recomputed(call: Call, rows: slice, num_rows: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Per-row gradients of parameters inside a module, for one of its calls.

    Args:
        call: a finished call.
        rows: those wanted.
        num_rows: how many rows it holds.
        names: parameters, as in `call.module.named_parameters()`.

    Returns:
        name -> `[rows wanted, *parameter.shape]`.

    Raises:
        NotByRow: if the module does not take the rows apart as this does.
    """
    parameters = dict(call.module.named_parameters())
    values = {name: parameters[name].detach() for name in names}
    # As many tokens as rows: a mask between tokens looks like one of rows. And what follows its inputs' values (the
    # routing of experts) can only be run row by row.
    ways = [(way, squares) for way in (_together, _one_by_one) for squares in (True, False)]
    for position, (way, squares) in enumerate(ways):
        try:
            return way(*_apart(call, rows, num_rows, squares), values)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if position == len(ways) - 1:
                what = error if isinstance(error, NotByRow) else f"cannot be run for a row alone ({error})"
                raise NotByRow(f"{type(call.module).__name__} {what}") from error
    raise AssertionError("there is a last way")


def _apart(
    call: Call, rows: slice, num_rows: int, squares: bool = True
) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], Call]]:
    """What of a call has a row axis, `[rows wanted, ...]` each, and how to put a row's part into a call.

    Args:
        call, rows, num_rows: see `recomputed`.
        squares: whether a square matrix may have a row axis, or is between tokens.
    """
    lengths = {num_rows, *(len(tensor) for tensor in (call.input, call.outputs[0]) if _has_rows(tensor, num_rows))}
    leaves, form = tree_flatten((call.args, call.kwargs, call.outputs, call.grads))
    chosen = [
        index
        for index, leaf in enumerate(leaves)
        if _has_rows(leaf, num_rows)
        and len(leaf) in lengths
        and (squares or leaf.dim() != 2 or leaf.shape[0] != leaf.shape[1])
    ]

    def rebuild(parts: Sequence[torch.Tensor]) -> Call:
        filled = dict(zip(chosen, parts, strict=True))
        return Call(call.module, *tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], form))

    return [leaves[i].reshape(num_rows, -1, *leaves[i].shape[1:])[rows] for i in chosen], rebuild


def _has_rows(held: Any, num_rows: int) -> bool:
    return isinstance(held, torch.Tensor) and held.dim() > 0 and len(held) > 0 and len(held) % num_rows == 0


def _together(apart: list[torch.Tensor], rebuild: Callable, values: Values) -> Values:
    """All rows in one pass, each with gradients of its own."""

    def one(inside: Values, *parts: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        call = rebuild(parts)
        outputs = _outputs(call, inside)
        pairs = [(made, grad) for made, grad in zip(outputs, call.grads, strict=True) if grad is not None]
        return sum((made * grad).sum() for made, grad in pairs), [
            (made - before).square().sum() for made, before in zip(outputs, call.outputs, strict=True)
        ]

    over_rows = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, *[0] * len(apart)))
    with torch.no_grad():  # the other parameters stay out of it
        found, differences = over_rows(values, *apart)
    _refuse_others(differences, rebuild([part.flatten(0, 1) for part in apart]))
    return found


def _one_by_one(apart: list[torch.Tensor], rebuild: Callable, values: Values) -> Values:
    """A pass for each row."""
    result = {name: value.new_zeros((len(apart[0]), *value.shape)) for name, value in values.items()}
    for row in range(len(apart[0])):
        call = rebuild([part[row] for part in apart])
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with torch.enable_grad():
            outputs = _outputs(call, leaves)
        before = zip(outputs, call.outputs, strict=True)
        _refuse_others([(made.detach() - given).square().sum() for made, given in before], call)
        pairs = [
            (made, grad)
            for made, grad in zip(outputs, call.grads, strict=True)
            if grad is not None and made.requires_grad
        ]
        if pairs:  # not so if the row uses none of them
            made, grads = zip(*pairs, strict=True)
            grads = torch.autograd.grad(made, list(leaves.values()), grads, allow_unused=True)
            for name, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    result[name][row] = grad
    return result


def _outputs(call: Call, inside: Values) -> list[torch.Tensor]:
    """What the module gives with other tensors for its parameters."""
    outputs = tensors_of(torch.func.functional_call(call.module, inside, call.args, call.kwargs))
    if [made.shape for made in outputs] != [before.shape for before in call.outputs]:
        raise NotByRow("gives another output for a row alone")
    return outputs


def _refuse_others(differences: Sequence[torch.Tensor], call: Call) -> None:
    """Squared differences of every output from what it was, summed up to those of the call's outputs."""
    for difference, before in zip(differences, call.outputs, strict=True):
        size = before.norm().clamp_min(1e-6)
        if not difference.sum().sqrt() <= _TOLERANCE.get(before.dtype, 2e-2) * size:
            raise NotByRow("gives another output for a row alone")
