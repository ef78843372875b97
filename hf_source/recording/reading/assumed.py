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
"""Visits that are not known, taken as uniform: every row's weight is the paper's `1 / N`.

The expected gradient of a step is `1 / N sum over all rows of grad l_m`, with `N` what the Trainer would have divided
the summed loss of all rows by. A row's weight in a segment is then `s / N`, the same for every row.
"""

from typing import TYPE_CHECKING

import numpy as np

from ...errors import UnsupportedError


if TYPE_CHECKING:
    from .segment import SegmentRecord
    from .stage import StageRecord


def visits_are_recorded(stage: "StageRecord") -> bool:
    """Whether the record knows which rows each step trained on."""
    return stage.data["visits"] == "recorded"


def require_recorded_visits(stage: "StageRecord", purpose: str) -> None:
    """Raise where the real visits are needed.

    Raises:
        UnsupportedError: if they are not known.
    """
    if not visits_are_recorded(stage):
        raise UnsupportedError(
            f"Stage '{stage.name}' was rebuilt from checkpoints: which rows each step trained on is not known (visits "
            f"are {stage.data['visits']}), so it cannot be {purpose}. Train it with SourceTrainer for that."
        )


def uniform_objective_scale(segment: "SegmentRecord") -> float:
    """`SegmentRecord.objective_scale` over all rows."""
    dataset = segment.stage.dataset
    return dataset["total_items"] / dataset["total_normalizer"]


def uniform_weights(stage: "StageRecord", learning_rate: float) -> np.ndarray:
    """Weight of each row where gradients were applied with this sum of learning rates times clip factors."""
    return np.full(stage.num_examples, learning_rate / stage.dataset["total_normalizer"])


def uniform_visits(segment: "SegmentRecord") -> np.ndarray:
    """Expected visits of each row, float64."""
    steps = segment.end_step - segment.first_step
    return np.full(segment.stage.num_examples, steps * segment.stage.dataset["epochs_per_step"])


def visits_note(stages: "list[StageRecord]") -> str:
    """What is to be said with every number that rests on assumed visits; empty if there is none."""
    names = [stage.name for stage in stages if not visits_are_recorded(stage)]
    if not names:
        return ""
    which = f"stage {names[0]} was" if len(names) == 1 else f"stages {', '.join(names)} were"
    return (
        f"Visits are assumed uniform: {which} rebuilt from checkpoints, so which row was trained on when is not "
        "known. Scores take every row as trained on equally often at any time."
    )
