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
from .adafactor import AdafactorRule, TransformersAdafactorRule
from .adam import AdamRule, NAdamRule, RAdamRule
from .bitsandbytes import (
    BitsAndBytesAdagradRule,
    BitsAndBytesAdamRule,
    BitsAndBytesAdamWRule,
    BitsAndBytesRMSpropRule,
    BitsAndBytesSGDRule,
)
from .muon import MuonRule
from .rmsprop import AdagradRule, RMSpropRule
from .rule import Rule, qualified_name
from .sgd import SGDRule


RULES: tuple[Rule, ...] = (
    SGDRule(),
    AdamRule(),
    NAdamRule(),
    RAdamRule(),
    RMSpropRule(),
    AdagradRule(),
    AdafactorRule(),
    TransformersAdafactorRule(),
    MuonRule(),
    BitsAndBytesAdamRule(),
    BitsAndBytesAdamWRule(),
    BitsAndBytesRMSpropRule(),
    BitsAndBytesAdagradRule(),
    BitsAndBytesSGDRule(),
)

_REFUSED = {
    "bitsandbytes.optim.lion": "it steps by the sign of its momentum, so that no preconditioner describes how a step "
    "follows from gradients",
    "bitsandbytes.optim.ademamix": "it mixes two momenta, which momentum shares with one decay do not describe",
    "bitsandbytes.optim.lamb": "it scales a whole tensor's update by the norms of its weights and update",
    "bitsandbytes.optim.lars": "it scales a whole tensor's update by the norms of its weights and gradient",
    "galore_torch": "it projects gradients to a low rank that changes in training",
    "apollo_torch": "it scales gradients by random low-rank projections of them",
    "lomo_optim": "it updates the weights during the backward pass",
    "schedulefree": "it takes gradients at other weights than those it keeps",
    "torchao": "its quantised moments cannot be read",
    "grokadamw": "it amplifies slow gradients by a signal of its own",
    "optimi": "it sums updates in ways that its state does not show",
    "torchdistx": "it sums updates in ways that its state does not show",
    "transformers.trainer_pt_utils.LayerWiseDummyOptimizer": "it updates the weights during the backward pass",
}
"""Module or class -> why no rule is given for it."""

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
        reasons = [reason for prefix, reason in _REFUSED.items() if f"{kind}.".startswith(f"{prefix}.")]
        reason = reasons[0] if reasons else "hf_source does not know its preconditioner"
        raise UnsupportedError(
            f"The optimizer {kind} cannot be attributed: {reason}. Supported: "
            f"{supported()}. Set `optim='adamw_torch'` (or 'sgd'), or pass `optimizers=` with one of them."
        )
    return _NAME_OF_CLASS[kind]


def supported() -> str:
    """The optimizers for an error message."""
    names = [name if "." in name else f"torch.optim.{name}" for name in _BY_NAME]
    families = [name for name in names if not name.startswith("bitsandbytes")]
    return ", ".join(families) + ", and bitsandbytes' Adam, AdamW, RMSprop, Adagrad and SGD (8-bit and paged too)"
