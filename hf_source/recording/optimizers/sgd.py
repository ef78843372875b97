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
"""Stochastic gradient descent."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from .rule import Rule, Shares


class SGDRule(Rule):
    """SGD with momentum `mu`, dampening `tau` and Nesterov's variant (Sutskever et al. 2013).

    `b_j = mu b_{j-1} + (1 - tau) g_j` and `theta <- theta - eta b_j`, so one gradient moves the weights, in total and
    per unit of learning rate, by `P = (1 - tau) / (1 - mu)`, of which the update of step `j` holds the share
    `kappa(j, k) = (1 - mu) mu^(j - k)`. Nesterov steps along `g_j + mu b_j`: the shares are
    `(1 - mu) (mu mu^(j - k) + [j = k])`, and their sum over all updates is 1 again.

    torch starts the buffer with the undampened first gradient, whose shares are therefore `1 / (1 - tau)` times these.
    """

    kinds: ClassVar[Mapping[str, str]] = {"SGD": "torch.optim.sgd.SGD"}
    constants: ClassVar[Mapping[str, Any]] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
    scalar: ClassVar[bool] = True

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        momentum = constants["momentum"]
        share = np.full(len(updates), 1.0 - momentum)
        if not constants["nesterov"]:
            undampened = 1 / (1 - constants["dampening"]) if momentum and constants["dampening"] < 1 else 1.0
            return Shares(momentum, share, first=undampened)
        return Shares(momentum, momentum * share, own=share)

    def scalar_preconditioner(self, constants: Mapping[str, Any]) -> float:
        """`(1 - dampening) / (1 - momentum)`."""
        momentum = constants["momentum"]
        return (1 - constants["dampening"]) / (1 - momentum) if momentum else 1.0

    def preconditioner(self, parameter, state, constants, updates, before=None):
        """See `Rule.preconditioner`; 0-dim."""
        value = self.scalar_preconditioner(constants)
        return torch.tensor(value, dtype=parameter.dtype, device=parameter.device)
