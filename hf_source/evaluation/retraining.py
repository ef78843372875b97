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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from ..attribution.rows import collate
from ..data import take_rows
from ..gradients import (
    CausalLMTask,
    Loss,
    Measurement,
    RowLossTask,
    Task,
    make_measurement,
    measured,
    task_for,
    task_labels,
)
from ..recording import StageRecord, canonical_name
from ..recording.optimizers import OptimizerDescription, build_optimizer
from ..recording.reading.assumed import require_recorded_visits
from ..recording.warm import refuse_moments


Stacked = dict[str, torch.Tensor]


class _Losses(torch.nn.Module):
    """Row losses as a module, so that a task can call its model however it wants while the weights are replaced."""

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.task.row_losses(self.task.forward(self.model, batch), task_labels(self.task, batch))

    def at(self, weights: Stacked, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of each row at other weights, `[rows]`."""
        return functional_call(self, {f"model.{name}": weight for name, weight in weights.items()}, (batch,))


class StackedOptimizer:
    """The recorded optimizer on stacked parameters `[copies, *shape]`.

    Where every entry is updated by itself (SGD, Adam, ...) one optimizer takes the stack as it is; where entries work
    together (Adafactor, Muon, 8-bit states) every copy has its own.

    Args:
        description: the recorded optimizer.
        parameters: name -> `[copies, *shape]`; updated in place.
    """

    def __init__(self, description: OptimizerDescription, parameters: Stacked) -> None:
        entrywise = all(group.how.entrywise for group in description.groups)
        copies = [slice(None)] if entrywise else range(len(next(iter(parameters.values()))))
        self.copies = [
            (copy, {name: torch.nn.Parameter(stack[copy], requires_grad=False) for name, stack in parameters.items()})
            for copy in copies
        ]
        self.optimizers = [build_optimizer(description, own) for _, own in self.copies]

    def step(self, gradients: Stacked, learning_rates: Sequence[float]) -> None:
        """One update; `learning_rates` holds one per group."""
        for (copy, own), optimizer in zip(self.copies, self.optimizers, strict=True):
            for name, parameter in own.items():
                parameter.grad = gradients[name][copy] if name in gradients else None
            for group, rate in zip(optimizer.param_groups, learning_rates, strict=True):
                group["lr"] = rate
            optimizer.step()


def retrain(
    stage: StageRecord,
    dataset: Any,
    keep: np.ndarray,
    *,
    task: Task | None = None,
    dtype: torch.dtype = torch.float32,
    data_collator: Any = None,
    start: Stacked | None = None,
    progress: Any = None,
    model: Callable[[StageRecord], torch.nn.Module] | None = None,
) -> tuple[torch.nn.Module, Stacked]:
    """Train one copy of a recorded stage per row mask.

    Args:
        stage: a complete stage.
        dataset: its tokenised rows, by row number.
        keep: bool `[copies, rows]`, or float weights of the rows; a copy trains on row `m` with weight `keep[:, m]`.
        task: what defines a row's loss.
        dtype: of training.
        data_collator: as in training; the task's by default.
        start: what each copy starts from instead of the recorded initial weights, as `retrain` returned it for the
            stage before. Weights that this stage freezes are kept.
        progress: wraps the list of steps, e.g. in a progress bar.
        model: gives a fresh model for the stage, for architectures that transformers cannot rebuild.

    Returns:
        The model skeleton, and the parameters in which copies differ, name -> `[copies, *shape]`.
    """
    require_recorded_visits(stage, "trained again")
    refuse_moments(stage, "retraining many copies at once")
    task = task or task_for(stage)
    own_task = task if isinstance(task, RowLossTask) else CausalLMTask()
    collator = data_collator or own_task.collator(stage.record.processing_class())
    model = stage.build_model(dtype).eval() if model is None else model(stage).to(dtype).eval()
    stage.load_weights(model, "initial")
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # fused attention would take the copies one by one
    own = dict(model.named_parameters())
    given = {canonical_name(name): value for name, value in (start or {}).items()}
    held = {name: given[canonical_name(name)] for name in own if canonical_name(name) in given}
    parameters = {
        name: (held.pop(name) if name in held else own[name].detach().expand(len(keep), *own[name].shape))
        .to(dtype)
        .clone()
        for name in stage.trainable
    }
    weights = torch.as_tensor(keep, dtype=dtype)
    optimizer = StackedOptimizer(OptimizerDescription.from_dict(stage.optimizer), parameters)
    steps = stage.steps()
    losses = _Losses(model, task)

    def loss(
        parameters: Stacked, held: Stacked, batch: dict[str, torch.Tensor], row_weights: torch.Tensor
    ) -> torch.Tensor:
        return (losses.at({**parameters, **held}, batch) * row_weights).sum()

    gradients_of = vmap(grad(loss), in_dims=(0, 0, None, 0))
    for step in (progress or iter)(range(stage.num_steps)):
        total: Stacked = {}
        if isinstance(task, RowLossTask):
            task.at_epochs((int(steps.epoch[step]),))
        for micro in steps.micro_batches[step]:
            batch = collate(collator, take_rows(dataset, micro.rows), torch.device("cpu"), own_task.columns)
            batch = own_task.complete(batch)
            part = gradients_of(parameters, held, batch, weights[:, micro.rows])
            for name, gradient in part.items():
                gradient.div_(micro.normalizer)
                total[name] = total[name].add_(gradient) if name in total else gradient
        if steps.skipped[step]:
            continue
        total = {name: gradient for name, gradient in total.items() if name not in stage.frozen_at(step)}
        _clip(total, stage.training["max_grad_norm"])
        optimizer.step(total, steps.learning_rate[step].tolist())
    return model, {**parameters, **held}


def _clip(gradients: Stacked, max_norm: float) -> None:
    """Each copy's own clipping, as torch does it."""
    if not max_norm:
        return
    norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp_max(1.0)
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def losses_of(
    model: torch.nn.Module,
    parameters: Stacked,
    rows: Sequence[Mapping[str, Any]],
    task: Task | None = None,
    measurement: str | Measurement = "loss",
    data_collator: Any = None,
) -> np.ndarray:
    """What each row measures under each copy: its summed loss by default.

    Args:
        model: the skeleton from `retrain`.
        parameters: the copies.
        rows: the queries' rows (`Queries.rows`).
        task: what the rows are to the model; next-token prediction by default.
        measurement: as of `SourceAttributor`.
        data_collator: as in training; the task's by default.

    Returns:
        float64 `[copies, rows]`; smaller is better, in the unit of the measurement (nats of the loss).
    """
    task = task or CausalLMTask()
    task = task if make_measurement(measurement) == Loss() else measured(task, measurement)
    own_task = task if isinstance(task, RowLossTask) else CausalLMTask()
    collator = data_collator or own_task.collator(None)
    batch = collate(collator, rows, torch.device("cpu"), own_task.columns)
    batch, losses = own_task.complete(batch), _Losses(model, task)

    def one(parameters: Stacked) -> torch.Tensor:
        return losses.at(parameters, batch)

    with torch.no_grad():
        return vmap(one, chunk_size=8)(parameters).double().numpy()


def retrain_in_chunks(
    stage: StageRecord,
    dataset: Any,
    keep: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    chunk: int = 16,
    measurement: str | Measurement = "loss",
    **options: Any,
) -> np.ndarray:
    """What the query rows measure after retraining on every mask, a few copies at a time: float64 `[copies, rows]`.

    Args:
        stage, dataset, keep, options: see `retrain`.
        rows, measurement: see `losses_of`.
        chunk: copies trained at once.
    """
    task, collator = options.get("task") or task_for(stage), options.get("data_collator")
    if collator is None and isinstance(task, RowLossTask):
        collator = task.collator(stage.record.processing_class())
    task = measured(task, measurement)
    parts = [
        losses_of(*retrain(stage, dataset, keep[start : start + chunk], **options), rows, task, "loss", collator)
        for start in range(0, len(keep), chunk)
    ]
    return np.concatenate(parts)
