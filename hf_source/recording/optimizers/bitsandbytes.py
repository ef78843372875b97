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
"""bitsandbytes' optimizers, with their state in 32 or 8 bits, paged or not.

Their updates are those of torch's optimizers; the rules are tested against them, which run on a CPU too. A state in 8
bits is kept in blocks of 256 entries, `code[state] * absmax[block]`, rounded anew after every update (Dettmers et al.
2022, arXiv 2110.02861). The update itself uses the second moment before that rounding, `beta2 v_old + (1 - beta2) g^2`
with `v_old` as it was kept, which is therefore noted beforehand, in its 8 bits. (Coupled weight decay adds to `g` what
is left out here.) Momentum kept in 8 bits loses some of the share of old gradients to rounding, which is not followed.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import UnsupportedError
from .adam import corrections
from .rule import InverseRootRule, Rule, Shares, imported, part


_BLOCK = 256


def variants(family: str, *prefixes: str) -> dict[str, str]:
    """`bitsandbytes.AdamW8bit` -> `bitsandbytes.optim.adamw.AdamW8bit` and so on."""
    module = f"bitsandbytes.optim.{family.lower()}"
    names = [prefix + family + bits for prefix in ("", *prefixes) for bits in ("", "8bit", "32bit")]
    return {f"bitsandbytes.{name}": f"{module}.{name}" for name in names}


class BitsAndBytes:
    """What the rules of bitsandbytes' optimizers share. As a constant they have the parameters kept in 8 bits."""

    family: ClassVar[str]
    moment: ClassVar[str] = "1"  # number of the state that is the second moment
    notes: ClassVar[bool] = True
    entrywise: ClassVar[bool] = False
    required: ClassVar[Mapping[str, Any]] = {}  # arguments of the constructor; the groups' own values count

    def describe(self, name, optimizer, group, names):
        """See `Rule.describe`."""
        settings = optimizer.args
        for flag, reason in {
            "max_unorm": "it scales a whole tensor's update by its norm",
            "skip_zeros": "it leaves out entries whose gradient is 0",
        }.items():
            if getattr(settings, flag, False):
                raise UnsupportedError(f"{name}({flag}=...) cannot be attributed: {reason}. Leave {flag} out.")
        own = {key: group[key] for key in self.constants if key != "eight_bit"}
        own = {key: list(map(float, value)) if key == "betas" else float(value) for key, value in own.items()}
        trained = [p for p in group["params"] if p.requires_grad]
        return {**own, "eight_bit": [names[p] for p in trained if self._in_eight_bits(optimizer, p)]}

    @staticmethod
    def _overrides(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Iterator[dict[str, Any]]:
        """What the global manager says about a parameter, the last word last. The Trainer keeps embeddings in 32."""
        manager = optimizer.mng
        for g, group in enumerate(optimizer.param_groups):
            for i, other in enumerate(group["params"]):
                if other is parameter and (g, i) in manager.index2config:
                    yield manager.index2config[g, i]
        if id(parameter) in manager.pid2config:
            yield manager.pid2config[id(parameter)]
        for module, attribute, override in manager.module_weight_config_triple:
            if getattr(module, attribute) is parameter:
                yield override

    def _in_eight_bits(self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> bool:
        if "state1" in optimizer.state.get(parameter, {}):
            return optimizer.state[parameter]["state1"].dtype == torch.uint8
        bits = optimizer.args.optim_bits
        for override in self._overrides(optimizer, parameter):
            if set(override) - {"optim_bits"}:
                raise UnsupportedError(
                    f"bitsandbytes' GlobalOptimManager overrides {sorted(override)} of single parameters, which a "
                    "record cannot hold. Use parameter groups for own learning rates or betas; `optim_bits` may be "
                    "overridden."
                )
            bits = override["optim_bits"]
        return bits == 8 and parameter.numel() >= optimizer.args.min_8bit_size

    def decoupled(self, name, group):
        """See `Rule.decoupled`: of Adam too, whatever it is called."""
        return self.family in ("Adam", "AdamW")

    def before_update(self, parameter, state, learning_rate):
        """See `Rule.before_update`: a second moment in 8 bits, as kept."""
        key = self.moment
        if state.get(f"state{key}", parameter).dtype != torch.uint8:
            return None
        return state[f"state{key}"].clone(), state[f"absmax{key}"].clone()

    def second_moment(self, parameter, state, constants, piece=None, before=None):
        """See `InverseRootRule.second_moment`."""
        key, (old, new) = self.moment, self.decay(constants)
        kept = part(state[f"state{key}"], piece)
        if kept.dtype != torch.uint8:
            return kept
        gradient = part(parameter.grad, piece).float()
        if before is None:
            return gradient.square() * new
        return dequantised(*before, state[f"qmap{key}"], piece).mul_(old).addcmul_(gradient, gradient, value=new)

    def decay(self, constants: Mapping[str, Any]) -> tuple[float, float]:
        """`v <- old v + new g^2`: `(old, new)`."""
        beta = constants["betas"][int(self.moment) - 1]
        return beta, 1 - beta

    def build(self, name, groups):
        """See `Rule.build`; unpaged, since paging changes no number."""
        kind = imported(f"bitsandbytes.optim.{self.family.lower()}.{self.family}")
        groups = [{key: value for key, value in group.items() if key != "eight_bit"} for group in groups]
        optimizer = kind(groups, **self.required)
        optimizer.args.min_8bit_size = 0
        return optimizer

    def after_build(self, optimizer, group, parameters):
        """See `Rule.after_build`: states of the recorded widths."""
        numbers = {p: (g, i) for g, one in enumerate(optimizer.param_groups) for i, p in enumerate(one["params"])}
        for name, parameter in parameters.items():
            # The manager is one for the whole process and knows parameters by their address: leave no trace in it.
            optimizer.mng.pid2config[id(parameter)] = {"optim_bits": 8 if name in group["eight_bit"] else 32}
            number, place = numbers[parameter]
            optimizer.init_state(optimizer.param_groups[number], parameter, number, place)
            del optimizer.mng.pid2config[id(parameter)]


def dequantised(
    kept: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, piece: slice | None = None
) -> torch.Tensor:
    """Numbers kept in 8 bits, or a piece of them."""
    start, stop, _ = (piece or slice(0, kept.numel())).indices(kept.numel())
    numbers, first = part(kept, piece), start // _BLOCK
    if start % _BLOCK == 0:  # bitsandbytes' own kernel, which is faster
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(
            numbers, absmax=absmax[first : (stop - 1) // _BLOCK + 1].contiguous(), code=code, blocksize=_BLOCK
        )
    block = torch.arange(start, stop, device=kept.device) // _BLOCK
    return (code[numbers.view(-1).int()] * absmax[block]).view(numbers.shape)


class BitsAndBytesAdamRule(BitsAndBytes, InverseRootRule):
    """Adam and AdamW, both with decoupled weight decay; see `AdamRule`."""

    family = "Adam"
    moment = "2"
    kinds: ClassVar[Mapping[str, str]] = variants("Adam", "Paged")
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.999], "eps": 1e-8, "eight_bit": []}

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        beta = constants["betas"][0]
        return Shares(beta, (1 - beta) / corrections(beta, updates))

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        correction = (1 - constants["betas"][1] ** updates) ** 0.5
        return correction, constants["eps"] * correction


class BitsAndBytesAdamWRule(BitsAndBytesAdamRule):
    """AdamW."""

    family = "AdamW"
    kinds: ClassVar[Mapping[str, str]] = variants("AdamW", "Paged")


class BitsAndBytesRMSpropRule(BitsAndBytes, InverseRootRule):
    """RMSprop, `P = 1 / (sqrt(v) + eps)`; bitsandbytes makes no use of its `momentum`. Decay goes through `P`."""

    family = "RMSprop"
    kinds: ClassVar[Mapping[str, str]] = variants("RMSprop")
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.99, 0.0], "eps": 1e-8, "eight_bit": []}

    def scale_and_eps(self, constants, updates):
        """See `InverseRootRule.scale_and_eps`."""
        return 1.0, constants["eps"]


class BitsAndBytesAdagradRule(BitsAndBytesRMSpropRule):
    """Adagrad: the same with the sum of all squared gradients."""

    family = "Adagrad"
    kinds: ClassVar[Mapping[str, str]] = variants("Adagrad")

    def decay(self, constants):
        """See `BitsAndBytes.decay`."""
        return 1.0, 1.0


class BitsAndBytesSGDRule(BitsAndBytes, Rule):
    """SGD with momentum; bitsandbytes has neither dampening nor Nesterov's variant, whatever its arguments say."""

    family = "SGD"
    kinds: ClassVar[Mapping[str, str]] = variants("SGD")
    constants: ClassVar[Mapping[str, Any]] = {"betas": [0.9, 0.0], "eight_bit": []}
    required: ClassVar[Mapping[str, Any]] = {"lr": 0.0, "momentum": 0.9}
    scalar: ClassVar[bool] = True
    notes: ClassVar[bool] = False

    def shares(self, constants, updates):
        """See `Rule.shares`."""
        return Shares(constants["betas"][0], np.full(len(updates), 1 - constants["betas"][0]))

    def scalar_preconditioner(self, constants: Mapping[str, Any]) -> float:
        """`1 / (1 - momentum)`."""
        return 1 / (1 - constants["betas"][0])

    def preconditioner(self, parameter, state, constants, updates, before=None):
        """See `Rule.preconditioner`; 0-dim."""
        return torch.tensor(self.scalar_preconditioner(constants), dtype=parameter.dtype, device=parameter.device)
