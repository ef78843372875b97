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
"""Adam and AdamW."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .rule import InverseRootRule, Shares


class AdamRule(InverseRootRule):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1) and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    `theta <- theta - eta m_hat / (sqrt(v_hat) + eps)` with `v_hat = v / b`, `b = 1 - beta2^t`, so
    `P = 1 / (sqrt(v_hat) + eps) = sqrt(b) / (sqrt(v) + eps sqrt(b))`, and
    `m_hat = sum over k of (1 - beta1) beta1^(j - k) / (1 - beta1^t) g_k` gives the shares.

    Weight decay: Adam adds `lambda theta` to the gradient; AdamW, and Adam with `decoupled_weight_decay`, subtract
    `eta lambda theta` from the weights.
    """

    kinds: ClassVar[Mapping[str, str]] = {"Adam": "torch.optim.adam.Adam", "AdamW": "torch.optim.adamw.AdamW"}
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.999], "eps": 1e-8}
    refused: ClassVar[Mapping[str, str]] = {
        **InverseRootRule.refused,
        "amsgrad": "its preconditioner keeps a maximum over the past",
    }

    def decoupled(self, name, group):
        """See `Rule.decoupled`: torch.optim.Adam(decoupled_weight_decay=True) is AdamW, the flag decides."""
        return bool(group.get("decoupled_weight_decay", name == "AdamW"))

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        beta = constants["betas"][0]
        return Shares(beta, (1 - beta) / -np.expm1(updates * math.log(beta)) if beta else np.ones(len(updates)))

    def second_moment(self, state, constants):
        """See `InverseRootRule.second_moment`."""
        return state["exp_avg_sq"]

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        correction = math.sqrt(1 - constants["betas"][1] ** updates)
        return correction, constants["eps"] * correction
