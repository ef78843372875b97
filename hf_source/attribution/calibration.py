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
"""What `plan()` measures on the machine: time and memory of a few real batches, and the speed of products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..budget import clock, give_back, held_by_process
from ..curvature.block import GradientMoments, as_matrices, rotate
from ..curvature.columns import holds_factored
from ..gradients import RowGradients
from ..gradients.rerun import region
from ..gradients.rules import Call, Rule
from ..recording import StageRecord
from ..recording.sharding import local
from ..source import score_rows
from .cost import JointCost
from .methods.projected import ProjectedOptions


if TYPE_CHECKING:
    from .attributor import SourceAttributor
    from .rows import StageRows


_TURNED = 2**22
"""Numbers that the speed of products is measured with, at most."""

_VECTOR_BYTES = 2**28
"""Query vectors that a calibration makes; the time of more is that of these and of one, continued."""

_LONG = 5.0
"""Seconds that one of the timings may take, of which there are three."""

_MOST = 8
"""Vectors that the products of rows with are timed for, however large, if there are as many queries."""


@dataclass(frozen=True)
class Calibration:
    """Of one stage's model on its rows.

    Attributes:
        pass_seconds: for each token, of forward and backward with per-row gradients.
        score_seconds: for each token, of what the method does with a row, the pass included.
        first_seconds: once, of checking the rules and of the queries' gradients.
        operations_per_second: of products of matrices, of the size of those that take the curvature longest.
        batch_bytes: that a batch of `max_tokens_per_batch` leaves between its forward and its backward pass, and what
            goes back through its largest layer; of as many tokens as there are, if they are fewer.
        rows_bytes: that batches of rows take: as much, or more if a few of them left more with the process, with which
            memory that is freed in small pieces stays.
        token_bytes: the same for each token.
        column_token_bytes: that the sample's columns hold for each token, of parameters whose columns are factored.
    """

    pass_seconds: float
    score_seconds: float
    first_seconds: float
    operations_per_second: float
    batch_bytes: int
    rows_bytes: int
    token_bytes: float
    column_token_bytes: float


def calibrate(
    attributor: "SourceAttributor",
    gradients: RowGradients,
    stage: StageRecord,
    num_queries: int,
    together: int | None = None,
) -> Calibration:
    """Run a few batches of a stage, at its final weights; rows meet so many queries at once, all by default."""
    rows = attributor.rows(stage)
    start = clock(attributor.device)
    if not gradients.checked:
        rows.prepare(gradients)
        stage.load_weights(gradients.model, "final")
        start = clock(attributor.device)
        gradients.check(rows.collated(rows.shortest(2), attributor.device))
    checking = clock(attributor.device) - start
    batches = rows.batches(rows.trained)
    chosen = [batches[i] for i in sorted({0, len(batches) // 2, len(batches) - 1})]
    narrow = attributor.vector_dtype
    token_bytes, column_bytes = _bytes_per_token(gradients, rows, chosen[0][:4], attributor.device, narrow)
    if attributor.vector_dtype is not None:
        column_bytes *= attributor.vector_dtype.itemsize / attributor.dtype.itemsize
    if not isinstance(attributor.options, ProjectedOptions):
        chosen = _affordable(_scoring(gradients, 1, narrow), rows, chosen, attributor.device)
    tokens, timed = (max(len(some) * int(rows.lengths[some].max()) for some in each) for each in (batches, chosen))
    kept = 0

    def seconds(work: Callable[[dict], object]) -> float:
        nonlocal kept
        give_back()
        before = held_by_process()
        found = seconds_per_token(work, rows, chosen, attributor.device)
        kept = max(kept, int((held_by_process() - before) * tokens / timed))
        return found

    if isinstance(attributor.options, ProjectedOptions):
        alone = scoring = seconds(_projecting(attributor, gradients, stage))
    else:
        largest = max(parameter.numel() * parameter.element_size() for parameter in gradients.parameters.values())
        held = num_queries if together is None else together
        most = min(held, max(_MOST, _VECTOR_BYTES // largest))
        # Gradients are made of their factors for two vectors, but not for one.
        fewest = min(2, most)
        alone, few, scoring = (
            seconds(_scoring(gradients, count, attributor.vector_dtype)) for count in (1, fewest, most)
        )
        scoring = max(few, scoring)
        scoring += (scoring - few) * (held - most) / max(1, most - fewest)
    first = checking + num_queries * float(rows.lengths[rows.trained].mean()) * alone  # a query is about a row
    speed = _operations_per_second(attributor, *_longest(attributor, gradients))
    batch = int(token_bytes * tokens)
    return Calibration(alone, scoring, first, speed, batch, max(batch, kept), token_bytes, column_bytes)


def _affordable(
    work: Callable[[dict], object], rows: "StageRows", chosen: list[np.ndarray], device: torch.device
) -> list[np.ndarray]:
    """The batches, or some rows of one where all of them would take long."""
    some = chosen[0][:2]
    work(rows.collated(some, device))  # warm-up
    start = clock(device)
    work(rows.collated(some, device))
    each = (clock(device) - start) / len(some)
    if each * sum(map(len, chosen)) <= _LONG:
        return chosen
    return [chosen[len(chosen) // 2][: max(2, int(_LONG / each))]]


def _scoring(gradients: RowGradients, count: int, dtype: torch.dtype | None) -> Callable[[dict], object]:
    """Products with so many vectors, each parameter's in the same memory."""
    largest = max(gradients.parameters.values(), key=torch.numel)
    memory = largest.new_ones(count * largest.numel(), dtype=dtype or largest.dtype)
    vectors = {
        name: memory[: count * parameter.numel()].view(count, *parameter.shape)
        for name, parameter in gradients.parameters.items()
    }
    return lambda batch: score_rows(gradients, batch, vectors)


def _projecting(
    attributor: "SourceAttributor", gradients: RowGradients, stage: StageRecord
) -> Callable[[dict], object]:
    own = gradients.only(name for name in gradients.parameters if name in stage.trainable)
    projector = attributor.options.projector(attributor, stage, own)
    return lambda batch: projector.project(own, own.run(batch))


def seconds_per_token(
    work: Callable[[dict], object], rows: "StageRows", chosen: list[np.ndarray], device: torch.device
) -> float:
    """Seconds that some work takes for each token of batches of rows."""
    work(rows.collated(chosen[0][:2], device))  # warm-up
    tokens = sum(int(rows.lengths[numbers].sum()) for numbers in chosen)
    start = clock(device)
    for numbers in chosen:
        work(rows.collated(numbers, device))
    return (clock(device) - start) / tokens


def _bytes_per_token(
    gradients: RowGradients,
    rows: "StageRows",
    numbers: np.ndarray,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """What a batch takes, and what of it the sample's columns hold.

    A batch: what autograd keeps of it and what rules read, each once, and three times the largest for its gradient.
    """
    batch = rows.collated(numbers, device)
    own = {local(parameter).untyped_storage().data_ptr() for parameter in gradients.model.parameters()}
    by_region: dict[int, dict[int, int]] = {}  # a layer that is run again lets go what it held

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        source = tensor if tensor._base is None else tensor._base
        # Weights that came from other processes are let go once their layer is done.
        if place.data_ptr() not in own and not isinstance(source, nn.Parameter):
            held = by_region.setdefault(region(), {})
            held[place.data_ptr()] = max(held.get(place.data_ptr(), 0), place.nbytes())
        return tensor.detach()  # an output that its own node held would hold the node

    columns: dict[int, torch.Tensor] = {}  # by place, and held: no other may come to lie there

    def call_arrived(name: str, rule: Rule, call: Call, num_rows: int) -> None:
        note(call.input)
        if holds_factored(rule, call, num_rows, gradients.parameters[name], dtype):
            columns.update({tensor.data_ptr(): tensor for tensor in (call.input, call.grad)})

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients.stream(batch, list(gradients.parameters), call_arrived, lambda *block: None)
    tokens = max(1, len(numbers) * int(rows.lengths[numbers].max()))
    largest = max((size for held in by_region.values() for size in held.values()), default=0)
    outside = sum(by_region.pop(0, {}).values())
    of_batch = outside + max((sum(held.values()) for held in by_region.values()), default=0) + 3 * largest
    return of_batch / tokens, sum(tensor.nbytes for tensor in columns.values()) / tokens


def _longest(attributor: "SourceAttributor", gradients: RowGradients) -> tuple[torch.Size, bool]:
    """Shape of the parameter whose part of `joint` curvature takes longest; whether it starts with a vocabulary."""
    cost, known = JointCost(attributor.num_samples, 0.0, 0), gradients.vocabulary
    parts = {name: cost.of(each.shape, False, name in known) for name, each in gradients.parameters.items()}
    name = max(parts, key=parts.get)
    return gradients.parameters[name].shape, name in known


def _operations_per_second(attributor: "SourceAttributor", shape: torch.Size, diagonal_left: bool) -> float:
    """Operations a second of the device, from second moments of gradients of this shape, turned on their sides."""
    count = max(1, min(attributor.num_samples, _TURNED // shape.numel()))
    grads = torch.ones(count, *shape, dtype=attributor.dtype, device=attributor.device)
    matrices, seconds = as_matrices(grads), []
    moments = GradientMoments(shape, diagonal_left)
    if not moments.want_left and not moments.want_right:  # no side to turn: a sum over samples
        moments.want_left = True
    for _ in range(4):  # the first is a warm-up
        start = clock(attributor.device)
        moments.add(matrices)
        float(rotate(matrices, moments.left, moments.right)[0, 0, 0])  # waits for the device
        seconds.append(clock(attributor.device) - start)
    turned = sum(len(side) for side in (moments.left, moments.right) if side is not None)
    return 4 * grads.numel() * turned / min(seconds[1:])
