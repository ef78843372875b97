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
"""An optimizer as plain numbers: which rule holds for each of its parameter groups, and the rule's constants."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .registry import rule_named
from .rule import Rule


@dataclass(frozen=True)
class GroupDescription:
    """Constants of one parameter group. Learning rates are recorded per step, not here.

    Attributes:
        rule: name of the optimizer that updates the group, such as `"AdamW"`.
        parameters: names of the parameters that train.
        weight_decay: `lambda`.
        decoupled_weight_decay: whether `lambda` acts on the weights directly, or is added to the gradient.
        constants: of the rule, such as `betas`.
    """

    rule: str
    parameters: list[str]
    weight_decay: float
    decoupled_weight_decay: bool
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def how(self) -> Rule:
        """The rule itself."""
        return rule_named(self.rule)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "GroupDescription":
        """From its JSON form; constants that an older record lacks have the values they had then."""
        constants = {**rule_named(data["rule"]).constants, **data["constants"]}
        return cls(**{**data, "constants": constants})


@dataclass(frozen=True)
class OptimizerDescription:
    """An optimizer: class name and the constants of its groups."""

    name: str
    groups: list[GroupDescription]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "OptimizerDescription":
        """Inverse of `to_dict`."""
        return cls(name=data["name"], groups=[GroupDescription.from_dict(group) for group in data["groups"]])


def name_rules(optimizer: dict[str, Any]) -> None:
    """Bring the optimizer of a record of schema version 1 up to date, in place: its groups had no `rule` yet."""
    for group in optimizer["groups"]:
        if "rule" not in group:
            group["rule"] = optimizer["name"]
            kept = ("parameters", "weight_decay", "decoupled_weight_decay", "rule")
            given = {key: group.pop(key) for key in list(group) if key not in kept}
            group["constants"] = {key: value for key, value in given.items() if value is not None}
