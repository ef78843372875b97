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
"""Which optimizers can be described by one diagonal preconditioner per step, and how.

One update is `theta <- theta - lr * P * (c g) - lr * lambda * theta`, `P` diagonal. Supported are exactly the classes
for which that is known to hold (up to the moments' own reaction): SGD, Adam and AdamW of torch, fused and foreach too.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from ..errors import UnsupportedError


SUPPORTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

_REFUSED_FLAGS = {
    "amsgrad": "its preconditioner keeps a maximum over the past",
    "maximize": "it climbs the loss instead of descending it",
    "differentiable": "it keeps the graph of every step",
}


@dataclass(frozen=True)
class GroupDescription:
    """Constants of one parameter group. Learning rates are recorded per step, not here."""

    parameters: list[str]
    weight_decay: float
    decoupled_weight_decay: bool
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    betas: list[float] | None = None
    eps: float | None = None


@dataclass(frozen=True)
class OptimizerDescription:
    """An optimizer as plain numbers: class name and the constants of its groups."""

    name: str
    groups: list[GroupDescription]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "OptimizerDescription":
        """Inverse of `to_dict`."""
        return cls(name=data["name"], groups=[GroupDescription(**group) for group in data["groups"]])

    @property
    def adaptive(self) -> bool:
        """Whether `P` differs from entry to entry (Adam, AdamW)."""
        return self.name != "SGD"


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def describe_optimizer(optimizer: Any, names: Mapping[torch.nn.Parameter, str]) -> OptimizerDescription:
    """Describe an optimizer by what its update does to each parameter.

    Args:
        optimizer: a torch optimizer, or Accelerate's wrapper of one.
        names: name of every parameter of the model. Parameters that need no gradient are left out of the groups.

    Raises:
        UnsupportedError: if the update is not known to be `lr * P * g` with a known diagonal `P`.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = type(optimizer)
    supported = ", ".join(f"torch.optim.{cls.__name__}" for cls in SUPPORTED)
    if kind not in SUPPORTED:
        raise UnsupportedError(
            f"The optimizer {kind.__module__}.{kind.__qualname__} cannot be attributed: hf_source does not know its "
            f"preconditioner. Supported: {supported} (fused and foreach too). Set `optim='adamw_torch'` "
            "(or 'sgd'), or pass `optimizers=` with one of them."
        )
    groups = []
    for group in optimizer.param_groups:
        for flag, reason in _REFUSED_FLAGS.items():
            if group.get(flag):
                raise UnsupportedError(
                    f"{kind.__name__}({flag}=True) cannot be attributed: {reason}. Set {flag}=False. "
                    f"Supported: {supported}."
                )
        groups.append(_describe_group(kind, group, names))
    return OptimizerDescription(name=kind.__name__, groups=groups)


def _describe_group(kind: type, group: Mapping[str, Any], names: Mapping[torch.nn.Parameter, str]) -> GroupDescription:
    unknown = sum(parameter not in names for parameter in group["params"])
    if unknown:
        raise UnsupportedError(
            f"The optimizer trains {unknown} parameter(s) that are not in the model, so their training cannot be "
            "recorded. Build the optimizer from `model.parameters()`, or make them part of the model."
        )
    parameters = [names[parameter] for parameter in group["params"] if parameter.requires_grad]
    if kind is torch.optim.SGD:
        return GroupDescription(
            parameters=parameters,
            weight_decay=float(group["weight_decay"]),
            decoupled_weight_decay=False,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
        )
    return GroupDescription(
        parameters=parameters,
        weight_decay=float(group["weight_decay"]),
        # torch.optim.Adam(decoupled_weight_decay=True) is AdamW: the flag decides, not the class.
        decoupled_weight_decay=bool(group.get("decoupled_weight_decay", kind is torch.optim.AdamW)),
        betas=[float(beta) for beta in group["betas"]],
        eps=float(group["eps"]),
    )


def sgd_preconditioner(group: GroupDescription | Mapping[str, Any]) -> float:
    """`(1 - dampening) / (1 - momentum)`: what one gradient moves in total, through the buffer, per unit lr."""
    momentum, dampening = (
        (group.momentum, group.dampening)
        if isinstance(group, GroupDescription)
        else (group["momentum"], group["dampening"])
    )
    return (1 - dampening) / (1 - momentum) if momentum else 1.0


def preconditioner(parameter: torch.nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
    """`P` of the update just made, for one parameter; read it after `optimizer.step()`.

    Args:
        parameter: the parameter.
        state: its entry of `optimizer.state` (empty if it never had a gradient).
        group: its entry of `optimizer.param_groups`.

    Returns:
        SGD: a 0-dim tensor, `(1 - dampening) / (1 - momentum)`. Adam, AdamW: a tensor of the parameter's shape,
        `1 / (sqrt(v_hat) + eps)`, and 0 where the second moment is 0.
    """
    if "betas" not in group:
        return torch.tensor(sgd_preconditioner(group), dtype=parameter.dtype, device=parameter.device)
    if "exp_avg_sq" not in state:
        return torch.zeros_like(parameter, requires_grad=False)
    second = state["exp_avg_sq"]
    correction = math.sqrt(1 - float(group["betas"][1]) ** float(state["step"]))
    # An entry whose second moment is exactly 0 has never had a gradient, so it has not moved: P = 0. The formula's
    # 1/eps = 1e8 would dominate the average over a segment for, say, a token first seen in mid-segment.
    return torch.where(second > 0, 1 / (second.sqrt() / correction + group["eps"]), 0)


def build_optimizer(
    description: OptimizerDescription, parameters: Mapping[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """An optimizer that makes the described updates; learning rates start at 0 and are set step by step."""
    groups = []
    for group in description.groups:
        options: dict[str, Any] = {"params": [parameters[name] for name in group.parameters], "lr": 0.0}
        options["weight_decay"] = group.weight_decay
        if description.adaptive:
            options |= {"betas": tuple(group.betas), "eps": group.eps}
        else:
            options |= {"momentum": group.momentum, "dampening": group.dampening, "nesterov": group.nesterov}
        groups.append(options)
    if not description.adaptive:
        # foreach is what torch picks by itself on GPU; on CPU it is the loop anyway.
        return torch.optim.SGD(groups, lr=0.0)
    optimizer = getattr(torch.optim, description.name)(groups, lr=0.0)
    for built, group in zip(optimizer.param_groups, description.groups, strict=True):
        built["decoupled_weight_decay"] = group.decoupled_weight_decay
    return optimizer
