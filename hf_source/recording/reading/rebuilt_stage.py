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
"""The stage that is written of a run that was not recorded."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ...errors import UnsupportedError
from ...logs import get_logger
from ..config import RecordingOptions
from ..description import describe_stage
from ..optimizers import unwrap_optimizer
from ..recorder import STEPS_PER_SHARD
from ..start import new_stage
from ..writer import RecordWriter
from .checkpoint_files import Checkpoint
from .past_run import PastRun


logger = get_logger(__name__)

ASSUMED_UNIFORM = "assumed uniform"
"""`stage["visits"]` of a stage whose visits are not known."""


def write_stage(run: PastRun, options: RecordingOptions) -> None:
    """Write what is known of a run and what is assumed, from the description to the final weights."""
    trainer = run.trainer
    with torch.no_grad():
        trainer.model.load_state_dict(run.initial)
    stage = describe_stage(trainer, options, run.description)
    stage |= {"visits": ASSUMED_UNIFORM, "assumptions": run.assumptions, "planned_segment_starts": run.starts}
    _count_items(run, stage)
    if len(trainer.train_dataset) != stage["dataset"]["num_rows"]:
        raise UnsupportedError("The Trainer leaves rows out, so visits cannot be taken as uniform. Filter before.")
    tensors = {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()} | run.parameters
    writer = new_stage(trainer, options, stage, tensors)
    _write_steps(run, writer)
    for index, (first, end) in enumerate(zip(run.starts, [*run.starts[1:], run.num_steps], strict=True)):
        _write_segment(run, writer, index, first, end)
    # The last checkpoint's weights are in the model now.
    writer.add_tensors("final.safetensors", {name: run.parameters[name] for name in run.trained})
    writer.stage |= {"num_steps": run.num_steps, "status": "complete"}
    writer.commit()
    if run.num_steps < run.max_steps:
        logger.warning(
            f"The last checkpoint is of step {run.num_steps} of {run.max_steps}: the stage ends there, and the "
            "model that is attributed is that one."
        )


def _write_steps(run: PastRun, writer: RecordWriter) -> None:
    per_step = writer.stage["dataset"]["epochs_per_step"]
    steps = [
        {
            "step": step,
            "epoch": step * per_step,
            "learning_rate": run.rates[step].tolist(),
            "grad_norm": float(run.grad_norms[step]),
            "clip_factor": float(run.clip_factors[step]),
            "skipped": False,
            "micro_batches": [],
        }
        for step in range(run.num_steps)
    ]
    for start in range(0, len(steps), STEPS_PER_SHARD):
        writer.add_steps(steps[start : start + STEPS_PER_SHARD])


def _write_segment(run: PastRun, writer: RecordWriter, index: int, first: int, end: int) -> None:
    """Averages over the segment's steps, each of which takes the nearest of the segment's checkpoints."""
    inside = [c for c in run.checkpoints if first < c.step <= end or c.step == first == 0]
    moved = [c for c in inside if c.step]
    steps = np.arange(first, end)
    clipped = run.rates[first:end] * run.clip_factors[first:end, None]  # (steps, groups)
    reference = run.reference[first:end] * run.clip_factors[first:end]
    total = float(_summed(reference))
    parameters: dict[str, torch.Tensor] = {}
    scale: dict[str, torch.Tensor] = {}
    for checkpoint in inside:
        checkpoint.load_weights(run.trainer.model, run.trained)
        mine = _nearest(steps, inside) == checkpoint.step
        share = float(reference[mine].sum()) / total if total else 1 / len(inside)
        for name in run.trained:
            _add(parameters, name, run.parameters[name].detach(), share)
        if checkpoint.step:
            _add_preconditioner(run, scale, checkpoint, clipped[_nearest(steps + 1, moved) == checkpoint.step], total)
    writer.add_tensors(f"segments/{index}/parameters.safetensors", parameters)
    writer.add_tensors(f"segments/{index}/preconditioner.safetensors", scale)
    writer.stage["segments"].append(
        {
            "first_step": first,
            "end_step": end,
            "learning_rate_sum": float(_summed(run.reference[first:end])),
            "effective_learning_rate_sum": total,
            "learning_rate_sum_per_group": _summed(run.rates[first:end]).tolist(),
            "effective_learning_rate_sum_per_group": _summed(clipped).tolist(),
            "checkpoints": [checkpoint.step for checkpoint in inside],
        }
    )


def _add_preconditioner(
    run: PastRun, scale: dict[str, torch.Tensor], checkpoint: Checkpoint, clipped: np.ndarray, total: float
) -> None:
    """Add `sum of eta_g c P / s` over the steps that this checkpoint stands for."""
    optimizer = unwrap_optimizer(run.trainer.optimizer)
    if checkpoint.has("optimizer.pt"):
        checkpoint.load_optimizer(optimizer, run.names)
    for number, group in enumerate(run.description.groups):
        share = float(clipped[:, number].sum()) / total if total else 0.0
        for name in group.parameters:
            parameter = run.parameters[name]
            if group.how.scalar:
                value = torch.tensor(group.how.scalar_preconditioner(group.constants))
            else:
                state = optimizer.state.get(parameter, {})
                updates = group.how.updates_made(state)
                value = group.how.preconditioner(parameter, state, group.constants, updates).detach()
            _add(scale, name, value, share)


def _count_items(run: PastRun, stage: dict[str, Any]) -> None:
    """Loss items of all rows, and what the Trainer counts for them, by going through the rows once."""
    trainer = run.trainer
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
    last = run.checkpoints[-1]
    stage["dataset"]["epochs_per_step"] = float(last.state.get("epoch") or 0) / last.step


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
