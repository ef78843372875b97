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
"""The start of a recorded stage, new or resumed: everything that is checked and written before the first step."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import has_length

from ..errors import ConfigError, RecordError, UnsupportedError
from ..logs import get_logger
from .checkpoints import check_history
from .checks import refuse_moving_momentum
from .config import RecordingOptions
from .deepspeed import FollowedEngine
from .description import (
    continues,
    describe_stage,
    describe_training,
    frozen_tensors,
    save_frozen,
    save_model_files,
    save_tokenizer,
)
from .freezing import recorded_names
from .names import named_parameters
from .optimizers import OptimizerDescription, describe_optimizer, is_fresh, unwrap_optimizer
from .processes import Processes
from .reading.record import TrainingRecord
from .recorder import StageRecorder
from .rows.columns import write_columns
from .rows.stored import write_rows
from .rows.streamed import StreamRows
from .segment_plan import plan_checkpoints, plan_segments, scheduled_learning_rates
from .segments import NoSums, SegmentAccumulator
from .sharding import Fragment, is_sharded, whole_tensors
from .warm import save_optimizer_state
from .writer import RecordWriter


logger = get_logger(__name__)


def start_recorder(
    trainer: Any,
    options: RecordingOptions,
    resume_folder: Path | None,
    processes: Processes,
    engine: FollowedEngine | None = None,
) -> StageRecorder:
    """The recorder of a run whose optimizer and scheduler exist, and which has not made its first step.

    Args:
        trainer: the trainer, ready to train.
        options: where and how to record.
        resume_folder: checkpoint that the trainer has loaded, if it resumes.
        processes: the processes that train together; all of them start here.
        engine: DeepSpeed's, if it trains.

    Raises:
        UnsupportedError: if the optimizer cannot be described.
        RecordError: if the checkpoint does not continue a stage of this record.
    """
    processes.agree(lambda: refuse_moving_momentum(trainer.lr_scheduler))
    names = recorded_names(trainer.model)
    optimizer = unwrap_optimizer(trainer.optimizer)
    if engine is not None:
        names, optimizer = engine.parts(names), engine.optimizer
    resumes = resume_folder is not None
    description, stage = processes.agree(lambda: _describe(trainer, options, names, optimizer, resumes))
    _refuse_other_rows(stage, processes)
    _refuse_other_steps(trainer, processes)
    trained = {name for group in description.groups for name in group.parameters}
    parameters = {name: p for p, name in names.items() if name in trained}
    fragments = {} if engine is None else engine.fragments
    weights = {} if resume_folder else _all_weights(trainer.model, trained, fragments, processes)

    def stage_entry() -> dict[str, Any]:
        if resume_folder is not None:
            return _resumed_stage(options, stage, resume_folder).stage
        starts, checkpoints = _plan_segments(trainer, options, description)
        stage["planned_segment_starts"] = starts
        if checkpoints:
            stage["planned_checkpoints"] = checkpoints
        writer = new_stage(trainer, options, stage, weights)
        _store_moments(optimizer, names, writer)
        return writer.stage

    writer = RecordWriter(Path(options.record_dir), processes.agree(stage_entry, main_only=True))
    # Unless they are sharded, every process has the same weights and optimizer, so one keeps the sums.
    sums_here = processes.is_main or any(map(is_sharded, parameters.values()))
    kind = SegmentAccumulator if sums_here else NoSums
    accumulator = kind(
        parameters, optimizer, description, options.record_averages_on_cpu, options.record_gradient_mean
    )
    streamed = StreamRows(writer, options.record_rows, processes) if stage["dataset"]["stream"] else None
    starts = writer.stage["planned_segment_starts"]
    recorder = StageRecorder(writer, accumulator, starts, names, processes, streamed)
    recorder.checkpoint_steps = list(writer.stage.get("planned_checkpoints", []))
    if resume_folder is not None:
        recorder.go_back(resume_folder)
    return recorder


def _refuse_other_steps(trainer: Any, processes: Processes) -> None:
    batches = trainer.callback_handler.train_dataloader
    length = len(batches) if has_length(batches) else 0
    processes.refuse_differences(
        (trainer.state.max_steps, math.ceil(length / trainer.args.gradient_accumulation_steps)),
        "The processes would make different numbers of optimizer steps, and wait for each other forever: their shares "
        "of the rows differ. Leave even_batches of accelerator_config at True, or set dataloader_drop_last=True.",
    )


def _describe(
    trainer: Any,
    options: RecordingOptions,
    names: Mapping[torch.nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    resumes: bool,
) -> tuple[OptimizerDescription, dict[str, Any]]:
    """The optimizer, and the stage's entry of `record.json`."""
    description = describe_optimizer(optimizer, names)
    trained = {name for group in description.groups for name in group.parameters}
    if not trained:
        raise UnsupportedError("The optimizer trains no parameter: set requires_grad on what should train.")
    if any(map(is_sharded, names)):
        _refuse_sharded(description, has_moments=not resumes and not is_fresh(optimizer))
    return description, describe_stage(trainer, options, description)


def _refuse_sharded(description: OptimizerDescription, has_moments: bool) -> None:
    for group in description.groups:
        if not group.how.entrywise:
            raise UnsupportedError(
                f"{group.rule} is not known to update each entry of a tensor by itself, so it cannot be recorded "
                "where each process has a part. With FSDP use one of SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad."
            )
    if has_moments:
        raise UnsupportedError(
            "The optimizer carries moments from earlier training, sharded over the processes, which recording cannot "
            "store. Make a new trainer for a new stage."
        )


def _all_weights(
    model: torch.nn.Module, trained: set[str], fragments: Mapping[str, Fragment], processes: Processes
) -> dict[str, torch.Tensor]:
    """Everything a model is rebuilt from, on the main process."""
    parameters = {name: parameter.detach() for name, parameter in named_parameters(model)}
    return whole_tensors(parameters | frozen_tensors(model, trained) | fragments, keep=processes.is_main)


def _store_moments(optimizer: Any, names: Mapping[torch.nn.Parameter, str], writer: RecordWriter) -> None:
    """Keep the moments that the optimizer brings from earlier training."""
    if is_fresh(optimizer):
        return
    if not writer.stage["continues_parent"]:
        logger.warning(
            f"The optimizer of stage '{writer.stage['name']}' carries moments of training that the record does not "
            "hold. They are stored, but rows of that training cannot be credited for what they still move. To "
            "record both runs of one trainer, set another `args.stage` before the second train()."
        )
    save_optimizer_state(optimizer, names, writer)
    writer.commit()


def _refuse_other_rows(stage: Mapping[str, Any], processes: Processes) -> None:
    processes.refuse_differences(
        stage["dataset"],
        "The processes were given different training sets, so a row number would mean another row on each. Give every "
        "process the whole dataset, in the same order; the Trainer shares its rows out.",
    )


def restart_recorder(
    trainer: Any, options: RecordingOptions, resume_folder: Path | None, recorder: StageRecorder
) -> StageRecorder:
    """The recorder of a run that the Trainer starts again with smaller batches (`auto_find_batch_size`).

    Weights and optimizer go on from where memory ran out, so the steps made until then stay in the stage.

    Args:
        trainer, options, resume_folder: see `start_recorder`.
        recorder: the recorder of the attempt that ended.

    Raises:
        UnsupportedError: if weights and optimizer no longer belong together.
    """
    if recorder.step == recorder.first_step:  # nothing was trained: as if it had never begun
        return start_recorder(trainer, options, resume_folder, recorder.processes)
    if resume_folder is not None or recorder.inside_update:
        where = "in an update" if recorder.inside_update else "after resuming"
        raise UnsupportedError(
            f"Memory ran out {where}, and the Trainer's restart with smaller batches would go on from weights that do "
            "not belong to its optimizer state. Resume from the last checkpoint, or start the stage anew with "
            "overwrite_stage=True, with a smaller per_device_train_batch_size and auto_find_batch_size=False."
        )
    starts, checkpoints = _plan_segments(trainer, options, recorder.accumulator.description)
    recorder.restart(starts, describe_training(trainer), checkpoints)
    logger.warning(
        f"Memory ran out in optimizer step {recorder.step}. The Trainer goes on from the present weights, with "
        f"batches of {trainer.state.train_batch_size} rows and a new schedule; the steps made so far stay in the "
        "record."
    )
    return recorder


def _plan_segments(
    trainer: Any, options: RecordingOptions, description: OptimizerDescription
) -> tuple[list[int], list[int]]:
    """First steps of the segments, and the steps of checkpoints inside them."""
    num_steps = trainer.state.max_steps
    if num_steps < 1:
        raise ConfigError("The training makes no optimizer step: set max_steps or num_train_epochs above 0.")
    groups = [g for g, group in enumerate(description.groups) if group.parameters]
    rates = scheduled_learning_rates(trainer.lr_scheduler, num_steps, groups)
    if rates is None:
        logger.warning(
            f"The learning rates of {type(trainer.lr_scheduler).__name__} are not known ahead, so segments hold equal "
            "numbers of steps instead of equal sums of learning rates. Set segment_boundaries to choose yourself."
        )
    if options.segment_boundaries is None and options.num_segments > num_steps:
        logger.warning(
            f"The stage has {num_steps} optimizer step(s), so each is a segment; num_segments={options.num_segments} "
            "needs more."
        )
    starts = plan_segments(num_steps, rates, min(options.num_segments, num_steps), options.segment_boundaries)
    return starts, plan_checkpoints(num_steps, rates, starts, options.checkpoints_per_segment)


def new_stage(
    trainer: Any, options: RecordingOptions, stage: dict[str, Any], weights: Mapping[str, torch.Tensor]
) -> RecordWriter:
    """Append the stage to the record, or put it in the place of the one it overwrites."""
    root = Path(options.record_dir)
    data = RecordWriter.read(root)
    names = [entry["name"] for entry in data["stages"]]
    index = names.index(options.stage) if options.stage in names else len(names)
    # What is overwritten may be damaged; what is kept may not.
    earlier = TrainingRecord(root, {**data, "stages": data["stages"][:index]})
    earlier.check_sizes()
    parent = earlier.stages[-1] if index else None
    if parent is not None:
        parent.require_complete()
    stage |= {"index": index, "parent": parent.name if parent else None}
    writer = RecordWriter(root, stage)
    writer.create()
    frozen = {name: weights[name] for name in frozen_tensors(trainer.model, set(stage["trainable"]))}
    model = {name: weights[name] for name, _ in named_parameters(trainer.model)}
    stage["continues_parent"] = parent is not None and continues(model, parent, stage["model"]["prompt_learning"])
    stage["frozen"] = save_frozen(frozen, writer, parent, store=options.record_frozen_weights)
    save_model_files(trainer.model, writer)
    stored = write_rows(trainer.train_dataset, writer, store=options.record_rows)
    if options.record_rows:
        write_columns(trainer.given_dataset, trainer.train_dataset, stored, writer, options.record_columns)
    writer.add_tensors("initial.safetensors", {name: weights[name] for name in stage["trainable"]})
    writer.commit()
    save_tokenizer(trainer.processing_class, writer)
    return writer


def _resumed_stage(options: RecordingOptions, now: Mapping[str, Any], resume_folder: Path) -> RecordWriter:
    """The stage that a checkpoint belongs to, if the run goes on as it began."""
    root = Path(options.record_dir)
    stages = RecordWriter.read(root)["stages"]
    stage = check_history(resume_folder, stages, options.stage)
    name = stage["name"]
    if stage["index"] + 1 < len(stages):
        raise RecordError(
            f"Stage '{name}' cannot be resumed: stage '{stages[stage['index'] + 1]['name']}' was trained from its "
            "result. Train it anew with overwrite_stage=True, which removes the later stages."
        )
    steps, steps_now = stage["training"]["max_steps"], now["training"]["max_steps"]
    if steps != steps_now:
        raise RecordError(
            f"Stage '{name}' was started with {steps} steps and now has {steps_now}; its segments were cut for the "
            "former. Resume with the settings of the start, or train a new stage from the present weights."
        )
    for part, what in (("optimizer", "optimizer's constants"), ("dataset", "training set")):
        if _constant(stage[part]) != _constant(now[part]):
            raise RecordError(
                f"The {what} changed since stage '{name}' was started. Resume with the settings and rows of the "
                "start, or train a new stage from the present weights."
            )
    return RecordWriter(root, stage)


def _constant(part: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a stream only tells while it is read, and where rows come from, which older records do not say."""
    grows = {"source"} | ({"num_rows", "num_visited", "fingerprint"} if part.get("stream") else set())
    return {"stream": False} | {key: value for key, value in part.items() if key not in grows}


def refuse_existing_stage(options: RecordingOptions) -> None:
    """Protect what is recorded.

    Raises:
        RecordError: if the stage is in the record already and may not be overwritten.
    """
    stages = RecordWriter.read(Path(options.record_dir))["stages"]
    names = [stage["name"] for stage in stages]
    if options.stage not in names or options.overwrite_stage:
        return
    stage = stages[names.index(options.stage)]
    later = names[names.index(options.stage) + 1 :]
    resume = "" if stage["status"] == "complete" else "continue it with train(resume_from_checkpoint=True), "
    raise RecordError(
        f"The record {options.record_dir} has a stage '{options.stage}' already ({stage['status']}, "
        f"{stage['num_steps']} steps): {resume}choose another `stage=`, or set overwrite_stage=True to replace it"
        + (f" and remove the stages after it ({', '.join(later)})." if later else ".")
    )
