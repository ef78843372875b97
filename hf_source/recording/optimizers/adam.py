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
"""Adam, AdamW and their variants AMSGrad, NAdam and RAdam."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .rule import InverseRootRule, Shares, part


class AdamRule(InverseRootRule):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1) and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    `theta <- theta - eta m_hat / (sqrt(v_hat) + eps)` with `v_hat = v / b`, `b = 1 - beta2^t`, so
    `P = 1 / (sqrt(v_hat) + eps) = sqrt(b) / (sqrt(v) + eps sqrt(b))`, and
    `m_hat = sum over k of (1 - beta1) beta1^(j - k) / (1 - beta1^t) g_k` gives the shares.

    AMSGrad (Reddi et al. 2018, arXiv 1904.09237, algorithm 2) takes for `v` the largest one so far.

    Weight decay: Adam adds `lambda theta` to the gradient; AdamW, and Adam with `decoupled_weight_decay`, subtract
    `eta lambda theta` from the weights.
    """

    kinds: ClassVar[Mapping[str, str]] = {"Adam": "torch.optim.adam.Adam", "AdamW": "torch.optim.adamw.AdamW"}
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False}

    def decoupled(self, name, group):
        """See `Rule.decoupled`: torch.optim.Adam(decoupled_weight_decay=True) is AdamW, the flag decides."""
        return bool(group.get("decoupled_weight_decay", name == "AdamW"))

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        beta = constants["betas"][0]
        return Shares(beta, (1 - beta) / corrections(beta, updates))

    def second_moment(self, parameter, state, constants, piece=None, before=None):
        """See `InverseRootRule.second_moment`."""
        return part(state["max_exp_avg_sq" if constants.get("amsgrad") else "exp_avg_sq"], piece)

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        correction = math.sqrt(1 - constants["betas"][1] ** updates)
        return correction, constants["eps"] * correction


class NAdamRule(AdamRule):
    """NAdam (Dozat 2016): Adam that looks one step of its momentum ahead, with a momentum that grows.

    With `mu_t = beta1 (1 - 0.96^(t psi) / 2)` and `M_t = mu_1 ... mu_t`, the update is
    `-eta P ((1 - mu_t) / (1 - M_t) g_t + mu_{t+1} / (1 - M_{t+1}) m_t)`, `P` that of Adam and
    `m_t = sum over k of (1 - beta1) beta1^(t - k) g_k`: the new gradient has a share beside that in the buffer.
    """

    kinds: ClassVar[Mapping[str, str]] = {"NAdam": "torch.optim.nadam.NAdam"}
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.999], "eps": 1e-8, "momentum_decay": 4e-3}

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        beta = constants["betas"][0]
        count = np.arange(1, int(updates.max(initial=0)) + 2)
        mu = beta * (1 - 0.5 * 0.96 ** (count * constants["momentum_decay"]))
        product = np.cumprod(mu)
        carried = mu[updates] / (1 - product[updates]) * (1 - beta)
        return Shares(beta, carried, own=(1 - mu[updates - 1]) / (1 - product[updates - 1]))


class RAdamRule(AdamRule):
    """RAdam (Liu et al. 2020, arXiv 1908.03265, algorithm 2).

    With `rho_inf = 2 / (1 - beta2) - 1` and `rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)`: while `rho_t <= 5` the
    update is `-eta m_hat`, so `P = 1`; afterwards it is Adam's times the rectification
    `r = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))`. torch adds `eps` to `sqrt(v)`
    before the bias correction: `P = r sqrt(b) / (sqrt(v) + eps)`, `b = 1 - beta2^t`. Shares are Adam's.
    """

    kinds: ClassVar[Mapping[str, str]] = {"RAdam": "torch.optim.radam.RAdam"}
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.999], "eps": 1e-8}

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        beta2, longest = constants["betas"][1], 2 / (1 - constants["betas"][1]) - 1
        correction = 1 - beta2**updates
        length = longest - 2 * updates * beta2**updates / correction
        if length <= 5:
            return 1.0, None
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return math.sqrt(square * correction), constants["eps"]


def corrections(beta: float, updates: np.ndarray) -> np.ndarray:
    """`1 - beta^t`, the weight that an average started at 0 has gathered after `t` updates."""
    return -np.expm1(updates * math.log(beta)) if beta else np.ones(len(updates))
