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
"""Neighbouring segments read as one: averages of averages are what recording them as one would have left."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..segment_plan import plan_segments
from .segment import SegmentRecord


if TYPE_CHECKING:
    from .stage import StageRecord


class MergedSegment(SegmentRecord):
    """Several segments of a stage that follow one another, as one.

    Args:
        stage: of which they are.
        index: number of the merged segment.
        parts: the recorded segments, in order.
    """

    def __init__(self, stage: "StageRecord", index: int, parts: Sequence[SegmentRecord]) -> None:
        super().__init__(stage, index, _sums(parts))
        self.parts = list(parts)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Average weights, by name: those of the parts, weighted by their summed learning rates."""
        return self._average(SegmentRecord.parameters, [part.effective_learning_rate_sum for part in self.parts])

    def preconditioner(self) -> dict[str, torch.Tensor]:
        """Average preconditioner, by name: see `SegmentRecord.preconditioner`."""
        return self._average(SegmentRecord.preconditioner, [part.effective_learning_rate_sum for part in self.parts])

    def gradient_mean(self) -> dict[str, torch.Tensor]:
        """Mean gradient, by name: see `SegmentRecord.gradient_mean`."""
        return self._average(SegmentRecord.gradient_mean, [part.learning_rate_sum for part in self.parts])

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps whose weights the record holds: those of all parts."""
        return [step for part in self.parts for step in part.checkpoint_steps]

    def checkpoint(self, step: int) -> dict[str, torch.Tensor]:
        """Weights before a step, by name: see `SegmentRecord.checkpoint`."""
        return next((part for part in self.parts if step in part.checkpoint_steps), self.parts[0]).checkpoint(step)

    def _average(
        self, read: Callable[[SegmentRecord], dict[str, torch.Tensor]], weights: Sequence[float]
    ) -> dict[str, torch.Tensor]:
        """Weighted mean of the parts' tensors; of the first part if nothing moved. Two parts are held at once."""
        total = sum(weights)
        moved = [(part, weight / total) for part, weight in zip(self.parts, weights, strict=True) if weight > 0]
        (first, share), *others = moved or [(self.parts[0], 1.0)]
        mean = {name: tensor * share for name, tensor in read(first).items()}
        for part, share in others:
            for name, tensor in read(part).items():
                mean[name] += tensor * share
        return mean


def merged(segments: Sequence[SegmentRecord], number: int | None) -> list[SegmentRecord]:
    """At most so many segments, of as equal summed learning rates as the recorded cuts allow; `None` for all."""
    if number is None or number >= len(segments):
        return list(segments)
    lengths = np.array([segment.learning_rate_sum for segment in segments])
    starts = plan_segments(len(segments), lengths, number)
    parts = [segments[start:end] for start, end in zip(starts, [*starts[1:], len(segments)], strict=True)]
    return [MergedSegment(own[0].stage, index, own) for index, own in enumerate(parts)]


def _sums(parts: Sequence[SegmentRecord]) -> Mapping[str, Any]:
    """What `record.json` would say of the parts as one segment."""
    over_groups = lambda key: [sum(sums) for sums in zip(*(getattr(p, key) for p in parts), strict=True)]  # noqa: E731
    missed: dict[str, list[float]] = {}
    for name, sums in (item for part in parts for item in part.missed_learning_rates.items()):
        missed[name] = [a + b for a, b in zip(missed.get(name, (0.0, 0.0)), sums, strict=True)]
    return {
        "first_step": parts[0].first_step,
        "end_step": parts[-1].end_step,
        "learning_rate_sum": sum(part.learning_rate_sum for part in parts),
        "effective_learning_rate_sum": sum(part.effective_learning_rate_sum for part in parts),
        "learning_rate_sum_per_group": over_groups("learning_rate_sum_per_group"),
        "effective_learning_rate_sum_per_group": over_groups("effective_learning_rate_sum_per_group"),
        "missed_learning_rates": missed,
        "matrix_sides": parts[0].matrix_sides,
    }
