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
"""What the recorder must know about an optimizer: one rule per family, over these base classes.

One update is `theta <- theta - eta (P-weighted gradients) - eta lambda theta`. A rule says what `P` of the update just
made is, with the state that makes it *frozen* (how moments react to a changed gradient is not part of `P`), and which
share `kappa(j, k)` of the gradient of step `k` the update of step `j` holds, so that, with no decay,

    theta_{j+1} - theta_j = -eta_j sum over k <= j of kappa(j, k) P_j g_k     (`P_k` where the buffer holds `P g`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import UnsupportedError


@dataclass(frozen=True)
class Shares:
    """`kappa(j, k) = carried[j] beta^(j - k) + own[j] [j = k]`: how momentum spreads a gradient over updates.

    Attributes:
        beta: decay of the momentum per update; 0 without momentum.
        carried: float64 `[updates]`, by update: factor of the momentum buffer.
        own: float64 `[updates]` or a number: factor of the new gradient beside the buffer (Nesterov).
        first: factor of all shares of the very first gradient.
        own_rate: a gradient is applied with the learning rate of its own step, not of the update.
    """

    beta: float
    carried: np.ndarray
    own: np.ndarray | float = 0.0
    first: float = 1.0
    own_rate: bool = False


class Rule(ABC):
    """How one family of optimizers updates a parameter.

    Attributes:
        kinds: name in the record -> qualified name of the optimizer class. Classes are compared by name, so that a
            package that is not installed is not needed; a subclass is another optimizer.
        constants: constants of a parameter group that shape its updates -> their values in older records.
        refused: flags of a group that are not supported -> why.
        scalar: `P` is one number for the whole training, `scalar_preconditioner`; nothing need be accumulated.
        buffers_steps: momentum gathers `P_k g_k` of each step (RMSprop) rather than gradients.
        notes: `before_update` has something to say.
        entrywise: every entry is updated by itself, whatever the others are.
        every: averages take `P` of every so-many-th update, to stand for those around it.
    """

    kinds: ClassVar[Mapping[str, str]] = {}
    constants: ClassVar[Mapping[str, Any]] = {}
    refused: ClassVar[Mapping[str, str]] = {
        "maximize": "it climbs the loss instead of descending it",
        "differentiable": "it keeps the graph of every step",
    }
    scalar: ClassVar[bool] = False
    buffers_steps: ClassVar[bool] = False
    notes: ClassVar[bool] = False
    entrywise: ClassVar[bool] = True
    every: ClassVar[int] = 1

    def describe(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        names: Mapping[torch.nn.Parameter, str],
    ) -> dict[str, Any]:
        """The constants of a group as plain JSON values.

        Args:
            name: which of `kinds` the optimizer is.
            optimizer: the optimizer.
            group: its entry of `optimizer.param_groups`.
            names: names of the parameters.

        Raises:
            UnsupportedError: if a flag of the group is refused.
        """
        for flag, reason in self.refused.items():
            if group.get(flag):
                raise UnsupportedError(f"{name}({flag}=True) cannot be attributed: {reason}. Set {flag}=False.")
        return {key: plain(group[key]) for key in self.constants}

    def decoupled(self, name: str, group: Mapping[str, Any]) -> bool:
        """Whether weight decay acts on the weights directly; else it is added to the gradient and goes through `P`."""
        return bool(group.get("decoupled_weight_decay", False))

    def shares(self, constants: Mapping[str, Any], updates: np.ndarray) -> Shares:
        """Momentum shares of the `updates`-th updates (int64, counted from 1)."""
        return Shares(0.0, np.ones(len(updates)))

    def before_update(self, parameter: torch.nn.Parameter, state: Mapping[str, Any], learning_rate: float) -> Any:
        """What `preconditioner` will want to know and the update changes; noted before `optimizer.step()`."""
        return None

    @abstractmethod
    def preconditioner(
        self,
        parameter: torch.nn.Parameter,
        state: Mapping[str, Any],
        constants: Mapping[str, Any],
        updates: int,
        before: Any = None,
    ) -> torch.Tensor:
        """`P` of the update just made, for one parameter; read it after `optimizer.step()`, before `zero_grad()`.

        Args:
            parameter: the parameter.
            state: its entry of `optimizer.state` (empty if it never had a gradient).
            constants: the group's, as described.
            updates: updates that the parameter has had, this one included.
            before: result of `before_update`.
        """

    def side(self, shape: torch.Size) -> str | None:
        """If `P` is a matrix on one side of a parameter of this shape: `"left"` or `"right"`."""
        return None

    def fresh(self, state: Mapping[str, Any]) -> bool:
        """Whether a parameter's state is that of an optimizer that has made no update."""
        return not state

    def updates_made(self, state: Mapping[str, Any]) -> int:
        """Updates that a parameter has had, from its state."""
        return int(state.get("step", 0))

    def learning_rate(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """`eta` of the update to come; `state` is that of one of the group's parameters."""
        return float(group["lr"])

    def build(self, name: str, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of described groups: dicts of `params`, `lr`, `weight_decay` and the constants."""
        return imported(self.kinds[name])(list(groups))

    def after_build(  # noqa: B027  (most rules have nothing to set)
        self,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> None:
        """What is left to set, by name of parameter, once the optimizer is built; `group` holds the constants."""


class InverseRootRule(Rule):
    """`P = scale / (sqrt(v) + eps)` with a second moment `v`; 0 where `v` is 0.

    An entry whose second moment is exactly 0 has never had a gradient, so it has not moved: `P = 0`. The formula's
    1/eps = 1e8 would dominate the average over a segment for, say, a token first seen in mid-segment.
    """

    @abstractmethod
    def second_moment(
        self,
        parameter: torch.nn.Parameter,
        state: Mapping[str, Any],
        constants: Mapping[str, Any],
        piece: slice | None = None,
        before: Any = None,
    ) -> torch.Tensor:
        """`v`, of the parameter's shape, or the `piece` of it when its memory is seen as one row of numbers."""

    @abstractmethod
    def scale_and_eps(self, constants: Mapping[str, Any], updates: int) -> tuple[float, float | None]:
        """`scale` and `eps` of the update; without `eps`, `P` is `scale` for every entry."""

    def preconditioner(self, parameter, state, constants, updates, before=None):
        """See `Rule.preconditioner`; of the parameter's shape."""
        if updates == 0:
            return torch.zeros_like(parameter, requires_grad=False)
        scale, eps = self.scale_and_eps(constants, updates)
        if eps is None:
            return torch.full_like(parameter, scale, requires_grad=False)
        second = self.second_moment(parameter, state, constants, before=before)
        return torch.where(second > 0, scale / (second.sqrt() + eps), 0)


def part(tensor: torch.Tensor, piece: slice | None) -> torch.Tensor:
    """A piece of a tensor's memory, or all of it in its shape."""
    return tensor if piece is None else tensor.view(-1)[piece]


def plain(value: Any) -> Any:
    """A constant as JSON holds it."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else float(value)


def qualified_name(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def imported(name: str) -> Any:
    """The class of a qualified name.

    Raises:
        UnsupportedError: if its package is not installed.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnsupportedError(
            f"The record was made with {name}, which needs the package {package}: `pip install {package}`."
        ) from error
