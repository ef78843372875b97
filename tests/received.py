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
"""What an optimizer really received, for comparison with what the record says it did."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from hf_source.recording import StageRecord


class Received(TrainerCallback):
    """Keeps weights and gradients of every step before the update. Clipping comes first: set `max_grad_norm=0`."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        """Copy weights and gradients."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        weights = {name: p.detach().clone() for name, p in trained.items()}
        self.steps.append(
            (weights, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()})
        )


def largest_error(
    received: Received,
    stage: StageRecord,
    model: torch.nn.Module,
    row_loss: Callable[[torch.nn.Module, int], torch.Tensor],
) -> float:
    """Largest relative error, over steps, of the record's gradient: sum over rows of grad(row loss) / normalizer.

    Args:
        received: what was received.
        stage: what was recorded.
        model: any model of the architecture; its weights are replaced.
        row_loss: the summed loss of a row alone, by its number, written without the library.
    """
    assert len(received.steps) == stage.num_steps > 1
    parameters = {n: p.requires_grad_() for n, p in model.named_parameters() if n in stage.trainable}
    worst = 0.0
    for (weights, gradients), step in zip(received.steps, stage.steps().micro_batches, strict=True):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        model.zero_grad()
        for batch in step:
            for row in batch.rows:
                (row_loss(model, row) / batch.normalizer).backward()
        missed = sum((p.grad - gradients[n]).square().sum() for n, p in parameters.items() if p.grad is not None)
        worst = max(worst, float((missed / sum(g.square().sum() for g in gradients.values())).sqrt()))
    return worst
