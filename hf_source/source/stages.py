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
"""Entering a stage at its end: its model, what influence passes through, and the vectors under its names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..gradients import RowGradients
from ..gradients.shards import Shards
from ..recording import StageRecord
from .together import Together
from .work import Work


Vectors = dict[str, torch.Tensor]
"""Parameter name -> `[queries, *parameter.shape]`."""


@dataclass
class WalkSettings:
    """What a walk needs beside the record.

    Attributes:
        curvature: object with `propagate(vectors, flow, sample)`.
        num_samples: rows of the sample matrix of each segment.
        dtype: of gradients and scores' arithmetic.
        device: where the model runs.
        seed: of the sampled rows and labels.
        together: the processes that share the work: each scores its share of the rows, and has the curvature of its
            share of the parameters.
        momentum: weigh each visit by the updates that applied its gradient, rather than by the step that took it.
        progress: wraps an iterable with a description, e.g. in a progress bar.
        checkpoints: take gradients at the weights stored along a segment, where there are any.
        targets: stage name -> what is scored in place of all rows of the stage, such as the tokens of a few of them
            (`RowTokens`); samples of the curvature are still drawn from the rows.
        work: keeps what is done.
        probes: what sampled gradients are drawn with, `"labels"` or `"signs"`.
        vector_dtype: that the sample's factored columns are held in; `dtype` by default.
        carry_in: folder where vectors that are carried on wait while a segment's rows are scored; `None`: in memory.
        shards: the processes, where they hold the model between them.
    """

    curvature: Any
    num_samples: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    seed: int = 0
    together: Together = Together()
    momentum: bool = False
    progress: Callable[[Sequence, str], Any] = lambda items, description: items
    checkpoints: bool = False
    targets: Mapping[str, Any] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    probes: str = "labels"
    vector_dtype: torch.dtype | None = None
    carry_in: Path | None = None
    shards: Shards | None = None


def open_stage(
    stages: Sequence[StageRecord],
    position: int,
    rows: Mapping[str, Any],
    query_gradients: Callable[[RowGradients], Vectors],
    settings: WalkSettings,
    models: Callable[[StageRecord], nn.Module],
    vectors: Vectors | None,
    together: Together | None = None,
) -> tuple[RowGradients, dict[str, str], Vectors]:
    """Enter a stage at its end.

    Args:
        stages, rows, query_gradients, settings, models: see `walk`.
        position: of the stage among the stages.
        vectors: at the start of the stage after it, by canonical name; `None` for the last stage.
        together: processes whose vectors stay with them, if they do: only this one's parameters are entered.

    Returns:
        The engine of the stage's model, canonical names of its parameters, and the vectors at its end by own name.
    """
    stage = stages[position]
    place = settings.device if settings.shards is None else torch.device("cpu")  # of a model that is whole
    model = models(stage).to(place, settings.dtype).eval()
    names = wanted_parameters(model, stages[: position + 1])
    own = rows[stage.name]
    gradients = RowGradients(model, own.task, list(names))
    own.prepare(gradients)
    batch = own.collated(own.shortest(2), place)
    gradients.check(batch)
    if settings.shards is not None:
        settings.shards.take(gradients, batch)
    if together is not None and together.shards > 1:
        names = together.shard(trained_sizes(stages), names)
        gradients = gradients.only(names)
    if vectors is not None:
        return gradients, names, enter_stage(vectors, names, stages, position, gradients)
    stage.load_weights(model, "final")
    return gradients, names, query_gradients(gradients)


def wanted_parameters(model: nn.Module, stages: Sequence[StageRecord]) -> dict[str, str]:
    """Parameters of the last stage's model that this or an earlier stage trains: its own name -> canonical name.

    Weights frozen in this stage but trained before carry influence through it, so they are wanted too.
    """
    linked = []  # stages that weights were handed on from
    for stage in reversed(stages):
        linked.append(stage)
        if not stage.continues_parent:
            break
    trained = {stage.canonical_name(name) for stage in linked for name in stage.trainable}
    own, last = set(stages[-1].trainable), stages[-1]
    return {
        name: last.canonical_name(name)
        for name, _ in model.named_parameters()
        if name in own or last.canonical_name(name) in trained
    }


def trained_sizes(stages: Sequence[StageRecord]) -> dict[str, int]:
    """Entries of every parameter that some stage trains, by canonical name."""
    return {
        stage.canonical_name(name): prod(stage.tensor_info[name]["shape"])
        for stage in stages
        for name in stage.trainable
    }


def enter_stage(
    vectors: Vectors,
    names: Mapping[str, str],
    stages: Sequence[StageRecord],
    position: int,
    gradients: RowGradients,
) -> Vectors:
    """Vectors at the end of an earlier stage, under the names of its model.

    Args:
        vectors: at the start of stage `position + 1`, by canonical name.
        names: from `wanted_parameters` of stage `position`.
        stages, position: in the order of training, and the stage entered.
        gradients: engine of the entered stage's model.

    Raises:
        UnsupportedError: if the later stage does not start where this one ended, or changed a parameter's shape.
    """
    check_handover(stages[position], stages[position + 1])
    count = next(iter(vectors.values()))
    entered = {}
    for name, canonical in names.items():
        parameter = gradients.parameters[name]
        vector = vectors.get(canonical)
        if vector is None:  # a part that the later stage replaced: what it learnt had no way to the answer
            vector = count.new_zeros((len(count), *parameter.shape))
        if vector.shape[1:] != parameter.shape:
            raise UnsupportedError(
                f"Parameter {name!r} has shape {tuple(parameter.shape)} in stage {stages[position].name!r} and "
                f"{tuple(vector.shape[1:])} in the next one: resize embeddings before the first recorded stage."
            )
        entered[name] = vector
    return entered


def check_handover(earlier: StageRecord, later: StageRecord) -> None:
    """A stage must start from the weights the one before it ended with, or influence cannot pass between them."""
    if not later.continues_parent:
        raise UnsupportedError(
            f"Stage {later.name!r} does not start from the weights stage {earlier.name!r} ended with: train it from "
            "the recorded model, or record the stages in separate records."
        )
