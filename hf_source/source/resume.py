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
"""Where a walk goes on that was cut off: the segments that are done, and the vectors before the next one."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from ..recording import SegmentRecord, StageRecord
from .stages import Vectors
from .work import Work


class Resume:
    """What an earlier run of the same walk left: which segments are scored, and the vectors before the next one.

    Args:
        stages: in the order of training.
        work: where it is kept.
        least: the smallest of the numbers that the processes have; they go on where the slowest was killed.
    """

    def __init__(
        self, stages: Sequence[StageRecord], work: Work, least: Callable[[int], int] = lambda number: number
    ) -> None:
        self.stages, self.work = stages, work
        order = [(position, segment) for position in range(len(stages) - 1, -1, -1)
                 for segment in reversed(stages[position].segments)]  # fmt: skip
        done = list(takewhile(lambda place: work.has(f"{work_key(*place)}.done"), order))
        done = done[: least(len(done))]
        # Vectors after the last segment that is done; a walk that is done as a whole keeps none.
        needed = bool(done) and len(done) < len(order)
        if not least(int(not needed or work.has(f"{work_key(*done[-1])}.carried"))):
            done = []
        self.done = {(position, segment.index) for position, segment in done}
        self.last: tuple[int, SegmentRecord] | None = done[-1] if done else None

    def is_done(self, position: int, segment: SegmentRecord | None = None) -> bool:
        """Whether a segment's rows are scored, or those of all segments of a stage."""
        segments = self.stages[position].segments if segment is None else [segment]
        return all((position, each.index) in self.done for each in segments)

    def vectors(
        self, position: int, entering: Vectors | None, device: torch.device
    ) -> tuple[Vectors | None, Vectors | None]:
        """Vectors that a stage starts with, by canonical name: those that enter it at its end, or those inside it."""
        if self.last is None or entering is not None:
            return entering, None
        found = self.work.load(f"{work_key(*self.last)}.carried", device)
        return (None, found) if self.last[0] == position else (found, None)

    def finished(self, position: int, segment: SegmentRecord) -> None:
        """A segment is done: the vectors before the one that is done now are no longer needed."""
        if self.last is not None:
            self.work.drop(f"{work_key(*self.last)}.carried")
        self.last = (position, segment)

    def scores(self, position: int, rows: Any, count: int | None = None) -> np.ndarray:
        """Scores of a stage so far; `count` queries, if nothing says how many there are."""
        stage, scores = self.stages[position], None
        width = getattr(rows, "count", stage.num_rows)
        for segment in reversed(stage.segments):
            if not self.is_done(position, segment):
                continue
            done = self.work.load(f"{work_key(position, segment)}.done")
            places, count = int(done["places"]), int(done["queries"])
            for place in range(places):
                for pieces, found in self.work.scored(f"{work_key(position, segment)}-{place}", [], None):
                    if scores is None:
                        scores = np.zeros((len(found), width), dtype=np.float32)
                    np.add.at(scores, (slice(None), rows.row[pieces]), found)
        return np.zeros((count or 0, width), dtype=np.float32) if scores is None else scores


def work_key(position: int, segment: SegmentRecord) -> str:
    """What the finished work of a segment is kept under."""
    return f"{position}-{segment.index}"


class StepsDone:
    """How far the steps of a stage were followed backwards.

    Args:
        work: where it is kept; written every `flush_seconds`.
        position: of the stage.
        device: where vectors go.
    """

    def __init__(self, work: Work, position: int, device: torch.device) -> None:
        self.work, self.key, self.device = work, f"{position}.steps", device
        self._written = time.monotonic()

    def __bool__(self) -> bool:
        """Whether any are."""
        return self.work.has(self.key)

    def load(self) -> tuple[int, Vectors, dict[str, Vectors], np.ndarray]:
        """The step that was done last, the adjoints of weights and state before it, and the scores."""
        found = self.work.load(self.key, self.device)
        step, scores = int(found.pop("step")), found.pop("scores").cpu().numpy()
        adjoint, moments = {}, {}
        for name, tensor in found.items():
            key, _, parameter = name.partition("/")
            (moments.setdefault(parameter, {}) if key else adjoint)[key or parameter] = tensor
        return step, adjoint, moments, scores

    def save(self, step: int, adjoint: Vectors, moments: Mapping[str, Vectors], scores: np.ndarray) -> None:
        """A step is done; written if the last time is long ago."""
        if self.work.folder is None or time.monotonic() - self._written < self.work.flush_seconds:
            return
        held = {f"/{name}": vectors for name, vectors in adjoint.items()}
        held |= {f"{key}/{name}": vectors for name, own in moments.items() for key, vectors in own.items()}
        self.work.save(self.key, held | {"step": torch.tensor(step), "scores": torch.from_numpy(scores)})
        self._written = time.monotonic()

    def drop(self) -> None:
        """The stage is done."""
        self.work.drop(self.key)
