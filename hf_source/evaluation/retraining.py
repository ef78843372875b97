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
from ..gradients import CausalLMTask, RowLossTask, Task, batch_to, task_for
from ..recording import StageRecord, canonical_name
from ..recording.optimizers import OptimizerDescription, build_optimizer
from ..recording.reading.assumed import require_recorded_visits
from ..recording.warm import refuse_moments


Stacked = dict[str, torch.Tensor]


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
) -> tuple[torch.nn.Module, Stacked]:
    """Train one copy of a recorded stage per row mask.

    Args:
        stage: a complete stage.
        dataset: its tokenised rows, by row number.
        keep: bool `[copies, rows]`, or float weights of the rows; a copy trains on row `m` with weight `keep[:, m]`.
        task: what defines a row's loss.
        dtype: of training.
        data_collator: as in training; right-padding by default.
        start: what each copy starts from instead of the recorded initial weights, as `retrain` returned it for the
            stage before. Weights that this stage freezes are kept.
        progress: wraps the list of steps, e.g. in a progress bar.

    Returns:
        The model skeleton, and the parameters in which copies differ, name -> `[copies, *shape]`.
    """
    require_recorded_visits(stage, "trained again")
    refuse_moments(stage, "retraining many copies at once")
    task = task or task_for(stage)
    collate = data_collator or CausalLMCollator()
    model = stage.build_model(dtype).eval()
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

    def loss(
        parameters: Stacked, held: Stacked, batch: dict[str, torch.Tensor], row_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = {**parameters, **held}
        outputs = functional_call(model, weights, (), {"input_ids": batch["input_ids"], "use_cache": False})
        return (task.row_losses(outputs.logits, batch["labels"]) * row_weights).sum()

    gradients_of = vmap(grad(loss), in_dims=(0, 0, None, 0))
    for step in (progress or iter)(range(stage.num_steps)):
        total: Stacked = {}
        for micro in steps.micro_batches[step]:
            batch = batch_to(collate(take_rows(dataset, micro.rows)), torch.device("cpu"))
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
    task = options.get("task") or task_for(stage)
    measured = task.unsmoothed() if isinstance(task, RowLossTask) else task
    parts = [
        losses_of(*retrain(stage, dataset, keep[start : start + chunk], **options), rows, measured)
        for start in range(0, len(keep), chunk)
    ]
    return np.concatenate(parts)
