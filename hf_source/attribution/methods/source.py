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
"""`source` and `fast-source`: segment by segment. `stepwise`: step by step. `unrolled`: the exact derivative."""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ...gradients.shards import Shards
from ...source import ExactProducts, Products, SampledProducts, unroll, walk
from ..queries import Queries
from .base import Scores, carries_on_disk


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


@dataclass(frozen=True)
class FastSourceOptions:
    """Settings of `fast-source`.

    Attributes:
        damping: of the inverse in `curvature="ekfac-hybrid"`, as a share of each block's mean eigenvalue; no other
            curvature of Source has one.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ConfigError(f"damping={self.damping}: the inverse needs a positive damping (0.1 is usual).")


@dataclass(frozen=True)
class SourceOptions(FastSourceOptions):
    """Settings of `source`.

    Attributes:
        damping: see `FastSourceOptions`.
        checkpoints: take gradients at the weights stored along each segment, where the record holds some
            (`checkpoints_per_segment` of `SourceConfig`); `False` for the segments' average weights.
    """

    checkpoints: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.checkpoints, bool):
            raise ConfigError(f"checkpoints={self.checkpoints!r}: method='source' takes True or False.")


@dataclass(frozen=True)
class StepwiseOptions:
    """Settings of `stepwise`.

    Attributes:
        draws: labels drawn per visit of a row; more is more accurate, and each costs a pass.
    """

    draws: int = 16

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws={self.draws}: at least one draw of labels is needed (16 is usual).")


def source(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Source (Bae et al. 2024, arXiv 2405.12186) with the attributor's curvature; nats.

    Gradients are averaged over the checkpoints of a segment where the record holds some, else taken at its averages.
    """
    return _walk(attributor, queries, attributor.options.checkpoints)


def fast_source(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """FAST-SOURCE (Bae et al. 2024): Source at the segments' average weights; nats."""
    return _walk(attributor, queries, checkpoints=False)


def _walk(attributor: "SourceAttributor", queries: Queries, checkpoints: bool) -> Scores:
    own = {"checkpoints": checkpoints, "work": attributor.work(queries), "shards": attributor.shards}
    if carries_on_disk(attributor, len(queries)):
        own["carry_in"] = attributor.cache_dir or Path(tempfile.gettempdir())
        own["carry_in"].mkdir(parents=True, exist_ok=True)
    scores = walk(
        attributor.record.stages,
        attributor.all_rows(),
        lambda gradients: attributor.query_gradients(gradients, queries, attributor.vector_dtype),
        replace(attributor.walk_settings(), **own),
        attributor.build_model if attributor.shards is None else partial(attributor.build_model, device="cpu"),
    )
    return scores if attributor.shards is None else _until_done(attributor.shards, scores)


def _until_done(shards: Shards, scores: Scores) -> Scores:
    try:
        yield from scores
    finally:
        shards.release()


def unrolled(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Exact derivative of the recorded training (see `source/unrolled.py`); nats. For some dozen queries."""
    return _unroll(attributor, queries, ExactProducts())


def stepwise(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Source with a segment for every step and the optimizer's real moments; nats, for any number of queries.

    Exact unrolling, but for the curvature of a step's batch, which is the Gauss-Newton matrix of labels drawn from the
    model (`source/products.py`).
    """
    return _unroll(attributor, queries, SampledProducts(attributor.options.draws, probes=attributor.probes))


def _unroll(attributor: "SourceAttributor", queries: Queries, products: Products) -> Scores:
    return unroll(
        attributor.record.stages,
        attributor.all_rows(),
        lambda gradients: attributor.query_gradients(gradients, queries),
        replace(attributor.walk_settings(), work=attributor.work(queries)),
        attributor.build_model,
        products,
    )
