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
"""Optimizers: what their updates do to each parameter, described, averaged and built again.

One rule per family (`sgd.py`, `adam.py`, ...); `registry.py` lists them. A group of parameters is described by the
rule's name and its constants, so one optimizer may follow several rules.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from ...errors import UnsupportedError
from .combined import CombinedOptimizer
from .description import GroupDescription, OptimizerDescription, name_rules
from .registry import RULES, name_of, rule_named, supported
from .rule import InverseRootRule, Rule, Shares


__all__ = [
    "RULES",
    "CombinedOptimizer",
    "GroupDescription",
    "InverseRootRule",
    "OptimizerDescription",
    "Rule",
    "Shares",
    "build_optimizer",
    "describe_optimizer",
    "is_fresh",
    "learning_rates",
    "name_rules",
    "rule_named",
    "supported",
    "unwrap_optimizer",
]


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def describe_optimizer(optimizer: Any, names: Mapping[torch.nn.Parameter, str | None]) -> OptimizerDescription:
    """Describe an optimizer by what its update does to each parameter.

    Args:
        optimizer: a torch optimizer, or Accelerate's wrapper of one.
        names: name of every parameter of the model; `None` for those that are left out of the groups.

    Raises:
        UnsupportedError: if the update is not known to be `lr * P * g` with a known `P`.
    """
    optimizer = unwrap_optimizer(optimizer)
    groups = [_describe_group(owner, name, group, names) for owner, name, group in _owned_groups(optimizer)]
    return OptimizerDescription(name=type(optimizer).__name__, groups=groups)


def _owned_groups(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.optim.Optimizer, str, dict[str, Any]]]:
    """Every parameter group with the optimizer that updates it and that one's name."""
    if isinstance(optimizer, CombinedOptimizer):
        for one in optimizer.optimizers:
            yield from _owned_groups(one)
    else:
        name = name_of(optimizer)
        yield from ((optimizer, name, group) for group in optimizer.param_groups)


def _describe_group(
    optimizer: torch.optim.Optimizer, name: str, group: Mapping[str, Any], names: Mapping[torch.nn.Parameter, str]
) -> GroupDescription:
    unknown = sum(parameter not in names for parameter in group["params"])
    if unknown:
        raise UnsupportedError(
            f"The optimizer trains {unknown} parameter(s) that are not in the model, so their training cannot be "
            "recorded. Build the optimizer from `model.parameters()`, or make them part of the model."
        )
    rule = rule_named(name)
    return GroupDescription(
        rule=name,
        parameters=[names[parameter] for parameter in group["params"] if names[parameter] is not None],
        weight_decay=float(group["weight_decay"]),
        decoupled_weight_decay=rule.decoupled(name, group),
        constants=rule.describe(name, optimizer, group, names),
    )


def is_fresh(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer has made no update yet."""
    return all(
        rule_named(name).fresh(owner.state.get(parameter, {}))
        for owner, name, group in _owned_groups(optimizer)
        for parameter in group["params"]
    )


def learning_rates(optimizer: Any) -> list[float]:
    """`eta` of every group in the update to come; read it before `optimizer.step()`."""
    return [
        rule_named(name).learning_rate(group, owner.state.get(next(iter(group["params"]), None), {}))
        for owner, name, group in _owned_groups(unwrap_optimizer(optimizer))
    ]


def build_optimizer(
    description: OptimizerDescription, parameters: Mapping[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """An optimizer that makes the described updates; learning rates start at 0 and are set step by step."""
    parts = [
        _build_part(name, list(groups), parameters)
        for name, groups in itertools.groupby(description.groups, key=lambda group: group.rule)
    ]
    return parts[0] if len(parts) == 1 else CombinedOptimizer(*parts)


def _build_part(
    name: str, described: list[GroupDescription], parameters: Mapping[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    rule = rule_named(name)
    groups = [
        {
            "params": [parameters[name] for name in group.parameters],
            "lr": 0.0,
            "weight_decay": group.weight_decay,
            **group.constants,
        }
        for group in described
    ]
    optimizer = rule.build(name, groups)
    for built, group in zip(optimizer.param_groups, described, strict=True):
        if "decoupled_weight_decay" in built:
            built["decoupled_weight_decay"] = group.decoupled_weight_decay
        rule.after_build(optimizer, group.constants, {name: parameters[name] for name in group.parameters})
    return optimizer
