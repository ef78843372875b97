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
"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): layers that are run again on the way back.

Of such a layer only what goes in is kept. The way back runs it again, with a graph whose calls then give the gradients
of its rows; so calls of one layer are held at a time, for a third more arithmetic. The first run leaves no calls. What
torch and transformers have is of no use here: it runs layers again only in training mode, and goes back through the
graph of the first run, whose calls hold what was to be let go.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import UnsupportedError
from .recompute import tensors_of
from .rules import Call


Calls = dict[nn.Module, list[Call]]

_region = _regions = 0


def region() -> int:
    """Number of the layer that is being run again and gone back through; 0 outside."""
    return _region


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Layers that transformers can checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def enable(model: nn.Module) -> None:
    """Let a model's layers be run again, as `gradient_checkpointing_enable()` of transformers does in training.

    Raises:
        UnsupportedError: if it has no such layers.
    """
    layers = layers_of(model)
    if not layers:
        raise UnsupportedError(
            f"gradient_checkpointing=True runs layers of transformers again, and {type(model).__name__} has none: "
            "leave it out, and lower max_tokens_per_batch= if a batch does not fit."
        )
    for layer in layers:
        layer.gradient_checkpointing = True


class Rerun:
    """Of one forward and backward pass; within it, layers that are enabled are run again.

    Args:
        model: whose layers may be.

    Attributes:
        shapes: module -> calls of the first run, with outputs that have shapes alone.
        kept: finished calls of the modules that were asked to be kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for layer in layers_of(model) if layer.gradient_checkpointing]
        self.shapes: Calls = {}
        self.kept: Calls = {}
        self._first = False
        self._again: Calls | None = None
        self._before: list[Callable | None] = []
        self._watch: Callable[[Calls], None] = lambda calls: None
        self._keep: set[nn.Module] = set()

    def __enter__(self) -> "Rerun":
        for layer in self.layers:
            self._before.append(vars(layer).get("forward"))
            layer.forward = self._instead_of(layer.forward)
        return self

    def __exit__(self, *error: Any) -> None:
        for layer, before in zip(self.layers, self._before, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before

    def place(self, calls: Calls) -> Calls:
        """Where calls go that are made now."""
        return calls if self._again is None else self._again

    def passes_over(self, module: nn.Module, output: Any) -> bool:
        """Whether a call is one of the first run of a layer, of which shapes are enough."""
        if self._first:
            outputs = tuple(torch.empty_like(tensor, device="meta") for tensor in tensors_of(output))
            self.shapes.setdefault(module, []).append(Call(module, (), {}, outputs))
        return self._first

    def go_back(self, watch: Callable[[Calls], None], keep: Iterable[nn.Module]) -> None:
        """Say what is done with the calls of layers before the way back begins.

        Args:
            watch: gets those of a layer before it is gone back through.
            keep: modules whose calls are wanted as they are, with their gradients.
        """
        self._watch, self._keep = watch, set(keep)

    def _instead_of(self, forward: Callable) -> Callable:
        def run_twice(*args: Any, **kwargs: Any) -> Any:
            if self._first or self._again is not None or not torch.is_grad_enabled():  # inside of another one
                return forward(*args, **kwargs)
            leaves, form = tree_flatten((args, kwargs))
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

            def run(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], Any]:
                given = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    given[place] = tensor
                args, kwargs = tree_unflatten(given, form)
                return tree_flatten(forward(*args, **kwargs))

            anchor = torch.zeros((), requires_grad=True)  # so that the way back passes even where nothing went in
            told: list = []
            found = iter(_Again.apply(self, run, told, anchor, *(leaves[place] for place in places)))
            others, out_form = told
            return tree_unflatten([next(found) if is_tensor else other for is_tensor, other in others], out_form)

        return run_twice

    def first(self, run: Callable, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], Any]:
        """A layer's outputs, without a graph."""
        self._first = True
        try:
            return run(tensors)
        finally:
            self._first = False

    def back(
        self, run: Callable, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Run a layer again and go back through it: gradients of what went in."""
        calls: Calls = {}
        given = [each.detach().requires_grad_(each.requires_grad) for each in tensors]
        self._again = calls
        try:
            with torch.enable_grad():
                outputs = [leaf for leaf in run(given)[0] if isinstance(leaf, torch.Tensor)]
        finally:
            self._again = None
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not pairs:
            return [None] * len(given)
        kept = [call for module in self._keep for call in calls.pop(module, ())]
        self._watch(calls)
        calls.clear()
        wanted = [each for each in given if each.requires_grad]
        asked = [output for call in kept for output in call.outputs if output.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [*wanted, *asked, *leaves_of(*outputs)], grads, allow_unused=True)
        of_given = iter(found[: len(wanted)])
        for call in with_grads(kept, iter(found[len(wanted) :])):
            self.kept.setdefault(call.module, []).append(call)
        return [next(of_given) if each.requires_grad else None for each in given]


class _Again(torch.autograd.Function):
    """A layer whose graph is made on the way back."""

    @staticmethod
    def forward(ctx, rerun, run, told, anchor, *tensors):
        ctx.rerun, ctx.run = rerun, run
        ctx.save_for_backward(*tensors)
        leaves, form = rerun.first(run, tensors)
        told.extend(([(isinstance(leaf, torch.Tensor), leaf if not isinstance(leaf, torch.Tensor) else None)
                      for leaf in leaves], form))  # fmt: skip
        outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ctx.mark_non_differentiable(*(each for each in outputs if not each.is_floating_point()))
        return tuple(each.view_as(each) if any(each is given for given in tensors) else each for each in outputs)

    @staticmethod
    def backward(ctx, *grads):
        global _region, _regions
        _region = _regions = _regions + 1
        try:
            return (None, None, None, None, *ctx.rerun.back(ctx.run, ctx.saved_tensors, grads))
        finally:
            _region = 0


def leaves_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Where the graph of some tensors begins, whoever asked for a gradient there.

    Going back as far as that passes every call that has a part in them.
    """
    found, seen = [], set()
    left = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a gradient would be added up
            found.append(node.variable)
        left += [before for before, _ in node.next_functions if before is not None]
    return found


def with_grads(made: Iterable[Call], grads: Iterable[torch.Tensor | None]) -> list[Call]:
    """Calls with the gradients of those outputs that require one, in order; those without a part in the loss left out.

    Args:
        made: calls with a graph.
        grads: of every output that requires one.
    """
    found, grads = [], iter(grads)
    for call in made:
        own = tuple(next(grads) if output.requires_grad else None for output in call.outputs)
        if any(grad is not None for grad in own):  # None for DoRA's look at its own weights, whatever its layout
            plain = tuple(output.detach() for output in call.outputs)
            found.append(Call(call.module, call.args, call.kwargs, plain, own))
    return found
