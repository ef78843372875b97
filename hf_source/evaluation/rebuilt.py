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
"""A stage's Trainer, rebuilt from its record: same rows, arguments, optimizer, learning rates and initial weights."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..data import IGNORE_INDEX, ROW
from ..errors import UnsupportedError
from ..gradients import DiffusionTask, task_for
from ..gradients.selection import HEADS
from ..recording import StageRecord
from ..recording.optimizers import OptimizerDescription, build_optimizer
from ..recording.reading.assumed import require_recorded_visits
from ..recording.reading.replay import collator_of
from ..recording.warm import refuse_moments


_EMPTY = "no_row_is_left"
_OTHERS = ("compute_loss_func", "compute_loss", "reward", "dpo", "in_batch", "vision")


def refuse_unknown(stage: StageRecord) -> None:
    """Refuse stages that a plain `Trainer` did not train.

    Raises:
        UnsupportedError: saying to pass `make_trainer`.
    """
    require_recorded_visits(stage, "trained again")
    refuse_moments(stage, "training it again")
    reasons = {
        "its rows were packed": stage.packing is not None,
        f"its loss is {stage.loss['kind']!r}": stage.loss["custom_function"] or stage.loss["kind"] in _OTHERS,
        "parameters were frozen or unfrozen on the way": bool(stage.data.get("trainable_changes")),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedError(
                f"Stage {stage.name!r} cannot be trained again by a plain Trainer: {reason}. Pass `make_trainer=`, a "
                "function (dataset, seed, output_dir) -> Trainer, with your own Trainer."
            )


def rebuilt_trainer(
    stage: StageRecord,
    rows: Sequence[Mapping[str, Any]],
    keep: np.ndarray,
    seed: int | None,
    output_dir: str | Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    data_collator: Any = None,
) -> Trainer:
    """The Trainer of a stage, to train on some of its rows.

    Without a seed it draws the recorded batches, less the rows that are left out; their items leave the normalizer
    too, as they do in any Trainer. With a seed it draws batches of its own from the rows that are kept, for as many
    epochs (or, of a run whose steps were given, for as many steps). Learning rates are the recorded ones, at the same
    share of the run.

    Args:
        stage: what is trained again.
        rows: by row number.
        keep: bool `[rows]`.
        seed: of the order and of dropout.
        output_dir: for the Trainer; nothing is saved.
        weights: what to start from, by canonical name, instead of what is recorded.
        data_collator: the run's, if it was not the default one.
    """
    model = stage.build_model()
    stage.load_weights(model, "initial")
    _load(stage, model, weights or {})
    trained = {name: parameter for name, parameter in model.named_parameters() if name in set(stage.trainable)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = build_optimizer(OptimizerDescription.from_dict(stage.optimizer), trained)
    steps = stage.steps()
    task = task_for(stage) if stage.loss["kind"] in (*HEADS, "diffusion") else None
    collator = collator_of(stage, task, data_collator)
    numbers = np.flatnonzero(keep)
    num_steps = stage.num_steps if seed is None else _num_steps(stage, len(numbers))
    scheduler = _RecordedRates(optimizer, steps.learning_rate, num_steps)
    accumulated = max(len(step) for step in steps.micro_batches)
    arguments = _arguments(stage, seed, output_dir, num_steps, accumulated if seed is None else None)
    kind, extra = (_SameOrder, {"stage": stage, "keep": keep}) if seed is None else (Trainer, {})
    if isinstance(task, DiffusionTask):
        kind = type(f"{kind.__name__}Denoising", (_Denoising, kind), {})
        extra |= {"task": task.drawn_anew(seed), "epochs": steps.epoch if seed is None else None}
    return kind(
        model,
        arguments,
        train_dataset=rows if seed is None else _Chosen(rows, numbers),
        data_collator=collator,
        optimizers=(optimizer, scheduler),
        **extra,
    )


def _load(stage: StageRecord, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights.get(stage.canonical_name(name))
            if value is not None:
                parameter.copy_(value)


def _num_steps(stage: StageRecord, count: int) -> int:
    """Optimizer steps of a run on `count` rows."""
    training = stage.training
    per_batch = training["per_device_train_batch_size"] * training["num_processes"]

    def steps(rows: int) -> int:
        batches = math.ceil(rows / per_batch)
        return math.ceil(training["epochs"] * math.ceil(batches / training["gradient_accumulation_steps"]))

    return steps(count) if steps(stage.num_rows) == training["max_steps"] else training["max_steps"]


def _arguments(
    stage: StageRecord, seed: int | None, output_dir: str | Path, num_steps: int, accumulated: int | None
) -> TrainingArguments:
    training = stage.training
    return TrainingArguments(
        output_dir=str(output_dir),
        seed=training["seed"] if seed is None else seed,
        max_steps=num_steps,
        per_device_train_batch_size=training["per_device_train_batch_size"] * training["num_processes"],
        gradient_accumulation_steps=accumulated or training["gradient_accumulation_steps"],
        max_grad_norm=training["max_grad_norm"],
        label_smoothing_factor=stage.loss.get("label_smoothing", 0.0),
        neftune_noise_alpha=training["neftune_noise_alpha"],
        bf16=bool(training["bf16"]),
        fp16=bool(training["fp16"]),
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class _RecordedRates(LRScheduler):
    """Learning rates of a recorded run, at the same share of a run of another length."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: np.ndarray, num_steps: int) -> None:
        self.rates, self.num_steps = rates, num_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Of every group, at the present step."""
        place = min(len(self.rates) - 1, self.last_epoch * len(self.rates) // max(1, self.num_steps))
        return self.rates[place].tolist()


class _Chosen(torch.utils.data.Dataset):
    """Some rows, numbered from 0."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return _features(self.rows[int(self.numbers[place])])


def _features(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != ROW and not isinstance(value, str)}


class _Denoising(Trainer):
    """Trains a denoiser as `SourceDiffusionTrainer` does: each image at the timestep and noise of its epoch.

    Args:
        task: whose draws those are.
        epochs: of every step, where the run takes recorded batches.
    """

    def __init__(self, *args: Any, task: DiffusionTask, epochs: np.ndarray | None, **kwargs: Any) -> None:
        self._task, self._epochs = task, epochs
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean squared error of a micro-batch."""
        epoch = self.state.epoch or 0 if self._epochs is None else self._epochs[self.state.global_step]
        loss, outputs = self._task.mean_loss(model, inputs, int(epoch))
        return (loss, {"predictions": outputs}) if return_outputs else loss


class _SameOrder(Trainer):
    """Trains on the recorded batches, in their order, less the rows that are left out.

    Steps of fewer micro-batches than others (at the end of an epoch) are filled up with batches of no row, as is a
    micro-batch none of whose rows is left; they add nothing to the step.
    """

    def __init__(self, *args: Any, stage: StageRecord, keep: np.ndarray, **kwargs: Any) -> None:
        self._stage, self._keep = stage, keep
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The recorded micro-batches, as one epoch."""
        batches, counts = [], []
        for step in self._stage.steps().micro_batches:
            filled = [batch.rows for batch in step]
            filled += [[]] * (self.args.gradient_accumulation_steps - len(filled))
            batches += filled
            counts += [len(step)] * len(filled)
        self._counts = iter(counts)
        collate = self.data_collator
        rows, keep = self.train_dataset, self._keep
        some = next(batch for batch in batches if batch)[:1]

        def collated(numbers: list[int]) -> dict[str, Any]:
            kept = [number for number in numbers if keep[number]]
            batch = dict(collate([_features(rows[number]) for number in kept or some]))
            if not kept:
                if "labels" in batch:
                    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
                batch[_EMPTY] = True
            return batch

        return DataLoader(batches, batch_size=None, shuffle=False, collate_fn=collated)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As the Trainer's; a micro-batch of no row adds nothing."""
        count = next(self._counts)
        if inputs.pop(_EMPTY, False):
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = count  # a loss that is a mean is divided by it
        return super().training_step(model, inputs, num_items_in_batch)
