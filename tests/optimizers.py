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
"""Optimizers driven by hand: random gradients, and the recorder's view of the updates they make."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_source.recording.optimizers import OptimizerDescription, describe_optimizer


RATES = [0.1, 0.05, 0.0, 0.02, 0.07, 0.01, 0.03, 0.09, 0.04]


def weights(*shapes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.nn.Parameter]:
    """Random parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(parameters: Sequence[torch.nn.Parameter], seed: int) -> None:
    """Gradients whose size changes from step to step, with an entry that never has one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.grad = noise * (0.2 + 1.8 * (seed % 3))
        parameter.grad.view(-1)[0] = 0


def describe(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> OptimizerDescription:
    """The description, as read back from a record; parameters are named a, b, c, ..."""
    description = describe_optimizer(optimizer, dict(zip(parameters, "abcdef", strict=False)))
    return OptimizerDescription.from_dict(description.to_dict())


def group_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> int:
    """Number of the parameter's group."""
    return next(g for g, group in enumerate(optimizer.param_groups) if any(parameter is p for p in group["params"]))


def before_update(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Any:
    """What the rule notes before the update."""
    number = group_of(optimizer, parameter)
    names = {p: str(i) for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    rate = float(optimizer.param_groups[number]["lr"] or 0.0)
    rule = describe_optimizer(optimizer, names).groups[number].how
    return rule.before_update(parameter, optimizer.state.get(parameter, {}), rate)


def preconditioner(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, before: Any = None
) -> torch.Tensor:
    """`P` of the update just made."""
    names = {p: str(i) for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    group = describe_optimizer(optimizer, names).groups[group_of(optimizer, parameter)]
    state = optimizer.state.get(parameter, {})
    return group.how.preconditioner(parameter, state, group.constants, group.how.updates_made(state), before)


def run(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], rates: Sequence[float] = RATES
) -> tuple[list, list, list]:
    """Make one update per rate.

    Returns:
        Updates, gradients and preconditioners, each a list over steps of lists over parameters.
    """
    updates, gradients, scales = [], [], []
    for step, rate in enumerate(rates):
        give_gradients(parameters, seed=step)
        gradients.append([p.grad.clone() for p in parameters])  # foreach SGD changes them in place
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [p.detach().clone() for p in parameters]
        noted = [before_update(optimizer, p) for p in parameters]
        optimizer.step()
        scales.append([preconditioner(optimizer, p, note) for p, note in zip(parameters, noted, strict=True)])
        updates.append([p.detach() - old for p, old in zip(parameters, before, strict=True)])
    return updates, gradients, scales
