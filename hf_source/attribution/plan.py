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
"""What an attribution will cost, before anything runs: passes, tokens, time, memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..curvature import EKFACCurvature, JointCurvature, column_bytes
from ..curvature.joint import PIECE_BYTES
from ..gradients import ClassificationTask, RowGradients
from ..gradients.rerun import layers_of
from ..recording import StageRecord
from ..source import DIRECTIONS_BYTES, state_stride, wanted_parameters
from .calibration import Calibration, calibrate
from .cost import JointCost
from .methods import METHODS
from .methods.base import carries_on_disk, queries_together
from .methods.projected import ProjectedOptions
from .queries import Queries


if TYPE_CHECKING:
    from .advice import Advice
    from .attributor import SourceAttributor
    from .rows import StageRows


UNROLLING = ("stepwise", "unrolled")
SAMPLING = ("source", "fast-source", "influence")
_FEATURE_BYTES, _PIECE_BYTES = 4, 8
"""Of a number of a row's features in a file, and of the row's own."""

CURVED = ("source", "influence")
"""Methods that draw a sample for `curvature=`."""


@dataclass
class StagePlan:
    """Cost of walking through one stage."""

    name: str
    num_rows: int
    num_segments: int
    sample_passes: int  # over the sampled rows, per segment (per step where every step is one)
    sample_tokens: int  # in all passes and segments
    score_tokens: int  # over all segments


@dataclass
class Plan:
    """Predicted cost; `print` it.

    Attributes:
        method, curvature: as set.
        num_queries, num_parameters: sizes that decide the cost.
        stages: in the order they are walked, last to first.
        seconds: predicted wall time, from a calibration pass over a few rows.
        memory: bytes held at the peak, by what holds them; for Source, in that of its phases that takes most.
        disk: bytes read from the record.
        written: bytes that are kept in `cache_dir` at most, or, of vectors that are carried on, in a temporary folder.
        members: of the ensemble, one after another; `seconds` and `disk` are those of all, `stages` those of each.
        training_tokens: that each member trains on first.
        walks: that the queries are taken in, some after others, where the memory budget has no room for the vectors of
            all; part of `seconds` and of the stages' tokens.
        one_segment: the same with `num_segments=1`, where more of them are walked through.
        advice: which method is the better buy, where that can be said.
        few_samples: names of stages that classify rows of which most are not in the sample.
        filter: in two-stage search, what proposes the rows, and its own plan, which is part of `seconds`, `disk` and
            `written`.
    """

    method: str
    curvature: str
    num_queries: int
    num_parameters: int
    stages: list[StagePlan]
    seconds: float
    memory: dict[str, int] = field(default_factory=dict)
    disk: int = 0
    written: int = 0
    members: int = 1
    training_tokens: int = 0
    walks: int = 1
    one_segment: "Plan | None" = None
    advice: "Advice | None" = None
    few_samples: tuple[str, ...] = ()
    filter: "tuple[str, Plan] | None" = None

    @property
    def peak_memory(self) -> int:
        """Bytes, beside the interpreter and its libraries."""
        own = sum(self.memory.values())
        return own if self.filter is None else max(own, self.filter[1].peak_memory)

    @property
    def _writes(self) -> str:
        return f"keeps up to {self.written / 2**20:,.0f} MiB" if self.written else "writes nothing"

    def __str__(self) -> str:
        how = f"{self.method} ({self.curvature})" if self.method in CURVED else self.method
        counted = f"{self.num_queries} queries, " if self.num_queries else ""
        lines = [f"{how}: {counted}{self.num_parameters:,} parameters"]
        if self.members > 1:
            first = f", after training on {self.training_tokens:,} tokens" if self.training_tokens else ""
            lines.append(f"  {self.members} members, one after another, each{first}:")
        if self.walks > 1:
            lines.append(
                f"  {self.walks} walks, some queries after others: memory_budget has no room for the vectors of all"
            )
        if self.filter is not None:
            name, own = self.filter
            lines.append(f"  first {name}: about {own.seconds:,.1f} s, {own.peak_memory / 2**20:,.0f} MiB")
        for stage in self.stages:
            if not stage.num_segments:
                lines.append(f"  look up {stage.name!r}: {stage.num_rows:,} rows")
                continue
            lines.append(
                f"  walk and score {stage.name!r}: {stage.num_rows:,} rows, "
                f"{stage.num_segments} segment{'s' * (stage.num_segments != 1)}, "
                f"{stage.sample_passes} passes over the sample of each, "
                f"{stage.sample_tokens + stage.score_tokens:,} tokens"
            )
        parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in self.memory.items())
        lines.append(f"  about {self.seconds:,.0f} s; peak memory {self.peak_memory / 2**20:,.0f} MiB ({parts})")
        lines.append(f"  disk: reads {self.disk / 2**20:,.0f} MiB of the record, {self._writes}")
        if self.few_samples:
            lines.append(
                f"  samples: {' and '.join(map(repr, self.few_samples))} classifies rows, and a trained model is sure "
                "of most, which then say nothing of the curvature: take as many as there are rows with "
                "`num_samples=`, where that can be paid for."
            )
        if self.one_segment is not None:
            fewer = f"about {self.one_segment.seconds:,.0f} s, {self.one_segment.peak_memory / 2**20:,.0f} MiB"
            lines.append(f"  with num_segments=1: {fewer}, somewhat less accurate")
        lines += [] if self.advice is None else [str(self.advice)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Measured:
    """What estimates of several methods for one record have in common.

    Attributes:
        stages: that are walked through, first to last.
        gradients: engine of the last one's model.
        num_queries: asked.
        calibration: of the last stage, with what the attributor's method does.
    """

    stages: list[StageRecord]
    gradients: RowGradients
    num_queries: int
    calibration: Calibration


def measure(attributor: "SourceAttributor", queries: Queries, target: StageRecord) -> Measured:
    """Time a few batches of the last stage; `target` is the stage whose rows are scored."""
    stages = [stage for stage in attributor.record.stages if stage.index >= target.index]
    last = stages[-1]
    model = attributor.build_model(last, attributor.place)
    wanted = list(wanted_parameters(model, attributor.record.stages))
    if attributor.shards is None:
        gradients = RowGradients(model, attributor.rows(last).task, wanted)
    else:
        gradients = attributor.engine(last, model, wanted)
    together = queries_together(attributor, len(queries), METHODS[attributor.method])
    calibration = calibrate(attributor, gradients, last, len(queries), together)
    if attributor.shards is not None:  # which may have timed different numbers of batches
        attributor.shards.settle()
        attributor.shards.release()
    return Measured(stages, gradients, len(queries), calibration)


def plan_tokens(attributor: "SourceAttributor", queries: Queries, target: StageRecord, numbers: np.ndarray) -> Plan:
    """Predict the cost of the scores of every label token of some rows: a pass of the row for each of them."""
    measured = measure(attributor, queries, target)
    plan, rows = estimate(attributor, measured), attributor.rows(target)
    wanted = rows.trained[np.isin(rows.row[rows.trained], numbers)]
    for stage in plan.stages:
        walked, stage.score_tokens = stage.score_tokens, 0
        if stage.name == target.name:
            stage.num_rows = len(np.unique(rows.row[wanted]))
            for segment in target.segments:
                visited = wanted[segment.scored(attributor.momentum)[rows.example[wanted]]]
                stage.score_tokens += int((rows.lengths[visited] * rows.items[visited]).sum())
        plan.seconds += (stage.score_tokens - walked) * measured.calibration.score_seconds
    return plan


def estimate(attributor: "SourceAttributor", measured: Measured) -> Plan:
    """Predict the cost of the attributor's method."""
    if attributor.index is not None:
        return _index_plan(attributor, measured)
    stages, gradients, count = measured.stages, measured.gradients, measured.num_queries
    last = stages[-1]
    sizes = [parameter.numel() for parameter in gradients.parameters.values()]
    columns = _column_bytes(attributor, gradients, last)
    passes = _sample_passes(attributor, columns)
    together = queries_together(attributor, count, METHODS[attributor.method])
    walks, speed = math.ceil(count / max(1, together)), measured.calibration
    plans = [_stage_plan(attributor, stage, passes, together) for stage in reversed(stages)]
    curvature = _curvature_operations(attributor, gradients, last, plans, columns, together)
    for plan in plans:
        plan.sample_tokens, plan.score_tokens = walks * plan.sample_tokens, walks * plan.score_tokens
    seconds = sum(plan.sample_tokens * speed.pass_seconds + plan.score_tokens * speed.score_seconds for plan in plans)
    seconds += walks * curvature / speed.operations_per_second + speed.first_seconds
    return Plan(
        attributor.method,
        attributor.curvature_name,
        count,
        sum(sizes),
        plans,
        seconds,
        _memory(attributor, gradients, together, columns, speed),
        sum(stage.num_bytes for stage in stages),
        _written(attributor, gradients, stages, count, together),
        few_samples=_few_samples(attributor, stages),
        walks=walks,
    )


def _few_samples(attributor: "SourceAttributor", stages: list[StageRecord]) -> tuple[str, ...]:
    """Stages of which most rows are in no sample though each is but one item, an answer that the model may be sure of.

    Measured on FashionMNIST (README): LDS .37 with a sixth of the rows, .43 and .44 with all of them.
    """
    if attributor.method not in SAMPLING or not isinstance(attributor.curvature, JointCurvature | EKFACCurvature):
        return ()
    rows = [(stage.name, attributor.rows(stage)) for stage in stages]
    return tuple(
        name
        for name, own in rows
        if isinstance(own.task, ClassificationTask)
        and own.items.max(initial=0) == 1
        and len(own.trained) > 2 * attributor.num_samples
    )


def _index_plan(attributor: "SourceAttributor", measured: Measured) -> Plan:
    """Answers from an index: the queries' gradients, in its coordinates, times what is kept of every row."""
    index, count = attributor.index, measured.num_queries
    shapes = [tuple(parameter.shape) for parameter in measured.gradients.parameters.values()]
    sizes = [parameter.numel() for parameter in measured.gradients.parameters.values()]
    rotated = sum(2 * size * (shape[0] + size // shape[0]) for shape, size in zip(shapes, sizes, strict=True) if shape)
    rows = sum(stage.num_rows for stage in attributor.record.stages)
    operations = count * (rotated + 2 * index.numbers * rows)
    seconds = measured.calibration.first_seconds + operations / measured.calibration.operations_per_second
    element = next(iter(measured.gradients.parameters.values())).element_size()
    model = sum(p.numel() * p.element_size() for p in measured.gradients.model.parameters())
    return Plan(
        "an index of Source",
        attributor.curvature_name,
        count,
        sum(sizes),
        [StagePlan(each.name, each.num_rows, 0, 0, 0, 0) for each in reversed(attributor.record.stages)],
        seconds,
        {"model": model, "query vectors": 2 * count * sum(sizes) * element, "the index": index.num_bytes},
        index.num_bytes + model,
    )


def _written(
    attributor: "SourceAttributor",
    gradients: RowGradients,
    stages: list[StageRecord],
    num_queries: int,
    together: int,
) -> int:
    """Vectors of a segment and of the one after it, and scores; of projected methods, every row's features."""
    element = (attributor.vector_dtype or attributor.dtype).itemsize
    vectors = sum(parameter.numel() * element for parameter in gradients.parameters.values())
    if attributor.cache_dir is None:
        return together * vectors if carries_on_disk(attributor, together) else 0
    if isinstance(attributor.options, ProjectedOptions):
        walked = {stage.name for stage in stages}
        return sum(
            (_FEATURE_BYTES * size + _PIECE_BYTES)
            * len(attributor.rows(stage).trained)
            * _kept_features(attributor, stage)
            for stage, size, _ in _feature_sizes(attributor)
            if stage.name in walked
        )
    scores = num_queries * sum(4 * len(stage.segments) * stage.num_rows for stage in stages)
    return 3 * together * vectors + scores


def _kept_features(attributor: "SourceAttributor", stage: StageRecord) -> int:
    """Sets of features of a stage's rows."""
    return len(stage.segments) if getattr(attributor.options, "checkpoints", "") == "segments" else 1


def _curvature_operations(
    attributor: "SourceAttributor",
    gradients: RowGradients,
    stage: StageRecord,
    plans: list[StagePlan],
    columns: list[int],
    num_queries: int,
) -> float:
    """What `joint` curvature takes beside the passes over its sample."""
    if attributor.method not in ("source", "fast-source") or not isinstance(attributor.curvature, JointCurvature):
        return 0.0
    rows, count = attributor.rows(stage), attributor.num_samples
    shapes = []
    for (name, parameter), held in zip(gradients.parameters.items(), columns, strict=True):
        dense = count * parameter.numel() * parameter.element_size()
        shapes.append((tuple(parameter.shape), held < dense, name in gradients.vocabulary))
    tokens, segments = float(rows.lengths[rows.trained].mean()), sum(plan.num_segments for plan in plans)
    narrow, tail = attributor.vector_dtype not in (None, attributor.dtype), attributor.curvature.tail
    cost = lambda vectors: JointCost(count, tokens, vectors, tail, narrow).of_all(shapes)  # noqa: E731
    # Vectors go through the first segment for its rows only, through the others also to those before.
    return cost(2 * num_queries) * (segments - 1) + cost(num_queries)


def _column_bytes(attributor: "SourceAttributor", gradients: RowGradients, stage: StageRecord) -> list[int]:
    """What each parameter's columns of the sample matrix take."""
    rows, count = attributor.rows(stage), attributor.num_samples
    tokens = count * float(rows.lengths[rows.trained].mean()) if "input_ids" in (rows.columns or ()) else None
    met = {name: count if tokens is None and name in gradients.single else tokens for name in gradients.parameters}
    parameters, dtype = gradients.parameters.items(), attributor.vector_dtype
    return [column_bytes(p, count, met[name], gradients.rules(name), dtype) for name, p in parameters]


def _sample_passes(attributor: "SourceAttributor", columns: list[int]) -> int:
    if isinstance(attributor.curvature, JointCurvature):
        return attributor.curvature.num_passes(columns)
    return {"ekfac": 2, "ekfac-hybrid": 3, "identity": 0}.get(attributor.curvature_name, 1)


def _stage_plan(attributor: "SourceAttributor", stage: StageRecord, passes: int, num_queries: int) -> StagePlan:
    rows = attributor.rows(stage)
    if attributor.method in UNROLLING:
        return _unrolling_plan(attributor, stage, rows, num_queries)
    visited = [np.flatnonzero(segment.scored(attributor.momentum)[rows.example]) for segment in stage.segments]
    places = [1] * len(visited)  # sets of weights that a segment's rows are scored at
    if getattr(attributor.options, "checkpoints", False):
        places = [max(1, len(segment.checkpoint_steps)) for segment in stage.segments]
    if attributor.method not in ("source", "fast-source"):
        visited, passes = [rows.trained] * row_passes(attributor, stage), 0
        places = [1] * len(visited)
    score_tokens = sum(int(rows.lengths[v].sum()) * count for v, count in zip(visited, places, strict=True))
    sample_tokens = sum(
        int(rows.lengths[numbers].mean() * attributor.num_samples * passes) for numbers in visited if len(numbers)
    )
    if _iterates(attributor):  # about three passes a query in every iteration
        options = attributor.options
        passes = 3 * num_queries * options.iterations
        share = min(1.0, options.product_rows / len(rows.trained)) if options.product_rows else 1.0
        sample_tokens = int(passes * score_tokens * share)
    segments = stage.segments if getattr(attributor.options, "checkpoints", "") == "segments" else [None]
    number = len(visited) if attributor.method == "source" else len(segments)
    return StagePlan(stage.name, stage.num_rows, number, passes, sample_tokens, score_tokens)


def row_passes(attributor: "SourceAttributor", stage: StageRecord) -> int:
    """Passes over all rows of a stage, of a method that does not walk."""
    counted = getattr(attributor.options, "num_passes", None)
    return 1 if counted is None else counted(stage)


def _iterates(attributor: "SourceAttributor") -> bool:
    return getattr(attributor.options, "solver", None) == "cg"


def _unrolling_plan(
    attributor: "SourceAttributor", stage: StageRecord, rows: "StageRows", num_queries: int
) -> StagePlan:
    """Every visit of a row costs about four passes, and what its curvature takes."""
    visits = sum(segment.num_visits()[rows.example] for segment in stage.segments)
    tokens = int((visits * rows.lengths).sum())
    # A gradient of a gradient is two backward passes, and those are two thirds of a pass each.
    products = attributor.options.draws if attributor.method == "stepwise" else math.ceil(4 * num_queries / 3)
    return StagePlan(stage.name, stage.num_rows, stage.num_steps, products, products * tokens, 4 * tokens)


def _visited_bytes(attributor: "SourceAttributor", token_bytes: float) -> int:
    """What the pass over the largest of the last stage's first micro-batches leaves."""
    stage = attributor.record.stages[-1]
    rows = attributor.rows(stage)
    first = [batch for step in stage.steps().micro_batches[:16] for batch in step]
    pieces = [rows.pieces_of(batch.rows) for batch in first]
    tokens = max((int(len(each) * rows.lengths[each].max()) for each in pieces if len(each)), default=0)
    return int(token_bytes * tokens)


def _projected_memory(attributor: "SourceAttributor", num_queries: int) -> dict[str, int]:
    """Features of the largest stage, as float32 and once as float64, and matrices of the smaller of their sides."""
    features = matrices = 0
    for stage, size, parts in _feature_sizes(attributor):
        rows = len(attributor.rows(stage).trained_rows)
        features = max(features, (4 + 8 + 4) * (rows + num_queries) * size)
        matrices = max(matrices, 3 * 8 * min(rows + num_queries, max(parts)) ** 2)
    return {"projected gradients": features, "their second moments": matrices}


def _feature_sizes(attributor: "SourceAttributor") -> Iterator[tuple[StageRecord, int, list[int]]]:
    """Dimensions that each stage's gradients are projected to, in all and by block."""
    model = attributor.build_model(attributor.record.stages[-1])
    last = attributor.record.stages[-1]
    names = {last.canonical_name(name): name for name, _ in model.named_parameters()}
    for stage in attributor.record.stages:
        own = [stage.canonical_name(name) for name in stage.trainable]
        gradients = RowGradients(model, attributor.rows(stage).task, [names[name] for name in own if name in names])
        projector = attributor.options.projector(attributor, stage, gradients)
        parts = [part.stop - part.start for part in getattr(projector, "parts", {}).values()] or [projector.size]
        yield stage, projector.size, parts


def _memory(
    attributor: "SourceAttributor",
    gradients: RowGradients,
    num_queries: int,
    columns: list[int],
    speed: Calibration,
) -> dict[str, int]:
    sizes = [parameter.numel() for parameter in gradients.parameters.values()]
    element = next(iter(gradients.parameters.values())).element_size()
    total, model = sum(sizes) * element, _model_bytes(gradients)
    if isinstance(attributor.options, ProjectedOptions):
        return {"model": model, **_projected_memory(attributor, num_queries)}
    memory = {"model": model, "query vectors": 3 * num_queries * total, "a batch": speed.rows_bytes}
    if attributor.method in UNROLLING:
        steps = max(stage.num_steps for stage in attributor.record.stages)
        memory["query vectors"] *= 2  # moments of the adjoint beside it, and the products
        stride = state_stride(steps, total)
        kept = steps if stride == 1 else stride - (-steps // stride)
        memory["states of the run"] = 3 * kept * total  # weights and two moments
        if attributor.method == "unrolled":  # a batch's activations and their derivatives, of some queries at once
            each = 3 * _visited_bytes(attributor, speed.token_bytes)
            memory["second derivatives"] = each + min(num_queries * each, max(each, DIRECTIONS_BYTES))
        return memory
    if _iterates(attributor):
        memory["query vectors"] *= 2  # residual, direction and their products
        memory["products"] = attributor.memory_budget
    if attributor.method in CURVED and isinstance(attributor.curvature, JointCurvature):
        # One parameter's columns are never split between groups.
        most = max(attributor.memory_budget, max(columns))
        memory["sample columns"] = min(_held_columns(attributor, gradients, columns, speed), most)
        memory["sample space"] = 6 * 8 * attributor.num_samples**2
        if attributor.method in ("source", "fast-source"):
            held = (attributor.vector_dtype or attributor.dtype).itemsize
            mine = sum(sizes) // attributor.vector_shards
            segments = sum(len(stage.segments) for stage in attributor.record.stages)
            both = segments > 1 and not carries_on_disk(attributor, num_queries)
            memory["query vectors"] = (2 if both else 1) * num_queries * mine * held
            memory["one parameter's block"] = max(
                _block_bytes(attributor, size * element, held, num_queries)
                for size, held in zip(sizes, columns, strict=True)
            )
            memory["segment"] = total  # its preconditioner
            memory = _heaviest_phase(memory, speed.batch_bytes)
    return memory


def _model_bytes(gradients: RowGradients) -> int:
    """What a process holds of the model: of one that is shared, its part, and a layer and the one after it whole."""
    size = lambda part: sum(p.numel() * p.element_size() for p in part.parameters())  # noqa: E731
    if gradients.shards is None:
        return size(gradients.model)
    return size(gradients.model) // gradients.shards.count + 2 * max(map(size, layers_of(gradients.model)))


def _heaviest_phase(memory: dict[str, int], batch: int) -> dict[str, int]:
    """The sample is taken in batches, blocks are fitted to it, and then rows are scored in batches."""
    fitted = ("sample columns", "sample space", "one parameter's block")
    taking = {"a batch": batch, "sample columns": memory["sample columns"]}
    fitting = {part: memory[part] for part in fitted}
    scoring = {"a batch": memory["a batch"]}
    always = {part: size for part, size in memory.items() if part not in ("a batch", *fitted)}
    return always | max(taking, fitting, scoring, key=lambda phase: sum(phase.values()))


def _held_columns(
    attributor: "SourceAttributor", gradients: RowGradients, columns: list[int], speed: Calibration
) -> int:
    """Of all parameters; what modules share, such as the input of several, is held once."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in gradients.parameters.values()]
    count, stage = attributor.num_samples, attributor.record.stages[-1]
    rows = attributor.rows(stage)
    dense = sum(held for held, size in zip(columns, sizes, strict=True) if held >= count * size)
    return min(sum(columns), int(dense + count * float(rows.lengths[rows.trained].mean()) * speed.column_token_bytes))


def _block_bytes(attributor: "SourceAttributor", size: int, held: int, num_vectors: int) -> int:
    """What the block of a parameter of `size` bytes takes beside its columns and vectors."""
    dense, budget = attributor.num_samples * size, attributor.memory_budget
    piece = max(1, min(budget // 4, PIECE_BYTES))
    whole = held >= dense and dense <= budget // 2
    # Whitened and turned columns, of all samples or of some; moments and bases; parts of the vectors, turned.
    return (2 * dense if whole else 2 * held + 2 * piece) + 3 * max(size, min(num_vectors * size, piece))
