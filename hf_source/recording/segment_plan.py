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
"""Where a stage is cut into segments: equal shares of the summed learning rate, or cuts of one's own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.optim.lr_scheduler import LambdaLR

from ..errors import ConfigError


def scheduled_learning_rates(scheduler: Any, num_steps: int, groups: Sequence[int] | None = None) -> np.ndarray | None:
    """Reference learning rate (largest over the groups) of every step to come, or `None` if it cannot be known.

    Args:
        scheduler: learning-rate scheduler before its first step. `LambdaLR` (all of transformers' schedules but
            `reduce_lr_on_plateau` and `greedy`) is a function of the step alone, so it can be evaluated ahead.
        num_steps: optimizer steps of the stage.
        groups: parameter groups to look at; default all.

    Returns:
        float64 `[num_steps]`, or `None`.
    """
    if not isinstance(scheduler, LambdaLR):
        return None
    groups = range(len(scheduler.base_lrs)) if groups is None else groups
    start = scheduler.last_epoch
    return np.array(
        [
            max(float(scheduler.base_lrs[g]) * float(scheduler.lr_lambdas[g](start + step)) for g in groups)
            for step in range(num_steps)
        ]
    )


def plan_segments(
    num_steps: int,
    learning_rates: np.ndarray | None,
    num_segments: int = 3,
    boundaries: Sequence[int] | Sequence[float] | None = None,
) -> list[int]:
    """First step of every segment.

    Args:
        num_steps: optimizer steps of the stage.
        learning_rates: reference learning rate per step; `None` (or all zero) cuts equal numbers of steps.
        num_segments: segments of equal summed learning rate.
        boundaries: own cuts: first steps of the second, third, ... segment, or shares of the summed learning rate.

    Returns:
        Strictly increasing first steps, the first being 0.

    Raises:
        ConfigError: if there are more segments than steps, or a cut lies outside the stage.
    """
    if boundaries and isinstance(boundaries[0], int):
        if boundaries[-1] >= num_steps:
            raise ConfigError(
                f"segment_boundaries={list(boundaries)} reaches beyond the stage's {num_steps} optimizer steps: the "
                f"last cut may be step {num_steps - 1}. Use shares such as [0.5] to be independent of the length."
            )
        return [0, *boundaries]
    shares = list(boundaries) if boundaries is not None else [i / num_segments for i in range(1, num_segments)]
    count = len(shares) + 1
    if count > num_steps:
        raise ConfigError(
            f"{count} segments do not fit into {num_steps} optimizer step(s): set num_segments to at most "
            f"{num_steps}, or train for more steps."
        )
    if learning_rates is None or learning_rates.sum() <= 0:
        learning_rates = np.ones(num_steps)
    before = np.concatenate([[0.0], np.cumsum(learning_rates)])  # summed learning rate before step k
    starts = [0]
    for index, share in enumerate(shares, start=1):
        nearest = int(np.abs(before - share * before[-1]).argmin())
        # Every segment needs one step at least, this one and those that follow.
        starts.append(min(max(nearest, starts[-1] + 1), num_steps - (count - index)))
    return starts


def plan_checkpoints(
    num_steps: int, learning_rates: np.ndarray | None, starts: Sequence[int], per_segment: int
) -> list[int]:
    """Steps before which weights are stored: the middles of equal shares of each segment's summed learning rate.

    Args:
        num_steps, learning_rates: see `plan_segments`.
        starts: first step of every segment.
        per_segment: how many in each.

    Returns:
        Strictly increasing steps.

    Raises:
        ConfigError: if a segment has fewer steps.
    """
    if learning_rates is None or learning_rates.sum() <= 0:
        learning_rates = np.ones(num_steps)
    before = np.concatenate([[0.0], np.cumsum(learning_rates)])
    found: list[int] = []
    for start, end in zip(starts, [*starts[1:], num_steps], strict=True):
        if end - start < per_segment:
            raise ConfigError(
                f"checkpoints_per_segment={per_segment} do not fit into the {end - start} steps of the segment from "
                f"step {start} on: set it to at most {end - start}, or take fewer segments."
            )
        last = start - 1
        for index in range(per_segment):
            share = (2 * index + 1) / (2 * per_segment)
            target = before[start] + share * (before[end] - before[start])
            nearest = int(np.abs(before - target).argmin())
            last = min(max(nearest, last + 1), end - (per_segment - index))
            found.append(last)
    return found
