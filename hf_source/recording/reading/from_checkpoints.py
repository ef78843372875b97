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
"""A record of a run that was not recorded, from the checkpoints that an ordinary Trainer left.

Known exactly: the learning rate of every step (the Trainer's own scheduler, built again and stepped, and compared with
what every checkpoint says), optimizer constants, the rows, the weights and preconditioners at the checkpoints.
Assumed, and said so in the record: that every row was visited equally often at any time (the Source paper's setting),
that a segment's averages are those of the checkpoints in it, and clipping factors between logged gradient norms. No
pickle is read: `training_args.bin` stays closed, and `optimizer.pt` is read with `weights_only=True`.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ...errors import ConfigError, DataError, RecordError, UnsupportedError
from ...logs import get_logger
from ..checks import refuse_unsupported
from ..config import RecordingOptions, SourceConfig
from ..description import describe_stage
from ..lock import writing
from ..names import named_parameters
from ..optimizers import InverseRootRule, OptimizerDescription, describe_optimizer, unwrap_optimizer
from ..precision import clip_factor
from ..recorder import STEPS_PER_SHARD
from ..rows.columns import check_columns
from ..segment_plan import plan_segments
from ..start import new_stage, refuse_existing_stage
from ..trainer import SourceTrainer
from ..writer import RecordWriter
from .checkpoint_files import Checkpoint


logger = get_logger(__name__)

ASSUMED_UNIFORM = "assumed uniform"
"""`stage["visits"]` of a stage whose visits are not known."""

_MOST_SEGMENTS = 3


def record_from_checkpoints(
    checkpoints: Sequence[str | Path], dataset: Any, options: RecordingOptions, num_segments: int | None, **run: Any
) -> None:
    """Write the stage. See `TrainingRecord.from_checkpoints`; `run` is what the Trainer was made of."""
    refuse_existing_stage(options)
    found = _sorted(checkpoints)
    if dataset is None:
        raise DataError(
            "Pass `dataset=`: the rows of the run, as the Trainer took them. Checkpoints do not hold them."
        )
    if not isinstance(dataset, str) and not hasattr(dataset, "__len__"):
        raise UnsupportedError(
            "A stream has no fixed rows that could be visited equally often. Collect it with Dataset.from_generator."
        )
    trainer = _make_trainer(found, dataset, max_length=options.max_length, **run)
    check_columns(trainer.given_dataset, trainer.train_dataset, options.record_columns)
    rebuilt = _Run(trainer, found, options, num_segments)
    with writing(Path(options.record_dir)):
        rebuilt.write()


def _sorted(sources: Sequence[str | Path]) -> list[Checkpoint]:
    if isinstance(sources, (str, Path)) or not sources:
        raise ConfigError("Pass a list of checkpoints, such as ['out/checkpoint-500', 'out/checkpoint-1000'].")
    found = sorted((Checkpoint.read(source) for source in sources), key=lambda checkpoint: checkpoint.step)
    steps = [checkpoint.step for checkpoint in found]
    lengths = sorted({checkpoint.state["max_steps"] for checkpoint in found})
    if len(set(steps)) < len(steps) or len(lengths) > 1:
        raise RecordError(
            f"The checkpoints (of steps {steps}, of runs of {lengths} steps) are not of one run. Pass those of one "
            "run, each once; another run is another stage."
        )
    if steps[-1] == 0:
        raise RecordError("There is no checkpoint after step 0: pass those that training left.")
    return found


def _make_trainer(
    checkpoints: Sequence[Checkpoint],
    dataset: Any,
    *,
    args: TrainingArguments | Mapping[str, Any],
    model: Any,
    processing_class: Any,
    data_collator: Any,
    max_length: int | None,
) -> SourceTrainer:
    """The Trainer of the run, at its beginning."""
    if isinstance(args, Mapping):
        try:
            args = SourceConfig(**args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"args do not fit together: {error}") from error
    if not isinstance(args, TrainingArguments):
        raise ConfigError(
            "Pass `args=`: the TrainingArguments of the run, or a dictionary of its settings. training_args.bin is a "
            "pickle, which could run any code, so it is not read."
        )
    first = checkpoints[0]
    source = model if model is not None else first.folder if first.step == 0 else None
    if source is None:
        raise RecordError(
            "The weights that training started from are unknown: pass `model=` (the model or its path or Hub id), or "
            "a checkpoint of step 0."
        )
    if isinstance(source, (str, Path)):
        dtype = next(iter(first.weights().values())).dtype
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        if processing_class is None:
            holders = [path for path in (first.folder, Path(source)) if (path / "tokenizer_config.json").is_file()]
            processing_class = AutoTokenizer.from_pretrained(holders[0]) if holders else None
    args = copy.copy(args)
    # Nothing is evaluated, reported or pushed: the run is over.
    args.eval_strategy, args.report_to = IntervalStrategy.NO, []
    args.load_best_model_at_end = args.push_to_hub = False
    args.max_length = max_length if max_length is not None else getattr(args, "max_length", None)
    trainer = SourceTrainer(model, args, data_collator, dataset, processing_class=processing_class)
    refuse_unsupported(trainer)
    return trainer


class _Run:
    """What is known of the run, checked against its checkpoints, and the record made of it."""

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

    def _assumptions(self) -> list[str]:
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

    def _count_items(self, stage: dict[str, Any]) -> None:
        """Loss items of all rows, and what the Trainer counts for them, by going through the rows once."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer._recorder = SimpleNamespace(writer=SimpleNamespace(stage=stage), merge_processes=True)
        rows = items = counted = 0
        try:
            for batch in trainer.get_train_dataloader():
                (inputs,), count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
                numbers = inputs.pop("source_row")
                trainer._recognise_head(stage["loss"], inputs)
                here = int(trainer.count_items(inputs, len(numbers)))
                if rows == 0:
                    trainer._normalizer(inputs, count, here)
                rows, items = rows + len(numbers), items + here
                counted += float(count) if stage["loss"]["normalization"] == "tokens" else here
        finally:
            trainer._recorder = None
        share = stage["dataset"]["num_rows"] / rows  # dataloader_drop_last leaves some out
        stage["dataset"] |= {"total_items": items * share, "total_normalizer": counted * share}
        last = self.checkpoints[-1]
        stage["dataset"]["epochs_per_step"] = float(last.state.get("epoch") or 0) / last.step

    def write(self) -> None:
        """Write the stage, from its description to its final weights."""
        trainer = self.trainer
        with torch.no_grad():
            trainer.model.load_state_dict(self.initial)
        stage = describe_stage(trainer, self.options, self.description)
        stage |= {"visits": ASSUMED_UNIFORM, "assumptions": self._assumptions(), "planned_segment_starts": self.starts}
        self._count_items(stage)
        if len(trainer.train_dataset) != stage["dataset"]["num_rows"]:
            raise UnsupportedError("The Trainer leaves rows out, so visits cannot be taken as uniform. Filter before.")
        tensors = {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()} | self.parameters
        writer = new_stage(trainer, self.options, stage, tensors)
        self._write_steps(writer)
        for index, (first, end) in enumerate(zip(self.starts, [*self.starts[1:], self.num_steps], strict=True)):
            self._write_segment(writer, index, first, end)
        # The last checkpoint's weights are in the model now.
        writer.add_tensors("final.safetensors", {name: self.parameters[name] for name in self.trained})
        writer.stage |= {"num_steps": self.num_steps, "status": "complete"}
        writer.commit()
        if self.num_steps < self.max_steps:
            logger.warning(
                f"The last checkpoint is of step {self.num_steps} of {self.max_steps}: the stage ends there, and the "
                "model that is attributed is that one."
            )

    def _write_steps(self, writer: RecordWriter) -> None:
        per_step = writer.stage["dataset"]["epochs_per_step"]
        steps = [
            {
                "step": step,
                "epoch": step * per_step,
                "learning_rate": self.rates[step].tolist(),
                "grad_norm": float(self.grad_norms[step]),
                "clip_factor": float(self.clip_factors[step]),
                "skipped": False,
                "micro_batches": [],
            }
            for step in range(self.num_steps)
        ]
        for start in range(0, len(steps), STEPS_PER_SHARD):
            writer.add_steps(steps[start : start + STEPS_PER_SHARD])

    def _write_segment(self, writer: RecordWriter, index: int, first: int, end: int) -> None:
        """Averages over the segment's steps, each of which takes the nearest of the segment's checkpoints."""
        inside = [c for c in self.checkpoints if first < c.step <= end or c.step == first == 0]
        moved = [c for c in inside if c.step]
        steps = np.arange(first, end)
        clipped = self.rates[first:end] * self.clip_factors[first:end, None]  # (steps, groups)
        reference = self.reference[first:end] * self.clip_factors[first:end]
        total = float(_summed(reference))
        parameters: dict[str, torch.Tensor] = {}
        scale: dict[str, torch.Tensor] = {}
        for checkpoint in inside:
            checkpoint.load_weights(self.trainer.model, self.trained)
            mine = _nearest(steps, inside) == checkpoint.step
            share = float(reference[mine].sum()) / total if total else 1 / len(inside)
            for name in self.trained:
                _add(parameters, name, self.parameters[name].detach(), share)
            if checkpoint.step:
                self._add_preconditioner(
                    scale, checkpoint, clipped[_nearest(steps + 1, moved) == checkpoint.step], total
                )
        writer.add_tensors(f"segments/{index}/parameters.safetensors", parameters)
        writer.add_tensors(f"segments/{index}/preconditioner.safetensors", scale)
        writer.stage["segments"].append(
            {
                "first_step": first,
                "end_step": end,
                "learning_rate_sum": float(_summed(self.reference[first:end])),
                "effective_learning_rate_sum": total,
                "learning_rate_sum_per_group": _summed(self.rates[first:end]).tolist(),
                "effective_learning_rate_sum_per_group": _summed(clipped).tolist(),
                "checkpoints": [checkpoint.step for checkpoint in inside],
            }
        )

    def _add_preconditioner(
        self, scale: dict[str, torch.Tensor], checkpoint: Checkpoint, clipped: np.ndarray, total: float
    ) -> None:
        """Add `sum of eta_g c P / s` over the steps that this checkpoint stands for."""
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        if checkpoint.has("optimizer.pt"):
            checkpoint.load_optimizer(optimizer, self.names)
        for number, group in enumerate(self.description.groups):
            share = float(clipped[:, number].sum()) / total if total else 0.0
            for name in group.parameters:
                parameter = self.parameters[name]
                if group.how.scalar:
                    value = torch.tensor(group.how.scalar_preconditioner(group.constants))
                else:
                    state = optimizer.state.get(parameter, {})
                    updates = group.how.updates_made(state)
                    value = group.how.preconditioner(parameter, state, group.constants, updates).detach()
                _add(scale, name, value, share)


def _summed(rates: np.ndarray) -> np.ndarray:
    """Sum over steps, one after the other as a recorder adds them up: equal to the last digit."""
    return np.cumsum(rates, axis=0)[-1]


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor, share: float) -> None:
    value = value if value.dtype.itemsize >= 4 else value.float()
    sums[name] = sums[name] + share * value if name in sums else share * value


def _nearest(steps: np.ndarray, checkpoints: Sequence[Checkpoint]) -> np.ndarray:
    """For each step, the step of the nearest checkpoint."""
    places = np.array([checkpoint.step for checkpoint in checkpoints])
    return places[np.abs(steps[:, None] - places[None]).argmin(axis=1)]


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
