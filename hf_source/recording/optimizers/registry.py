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
"""The optimizers that can be attributed."""

import torch

from ...errors import UnsupportedError
from .adam import AdamRule, NAdamRule, RAdamRule
from .rmsprop import AdagradRule, RMSpropRule
from .rule import Rule, qualified_name
from .sgd import SGDRule


RULES: tuple[Rule, ...] = (SGDRule(), AdamRule(), NAdamRule(), RAdamRule(), RMSpropRule(), AdagradRule())

_BY_NAME = {name: rule for rule in RULES for name in rule.kinds}
_NAME_OF_CLASS = {kind: name for rule in RULES for name, kind in rule.kinds.items()}


def rule_named(name: str) -> Rule:
    """The rule of a name in a record.

    Raises:
        UnsupportedError: if this version does not know it.
    """
    if name not in _BY_NAME:
        raise UnsupportedError(
            f"The record was made with the optimizer {name}, which this hf_source does not know. Install the "
            f"hf_source that wrote the record. Known: {supported()}."
        )
    return _BY_NAME[name]


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Name under which a record knows the optimizer's class.

    Raises:
        UnsupportedError: if no rule is known for it.
    """
    kind = qualified_name(type(optimizer))
    if kind not in _NAME_OF_CLASS:
        raise UnsupportedError(
            f"The optimizer {kind} cannot be attributed: hf_source does not know its preconditioner. Supported: "
            f"{supported()} (fused and foreach too). Set `optim='adamw_torch'` (or 'sgd'), or pass `optimizers=` with "
            "one of them."
        )
    return _NAME_OF_CLASS[kind]


def supported() -> str:
    """The optimizers for an error message."""
    return ", ".join(f"torch.optim.{name}" for name in _BY_NAME)
