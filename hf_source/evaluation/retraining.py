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
"""Retrain a recorded run with rows left out: many copies at once, from the record alone.

Every copy makes the recorded steps (same initial weights, order, learning rates, normalizers) with its own rows
missing, so that what differs between copies is the missing rows and nothing else. Copies are stacked along a new first
axis of the parameters and trained together with `torch.func`; for models small enough that a copy's step is mostly
overhead this is many times faster than one after another. The removed row's items stay in the normalizer: leaving row
`m` out then means exactly that its term `grad l_m / N_k` is missing, which is what a score predicts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from ..data import CausalLMCollator, take_rows
from ..gradients import CausalLMTask, Task, batch_to
from ..recording import StageRecord


Stacked = dict[str, torch.Tensor]


class StackedOptimizer:
    """The recorded optimizer on stacked parameters `[copies, *shape]`: SGD with momentum, Adam, AdamW.

    Args:
        description: `StageRecord.optimizer`.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.group_of = {name: g for g, group in enumerate(description["groups"]) for name in group["parameters"]}
        self.groups = description["groups"]
        self.state: dict[str, tuple[torch.Tensor, ...]] = {}
        self.step_count = 0

    def step(self, parameters: Stacked, gradients: Stacked, learning_rates: Sequence[float]) -> None:
        """One update in place; `learning_rates` holds one per group."""
        self.step_count += 1
        for name, gradient in gradients.items():
            group, rate = self.groups[self.group_of[name]], learning_rates[self.group_of[name]]
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                parameters[name].mul_(1 - rate * group["weight_decay"])
            elif group["weight_decay"]:
                gradient = gradient + group["weight_decay"] * parameters[name]
            update = self._sgd(name, gradient, group) if group["betas"] is None else self._adam(name, gradient, group)
            parameters[name].sub_(update, alpha=rate)

    def _sgd(self, name: str, gradient: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        if not group["momentum"]:
            return gradient
        if name not in self.state:  # torch starts the buffer with the undampened gradient
            buffer = gradient.clone()
        else:
            buffer = self.state[name][0].mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        self.state[name] = (buffer,)
        return gradient + group["momentum"] * buffer if group["nesterov"] else buffer

    def _adam(self, name: str, gradient: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        first, second = self.state.setdefault(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**self.step_count)).sqrt_().add_(group["eps"])
        return (first / (1 - beta1**self.step_count)).div_(root)


def retrain(
    stage: StageRecord,
    dataset: Any,
    keep: np.ndarray,
    *,
    task: Task | None = None,
    dtype: torch.dtype = torch.float32,
    data_collator: Any = None,
    progress: Any = None,
) -> tuple[torch.nn.Module, Stacked]:
    """Train one copy of a recorded stage per row mask.

    Args:
        stage: a complete stage.
        dataset: its tokenised rows, by row number.
        keep: bool `[copies, rows]`, or float weights of the rows; a copy trains on row `m` with weight `keep[:, m]`.
        task: what defines a row's loss.
        dtype: of training.
        data_collator: as in training; right-padding by default.
        progress: wraps the list of steps, e.g. in a progress bar.

    Returns:
        The model skeleton, and the trained parameters of all copies, name -> `[copies, *shape]`.
    """
    task = task or CausalLMTask()
    collate = data_collator or CausalLMCollator()
    model = stage.build_model(dtype).eval()
    stage.load_weights(model, "initial")
    own = dict(model.named_parameters())
    parameters = {n: own[n].detach().to(dtype).expand(len(keep), *own[n].shape).clone() for n in stage.trainable}
    weights = torch.as_tensor(keep, dtype=dtype)
    optimizer = StackedOptimizer(stage.optimizer)
    steps = stage.steps()

    def loss(parameters: Stacked, batch: dict[str, torch.Tensor], row_weights: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(model, parameters, (), {"input_ids": batch["input_ids"], "use_cache": False})
        return (task.row_losses(outputs.logits, batch["labels"]) * row_weights).sum()

    gradients_of = vmap(grad(loss), in_dims=(0, None, 0))
    for step in (progress or iter)(range(stage.num_steps)):
        total: Stacked = {}
        for micro in steps.micro_batches[step]:
            batch = batch_to(collate(take_rows(dataset, micro.rows)), torch.device("cpu"))
            part = gradients_of(parameters, batch, weights[:, micro.rows])
            for name, gradient in part.items():
                gradient.div_(micro.normalizer)
                total[name] = total[name].add_(gradient) if name in total else gradient
        if steps.skipped[step]:
            continue
        _clip(total, stage.training["max_grad_norm"])
        optimizer.step(parameters, total, steps.learning_rate[step].tolist())
    return model, parameters


def _clip(gradients: Stacked, max_norm: float) -> None:
    """Each copy's own clipping, as torch does it."""
    if not max_norm:
        return
    norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp_max(1.0)
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def losses_of(
    model: torch.nn.Module, parameters: Stacked, rows: Sequence[Mapping[str, Any]], task: Task | None = None
) -> np.ndarray:
    """Summed loss of each row under each copy.

    Args:
        model: the skeleton from `retrain`.
        parameters: the copies.
        rows: token rows with `labels` (the queries').

    Returns:
        float64 `[copies, rows]`, nats.
    """
    task = task or CausalLMTask()
    batch = CausalLMCollator()(rows)

    def one(parameters: Stacked) -> torch.Tensor:
        outputs = functional_call(model, parameters, (), {"input_ids": batch["input_ids"], "use_cache": False})
        return task.row_losses(outputs.logits, batch["labels"])

    with torch.no_grad():
        return vmap(one, chunk_size=8)(parameters).double().numpy()


def retrain_in_chunks(
    stage: StageRecord,
    dataset: Any,
    keep: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    chunk: int = 16,
    **options: Any,
) -> np.ndarray:
    """Losses of the query rows after retraining on every mask, a few copies at a time: float64 `[copies, rows]`."""
    parts = [
        losses_of(*retrain(stage, dataset, keep[start : start + chunk], **options), rows, options.get("task"))
        for start in range(0, len(keep), chunk)
    ]
    return np.concatenate(parts)
