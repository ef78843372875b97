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
"""RMSprop and Adagrad: a second moment, no first."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .rule import InverseRootRule, Shares, part


class RMSpropRule(InverseRootRule):
    """RMSprop (Hinton 2012, lecture 6e; centered: Graves 2013, arXiv 1308.0850, equations 38 to 45).

    `v = alpha v + (1 - alpha) g^2`, centered `v - a^2` with `a` the average gradient, and the step
    `g / (sqrt(v) + eps)` goes into a momentum buffer, `b_j = mu b_{j-1} + step`, `theta <- theta - eta b_j`. One
    gradient moves the weights in total by `P = 1 / ((1 - mu) (sqrt(v) + eps))`, `v` of its own step, spread over the
    updates by `kappa(j, k) = (1 - mu) mu^(j - k)`. Weight decay is added to the gradient.
    """

    kinds: ClassVar[Mapping[str, str]] = {"RMSprop": "torch.optim.rmsprop.RMSprop"}
    constants: ClassVar[Mapping[str, Any]] = {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False}
    buffers_steps: ClassVar[bool] = True

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        return Shares(constants["momentum"], np.full(len(updates), 1 - constants["momentum"]))

    def second_moment(self, parameter, state, constants, piece=None, before=None):
        """See `InverseRootRule.second_moment`."""
        square = part(state["square_avg"], piece)
        if not constants["centered"]:
            return square
        mean = part(state["grad_avg"], piece)
        return square.addcmul(mean, mean, value=-1)

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        return 1 / (1 - constants["momentum"]), constants["eps"]


class AdagradRule(InverseRootRule):
    """Adagrad (Duchi et al. 2011, JMLR 12, equation 1).

    `theta <- theta - eta / (1 + (t - 1) lr_decay) g / (sqrt(sum of g^2) + eps)`, the sum starting at
    `initial_accumulator_value`: `P = 1 / ((1 + (t - 1) lr_decay) (sqrt(sum) + eps))`. Weight decay is added to the
    gradient.
    """

    kinds: ClassVar[Mapping[str, str]] = {"Adagrad": "torch.optim.adagrad.Adagrad"}
    constants: ClassVar[Mapping[str, Any]] = {"lr_decay": 0.0, "eps": 1e-10, "initial_accumulator_value": 0.0}

    def second_moment(self, parameter, state, constants, piece=None, before=None):
        """See `InverseRootRule.second_moment`."""
        return part(state["sum"], piece)

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        return 1 / (1 + (updates - 1) * constants["lr_decay"]), constants["eps"]

    def fresh(self, state):
        """See `Rule.fresh`: Adagrad makes its state beforehand."""
        return self.updates_made(state) == 0

    def build(self, name, groups):
        """See `Rule.build`; torch starts every group's sum at the optimizer's own default."""
        optimizer = super().build(name, groups)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
        return optimizer
