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
"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import UnsupportedError
from .adam import corrections
from .rule import Rule, Shares


class MuonRule(Rule):
    """torch.optim.Muon: `theta <- theta - eta a O`, `O` from the momentum `U` by `n` Newton-Schulz steps.

    `B_t = mu B_{t-1} + (1 - mu) g_t` and `U = B`, with Nesterov `U = mu B + (1 - mu) g`. From `X = U / |U|`
    (Frobenius), `n` times `X <- (a I + b X X^T + c (X X^T)^2) X`, which carries every singular value towards 1 (with
    the default coefficients to between .7 and 1.2). Every step multiplies from the left by a polynomial of `X X^T`, so
    `O = Q U / |U|` with `Q` the product of these polynomials, symmetric and positive definite: `Q` is about
    `(U U^T / |U|^2)^{-1/2}` and no more than `a^n` where `U` is 0. torch works on the side that is shorter: for
    `m <= k` `P` is this `[m, m]` matrix from the left, else the `[k, k]` one from the right.

    `P = r w Q / |U|`, with `r = sqrt(max(1, m / k))` (`adjust_lr_fn="match_rms_adamw"`: `0.2 sqrt(max(m, k))`) and `w`
    the weight that `U` has gathered, `1 - mu^t`, with Nesterov `1 - mu^(t + 1)`. As in Adam it makes the shares
    `kappa(j, k) = (1 - mu) mu^(j - k) / w_j`, with Nesterov `(mu (1 - mu) mu^(j - k) + (1 - mu) [j = k]) / w_j`.
    `Q` is frozen, though it reacts to the gradient; torch computes it in bfloat16, this in float32. Weight decay is
    decoupled, `eta lambda theta`.

    `Q` costs about as much as Muon's own step and changes slowly, so the average takes it at every 16th update only.
    """

    kinds: ClassVar[Mapping[str, str]] = {"Muon": "torch.optim.Muon"}
    constants: ClassVar[Mapping[str, Any]] = {
        "momentum": 0.95,
        "nesterov": True,
        "ns_coefficients": [3.4445, -4.775, 2.0315],
        "ns_steps": 5,
        "eps": 1e-7,
        "adjust_lr_fn": None,
    }
    entrywise: ClassVar[bool] = False
    every: ClassVar[int] = 16

    def describe(self, name, optimizer, group, names):
        """See `Rule.describe`."""
        a, b, c = (float(value) for value in group["ns_coefficients"])
        squares = np.linspace(0, 1, 1001)  # of singular values at the start; the default ones grow to 1.2
        if (a + b * squares + c * squares**2).min() <= 0:
            raise UnsupportedError(
                f"Muon(ns_coefficients={(a, b, c)}) cannot be attributed: a + b x + c x^2 is not positive for x from "
                "0 to 1, so its updates may climb the loss. Use torch's default coefficients."
            )
        return super().describe(name, optimizer, group, names)

    def decoupled(self, name, group):
        """See `Rule.decoupled`."""
        return True

    def side(self, shape):
        """See `Rule.side`."""
        return "left" if shape[0] <= shape[1] else "right"

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        momentum = constants["momentum"]
        share = (1 - momentum) / self._gathered(constants, updates)
        if not constants["nesterov"]:
            return Shares(momentum, share)
        return Shares(momentum, momentum * share, own=share)

    def preconditioner(self, parameter, state, constants, updates, before=None):
        """See `Rule.preconditioner`; the matrix of the shorter side."""
        short = min(parameter.shape)
        if updates == 0:
            return parameter.new_zeros((short, short), requires_grad=False)
        update = state["momentum_buffer"]
        if constants["nesterov"]:
            update = parameter.grad.lerp(update, constants["momentum"])
        update = update.to(torch.promote_types(update.dtype, torch.float32))
        size = update.norm()
        if size == 0:
            return parameter.new_zeros((short, short), requires_grad=False)
        if self.side(parameter.shape) == "right":
            update = update.T
        size = size.clamp(min=constants["eps"])
        product = newton_schulz_product(update / size, constants["ns_coefficients"], constants["ns_steps"])
        weight = float(self._gathered(constants, np.array([updates]))[0])
        return product * (self._adjustment(constants, parameter.shape) * weight / size)

    @staticmethod
    def _gathered(constants: Mapping[str, Any], updates: np.ndarray) -> np.ndarray:
        return corrections(constants["momentum"], updates + 1 if constants["nesterov"] else updates)

    @staticmethod
    def _adjustment(constants: Mapping[str, Any], shape: torch.Size) -> float:
        if constants["adjust_lr_fn"] == "match_rms_adamw":
            return 0.2 * math.sqrt(max(shape))
        return math.sqrt(max(1.0, shape[0] / shape[1]))


def newton_schulz_product(start: torch.Tensor, coefficients: list[float], steps: int) -> torch.Tensor:
    """`Q` with `Q X` the result of Newton-Schulz steps from `X [m, k]`: `[m, m]`.

    `A = X X^T` and all polynomials of it commute, so after a step with the factor `F` the new `A` is `F A F`.
    """
    a, b, c = coefficients
    gram = start @ start.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    for step in range(steps):
        factor = torch.addmm(a * identity, gram, b * identity + c * gram)
        product = factor @ product if step else factor
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return (product + product.T) / 2
