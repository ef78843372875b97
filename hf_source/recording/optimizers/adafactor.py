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
"""Adafactor: a second moment kept as the product of its row and column sums (Shazeer & Stern 2018, arXiv 1804.04235).

Algorithms 4 and 5 of the paper: `U = G / sqrt(V)` with `V_ij = R_i C_j / mean(R)` (of a vector: `V` itself), clipped
to `U / max(1, RMS(U) / d)`, and the step `alpha U`. `V`, the clipping and the relative step size `alpha` are all taken
as frozen, so `P = alpha / eta / (max(1, RMS(U) / d) sqrt(V))`, a tensor of the parameter's shape; 0 where there never
was a gradient (see `InverseRootRule`).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import UnsupportedError
from .rule import Rule, Shares


# An `eps` below this bounds nothing: entries without gradients would have a `P` of a million and more.
_TINY = 1e-12


class AdafactorRule(Rule):
    """torch's: `alpha = max(eps2, RMS(theta)) min(eta, 1 / sqrt(t))`, `RMS` of the weights before the update.

    `V` is bounded below by `eps1^2`. No momentum. Weight decay is decoupled, `eta lambda theta`.
    """

    kinds: ClassVar[Mapping[str, str]] = {"Adafactor": "torch.optim.Adafactor"}
    constants: ClassVar[Mapping[str, Any]] = {"beta2_decay": -0.8, "eps": [None, 1e-3], "d": 1.0}
    notes: ClassVar[bool] = True
    entrywise: ClassVar[bool] = False

    def decoupled(self, name, group):
        """See `Rule.decoupled`."""
        return True

    def before_update(self, parameter, state, learning_rate):
        """See `Rule.before_update`: RMS of the weights, and the learning rate."""
        return root_mean_square(parameter.detach()), learning_rate

    def preconditioner(self, parameter, state, constants, updates, before=None):
        """See `Rule.preconditioner`; of the parameter's shape."""
        if updates == 0:
            return torch.zeros_like(parameter, requires_grad=False)
        eps = constants["eps"][0] if constants["eps"][0] is not None else torch.finfo(parameter.dtype).eps
        if "variance" in state:
            inverse_root = inverse_root_of(state["variance"])
        else:
            rows = state["row_var"]
            rows = rows / rows.mean(dim=-2, keepdim=True).clamp(min=eps)
            inverse_root = inverse_root_of(rows) * inverse_root_of(state["col_var"])
        if eps:
            inverse_root.clamp_(max=1 / eps)
        size, learning_rate = before
        relative = 1.0 if learning_rate == 0 else min(1.0, 1 / (learning_rate * updates**0.5))
        step = size.clamp(min=constants["eps"][1]) * relative
        return inverse_root.mul_(step / excess(inverse_root, parameter.grad, constants["d"]))


class TransformersAdafactorRule(Rule):
    """transformers': `alpha = eta`, times `max(eps2, RMS(theta))` with `scale_parameter`.

    With `relative_step` there is no learning rate in the group: `eta = min(0.01, 1 / sqrt(t))`, or
    `min(t / 10^6, 1 / sqrt(t))` with `warmup_init`. `optim="adafactor"` switches both off. With a `beta1`, steps (and
    not gradients) are averaged, each with the learning rate of its own: `kappa(j, k) = (1 - beta1) beta1^(j - k)`.
    Weight decay is decoupled, `alpha lambda theta`.
    """

    kinds: ClassVar[Mapping[str, str]] = {"transformers.Adafactor": "transformers.optimization.Adafactor"}
    constants: ClassVar[Mapping[str, Any]] = {
        "eps": [1e-30, 1e-3],
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta1": None,
        "scale_parameter": True,
        "relative_step": True,
        "warmup_init": False,
    }
    buffers_steps: ClassVar[bool] = True
    entrywise: ClassVar[bool] = False

    def describe(self, name, optimizer, group, names):
        """See `Rule.describe`."""
        if group["scale_parameter"] and group["weight_decay"]:
            raise UnsupportedError(
                "transformers.Adafactor(scale_parameter=True) with weight decay cannot be attributed: the decay of a "
                "parameter then changes with the size of its weights. Set weight_decay=0 or scale_parameter=False."
            )
        return super().describe(name, optimizer, group, names)

    def decoupled(self, name, group):
        """See `Rule.decoupled`."""
        return True

    def learning_rate(self, group, state):
        """See `Rule.learning_rate`."""
        if not group["relative_step"]:
            return float(group["lr"])
        step = state.get("step", 0) + 1
        return min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        beta = constants["beta1"] or 0.0
        return Shares(beta, np.full(len(updates), 1 - beta), own_rate=True)

    def preconditioner(self, parameter, state, constants, updates, before=None):
        """See `Rule.preconditioner`; of the parameter's shape."""
        if updates == 0:
            return torch.zeros_like(parameter, requires_grad=False)
        eps = constants["eps"][0]  # added to every square
        nothing = eps * (1 + 1e-4) if eps < _TINY else 0.0
        if "exp_avg_sq" in state:
            inverse_root = inverse_root_of(state["exp_avg_sq"], nothing)
        else:
            rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            rows = inverse_root_of(rows, nothing) * rows.mean(dim=-1, keepdim=True).sqrt()
            inverse_root = rows.unsqueeze(-1) * inverse_root_of(columns, nothing).unsqueeze(-2)
        step = 1 / excess(inverse_root, parameter.grad, constants["clip_threshold"])
        if constants["scale_parameter"]:
            step *= max(constants["eps"][1], float(state["RMS"]))
        return inverse_root.mul_(step)


def inverse_root_of(second: torch.Tensor, nothing: float = 0.0) -> torch.Tensor:
    """`1 / sqrt(V)`; 0 where `V` holds no more than what it holds without gradients."""
    return torch.where(second > nothing, second.rsqrt(), 0)


def root_mean_square(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim."""
    return tensor.norm(2) / tensor.numel() ** 0.5


def excess(inverse_root: torch.Tensor, gradient: torch.Tensor, threshold: float) -> torch.Tensor:
    """`max(1, RMS(U) / threshold)`, by which the step is shortened; 0-dim."""
    return (root_mean_square(inverse_root * gradient) / threshold).clamp(min=1.0)
