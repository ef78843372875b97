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
"""`ensemble="dropout"`: sub-networks of one trained model, each what a dropout mask leaves of it.

DROPOUT ENSEMBLE of Deng et al. 2024 (arXiv 2405.17293, section 3.2). A mask belongs to a member: it depends on the
seed, the member's number and the place in the model, and nothing else. Query and row gradients, every row, every
token, segment and stage see the same sub-network, whichever batch they are in; what is dropped are features (units),
and what is left is divided by `1 - p`, as in training.

Masks stand where the model has Dropout modules. A model without any (Llama and most that followed) has them at the
inputs of its linear layers, the head excepted. Dropout of attention weights stays off: they are no units of a network.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError
from ...gradients.changes import change_input, change_output
from ...recording import StageRecord, canonical_name
from .base import Members, member_of


if TYPE_CHECKING:
    from ..attributor import SourceAttributor

_Dropout = torch.nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class DropoutOptions:
    """Settings of `ensemble="dropout"`.

    Attributes:
        dropout: probability that a unit is dropped; by default each module's own, as the model was trained.
    """

    dropout: float | None = field(default=None, metadata={"example": 0.1})

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: it is a probability below 1 (0.1 is usual).")

    def check(self, attributor: "SourceAttributor") -> None:
        """Raise if neither the user nor the training says how much is dropped.

        Raises:
            ConfigError: naming the first stage that trained without.
        """
        for stage in attributor.record.stages:
            if self.dropout is None and not stage.training.get("dropout"):
                raise _unknown(stage)


def dropout_members(single: "SourceAttributor", options: DropoutOptions, numbers: range) -> Members:
    """The model under one mask after another."""
    for number in numbers:
        member = member_of(single)
        member._change_model = partial(apply_masks, p=options.dropout, seed=f"{single.seed}/{number}")
        yield member


def apply_masks(model: nn.Module, stage: StageRecord, p: float | None, seed: str) -> None:
    """Mask the model for good; it stays in evaluation mode.

    Args:
        model: as `StageRecord.build_model` gives it.
        stage: whose model it is.
        p: probability that a unit is dropped; `None` for each module's own.
        seed: of the member.

    Raises:
        ConfigError: if nothing would be dropped, because `p` is not given and the model has no dropout of its own.
    """
    places = list(_dropouts(model)) if any(isinstance(each, _Dropout) for each in model.modules()) else []
    if not places and p is not None:
        for name, module in _linears(model):
            change_input(module, _Mask(f"{seed}/{canonical_name(name)}", p))
        return
    shares = [module.p if p is None else p for _, module in places]
    if p is None and not any(shares):
        raise _unknown(stage)
    for (name, module), share in zip(places, shares, strict=True):
        mask = _Mask(f"{seed}/{canonical_name(name)}", share, axis=-1 if isinstance(module, nn.Dropout) else 1)
        change_output(module, lambda _, output, mask=mask: mask(output))


def _unknown(stage: StageRecord) -> ConfigError:
    return ConfigError(
        f"Stage {stage.name!r} trained without dropout of units: say how much the members of ensemble='dropout' drop, "
        "e.g. dropout=0.1."
    )


def _dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _Dropout))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and "lora_" not in name:
            yield name, module


class _Mask:
    """Drops features of whatever comes: a tensor times 0 or `1 / (1 - p)` along one axis.

    Args:
        key: of the place and the member; the same key, the same mask.
        p: probability that a feature is dropped.
        axis: of the features.
    """

    def __init__(self, key: str, p: float, axis: int = -1) -> None:
        self.seed, self.p, self.axis = zlib.crc32(key.encode()), p, axis
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.p:
            return tensor
        width = tensor.shape[self.axis]
        if width not in self._kept:
            generator = torch.Generator().manual_seed(self.seed)
            self._kept[width] = (torch.rand(width, generator=generator) >= self.p).double() / (1 - self.p)
        kept = self._kept[width] = self._kept[width].to(tensor)
        shape = [1] * tensor.dim()
        shape[self.axis] = width
        return tensor * kept.view(shape)
