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
"""The flow of one segment, and the scalar functions of its eigenvalues.

Inside a segment training is taken as the linear flow `d theta / dt = -(P H + Lambda) theta` over the time `s` (the sum
of the learning rates). A query vector is carried backwards through it by

    x  = F_r^T q = P integral_0^s exp(-t (P H + Lambda))^T q dt        (scores the segment's rows)
    q' = exp(-s (P H + Lambda))^T q                                    (enters the previous segment)

(Bae et al. 2024, arXiv 2405.12186, equations 13 to 16, with a preconditioner `P` and decoupled weight decay `Lambda`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .preconditioner import Preconditioner, as_preconditioners


@dataclass(frozen=True)
class Flow:
    """Constants of one segment, by parameter name.

    Attributes:
        length: `s`, the sum of the segment's learning rates.
        preconditioner: `P`, 0 for a parameter the segment does not train. A tensor stands for a `Diagonal`: same shape
            as the parameter or 0-dim.
        decay: `Lambda`, 0-dim per parameter (decoupled weight decay) or elementwise (coupled decay under Adam).
    """

    length: float
    preconditioner: Mapping[str, Preconditioner]
    decay: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "preconditioner", as_preconditioners(self.preconditioner))

    def trains(self, name: str) -> bool:
        """Whether the segment moves the parameter."""
        return not self.preconditioner[name].is_zero


def decayed(rate: torch.Tensor, length: float) -> torch.Tensor:
    """`exp(-s m)`."""
    return torch.exp(-length * rate)


def integral(rate: torch.Tensor, length: float) -> torch.Tensor:
    """`integral_0^s exp(-t m) dt = (1 - exp(-s m)) / m`, `s` at `m = 0`; any sign of `m`."""
    small = rate.abs() * length < 1e-12
    safe = torch.where(small, torch.ones_like(rate), rate)
    return torch.where(small, torch.full_like(rate, length), -torch.expm1(-length * safe) / safe)


def forced(rate: torch.Tensor, own: float, length: float) -> torch.Tensor:
    """`integral_0^s exp(-t m) exp(-(s - t) l) dt`: the response of a mode with rate `l = own` driven at rate `m`."""
    return decayed(torch.full_like(rate, own), length) * integral(rate - own, length)


def forced_integral(rate: torch.Tensor, own: float, length: float) -> torch.Tensor:
    """`integral_0^s forced(m, l, t) dt = (integral(l) - integral(m)) / (m - l)`; its limit where `m = l`."""
    gap = rate - own
    close = gap.abs() * length < 1e-5
    safe = torch.where(close, torch.ones_like(gap), gap)
    apart = (integral(torch.full_like(rate, own), length) - integral(rate, length)) / safe
    return torch.where(close, _first_moment((rate + own) / 2, length), apart)


def _first_moment(rate: torch.Tensor, length: float) -> torch.Tensor:
    """`integral_0^s t exp(-t m) dt`."""
    x = rate * length
    small = x.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(x), x)
    exact = (1 - torch.exp(-safe) * (1 + safe)) / safe**2
    return length**2 * torch.where(small, 0.5 - x / 3 + x**2 / 8, exact)
