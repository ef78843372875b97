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
"""One update of a recorded optimizer, forwards and backwards.

Forwards it is torch's own optimizer. Backwards, with `a` and `b` the adjoints of the weights and of the state that the
update leaves (gradients of the query with respect to them), it gives those of the weights, the state and the clipped
gradient that went in. For SGD, Adam and AdamW in closed form and in place, a few operations a parameter for all
queries; for the other optimizers by autograd through torch's differentiable one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..recording.optimizers import OptimizerDescription, build_optimizer
from ..recording.optimizers.adam import AdamRule
from ..recording.optimizers.description import GroupDescription
from ..recording.optimizers.sgd import SGDRule


Vectors = dict[str, torch.Tensor]

State = dict[str, dict[str, torch.Tensor]]
"""Of the optimizer, or its adjoints: parameter name -> key -> tensor."""


@dataclass
class Snapshot:
    """Everything the next step depends on."""

    weights: dict[str, torch.Tensor]
    state: State = field(default_factory=dict)


class Update:
    """Updates of one optimizer.

    Args:
        description: of the optimizer.
        closed_form: use it where it is known; otherwise autograd.
    """

    def __init__(self, description: OptimizerDescription, closed_form: bool = True) -> None:
        self.description = description
        self.by_hand = closed_form and all(type(group.how) in _BACKWARDS for group in description.groups)

    def forward(self, snapshot: Snapshot, gradient: Mapping[str, torch.Tensor], rates: Sequence[float]) -> Snapshot:
        """One step of torch's own optimizer on clipped gradients; differentiable where its inputs are."""
        differentiable = torch.is_grad_enabled()
        leaves = {name: nn.Parameter(weight) for name, weight in snapshot.weights.items()}
        optimizer = build_optimizer(self.description, leaves)
        optimizer.defaults["differentiable"] = differentiable
        for group, described, rate in zip(optimizer.param_groups, self.description.groups, rates, strict=True):
            group |= {"lr": float(rate), "differentiable": differentiable, "foreach": False, "fused": False}
            group["params"] = [snapshot.weights[name].clone() for name in described.parameters]
            for name, weight in zip(described.parameters, group["params"], strict=True):
                if name in snapshot.state:
                    optimizer.state[weight] = {key: value.clone() for key, value in snapshot.state[name].items()}
        made = {
            name: weight
            for group, described in zip(optimizer.param_groups, self.description.groups, strict=True)
            for name, weight in zip(described.parameters, group["params"], strict=True)
        }
        for name, part in gradient.items():
            made[name].grad = part
        if differentiable and isinstance(optimizer, torch.optim.SGD):
            _start_buffers(optimizer)
        optimizer.step()
        return Snapshot(made, {name: dict(optimizer.state[weight]) for name, weight in made.items()})

    def backward(
        self,
        before: Snapshot,
        gradient: Mapping[str, torch.Tensor],
        rates: Sequence[float],
        adjoint: Vectors,
        moments: State,
    ) -> tuple[Vectors, Vectors]:
        """Through the update, for all queries at once.

        Args:
            before: weights and state that went in.
            gradient: clipped, of the parameters that were updated.
            rates: learning rates of the groups.
            adjoint: of the weights, name -> `[queries, *parameter.shape]`; changed in place to that of those before.
            moments: adjoints of the state, changed in place likewise; of nothing at the end of a run.

        Returns:
            Adjoints of the clipped gradient, and `eta P` of every parameter, 0-dim or of its shape, with moments held
            fixed.
        """
        if not self.by_hand:
            return self._by_autograd(before, gradient, rates, adjoint, moments)
        with torch.no_grad():
            after, forces = self.forward(before, gradient, rates), {}
            for group, rate in zip(self.description.groups, rates, strict=True):
                through = _BACKWARDS[type(group.how)]
                for name in group.parameters:
                    if name not in gradient:  # it stays as it is
                        continue
                    whole = gradient[name]
                    if not group.decoupled_weight_decay:
                        whole = whole + group.weight_decay * before.weights[name]
                    states = before.state.get(name, {}), after.state[name]
                    own = moments.setdefault(name, {})
                    forces[name] = through(group, float(rate), whole, *states, adjoint[name], own)
                    if not states[0]:  # nothing came into the first update
                        del moments[name]
        return forces, self._step_sizes(after, rates)

    def _by_autograd(self, before, gradient, rates, adjoint, moments):
        weights = {name: value.detach().clone().requires_grad_() for name, value in before.weights.items()}
        forces = {name: value.detach().clone().requires_grad_() for name, value in gradient.items()}
        state = {name: {key: _leaf(value) for key, value in own.items()} for name, own in before.state.items()}
        with torch.enable_grad():
            # With learning rate 1, as torch's differentiable Adam divides by it: an update is linear in it.
            after = self.forward(Snapshot(weights, state), forces, [1.0] * len(self.description.groups))
        by_name = self._by_name(rates)
        outputs, cotangents = list(after.weights.values()), [by_name[name] * adjoint[name] for name in after.weights]
        for name, own in moments.items():
            for key, vector in own.items():
                if after.state[name][key].requires_grad:
                    outputs.append(after.state[name][key])
                    cotangents.append(vector)
        slots = [(name, key) for name, own in state.items() for key, value in own.items() if value.requires_grad]
        inputs = [*weights.values(), *forces.values(), *(state[name][key] for name, key in slots)]
        found = torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, allow_unused=True)
        count = len(cotangents[0])
        found = [
            value.new_zeros((count, *value.shape)) if part is None else part
            for value, part in zip(inputs, found, strict=True)
        ]
        for name, part in zip(weights, found, strict=False):
            adjoint[name].mul_(1 - by_name[name]).add_(part)
        pulled = {
            name: _zero_where_untouched(part, gradient[name])
            for name, part in zip(forces, found[len(weights) :], strict=False)
        }
        moments.clear()
        for (name, key), part in zip(slots, found[len(weights) + len(forces) :], strict=True):
            moments.setdefault(name, {})[key] = _zero_where_untouched(part, gradient.get(name))
        return pulled, self._step_sizes(after, rates)

    def _by_name(self, rates: Sequence[float]) -> dict[str, float]:
        groups = zip(self.description.groups, rates, strict=True)
        return {name: float(rate) for group, rate in groups for name in group.parameters}

    def _step_sizes(self, after: Snapshot, rates: Sequence[float]) -> dict[str, torch.Tensor]:
        sizes = {}
        for group, rate in zip(self.description.groups, rates, strict=True):
            for name in group.parameters:
                state = {key: value.detach() for key, value in after.state[name].items() if value is not None}
                weight, made = after.weights[name].detach(), group.how.updates_made(state)
                sizes[name] = float(rate) * group.how.preconditioner(weight, state, group.constants, made)
        return sizes


def _adam_backward(
    group: GroupDescription,
    rate: float,
    gradient: torch.Tensor,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    adjoint: torch.Tensor,
    moments: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Through `m' = beta1 m + (1 - beta1) g`, `v' = beta2 v + (1 - beta2) g^2`, `theta - s m' / (sqrt(v' / c) + eps)`.

    Args:
        group, rate: of the parameter; `s = rate / (1 - beta1^t)` and `c = 1 - beta2^t`.
        gradient: clipped, with what decay adds to it.
        before, after: state of the parameter.
        adjoint, moments: of the parameter and its state, changed in place.

    Returns:
        The adjoint of the gradient.
    """
    beta1, beta2 = group.constants["betas"]
    updates, largest = group.how.updates_made(after), group.constants.get("amsgrad", False)
    size, correction = rate / (1 - beta1**updates), math.sqrt(1 - beta2**updates)
    root = after["max_exp_avg_sq" if largest else "exp_avg_sq"].sqrt()
    moved = root > 0  # where it is 0 the root has no derivative, and no row of the step touches the entry
    denominator = root / correction + group.constants["eps"]
    by_first = torch.where(moved, -size / denominator, 0)
    by_second = torch.where(moved, size * after["exp_avg"] / (2 * correction * denominator.square() * root), 0)
    first, second = (_moment(moments, key, adjoint) for key in ("exp_avg", "exp_avg_sq"))
    first.addcmul_(adjoint, by_first)
    if largest:
        most, earlier = _moment(moments, "max_exp_avg_sq", adjoint), before.get("max_exp_avg_sq")
        most.addcmul_(adjoint, by_second)
        new = after["exp_avg_sq"]
        earlier = torch.zeros_like(new) if earlier is None else earlier
        share = (new > earlier).to(new) + 0.5 * (new == earlier)
        second.addcmul_(most, share)
        most.mul_(1 - share)
    else:
        second.addcmul_(adjoint, by_second)
    force = first * torch.where(moved, 1 - beta1, 0.0).to(first)
    force.addcmul_(second, 2 * (1 - beta2) * gradient)
    first.mul_(beta1)
    second.mul_(beta2)
    return _decayed(group, rate, adjoint, force)


def _sgd_backward(group, rate, gradient, before, after, adjoint, moments):
    """As `_adam_backward`, of `b' = mu b + (1 - tau) g` (`g` at first), `theta - rate b'` or `- rate (g + mu b')`."""
    momentum, dampening = group.constants["momentum"], group.constants["dampening"]
    force = -rate * adjoint
    if momentum:
        nesterov, started = group.constants["nesterov"], before.get("momentum_buffer") is not None
        buffer = _moment(moments, "momentum_buffer", adjoint).add_(force, alpha=momentum if nesterov else 1.0)
        share = 1 - dampening if started else 1.0
        force = force.add_(buffer, alpha=share) if nesterov else share * buffer
        buffer.mul_(momentum if started else 0.0)
    return _decayed(group, rate, adjoint, force)


def _decayed(group: GroupDescription, rate: float, adjoint: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
    """The way of weight decay; `theta` itself is carried on as it is."""
    if group.weight_decay and group.decoupled_weight_decay:
        adjoint.mul_(1 - rate * group.weight_decay)
    elif group.weight_decay:
        adjoint.add_(force, alpha=group.weight_decay)
    return force


def _moment(moments: dict[str, torch.Tensor], key: str, like: torch.Tensor) -> torch.Tensor:
    """An adjoint of the state; nothing depends on the last state of a run."""
    if key not in moments:
        moments[key] = torch.zeros_like(like)
    return moments[key]


_BACKWARDS = {AdamRule: _adam_backward, SGDRule: _sgd_backward}


def _start_buffers(optimizer: torch.optim.SGD) -> None:
    """Momentum buffers before a parameter's first step.

    torch starts a buffer with the first gradient and what decay adds to it, detached; `dampening / momentum` of them
    lead to the same buffer and keep the derivative.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if group["momentum"] and weight.grad is not None and "momentum_buffer" not in optimizer.state[weight]:
                share = group["dampening"] / group["momentum"]
                whole = weight.grad + group["weight_decay"] * weight
                optimizer.state[weight]["momentum_buffer"] = share * whole


def _zero_where_untouched(part: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """The root of a second moment that is still 0 has no derivative; no row of the step touches such an entry."""
    return part if gradient is None else part.masked_fill_((gradient == 0) & part.isnan(), 0.0)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """A copy to differentiate with respect to; the step counter stays a number."""
    value = value.detach().clone()
    return value.requires_grad_() if value.dim() and value.is_floating_point() else value
