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
"""What building an index will cost, before it is built."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..attribution.calibration import calibrate, seconds_per_token
from ..attribution.cost import JointCost
from ..attribution.plan import Plan, StagePlan
from ..curvature import JointCurvature
from ..curvature.block import GradientMoments
from ..curvature.joint import grouped
from ..gradients import RowGradients
from .build import NUM_CHECKS, check
from .responses import Responses, rows_at_once


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor


def plan_index(attributor: "SourceAttributor", numbers: int, precision: str) -> Plan:
    """Predict passes, time, memory and the size of the index. See `SourceAttributor.plan_index`."""
    check(attributor, numbers, precision)
    attributor.record.require_complete()
    responses = Responses(attributor)
    gradients = responses.final()
    sizes = {name: parameter.numel() for name, parameter in gradients.parameters.items()}
    total, element = sum(sizes.values()), attributor.dtype.itemsize
    at_once = rows_at_once(gradients, attributor.memory_budget)
    speed = calibrate(attributor, gradients, responses.stages[-1], 1)
    row_seconds = _row_seconds(attributor, responses, gradients)
    stages = [_stage_plan(responses, position, at_once) for position in range(len(responses.stages))]
    seconds = sum(stage.sample_tokens * speed.pass_seconds + stage.score_tokens * row_seconds for stage in stages)
    rows = responses.rows[responses.stages[-1].name]
    sampled = attributor.num_samples * float(rows.lengths[rows.trained].mean())
    seconds += 2 * sampled * row_seconds  # for the coordinates
    operations = _operations(responses, gradients, stages, at_once)
    seconds += operations / speed.operations_per_second + speed.first_seconds
    model = sum(parameter.numel() * parameter.element_size() for parameter in gradients.model.parameters())
    dense = attributor.num_samples * total * element
    memory = {
        "model": model,
        "responses": 6 * at_once * total * element,
        "sample columns": min(
            dense, max(attributor.memory_budget, attributor.num_samples * max(sizes.values()) * element)
        ),
        "sample space": 6 * 8 * attributor.num_samples**2,
        "coordinates": _coordinate_numbers(gradients) * element,
    }
    if not isinstance(attributor.curvature, JointCurvature):
        memory["sample columns"] = memory["sample space"] = 0
    return Plan(
        "building an index of Source",
        attributor.curvature_name,
        0,
        total,
        stages[::-1],
        seconds,
        memory,
        sum(stage.num_bytes for stage in responses.stages),
        _index_bytes(attributor, gradients, sum(stage.num_rows for stage in stages), numbers, precision),
    )


def _row_seconds(attributor: "SourceAttributor", responses: Responses, gradients: RowGradients) -> float:
    """For each token, of a row's gradients as they are."""

    def gradients_of(batch: dict) -> None:
        for _, _, grads in gradients.blocks(gradients.run(batch)):
            grads.mul_(1.0)  # weighted and added

    rows = responses.rows[responses.stages[-1].name]
    return seconds_per_token(gradients_of, rows, rows.batches(rows.trained)[:1], attributor.device)


def _stage_plan(responses: Responses, position: int, at_once: int) -> StagePlan:
    """Gradients of a stage's rows in segments that visited them; each file takes those samples and later ones."""
    attributor, stage = responses.attributor, responses.stages[position]
    rows = responses.rows[stage.name]
    places = [len(part.checkpoint_steps) if responses.settings.checkpoints else 1 for part in stage.segments]
    visits = [part.scored(responses.settings.momentum)[rows.example] for part in stage.segments]
    tokens = sum(int(rows.lengths[own].sum()) * max(1, count) for own, count in zip(visits, places, strict=True))
    passes = sampled = 0
    for later in responses.stages[position:]:
        own = responses.rows[later.name]
        passes += _passes(responses) * len(later.segments)
        mean = float(own.lengths[own.trained].mean())
        sampled += int(_passes(responses) * len(later.segments) * attributor.num_samples * mean)
    files = math.ceil(len(rows.trained_rows) / at_once)
    return StagePlan(stage.name, len(rows.trained_rows), len(stage.segments), passes * files, files * sampled, tokens)


def _passes(responses: Responses) -> int:
    """Over the sample of a segment, for each file."""
    attributor, gradients = responses.attributor, responses.final()
    if not isinstance(attributor.curvature, JointCurvature):
        return 0  # blocks are fitted once
    dense = {name: attributor.num_samples * p.numel() * p.element_size() for name, p in gradients.parameters.items()}
    groups = len(grouped(attributor.memory_budget, dense))
    return groups + (groups > 1)


def _operations(responses: Responses, gradients: RowGradients, stages: list[StagePlan], at_once: int) -> float:
    """Arithmetic of the responses, and of turning them into coordinates."""
    attributor = responses.attributor
    rows = responses.rows[responses.stages[-1].name]
    samples = attributor.num_samples if isinstance(attributor.curvature, JointCurvature) else 0
    tail = getattr(attributor.curvature, "tail", True)
    shapes = [(tuple(p.shape), False, name in gradients.vocabulary) for name, p in gradients.parameters.items()]
    mean = float(rows.lengths[rows.trained].mean())
    cost = lambda vectors: JointCost(samples, mean, vectors, tail).of_all(shapes)  # noqa: E731
    later, found = 0, 0.0
    for stage in reversed(stages):
        later += stage.num_segments
        found += later * (cost(2 * stage.num_rows) - cost(0)) + stage.num_segments * cost(0)
    turned = sum(p.numel() * sum(_sides(gradients, name)) for name, p in gradients.parameters.items())
    count = sum(stage.num_rows for stage in stages)
    return found + 2 * turned * (count + 3 * attributor.num_samples)


def _sides(gradients: RowGradients, name: str) -> tuple[int, int]:
    """Lengths of a parameter's sides that coordinates turn; 0 for those that they leave."""
    shape = gradients.parameters[name].shape
    moments, rows = GradientMoments(shape, name in gradients.vocabulary), shape[0] if shape else 1
    return rows * moments.want_left, max(1, shape.numel() // max(rows, 1)) * moments.want_right


def _coordinate_numbers(gradients: RowGradients) -> int:
    """Bases and scales."""
    sides = [_sides(gradients, name) for name in gradients.parameters]
    return sum(left**2 + right**2 for left, right in sides) + sum(p.numel() for p in gradients.parameters.values())


def _index_bytes(
    attributor: "SourceAttributor", gradients: RowGradients, rows: int, numbers: int, precision: str
) -> int:
    """What is written: of each row its numbers, their places, its scale and number, and its scores for the check."""
    size = sum(parameter.numel() for parameter in gradients.parameters.values())
    count, value = min(numbers, size), 1 if precision == "int8" else attributor.dtype.itemsize
    longest, place = (255, 1) if size <= 64 * count else (65535, 2)
    # Gaps are about geometric; those that are too long are bridged by zeros.
    missed = np.exp(-longest * count / size)
    bridges = missed / (1 - missed)
    each = count * (1 + bridges) * (value + place) + 8 + 4 + 8 + 4 * NUM_CHECKS
    return int(rows * each) + _coordinate_numbers(gradients) * attributor.dtype.itemsize
