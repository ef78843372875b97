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
"""Responses of rows: the predicted change of the final weights had a row been left out of training.

The walk of `source/walk.py`, transposed: a row's gradient enters at each segment that visited it and is carried
forward through the segments and stages after it. `<grad f_q(theta_T), response>` is the row's score, for every `q`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..budget import Parts
from ..curvature import Flow, Response, make_response
from ..gradients import RowGradients
from ..gradients.rows import as_rows
from ..recording import SegmentRecord
from ..source.stages import check_handover, open_stage
from ..source.walk import draw_sample, enter_epochs, segment_flow


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor


Vectors = dict[str, torch.Tensor]


@dataclass
class _Segment:
    """What a segment was found to be on the first visit."""

    flow: Flow
    response: Response
    places: list[Callable[[], None]]


class Responses:
    """Computes responses of rows; what segments were fitted to is kept from one call to the next.

    Args:
        attributor: whose record, rows and curvature they are.
    """

    def __init__(self, attributor: "SourceAttributor") -> None:
        self.attributor = attributor
        checkpoints = attributor.method == "source" and attributor.options.checkpoints
        self.settings = replace(attributor.walk_settings(), checkpoints=checkpoints)
        self.stages = attributor.record.stages
        self.rows = attributor.all_rows()
        self._engines: dict[int, tuple[RowGradients, dict[str, str]]] = {}
        self._segments: dict[tuple[int, int], _Segment | None] = {}

    def engine(self, position: int) -> tuple[RowGradients, dict[str, str]]:
        """Engine of a stage's model, and the canonical names of its parameters."""
        if position not in self._engines:
            given = (self.rows, lambda gradients: {}, self.settings, self.attributor.build_model, None)
            self._engines[position] = open_stage(self.stages, position, *given)[:2]
        return self._engines[position]

    def final(self) -> RowGradients:
        """Engine of the last stage's model, at the final weights."""
        gradients = self.engine(len(self.stages) - 1)[0]
        enter_epochs(gradients, self.stages[-1], self.stages[-1].segments[-1])
        self.stages[-1].load_weights(gradients.model, "final")
        return gradients

    def of(self, position: int, numbers: np.ndarray) -> Vectors:
        """Responses of some rows of a stage.

        Args:
            position: of the stage.
            numbers: of the rows.

        Returns:
            Name in the last stage's model -> `[rows, *parameter.shape]`.
        """
        arrived, names = None, {}
        for place in range(position, len(self.stages)):
            gradients, now = self.engine(place)
            if arrived is None:
                arrived = zeros(gradients, len(numbers))
            else:
                check_handover(self.stages[place - 1], self.stages[place])
                known = {names[name]: y for name, y in arrived.items()}
                arrived = zeros(gradients, len(numbers))
                # What a later stage replaced has no way to the answer; what it added starts without displacement.
                arrived |= {name: known[canonical] for name, canonical in now.items() if canonical in known}
            names = now
            for segment in self.stages[place].segments:
                enter_epochs(gradients, self.stages[place], segment)
                found = self._segment(place, segment)
                if found is not None:
                    own = self._own(place, segment, found, numbers) if place == position else {}
                    found.places[0]()
                    arrived = found.response(own or _nothing(found, gradients, len(numbers)), arrived)
        return arrived

    def _segment(self, place: int, segment: SegmentRecord) -> _Segment | None:
        """The segment's flow and response; `None` if nothing moved in it."""
        key = (place, segment.index)
        if key not in self._segments:
            self._segments[key] = self._fit(place, segment)
        return self._segments[key]

    def _fit(self, place: int, segment: SegmentRecord) -> _Segment | None:
        stage, gradients, settings = self.stages[place], self.engine(place)[0], self.settings
        flow = segment_flow(segment, gradients, settings)
        if flow.length <= 0:
            return None
        rows = self.rows[stage.name]
        steps = segment.checkpoint_steps if settings.checkpoints else []
        where = [(segment.index, step) for step in steps] or [segment.index]
        places = [partial(stage.load_weights, gradients.model, each) for each in where]
        places[0]()
        weights, seed = segment.row_weights()[rows.example], settings.seed + 7919 * segment.index
        several = places if len(places) > 1 else ()
        sample = draw_sample(rows, weights, gradients, settings, seed, segment.objective_scale(), several)
        return _Segment(flow, make_response(settings.curvature, flow, sample), places)

    def _own(self, place: int, segment: SegmentRecord, found: _Segment, numbers: np.ndarray) -> Vectors:
        """The rows' gradients in a segment that visited them, weighted as scores are; empty if it visited none."""
        rows, gradients = self.rows[self.stages[place].name], self.engine(place)[0]
        names = [name for name in gradients.parameters if found.flow.trains(name)]
        parts = segment.applied_parts() if self.settings.momentum else [(names, segment.row_weights())]
        by_part = [weights[rows.example] for _, weights in parts]
        part_of = {name: part for part, (own, _) in enumerate(parts) for name in own}
        position = np.full(self.stages[place].num_rows, -1)
        position[numbers] = np.arange(len(numbers))
        visited = np.flatnonzero(sum(np.abs(weights) for weights in by_part) * (position[rows.row] >= 0))
        if not len(visited):
            return {}
        own = {name: y for name, y in zeros(gradients, len(numbers)).items() if name in names}
        scale, parts = found.flow.length * len(found.places), Parts()
        run = lambda pieces: gradients.run(rows.collated(pieces, self.settings.device), names)  # noqa: E731
        for load in found.places:
            load()
            for pieces, done in (part for batch in rows.batches(visited) for part in parts(run, batch)):
                index = torch.as_tensor(position[rows.row[pieces]], device=self.settings.device)
                scales = [torch.as_tensor(weights[pieces] / scale).to(index.device) for weights in by_part]
                for name, some, grads in gradients.blocks(done, names):
                    weighted = as_rows(grads) * scales[part_of[name]][some, None].to(grads)
                    as_rows(own[name]).index_add_(0, index[some], weighted)
        return own


def zeros(gradients: RowGradients, count: int) -> Vectors:
    """No displacement of any parameter, `count` times."""
    return {name: parameter.new_zeros((count, *parameter.shape)) for name, parameter in gradients.parameters.items()}


def _nothing(found: _Segment, gradients: RowGradients, count: int) -> Vectors:
    return {name: y for name, y in zeros(gradients, count).items() if found.flow.trains(name)}


def products(queries: Vectors, responses: Vectors) -> torch.Tensor:
    """Exact scores `[queries, rows]`, float64."""
    return sum((as_rows(q) @ as_rows(responses[name]).T).double() for name, q in queries.items())


def rows_at_once(gradients: RowGradients, memory_budget: int, limits: Sequence[int] = (1, 2048)) -> int:
    """Rows whose responses, and what makes them, fit the memory budget: six times their gradients."""
    each = sum(parameter.numel() * parameter.element_size() for parameter in gradients.parameters.values())
    return int(min(max(memory_budget // (6 * each), limits[0]), limits[1]))
