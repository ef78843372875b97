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
"""One segment of a stage: its averages, and the weights of its rows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import RecordError
from ..writer import checkpoint_file, checkpoint_step, stage_folder
from .assumed import uniform_objective_scale, uniform_visits, uniform_weights, visits_are_recorded
from .momentum import applied_learning_rate


if TYPE_CHECKING:
    from .stage import StageRecord


class SegmentRecord:
    """One segment of a stage: what its steps averaged to.

    Attributes:
        index: number of the segment in its stage.
        first_step, end_step: its optimizer steps, `first_step <= step < end_step`.
        learning_rate_sum: sum of the reference learning rates `eta`.
        effective_learning_rate_sum: `s = sum of eta * c` (`c`: clip factor).
        missed_learning_rates: parameters that some steps left alone -> both sums over those steps.
        matrix_sides: parameters whose preconditioner is a matrix -> the side it acts on, `"left"` or `"right"`.
    """

    def __init__(self, stage: "StageRecord", index: int, data: Mapping[str, Any]) -> None:
        self.stage = stage
        self.index = index
        self.first_step: int = data["first_step"]
        self.end_step: int = data["end_step"]
        self.learning_rate_sum: float = data["learning_rate_sum"]
        self.effective_learning_rate_sum: float = data["effective_learning_rate_sum"]
        self.learning_rate_sum_per_group: list[float] = data["learning_rate_sum_per_group"]
        self.matrix_sides: dict[str, str] = data.get("matrix_sides", {})
        self.effective_learning_rate_sum_per_group: list[float] = data["effective_learning_rate_sum_per_group"]
        self.missed_learning_rates: dict[str, list[float]] = data.get("missed_learning_rates", {})

    def __repr__(self) -> str:
        return f"SegmentRecord({self.stage.name!r}, {self.index}, steps {self.first_step}-{self.end_step})"

    def parameters(self) -> dict[str, torch.Tensor]:
        """Average weights `theta = sum of eta c theta_k / s`, weights before each step, by name."""
        return self.stage.tensors(f"segments/{self.index}/parameters.safetensors")

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps whose weights the record holds too, evenly spaced in summed learning rate; often none."""
        folder = f"{stage_folder(self.stage.index, self.stage.name)}/segments/{self.index}/"
        steps = (checkpoint_step(name) for name in self.stage.data["files"] if name.startswith(folder))
        return sorted(step for step in steps if step is not None)

    def checkpoint(self, step: int) -> dict[str, torch.Tensor]:
        """Weights before a step, by name.

        Raises:
            RecordError: if it is none of `checkpoint_steps`.
        """
        if step not in self.checkpoint_steps:
            raise RecordError(
                f"Segment {self.index} of stage '{self.stage.name}' holds no weights of step {step}; it has "
                f"{self.checkpoint_steps or 'none'}. Train with SourceConfig(checkpoints_per_segment=2) to store some."
            )
        return self.stage.tensors(checkpoint_file(self.index, step))

    def preconditioner(self) -> dict[str, torch.Tensor]:
        """Average preconditioner `P = sum of eta_g c P_k / s`, by name; 0-dim for SGD.

        A tensor holds the factor of each entry, unless the name is in `matrix_sides`: then it is a matrix `M`, and the
        update is `M G` (`"left"`) or `G M` (`"right"`) of the gradient `G` (Muon).

        `eta_g` is the learning rate of the parameter's group, so that `s P` is the sum of the real step sizes.
        """
        return self.stage.tensors(f"segments/{self.index}/preconditioner.safetensors")

    def gradient_mean(self) -> dict[str, torch.Tensor]:
        """Mean gradient `sum of eta_k g_k / sum of eta_k` by name, `g_k` as the optimizer got it: clipped, normalised.

        It is for the response of Adam's second moment to a row that is removed (see `SourceConfig`).

        Raises:
            RecordError: if the run was not recorded with `record_gradient_mean=True`.
        """
        name = f"segments/{self.index}/gradient_mean.safetensors"
        if f"{stage_folder(self.stage.index, self.stage.name)}/{name}" not in self.stage.data["files"]:
            raise RecordError(
                f"Stage '{self.stage.name}' was recorded without mean gradients. Train it with "
                "SourceConfig(record_gradient_mean=True)."
            )
        return self.stage.tensors(name)

    def decay(self) -> dict[str, torch.Tensor]:
        """Weight decay `Lambda` by name, such that `s Lambda` is the fraction of a weight that the segment decays.

        Decoupled (AdamW) and SGD: 0-dim. Coupled (Adam): one value per entry, since the decay passes through `P`
        (approximated as the average `P`, which is exact if clipping was constant in the segment).
        """
        total, preconditioner = self.effective_learning_rate_sum, self.preconditioner()
        rates = zip(self.learning_rate_sum_per_group, self.effective_learning_rate_sum_per_group, strict=True)
        decays = {}
        for group, sums in zip(self.stage.groups, rates, strict=True):
            strength = group.weight_decay
            for name in group.parameters:
                # Steps without a gradient of the parameter do not decay it.
                missed = self.missed_learning_rates.get(name, (0.0, 0.0))
                rate_sum, effective = (a - b for a, b in zip(sums, missed, strict=True))
                dtype = preconditioner[name].dtype
                if effective <= 1e-12 * sums[1] or strength == 0:
                    decays[name] = torch.zeros((), dtype=dtype)
                elif group.decoupled_weight_decay:
                    decays[name] = torch.tensor(strength * rate_sum / total, dtype=dtype)
                else:
                    decays[name] = preconditioner[name] * (strength * rate_sum / effective)
        return decays

    def objective_scale(self) -> float:
        """Objective that was trained, over the mean loss per item: average of `items / normalizer`, weighted by lr.

        1 when losses are divided by the number of loss items. Not 1 where the Trainer divides by another count:
        transformers 5.23 counts the first token of each row too for GPT-2, though it is never predicted. Curvature of
        the mean loss is to be multiplied by this number.
        """
        if not visits_are_recorded(self.stage):
            return uniform_objective_scale(self)
        steps = self.stage.steps()
        batches, step = steps._batches(self.first_step, self.end_step)
        share = batches.field("items").to_numpy() / batches.field("normalizer").to_numpy()
        total = float((steps.effective_learning_rate[step] * share).sum())
        return total / self.effective_learning_rate_sum if self.effective_learning_rate_sum else 1.0

    def row_weights(self) -> np.ndarray:
        """float64 `[num_examples]`: sum over the row's visits in the segment of `eta c / normalizer`."""
        if not visits_are_recorded(self.stage):
            return uniform_weights(self.stage, self.effective_learning_rate_sum)
        visits = self.stage.steps().visits(self.first_step, self.end_step)
        return np.bincount(visits["row"], weights=visits["weight"], minlength=self.stage.num_examples)

    def applied_weights(self) -> np.ndarray:
        """float64 `[num_examples]`: the rows' weights in the segment's updates, momentum included (see `momentum.py`).

        Like `row_weights`, with the learning rate that really applied each gradient: gradients of earlier segments
        that momentum still carries count here, and what this segment's momentum carries on counts later. Of the first
        group that trains anything, if they differ: see `applied_parts`.
        """
        return self.applied_parts()[0][1]

    def applied_parts(self) -> list[tuple[list[str], np.ndarray]]:
        """Parameters that share their momentum, and the rows' weights in their updates (see `applied_weights`).

        One part, but for groups with different momentum or different optimizers (Muon with AdamW, say).
        """
        steps = self.stage.steps()
        before = (self.stage.data.get("optimizer_start") or {}).get("updates", 0)
        parts: list[tuple[list[str], np.ndarray]] = []
        for group in (group for group in self.stage.groups if group.parameters):
            rates = applied_learning_rate(
                group, steps.reference_learning_rate, steps.skipped, self.first_step, self.end_step, before
            )
            same = next((names for names, known in parts if np.array_equal(known, rates)), None)
            if same is None:
                parts.append((list(group.parameters), rates))
            else:
                same.extend(group.parameters)
        return [(names, self._weights_at(rates)) for names, rates in parts]

    def scored(self, momentum: bool) -> np.ndarray:
        """Rows with a weight in the segment, bool `[rows]`; with momentum also those of steps that it still felt."""
        parts = [weights for _, weights in self.applied_parts()] if momentum else [self.row_weights()]
        return sum(np.abs(weights) for weights in parts) > 0

    def _weights_at(self, rates: np.ndarray) -> np.ndarray:
        steps, first = self.stage.steps(), int(np.argmax(rates > 0))
        if not visits_are_recorded(self.stage):
            return uniform_weights(self.stage, float((rates * steps.clip_factor[: self.end_step]).sum()))
        visits = steps.visits(first, self.end_step, rates * steps.clip_factor[: self.end_step])
        return np.bincount(visits["row"], weights=visits["weight"], minlength=self.stage.num_examples)

    def num_visits(self) -> np.ndarray:
        """`[num_examples]`: how often each row was trained on in the segment; float64 expectations if not recorded."""
        if not visits_are_recorded(self.stage):
            return uniform_visits(self)
        visits = self.stage.steps().visits(self.first_step, self.end_step)
        return np.bincount(visits["row"], minlength=self.stage.num_examples)
