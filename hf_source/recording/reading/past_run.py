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
"""A run that was not recorded, as far as its Trainer, built again, and its checkpoints tell."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...errors import RecordError, UnsupportedError
from ..config import RecordingOptions
from ..names import named_parameters
from ..optimizers import InverseRootRule, OptimizerDescription, describe_optimizer, unwrap_optimizer
from ..precision import clip_factor
from ..segment_plan import plan_segments
from ..trainer import SourceTrainer
from .checkpoint_files import Checkpoint


_MOST_SEGMENTS = 3


class PastRun:
    """What is known of a run that was not recorded, checked against its checkpoints.

    Attributes:
        num_steps, max_steps: optimizer steps up to the last checkpoint, and that training was to make.
        initial: the weights that training started from.
        rates: learning rates, `[max_steps + 1, groups]`; `reference` the largest of each step up to `num_steps`.
        starts: first steps of the segments, each of which holds a checkpoint.
        grad_norms, clip_factors: `[num_steps]`, NaN where no norm was `logged`; factors between logged ones on lines.

    Raises:
        RecordError: if the checkpoints are not of this run, or too few for the segments.
        UnsupportedError: if its preconditioner or its learning rates cannot be known any more.
    """

    def __init__(
        self,
        trainer: SourceTrainer,
        checkpoints: list[Checkpoint],
        options: RecordingOptions,
        num_segments: int | None,
    ) -> None:
        self.trainer, self.checkpoints, self.options = trainer, checkpoints, options
        self.num_steps = checkpoints[-1].step
        self.max_steps = checkpoints[0].state["max_steps"]
        self._refuse_other_length()
        self.initial = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
        self.parameters = dict(named_parameters(trainer.model))
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.rates, self.description = self._schedule()
        self.trained = [name for group in self.description.groups for name in group.parameters]
        self._refuse_optimizers()
        for checkpoint in checkpoints:
            self._check(checkpoint)
        groups = [g for g, group in enumerate(self.description.groups) if group.parameters]
        self.reference = self.rates[: self.num_steps, groups].max(axis=1)
        self.starts = self._plan(num_segments)
        self.grad_norms, self.clip_factors, self.logged = self._clipping()

    # ---- What must fit ----

    def _refuse_other_length(self) -> None:
        expected = self.trainer.set_initial_training_values(self.trainer.args, self.trainer.get_train_dataloader())[-1]
        if expected != self.max_steps:
            raise RecordError(
                f"The checkpoints are of a run of {self.max_steps} optimizer steps; `args` and `dataset` make "
                f"{expected}. Pass the dataset of the run and its batch size, accumulation, epochs or max_steps (of a "
                "run on several processes, per_device_train_batch_size times their number)."
            )

    def _schedule(self) -> tuple[np.ndarray, OptimizerDescription]:
        """Learning rates float64 `[max_steps + 1, groups]` by the scheduler itself, and the optimizer's constants."""
        trainer = self.trainer
        trainer.state.max_steps = self.max_steps
        trainer.state.train_batch_size = trainer.args.train_batch_size
        trainer.create_optimizer()
        scheduler = trainer.create_scheduler(self.max_steps, trainer.optimizer)
        optimizer = unwrap_optimizer(trainer.optimizer)
        description = describe_optimizer(optimizer, self.names)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or not hasattr(scheduler, "base_lrs"):
            raise UnsupportedError(
                f"The learning rates of {type(scheduler).__name__} depend on how training went, so they cannot be "
                "computed again. Record the run while it trains, with SourceTrainer."
            )
        rates = []
        for _ in range(self.max_steps + 1):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()  # without gradients: nothing moves, but the scheduler wants to come after it
            scheduler.step()
        return np.array(rates), description

    def _refuse_optimizers(self) -> None:
        for group in self.description.groups:
            known = group.how.scalar or (isinstance(group.how, InverseRootRule) and not group.how.notes)
            if group.parameters and not known:
                raise UnsupportedError(
                    f"The preconditioner of {group.rule} cannot be read from optimizer.pt. Record the run while it "
                    "trains, with SourceTrainer."
                )

    @property
    def _adaptive(self) -> bool:
        return any(group.parameters and not group.how.scalar for group in self.description.groups)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint whose optimizer, learning rates or weights are not those of this run."""
        checkpoint.load_weights(self.trainer.model, self.trained)
        if checkpoint.step == 0:
            return
        has_moments, scheduler = checkpoint.has("optimizer.pt"), checkpoint.torch_file("scheduler.pt")
        if not has_moments and (self._adaptive or scheduler is None):
            raise RecordError(
                f"{checkpoint.folder} has no optimizer.pt, which holds the preconditioner (it was saved with "
                "save_only_model=True, or by DeepSpeed or FSDP). Leave this checkpoint out, or record the run while "
                "it trains."
            )
        found = self._load_optimizer(checkpoint) if has_moments else [float(r) for r in scheduler["_last_lr"]]
        expected = self.rates[checkpoint.step]
        if not np.allclose(found, expected, rtol=1e-9, atol=1e-18):
            raise RecordError(
                f"{checkpoint.folder} goes on with learning rates {found}; the scheduler of `args` has "
                f"{expected.tolist()} after {checkpoint.step} steps. Pass the learning_rate, lr_scheduler_type, "
                "warmup_steps and lr_scheduler_kwargs of the run."
            )

    def _load_optimizer(self, checkpoint: Checkpoint) -> list[float]:
        """Load moments; refuse those of an optimizer with other constants. Learning rates of the step to come."""
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        rates = checkpoint.load_optimizer(optimizer, self.names)
        described = describe_optimizer(optimizer, self.names)
        if described != self.description:
            raise RecordError(
                f"{checkpoint.folder / 'optimizer.pt'} has other constants than `args`: "
                f"{_differences(self.description, described)}. Pass those of the run."
            )
        return rates

    # ---- What is made of it ----

    def _plan(self, num_segments: int | None) -> list[int]:
        """First steps of segments that hold a checkpoint each."""
        if self.options.segment_boundaries is not None:
            wanted = [None]
        else:
            wanted = [num_segments] if num_segments is not None else range(_MOST_SEGMENTS, 0, -1)
        steps = [checkpoint.step for checkpoint in self.checkpoints if checkpoint.step]
        for count in wanted:
            if num_segments is None and count is not None and count > self.num_steps:
                continue
            starts = plan_segments(self.num_steps, self.reference, count or 1, self.options.segment_boundaries)
            empty = [
                (a, b)
                for a, b in zip(starts, [*starts[1:], self.num_steps], strict=True)
                if not any(a < step <= b for step in steps)
            ]
            if not empty:
                return starts
        raise RecordError(
            f"No checkpoint lies after step {empty[0][0]} and up to step {empty[0][1]}, so nothing is known of that "
            f"segment (there are checkpoints of steps {steps}). Set a smaller num_segments, other segment_boundaries, "
            "or pass more checkpoints."
        )

    def _clipping(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Gradient norms (NaN where not logged), clip factors, and how many norms were logged."""
        logged = {
            entry["step"] - 1: float(entry["grad_norm"])
            for entry in self.checkpoints[-1].state["log_history"]
            if entry.get("grad_norm") is not None and 0 < entry.get("step", 0) <= self.num_steps
        }
        norms = np.full(self.num_steps, np.nan)
        norms[list(logged)] = list(logged.values())
        limit = self.trainer.args.max_grad_norm
        if not limit or not logged:
            return norms, np.ones(self.num_steps), len(logged)
        known = sorted(logged)
        between = np.interp(np.arange(self.num_steps), known, [logged[step] for step in known])
        return norms, np.array([clip_factor(norm, limit) for norm in between]), len(logged)

    @property
    def assumptions(self) -> list[str]:
        """What a record of it will have to take for granted."""
        steps = ", ".join(str(checkpoint.step) for checkpoint in self.checkpoints)
        found = [
            "every row was trained on equally often at any time",
            f"a segment's average weights and preconditioner are those of the checkpoints in it (steps {steps})",
        ]
        if self.trainer.args.max_grad_norm and self.logged < self.num_steps:
            found.append(
                f"gradient norms between the {self.logged} logged ones lie on straight lines"
                if self.logged
                else "no gradient was clipped (no gradient norm was logged)"
            )
        return found


def _differences(expected: OptimizerDescription, found: OptimizerDescription) -> str:
    pairs = zip(expected.to_dict()["groups"], found.to_dict()["groups"], strict=True)
    differ = {
        f"{key} {_flat(theirs).get(key)} instead of {value}": None
        for mine, theirs in pairs
        for key, value in _flat(mine).items()
        if _flat(theirs).get(key) != value
    }
    return ", ".join(differ)


def _flat(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in group.items() if k != "constants"}, **group["constants"]}
