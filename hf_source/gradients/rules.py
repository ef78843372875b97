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
"""Per-row gradients of one module's parameters, from what went into it and the gradient that came back.

Each rule is the textbook chain rule for its module, kept apart per row. `call.input` is `[rows, ..., in]`,
`call.grad` (gradient of the summed loss with respect to the module's output) `[rows, ..., out]`; a rule returns
`[rows, *parameter.shape]`. Rules exist for the modules below and those of `convolutions.py`; parameters of any other
module come from running it again (`recompute.py`). Every rule is checked against autograd on real rows before it is
used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass
class Call:
    """One call of a module in a forward pass. A module called twice leaves two of them.

    Attributes:
        module: what was called.
        args, kwargs: what it was called with, without graph.
        outputs: its tensors that carry a gradient.
        grads: the gradients that came back to them, once there was a backward pass; `None` for an output without part
            in the loss.
    """

    module: nn.Module
    args: tuple
    kwargs: dict
    outputs: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor | None, ...] = ()

    @property
    def input(self) -> torch.Tensor:
        """The first thing that went in.

        Raises:
            TypeError: if nothing did: a parametrization's list is called like that, and has no rows.
        """
        for given in (*self.args, *self.kwargs.values()):
            return given
        raise TypeError(f"{type(self.module).__name__} was called with nothing")

    @property
    def grad(self) -> torch.Tensor:
        """The gradient of the first output that has one."""
        return next(grad for grad in self.grads if grad is not None)

    def with_tensors(self, inputs: torch.Tensor, grad: torch.Tensor | None) -> "Call":
        """A call of the same module with another input and gradient, and nothing else."""
        return Call(self.module, (inputs,), {}, (), () if grad is None else (grad,))


Rule = Callable[[Call, int], torch.Tensor]


def by_row(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`[rows, ..., features]` or flattened `[rows * tokens, features]` as `[rows, tokens, features]`."""
    return tensor.reshape(rows, -1, tensor.shape[-1])


def linear_weight(call: Call, rows: int) -> torch.Tensor:
    """`y = x W^T`: `dW = sum over tokens of (dy x^T)`, `[rows, out, in]`."""
    return torch.bmm(by_row(call.grad, rows).transpose(1, 2), by_row(call.input, rows))


def conv1d_weight(call: Call, rows: int) -> torch.Tensor:
    """GPT-2's `Conv1D` is a Linear whose weight is stored transposed: `[rows, in, out]`."""
    return torch.bmm(by_row(call.input, rows).transpose(1, 2), by_row(call.grad, rows))


def bias(call: Call, rows: int) -> torch.Tensor:
    """`y = ... + b`: `db = sum over tokens of dy`, `[rows, out]`."""
    return by_row(call.grad, rows).sum(dim=1)


def embedding_weight(call: Call, rows: int) -> torch.Tensor:
    """Token gradients scattered to their vocabulary entries, `[rows, vocabulary, hidden]`."""
    vocabulary, hidden = call.module.weight.shape
    tokens = call.input.reshape(rows, -1)
    grads = by_row(call.grad, rows)
    if call.module.padding_idx is not None:
        grads = grads * (tokens != call.module.padding_idx)[..., None]
    flat = tokens + vocabulary * torch.arange(rows, device=tokens.device)[:, None]
    result = grads.new_zeros(rows * vocabulary, hidden)
    result.index_add_(0, flat.flatten(), grads.reshape(-1, hidden))
    return result.view(rows, vocabulary, hidden)


def norm_weight(call: Call, rows: int) -> torch.Tensor:
    """Gradient of a norm's scale, `[rows, hidden]`: `dscale = sum over tokens of dy * n(x)`.

    A norm is affine in its scale, `y = scale * n(x) + ...` (or `(1 + scale) * n(x)`), so `n(x)` is the difference of
    its outputs at scale 1 and 0.
    """
    return by_row(call.grad * _normalized(call.module, call.input), rows).sum(dim=1)


@torch.no_grad()
def _normalized(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`n(x)`."""
    if type(module) is nn.LayerNorm:
        return nn.functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    # The module's own weights are not asked: processes may hold them between them. Others cancel in the difference.
    others = dict(module.named_parameters(recurse=False))
    zeros = {name: torch.zeros(each.shape, dtype=each.dtype, device=inputs.device) for name, each in others.items()}
    ones = {**zeros, "weight": torch.ones_like(zeros["weight"])}
    return torch.func.functional_call(module, ones, (inputs,)) - torch.func.functional_call(module, zeros, (inputs,))


def rules_for(module: nn.Module) -> dict[str, Rule]:
    """The rule of each of the module's own parameters; empty if the module's type has none.

    A subclass qualifies only while it keeps the parent's `forward`: what it does is then known.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return {"weight": linear_weight, "bias": bias}
    if type(module) is Conv1D:
        return {"weight": conv1d_weight, "bias": bias}
    if forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return {"weight": embedding_weight}
    if _is_feature_norm(module):
        return {"weight": norm_weight, "bias": bias}
    return {}


def _is_feature_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and their namesakes in transformers: one scale per feature, statistics within a token."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and weight is not None and weight.dim() == 1
