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
"""Replays the beginning of a recorded stage and compares it with what the record holds of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import DataError, RecordError, UnsupportedError
from ..weight_samples import sample_of, sample_weights
from .replay import replay
from .stage import StageRecord


_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
_LOOSE = 0.1
"""For half precision, whose rounding is itself a few per cent of a small update."""

_QUANTILE = 0.75
"""Of the entries that moved, so many must agree: weights whose true gradient is 0 (the bias of attention's keys)
follow rounding alone under Adam, and differ from one processor to the next."""


@dataclass
class ReplayCheck:
    """Outcome of replaying one stage.

    Attributes:
        stage: its name.
        steps: how many steps were replayed.
        compared: what was compared: "3 samples of weights", "segment 0", "final weights".
        error: largest relative error of what was compared.
        problem: what is wrong, if anything.
        note: why something could not be compared, if so.
    """

    stage: str
    steps: int = 0
    compared: list[str] = field(default_factory=list)
    error: float = 0.0
    problem: str | None = None
    note: str | None = None


class _Enough(Exception):
    """Ends a replay early."""


def check_replay(stage: StageRecord, num_steps: int, dataset: Any = None) -> ReplayCheck:
    """Replay a stage's first steps from its initial weights, with its recorded rows.

    Args:
        stage: the stage.
        num_steps: how many steps; all of them if there are fewer.
        dataset: its rows; default those in the record.
    """
    check = ReplayCheck(stage.name)
    dataset = stage.rows() if dataset is None else dataset
    check.note = _why_not(stage, dataset)
    if check.note is not None:
        return check
    comparison = _Comparison(stage, min(num_steps, stage.num_steps), check)
    try:
        model = replay(stage, dataset, callback=comparison)
        comparison.compare("final weights", _sample(model, stage), sample_of(stage.weights("final"), stage.trainable))
    except _Enough:
        pass
    except (UnsupportedError, DataError) as error:
        check.note = f"it cannot be replayed: {error}"
    except RecordError as error:
        check.problem = str(error)
    if check.problem is None and check.note is None and not check.compared:
        check.note = (
            f"{check.steps} steps reach nothing to compare with (the record holds no weights of its first steps): "
            f"replay all {stage.num_steps} of them"
        )
    return check


def _why_not(stage: StageRecord, dataset: Any) -> str | None:
    if stage.status != "complete":
        return "its training has not come to its end"
    if stage.data.get("visits", "recorded") != "recorded":
        return f"its visits are {stage.data['visits']}, not recorded"
    if stage.training["dropout"] or stage.training["neftune_noise_alpha"]:
        return "it trained with dropout or NEFTune noise, which a replay draws anew"
    if dataset is None:
        return "the record does not hold its rows"
    return None


def _sample(model: torch.nn.Module, stage: StageRecord) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    return sample_weights([parameters[name] for name in stage.trainable])


class _Comparison:
    """Called after every replayed step."""

    def __init__(self, stage: StageRecord, num_steps: int, check: ReplayCheck) -> None:
        self.stage, self.num_steps, self.check = stage, num_steps, check
        self.steps = stage.steps()
        self.start = self.before = sample_of(stage.weights("initial"), stage.trainable)
        precise = {info["dtype"] for name, info in stage.tensor_info.items() if name in set(stage.trainable)}
        half = stage.autocast is not None or not precise <= set(_TOLERANCE)
        self.epsilon = max(torch.finfo(getattr(torch, dtype)).eps for dtype in precise)
        self.tolerance = _LOOSE if half else max(_TOLERANCE[dtype] for dtype in precise)
        self.sums = torch.zeros_like(self.start)
        self.checkpoints = {step: segment for segment in stage.segments for step in segment.checkpoint_steps}
        self.segments: Iterator = iter(stage.segments)
        self.segment = next(self.segments, None)

    def __call__(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.sums += float(self.steps.effective_learning_rate[step]) * self.before
        self.before = after = _sample(model, self.stage)
        self.check.steps = step + 1
        recorded = self.steps.weight_sample(step)
        if recorded is not None:
            self.compare(f"step {step}", after, torch.from_numpy(recorded.copy()))
        if step + 1 in self.checkpoints:
            stored = self.checkpoints[step + 1].checkpoint(step + 1)
            self.compare(f"checkpoint {step + 1}", after, sample_of(stored, self.stage.trainable))
        if self.segment is not None and step + 1 == self.segment.end_step:
            self._compare_segment()
        if step + 1 >= self.num_steps < len(self.steps):
            raise _Enough

    def _compare_segment(self) -> None:
        total = self.segment.effective_learning_rate_sum
        if total > 0:
            recorded = sample_of(self.segment.parameters(), self.stage.trainable)
            self.compare(f"segment {self.segment.index}", self.sums / total, recorded)
        self.segment = next(self.segments, None)
        self.sums.zero_()

    def compare(self, what: str, found: torch.Tensor, recorded: torch.Tensor) -> None:
        """Note whether both moved alike from the stage's beginning."""
        if found.shape != recorded.shape:
            raise RecordError(f"The sample of weights at {what} of stage '{self.stage.name}' is of another model.")
        moved = torch.maximum((found - self.start).abs(), (recorded - self.start).abs())
        # A weight's own rounding is no movement, and no difference.
        rounding = 4 * self.epsilon * self.start.abs()
        active = moved > rounding
        error = 0.0
        if active.any():
            relative = ((found - recorded).abs() - rounding).clamp_min(0)[active] / moved[active]
            error = float(relative.quantile(_QUANTILE))
        self.check.compared.append(what)
        self.check.error = max(self.check.error, error)
        if error > self.tolerance:
            self.check.problem = (
                f"The replay of stage '{self.stage.name}' leaves the record at {what}: three quarters of the weights "
                f"should agree to {self.tolerance:g} of their movement, they do to {error:.2g}. Steps, rows or "
                "weights in the record are not those of the training, or the libraries compute otherwise (recorded "
                f"with transformers {self.stage.record.data['library_versions'].get('transformers')})."
            )
            raise _Enough
