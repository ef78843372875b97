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
"""The backward walk: from the gradient of what was said, through every segment and stage, to the rows.

Starting from `q = grad f_q(theta_T)`, each segment, last to first, turns `q` into a scoring vector `x = F_r^T q` for
the rows it visited and into the `q` of the segment before (Bae et al. 2024, arXiv 2405.12186, equation 16; several
stages are more segments of the same run). A row's score in a segment is `w_m / s <x, grad l_m>` with `w_m` the summed
`learning rate x clip factor / loss items of the batch` of its real visits: the paper's `1 / N` when visits are
uniform. With `momentum`, the learning rate of a visit is that of the updates which its gradient really entered.

Gradients of a segment are taken at its average weights, or, with `checkpoints` and where the record has some, at each
of the weights stored along the segment: rows' products are averaged over them, and the sample of the curvature is
spread over them (the paper's own form; averages are its FAST-SOURCE).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..budget import give_back
from ..curvature import ExactCurvature, FisherSample, Flow, JointCurvature, as_preconditioners, systematic_sample
from ..gradients import RowGradients, RowLossTask
from ..gradients.contraction import add_dots, products
from ..gradients.rows import as_rows
from ..gradients.rules import Call, Rule
from ..gradients.task import task_labels
from ..recording import SegmentRecord, StageRecord
from .on_disk import VectorsOnDisk
from .resume import Resume, work_key
from .stages import Vectors, WalkSettings, open_stage
from .together import Kind, Together


def walk(
    stages: Sequence[StageRecord],
    rows: Mapping[str, Any],
    query_gradients: Callable[[RowGradients], Vectors],
    settings: WalkSettings,
    models: Callable[[StageRecord], nn.Module],
) -> Iterator[tuple[StageRecord, np.ndarray]]:
    """Score the rows of one stage after another, from the last to the first.

    Args:
        stages: in the order of training.
        rows: stage name -> `StageRows`, with the task of each stage.
        query_gradients: gives `q` at the final weights from the engine of the last stage's model.
        settings: see `WalkSettings`.
        models: builds a stage's model.

    Yields:
        The stage and its scores, float32 `[queries, rows]`: this process's share (zeros elsewhere).

    Raises:
        UnsupportedError: if a stage does not start from the weights the one before it ended with.
    """
    vectors: Vectors | None = None
    resume = Resume(stages, settings.work, lambda number: settings.together.least(number, settings.device))
    for position in range(len(stages) - 1, -1, -1):
        stage, own = stages[position], rows[stages[position].name]
        if resume.is_done(position):
            yield stage, resume.scores(position, settings.targets.get(stage.name, own))
            continue
        vectors, known = resume.vectors(position, vectors, settings.device)
        ask = query_gradients if known is None else lambda gradients: {}
        gradients, names, vectors = open_stage(
            stages, position, rows, ask, settings, models, vectors, settings.together
        )
        give_back()
        if known is not None:
            vectors = {name: known[canonical] for name, canonical in names.items()}
        targets = settings.targets.get(stage.name, own)
        scores = None
        for segment in reversed(stage.segments):
            if resume.is_done(position, segment):
                continue
            if scores is None:
                scores = resume.scores(position, targets, len(next(iter(vectors.values()))))
            carry = position > 0 or segment is not stage.segments[0]
            vectors = _through_segment(
                segment, stage, own, gradients, vectors, scores, settings, carry, names, work_key(position, segment)
            )
            resume.finished(position, segment)
        vectors = {names[name]: vector for name, vector in vectors.items()}
        del gradients
        yield stage, scores


def segment_flow(segment: SegmentRecord, gradients: RowGradients, settings: WalkSettings) -> Flow:
    """The segment's constants for every wanted parameter; `P = 0` for what it does not train."""
    like = dict(dtype=settings.dtype, device=settings.device)
    preconditioner = {name: tensor.to(**like) for name, tensor in segment.preconditioner().items()}
    decay = {name: tensor.to(**like) for name, tensor in segment.decay().items()}
    zero = torch.zeros((), **like)
    return Flow(
        segment.effective_learning_rate_sum,
        as_preconditioners({n: preconditioner.get(n, zero) for n in gradients.parameters}, segment.matrix_sides),
        {name: decay.get(name, zero) for name in gradients.parameters},
    )


def _through_segment(segment, stage, rows, gradients, vectors, scores, settings, carry, canonical, key) -> Vectors:
    flow, work = segment_flow(segment, gradients, settings), settings.work
    if flow.length <= 0:  # nothing moved: every step was skipped, or the learning rate was 0
        work.save(f"{key}.carried", {canonical[name]: vector for name, vector in vectors.items()})
        work.save(f"{key}.done", {"places": torch.tensor(0), "queries": torch.tensor(len(scores))})
        settings.together.least(1, settings.device)
        return vectors
    steps = segment.checkpoint_steps if settings.checkpoints else []
    places = [(segment.index, step) for step in steps] or [segment.index]
    enter = [partial(stage.load_weights, gradients.model, place) for place in places]
    enter = enter if settings.shards is None else settings.shards.places(enter)
    enter[0]()
    enter_epochs(gradients, stage, segment)
    scoring, vectors = _vectors_of(
        segment, stage, rows, gradients, vectors, flow, settings, enter, carry, canonical, key
    )
    parts = segment.applied_parts() if settings.momentum else [(list(scoring), segment.row_weights())]
    targets = settings.targets.get(stage.name, rows)
    parts = [(names, by_row[targets.example]) for names, by_row in parts]
    visited = np.flatnonzero(sum(np.abs(weights) for _, weights in parts))
    mine, shares = settings.together.rows
    batches = targets.batches(visited)[mine::shares] if scoring else []  # a shard may hold nothing that trained

    def scored(pieces: np.ndarray) -> np.ndarray:
        batch = targets.collated(pieces, settings.device)
        dots = score_rows(gradients, batch, scoring, [names for names, _ in parts]).double()
        scales = [torch.as_tensor(weights[pieces] / (flow.length * len(enter))) for _, weights in parts]
        return sum(dot * scale for dot, scale in zip(dots, scales, strict=True)).float().numpy()

    for number, load in enumerate(enter):
        if len(enter) > 1:
            load()
        title = f"scoring {stage.name}, segment {segment.index + 1}" + (f", checkpoint {number + 1}" if steps else "")
        for pieces, found in work.scored(f"{key}-{number}", batches, scored, settings.progress, title):
            np.add.at(scores, (slice(None), targets.row[pieces]), found)  # a row may have several pieces
    work.save(f"{key}.done", {"places": torch.tensor(len(enter)), "queries": torch.tensor(len(scores))})
    settings.together.least(1, settings.device)  # nobody drops what one that is killed now would ask all for again
    work.drop(f"{key}.scoring", *([] if carry else [f"{key}.carried"]))
    return vectors


def enter_epochs(gradients: RowGradients, stage: StageRecord, part: SegmentRecord | range) -> None:
    """Tell a task whose visits differ which epochs those of a segment, or of some steps, belong to."""
    task = gradients.task
    if isinstance(task, RowLossTask) and type(task).at_epochs is not RowLossTask.at_epochs:
        first, end = (part.start, part.stop) if isinstance(part, range) else (part.first_step, part.end_step)
        task.at_epochs(np.unique(stage.steps().epoch[first:end].astype(int)).tolist())


def _vectors_of(
    segment, stage, rows, gradients, vectors, flow, settings, enter, carry, canonical, key
) -> tuple[Vectors, Vectors]:
    """The segment's scoring vectors, and those that enter the segment before; from disk if they are there."""
    work = settings.work
    own = {name: known for known, name in canonical.items()}
    if settings.together.least(work.has(f"{key}.scoring"), settings.device):  # of all, or they are made by all
        carried = work.load(f"{key}.carried", settings.device) or {}
        return work.load(f"{key}.scoring", settings.device), {own[name]: vector for name, vector in carried.items()}
    weights = segment.row_weights()[rows.example]
    seed, scale = settings.seed + 7919 * segment.index, segment.objective_scale()
    sample = draw_sample(rows, weights, gradients, settings, seed, scale, enter if len(enter) > 1 else ())
    scoring, carried = _propagate(settings, vectors, flow, sample, carry)
    if carry and work.folder is not None:
        work.save(f"{key}.carried", {canonical[name]: vector for name, vector in carried.items()})
    work.save(f"{key}.scoring", scoring)
    return scoring, carried


def _propagate(
    settings: WalkSettings, vectors: Vectors, flow: Flow, sample: FisherSample, carry: bool
) -> tuple[Vectors, Vectors]:
    """Through the segment, each process with its own parameters' vectors; they are taken out of `vectors`."""
    together, curvature = settings.together, settings.curvature
    if together.shards > 1:
        return _propagate_own(settings, vectors, flow, sample, carry, together)
    # A dense matrix has no parts, and of few parameters some process would have none.
    if together.alone or isinstance(curvature, ExactCurvature) or len(vectors) < together.count:
        return _propagate_own(settings, vectors, flow, sample, carry, None)
    first = next(iter(vectors.values()))
    parameters = {name: each for name, each in sample.gradients.parameters.items() if name in vectors}
    kinds = {name: Kind((len(first), *each.shape), first.dtype) for name, each in parameters.items()}
    owners = together.owners({name: each.numel() for name, each in parameters.items()})
    for name in parameters:
        if owners[name] != together.index:
            del vectors[name]
    del first
    scoring, carried = _propagate_own(settings, vectors, flow, sample, carry, together)
    for name, kind in kinds.items():
        for found in ([scoring] if flow.trains(name) else []) + ([carried] if carry else []):
            mine = owners[name] == together.index
            given = together.given(found[name] if mine else None, owners[name], kind, settings.device)
            if not mine:
                found[name] = given
    # In one order everywhere, for sums over parameters round in theirs.
    return {name: scoring[name] for name in kinds if name in scoring}, carried


def _propagate_own(
    settings: WalkSettings,
    vectors: Vectors,
    flow: Flow,
    sample: FisherSample,
    carry: bool,
    together: Together | None,
) -> tuple[Vectors, Vectors]:
    """`joint` needs not hold the vectors twice, nor carry on what nobody asks for."""
    curvature, folder = settings.curvature, settings.carry_in
    if isinstance(curvature, JointCurvature):
        carried = VectorsOnDisk(folder, settings.device) if carry and folder is not None else None
        return curvature.propagate(
            vectors, flow, sample, carry=carry, consume=True, carried=carried, together=together
        )
    return curvature.propagate(vectors, flow, sample)


def draw_sample(
    rows: Any,
    weights: np.ndarray,
    gradients: RowGradients,
    settings: WalkSettings,
    seed: int,
    objective_scale: float = 1.0,
    places: Sequence[Callable[[], None]] = (),
) -> FisherSample:
    """The segment's sample: pieces of rows in proportion to their weight in it, in batches of similar length.

    With `places`, which put one set of weights after the other into the model, each has an equal share of the sample.
    """
    batches, entering = [], {}
    count = max(len(places), 1)
    for place in range(count):
        size = (settings.num_samples * (place + 1)) // count - (settings.num_samples * place) // count
        if size == 0:  # fewer samples than places
            continue
        if places:
            entering[len(batches)] = places[place]
        numbers = systematic_sample(weights, size, seed + 15485863 * place)
        batches += [rows.collated(part, settings.device) for part in rows.batches(numbers)]
    return FisherSample(gradients, batches, seed, objective_scale, entering, settings.probes, settings.vector_dtype)


def score_rows(
    gradients: RowGradients,
    batch: Mapping[str, torch.Tensor],
    vectors: Vectors,
    parts: Sequence[Collection[str]] | None = None,
) -> torch.Tensor:
    """Dot products of each row's gradient with each vector, on the CPU.

    Args:
        gradients: engine.
        batch: the rows.
        vectors: name -> `[vectors, *parameter.shape]`.
        parts: groups of parameters whose products are wanted apart.

    Returns:
        `[vectors, rows]`; with `parts`, `[parts, vectors, rows]`.
    """
    part_of = {name: index for index, names in enumerate(parts or [list(vectors)]) for name in names}
    count, like = len(next(iter(vectors.values()))), next(iter(gradients.parameters.values()))
    totals: dict[int, torch.Tensor] = {}

    def total(name: str, rows: int) -> torch.Tensor:
        return totals.setdefault(part_of[name], like.new_zeros((count, rows)))

    def add(name: str, rule: Rule, call: Call, rows: int) -> None:
        add_dots(rule, call, rows, vectors[name], total(name, rows))

    def add_rows(name: str, rows: slice, grads: torch.Tensor) -> None:
        total(name, num_rows)[:, rows] += products(as_rows(vectors[name]).to(grads), as_rows(grads))

    num_rows = len(task_labels(gradients.task, batch))
    gradients.stream(batch, vectors, add, add_rows)
    zero = like.new_zeros((count, num_rows))
    result = torch.stack([totals.get(index, zero) for index in range(len(parts or [0]))])
    return result.cpu() if parts is not None else result[0].cpu()
