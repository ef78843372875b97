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
"""The recorder of one stage: takes what each optimizer step did and turns it into files.

A step arrives in pieces, in this order: `add_micro_batch` (once per micro-batch), `before_update`, `after_update`.
With several processes, each has a recorder; the main process writes what they gather (see `processes.py`).
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import RecordError, UnsupportedError
from .freezing import UpdateWatch, note_frozen
from .optimizers import describe_optimizer
from .precision import note_scale
from .processes import Processes
from .rows.streamed import StreamRows
from .segments import SegmentAccumulator
from .sharding import whole_tensors
from .weight_samples import is_sampled, sample_weights
from .writer import RecordWriter, checkpoint_file, file_entry, write_json, write_tensors


STEPS_PER_SHARD = 500
SIDECAR = "source_recording"
"""Files `source_recording.json` and `.safetensors` in a checkpoint folder: where the recording stood at that step."""


class StageRecorder:
    """Records one stage.

    Args:
        writer: writer of the stage.
        accumulator: sums of the running segment.
        segment_starts: first step of every planned segment.
        names: name of every parameter of the model, from `recorded_names`.
        processes: the processes that train together.
        streamed: keeps the rows of a stream.

    Attributes:
        checkpoint_steps: steps before which the weights themselves are stored.
        merge_processes: whether losses are divided by loss items counted over all processes, so that what the
            processes ran at the same time is one micro-batch.
    """

    def __init__(
        self,
        writer: RecordWriter,
        accumulator: SegmentAccumulator,
        segment_starts: Sequence[int],
        names: Mapping[torch.nn.Parameter, str | None],
        processes: Processes,
        streamed: StreamRows | None = None,
    ) -> None:
        self.processes = processes
        self.merge_processes = True
        self.writer = writer
        self.accumulator = accumulator
        self.names = names
        self.streamed = streamed
        self.segment_starts = list(segment_starts)
        self.checkpoint_steps: list[int] = []
        self.step = self.first_step = 0
        self.inside_update = False
        self._segment_start = 0
        self._micro_batches: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        # A group without parameters has a learning rate too, but moves nothing.
        recorded = {name for group in accumulator.description.groups for name in group.parameters}
        self._watch = UpdateWatch(names, recorded, accumulator.optimizer)
        self._groups_in_use = [g for g, group in enumerate(accumulator.description.groups) if group.parameters]

    def add_micro_batch(
        self, rows: torch.Tensor, normalizer: Any, items: Any, inputs: Mapping[str, Any] | None = None
    ) -> None:
        """Note one micro-batch of the running step; tensors stay where they are until the next flush.

        Args:
            rows: row numbers, int64 `[rows]`.
            normalizer: what the micro-batch's summed loss was divided by before backward.
            items: its number of loss items.
            inputs: what the model is given; needed of streams.
        """
        if self.streamed is not None and inputs is not None:
            self.streamed.add(rows, inputs)
        self._watch.micro_batch(self.step, first=not self._micro_batches)
        self._micro_batches.append({"rows": rows, "normalizer": normalizer, "items": items})

    def note_first_loss(self, loss: torch.Tensor) -> None:
        """Note what the first rows' losses add up to: attribution checks its idea of them by it."""
        described = self.writer.stage["loss"]
        if self.step == 0 and "first_micro_batch" not in described:
            described["first_micro_batch"] = float(loss)

    def before_update(
        self,
        learning_rates: Sequence[float],
        grad_norm: float,
        clip_factor: float,
        epoch: float,
        loss_scale: float | None = None,
    ) -> None:
        """Gradients are complete, weights not yet updated.

        Raises:
            UnsupportedError: if a constant of the optimizer is not what it was.
        """
        changes = self.writer.stage.setdefault("trainable_changes", [])
        note_frozen(changes, self.step, self._watch.without_update(self.step))
        self._refuse_changed_constants()
        if loss_scale is not None:
            note_scale(self.writer.stage.setdefault("loss_scales", []), self.step, loss_scale)
        self._running = {
            "step": self.step,
            "epoch": epoch,
            "learning_rate": list(learning_rates),
            "grad_norm": grad_norm,
            "clip_factor": clip_factor,
        }
        self.inside_update = True
        if self.streamed is not None:
            self.streamed.visit(self.step)
        if self.step in self.checkpoint_steps:
            self._keep_weights()
        self.accumulator.before_update(self._reference(learning_rates), clip_factor)
        if math.isfinite(grad_norm):  # else the optimizer will skip the step
            self.accumulator.add_gradients(self._reference(learning_rates))

    def after_update(self, skipped: bool = False) -> None:
        """Weights are updated (or, if `skipped`, left alone by the optimizer)."""
        step = self._running | {"skipped": skipped, "micro_batches": self._micro_batches}
        reference = self._reference(step["learning_rate"])
        self.accumulator.after_update(reference, step["learning_rate"], step["clip_factor"], skipped)
        self._steps.append(step)
        self._micro_batches = []
        self.inside_update = False
        self.step += 1
        if is_sampled(self.step):
            weights = whole_tensors(self.accumulator.parameters, keep=self.processes.is_main)
            sample = sample_weights(list(weights.values()))
            step["weights"] = None if sample is None else sample.tolist()
        if self.step in self.segment_starts:
            self._close_segment()
        if len(self._steps) >= STEPS_PER_SHARD or (self.streamed is not None and self.streamed.full):
            self.flush()

    def flush(self) -> None:
        """Write the complete steps that are still in memory."""
        for step in self._steps:
            step["micro_batches"] = [
                {
                    "rows": batch["rows"].tolist(),
                    "normalizer": float(batch["normalizer"]),
                    "items": int(batch["items"]),
                }
                for batch in step["micro_batches"]
            ]
        steps, self._steps = self.processes.gather_steps(self._steps, self.merge_processes), []
        self.writer.stage["num_steps"] = self.step
        rows = [] if self.streamed is None else self.streamed.gather(self.step)

        def write() -> None:
            if self.streamed is not None:
                self.streamed.write(rows, self.step)
            self.writer.add_steps(steps)
            self.writer.commit()

        self.processes.agree(write, main_only=True)

    def finish(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Close the stage with its final weights."""
        if self.step > self._segment_start:
            self._close_segment()
        final = whole_tensors(weights, keep=self.processes.is_main)
        self.processes.agree(lambda: self.writer.add_tensors("final.safetensors", final), main_only=True)
        self.writer.stage["status"] = "complete"
        self.flush()

    def figures(self) -> dict[str, int]:
        """What there is to say of the record among a run's metrics, after the last step of training."""
        rows = self.writer.stage["dataset"]["num_rows"] if self.streamed is None else self.streamed.num_rows
        shapes = (info["shape"] for info in self.writer.stage["trainable"].values())
        return {
            "record_steps": self.step,
            "record_segments": sum(start < self.step for start in self.segment_starts),
            "record_rows": rows,
            "record_trained_parameters": sum(map(math.prod, shapes)),
        }

    def save_sidecar(self, folder: Path) -> None:
        """Write to a checkpoint folder what resuming from it needs."""
        self.flush()
        tensors, scalars = self.accumulator.state()
        tensors = whole_tensors(tensors, keep=self.processes.is_main)
        self.processes.agree(lambda: self._write_sidecar(folder, tensors, scalars), main_only=True)

    def _write_sidecar(self, folder: Path, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / f"{SIDECAR}.safetensors", tensors)
        state = {
            "run_id": self.writer.stage["run_id"],
            "stage": self.writer.stage["name"],
            "attempt": attempts[-1]["id"] if (attempts := self.writer.stage.get("attempts")) else None,
            "step": self.step,
            "segment_start": self._segment_start,
            "segment_starts": self.segment_starts,
            "checkpoint_steps": self.checkpoint_steps,
            "sums": scalars,
            "tensors": file_entry(folder / f"{SIDECAR}.safetensors"),
        }
        write_json(folder / f"{SIDECAR}.json", state)

    def go_back(self, folder: Path) -> None:
        """Continue from a checkpoint: the record forgets what came after it."""
        state = self.processes.agree(lambda: read_sidecar(folder), main_only=True)
        main = self.processes.is_main
        self.accumulator.load_state(load_file(folder / f"{SIDECAR}.safetensors") if main else {}, state["sums"])
        self.step = self.first_step = state["step"]
        self.segment_starts = state["segment_starts"]
        self.checkpoint_steps = state.get("checkpoint_steps", [])
        self._segment_start = state["segment_start"]
        self._micro_batches, self._steps = [], []
        self.writer.stage["num_steps"] = self.step

        def cut_back() -> dict[str, Any]:
            self.writer.stage.setdefault("attempts", []).append({"id": uuid.uuid4().hex, "first_step": self.step})
            if self.streamed is not None:
                self.streamed.cut_back(self.step)
            for key in ("trainable_changes", "loss_scales"):
                changes = self.writer.stage.get(key, [])
                self.writer.stage[key] = [change for change in changes if change["step"] < self.step]
            self.writer.cut_back(self.step, self._segment_start)
            return self.writer.stage

        self.writer.stage = self.processes.agree(cut_back, main_only=True)

    def restart(
        self, segment_starts: Sequence[int], training: dict[str, Any], checkpoint_steps: Sequence[int] = ()
    ) -> None:
        """Go on where an attempt ended, as the beginning of a new run.

        Args:
            segment_starts: first step of every segment of the new run, counted from its own beginning. Its first
                segment goes on with the one that is open.
            training: settings of the new run, as in `record.json`.
            checkpoint_steps: of the new run, counted as the segments are.
        """
        started = [start for start in self.segment_starts if start <= self.step]
        self.segment_starts = started + [self.step + start for start in segment_starts[1:]]
        made = [step for step in self.checkpoint_steps if step < self.step]
        self.checkpoint_steps = made + [self.step + step for step in checkpoint_steps]
        self._micro_batches = []
        if self.streamed is not None:
            self.streamed.drop_waiting()
        self.first_step = self.step
        self.writer.stage |= {"planned_segment_starts": self.segment_starts, "training": training}
        self.flush()

    def _keep_weights(self) -> None:
        """Store the weights at which this step's gradients were taken."""
        name = checkpoint_file(len(self.writer.stage["segments"]), self.step)
        weights = whole_tensors(self.accumulator.parameters, keep=self.processes.is_main)
        self.processes.agree(lambda: self.writer.add_tensors(name, weights), main_only=True)

    def _close_segment(self) -> None:
        index = len(self.writer.stage["segments"])
        scalars = self.accumulator.scalars()
        parameters, scale = (
            whole_tensors(tensors, keep=self.processes.is_main) for tensors in self.accumulator.close()
        )
        gradients = whole_tensors(self.accumulator.close_gradient_mean(), keep=self.processes.is_main)

        def write() -> None:
            self.writer.add_tensors(f"segments/{index}/parameters.safetensors", parameters)
            self.writer.add_tensors(f"segments/{index}/preconditioner.safetensors", scale)
            if gradients:
                self.writer.add_tensors(f"segments/{index}/gradient_mean.safetensors", gradients)

        self.processes.agree(write, main_only=True)
        self.writer.stage["segments"].append({"first_step": self._segment_start, "end_step": self.step, **scalars})
        self._segment_start = self.step
        self.accumulator.reset()
        self.flush()

    def _reference(self, learning_rates: Sequence[float]) -> float:
        return max(learning_rates[g] for g in self._groups_in_use)

    def _refuse_changed_constants(self) -> None:
        if describe_optimizer(self.accumulator.optimizer, self.names) != self.accumulator.description:
            raise UnsupportedError(
                "A constant of the optimizer (momentum, betas, eps, weight decay) or its list of parameters changed "
                f"during training, before step {self.step}. The record holds them once per stage: keep them constant "
                "(with OneCycleLR: cycle_momentum=False), or train a new stage with the new values."
            )


def read_sidecar(folder: Path) -> dict[str, Any]:
    """State of the recording in a checkpoint folder, checked against its tensors.

    Raises:
        RecordError: if the checkpoint was saved without recording, or its files are torn.
    """
    file, tensors = folder / f"{SIDECAR}.json", folder / f"{SIDECAR}.safetensors"
    if not file.is_file() or not tensors.is_file():
        raise RecordError(
            f"The checkpoint {folder} holds no recording ({file.name} and {tensors.name}), so the steps before it are "
            "unknown. Resume from a checkpoint that SourceTrainer saved without save_only_model, or start this stage "
            "from the beginning."
        )
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{file} is damaged ({error}). Resume from an earlier checkpoint.") from error
    if file_entry(tensors) != state["tensors"]:
        raise RecordError(f"{tensors} is damaged (its hash differs). Resume from an earlier checkpoint.")
    return state
