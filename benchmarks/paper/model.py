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
"""The paper's networks as models that a Trainer trains and records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from hf_source import SourceConfig, SourceTrainer, TrainingRecord

from .data import Settings, Stage


MEASUREMENTS = {"classes": "margin", "value": "absolute-error"}
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}


class MLPConfig(PretrainedConfig):
    """Widths of the layers, and what the loss is."""

    model_type = "paper_mlp"

    def __init__(self, sizes: Sequence[int] = (2, 2), kind: str = "classes", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes = list(sizes)
        self.kind = kind


class MLP(PreTrainedModel):
    """Linear layers with ReLU between them."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        layers = [torch.nn.Linear(a, b) for a, b in zip(config.sizes, config.sizes[1:], strict=False)]
        self.layers = torch.nn.ModuleList(layers)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """As `torch.nn.Linear` starts, which is what the paper and the retrainings have."""

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Outputs, and the mean loss where there are labels."""
        for position, layer in enumerate(self.layers):
            inputs = layer(inputs.relu() if position else inputs)
        if labels is None:
            return {"logits": inputs}
        if self.config.kind == "value":
            return {"loss": F.mse_loss(inputs[:, 0], labels), "logits": inputs}
        return {"loss": F.cross_entropy(inputs, labels), "logits": inputs}


def rows_of(stage: Stage) -> Dataset:
    """The stage's rows as the Trainer takes them."""
    return Dataset.from_dict({"inputs": stage.inputs, "label": stage.targets})


def record_run(
    stages: Sequence[Stage], settings: Settings, folder: Path, segments: int, seed: int, checkpoints: int = 0
) -> TrainingRecord:
    """Train on all rows, stage after stage, and record, with so many checkpoints a segment."""
    torch.manual_seed(seed)
    model = MLP(MLPConfig(settings.sizes, settings.kind))
    for stage in stages:
        args = SourceConfig(
            output_dir=str(folder / "out"),
            record_dir=str(folder / "record"),
            stage=stage.name,
            num_segments=segments,
            checkpoints_per_segment=checkpoints,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            seed=seed,
            **QUIET,
        )
        optimizer = (torch.optim.SGD, {"lr": settings.learning_rate, "momentum": settings.momentum})
        SourceTrainer(
            model,
            args,
            train_dataset=rows_of(stage),
            optimizer_cls_and_kwargs=optimizer,
        ).train()
    return TrainingRecord.load(folder / "record")


def empty_model(settings: Settings) -> MLP:
    """A network to put recorded weights into."""
    return MLP(MLPConfig(settings.sizes, settings.kind))
