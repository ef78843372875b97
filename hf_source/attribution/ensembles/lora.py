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
"""`ensemble="lora"`: low-rank adapters briefly fine-tuned from one trained model, each with another seed.

LORA ENSEMBLE of Deng et al. 2024 (arXiv 2405.17293, section 3.3). A member is the recorded model with an adapter at
every linear layer but the head, `y = W x + B A x` (Hu et al. 2021, arXiv 2106.09685), trained for a few AdamW steps on
the rows of one stage from that stage's final weights.

- A method that compares gradients at the final weights takes those of the adapter's parameters, as the paper does
  (`lora_gradients="adapter"`), or those of the recorded parameters at the moved weights (`"all"`), or both.
- A method that uses what the record knows of a parameter (`RECORDED`) takes those of the recorded parameters: the
  adapter's have no learning rates, preconditioners or visits. If it follows the run, as `source` does, its members see
  the weights of every segment moved by the adapter.

For a small model trained from scratch the adapters' gradients predicted retraining worse than the recorded parameters'
own (`benchmarks/bench_ensembles.py`).

Adapters are hooks on the recorded model, so quantised layers and stages that trained adapters of their own take them.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError, UnsupportedError
from ...gradients import RowGradients, labels_of
from ...gradients.changes import change_output
from ...recording import StageRecord, TrainingRecord, canonical_name
from .base import Members, member_of


if TYPE_CHECKING:
    from ..attributor import SourceAttributor

RECORDED = ("source", "tracin", "trackstar", "datainf")
"""Methods that take the recorded parameters: they use what the record knows of them, along the run or at its end."""

ADAPTER = "ensemble_adapter"
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Adapted layer by canonical name -> `A [rank, in]`, `B [out, rank]`."""


@dataclass(frozen=True)
class LoraOptions:
    """Settings of `ensemble="lora"`.

    Attributes:
        lora_rank: of the adapters.
        lora_steps: optimizer steps of each adapter.
        lora_learning_rate: of its AdamW.
        lora_batch_size: rows of a step.
        lora_stage: stage that it is fine-tuned from and on; the last by default.
        lora_gradients: `"adapter"`, `"all"` (the recorded parameters) or `"both"`; by default `"adapter"` for methods
            that need nothing but gradients at the final weights, and `"all"` for the others.
    """

    lora_rank: int = 8
    lora_steps: int = 32
    lora_learning_rate: float = 1e-3
    lora_batch_size: int = 16
    lora_stage: str = ""
    lora_gradients: str = ""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_steps", "lora_batch_size", "lora_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be positive.")
        if self.lora_gradients not in ("", "adapter", "all", "both"):
            raise ConfigError(f"lora_gradients={self.lora_gradients!r}: choose 'adapter', 'all' or 'both'.")

    def check(self, attributor: "SourceAttributor") -> None:
        """Raise if the settings do not fit the method or the record.

        Raises:
            ConfigError: if the method needs the recorded parameters and others are asked for.
            RecordError: if there is no such stage.
        """
        if self.lora_gradients in ("adapter", "both") and attributor.method in RECORDED:
            raise ConfigError(
                f"method={attributor.method!r} uses what the record knows of each parameter, and the ensemble's "
                "adapters are not in it: it takes lora_gradients='all'."
            )
        self.stage_of(attributor.record)

    def training_tokens(self, attributor: "SourceAttributor") -> int:
        """Tokens that an adapter trains on."""
        rows = attributor.rows(self.stage_of(attributor.record))
        size = min(self.lora_batch_size, len(rows.trained))
        return int(self.lora_steps * size * rows.lengths[rows.trained].mean())

    def stage_of(self, record: TrainingRecord) -> StageRecord:
        """The stage that adapters start from."""
        return record.stage(self.lora_stage) if self.lora_stage else record.stages[-1]

    def taken(self, method: str) -> str:
        """Whose gradients a method takes."""
        return self.lora_gradients or ("all" if method in RECORDED else "adapter")


def lora_members(single: "SourceAttributor", options: LoraOptions, numbers: range) -> Members:
    """The model with one adapter after another."""
    stage = options.stage_of(single.record)
    for number in numbers:
        member = member_of(single)
        weights = train_adapter(single, stage, options, single.seed + 104729 * (number + 1))
        member._change_model = partial(_put_in, weights=weights)
        if options.taken(single.method) != "all":
            member._choose_parameters = partial(_chosen, both=options.lora_gradients == "both")
        yield member


def train_adapter(attributor: "SourceAttributor", stage: StageRecord, options: LoraOptions, seed: int) -> Weights:
    """Fine-tune a fresh adapter on random batches of a stage's rows, from its final weights.

    `A` starts as PEFT's does (uniform within `1 / sqrt(in)`) and `B` at zero.

    Args:
        attributor: with its record.
        stage: whose weights and rows are taken.
        options: see `LoraOptions`.
        seed: of `A` and of the batches.
    """
    model, rows = attributor.build_model(stage), attributor.rows(stage)
    rows.prepare(RowGradients(model, rows.task, []))
    stage.load_weights(model, "final")
    generator = torch.Generator().manual_seed(seed)
    start = {name: _fresh(*_sizes(layer), options.lora_rank, generator) for name, layer in _layers(model).items()}
    if not start:
        raise UnsupportedError(
            f"The model of stage {stage.name!r} has no linear layer to adapt: use ensemble='dropout' or 'independent'."
        )
    adapters = attach(model, start)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wanted = [parameter.requires_grad_(True) for adapter in adapters.values() for parameter in adapter.parameters()]
    optimizer = torch.optim.AdamW(wanted, lr=options.lora_learning_rate, weight_decay=0.0)
    shuffler = np.random.default_rng(seed)
    size = min(options.lora_batch_size, len(rows.trained))
    for _ in attributor.progress(range(options.lora_steps), "fine-tuning an adapter"):
        pieces = shuffler.choice(rows.trained, size=size, replace=False)
        optimizer.zero_grad()
        items = max(int(rows.items[pieces].sum()), 1)
        for part in rows.batches(pieces):
            batch = rows.collated(part, attributor.device)
            losses = rows.task.row_losses(rows.task.forward(model, batch), labels_of(batch))
            (losses.sum() / items).backward()
        optimizer.step()
    return {
        name: (broadcast(adapter.down.weight.detach()), broadcast(adapter.up.weight.detach()))
        for name, adapter in adapters.items()
    }


class Adapter(nn.Module):
    """`B A x`, to be added to a layer's output.

    Args:
        down: `A [rank, in]`.
        up: `B [out, rank]`.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(down.shape[1], down.shape[0], bias=False, device=down.device, dtype=down.dtype)
        self.up = nn.Linear(up.shape[1], up.shape[0], bias=False, device=up.device, dtype=up.dtype)
        with torch.no_grad():
            self.down.weight.copy_(down)
            self.up.weight.copy_(up)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is added, `[..., out]`."""
        return self.up(self.down(inputs))


def attach(model: nn.Module, weights: Weights) -> dict[str, Adapter]:
    """Add adapters to the layers of these canonical names that the model has; they become its submodules."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    adapters = {}
    for name, layer in _layers(model).items():
        if name in weights and _sizes(layer) == (weights[name][0].shape[1], weights[name][1].shape[0]):
            adapter = Adapter(*(part.to(like) for part in weights[name]))
            layer.add_module(ADAPTER, adapter)
            change_output(layer, lambda inputs, output, adapter=adapter: output + adapter(inputs[0]))
            adapters[name] = adapter
    return adapters


def _put_in(model: nn.Module, stage: StageRecord, weights: Weights) -> None:
    attach(model, weights)


def _chosen(model: nn.Module, recorded: list[str], both: bool) -> list[str]:
    adapters = [name for name, _ in model.named_parameters() if f".{ADAPTER}." in name]
    return recorded + adapters if both else adapters


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by canonical name; neither the head nor parts of an adapter that was recorded."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and "lora_" not in name
    }


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Features that go in, and that come out."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def _fresh(inputs: int, outputs: int, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    down = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
    return down, torch.zeros(outputs, rank)
