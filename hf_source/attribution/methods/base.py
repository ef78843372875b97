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
"""What a method is: a function that takes queries and yields the scores of one stage after another, last to first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...budget import queries_at_once
from ...curvature import JointCurvature
from ...errors import ConfigError
from ...recording import StageRecord
from ..queries import Queries


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


Scores = Iterator[tuple[StageRecord, np.ndarray]]
Vectors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class NoOptions:
    """Of a method without settings of its own."""


@dataclass(frozen=True)
class Method:
    """A way to score rows.

    Attributes:
        score: yields each stage, last to first, with float32 `[queries, rows by number]`; this process's share.
        options: dataclass of the method's own settings, which are keyword arguments of `SourceAttributor`; it raises
            `ConfigError` for values that make no sense.
        nats: whether scores are predicted changes of the query's loss; others have no unit.
        reads_text: compares texts, without a model or a task, so that any record will do.
        together: whether a query's scores depend on the other queries, or no vectors of theirs are held, so that all
            are taken at once whatever the memory budget.
    """

    score: Callable[["SourceAttributor", Queries], Scores]
    options: type = NoOptions
    nats: bool = False
    reads_text: bool = False
    together: bool = False

    def make_options(self, name: str, given: dict[str, Any], others: dict[str, "Method"]) -> Any:
        """The method's settings from keyword arguments.

        Raises:
            ConfigError: for a setting that the method does not have.
        """
        own = [field.name for field in fields(self.options)]
        for key in given:
            if key not in own:
                users = [other for other, method in others.items() if key in (f.name for f in fields(method.options))]
                hint = f" It belongs to method={' or '.join(map(repr, users))}." if users else ""
                listed = f"its own settings are {', '.join(own)}" if own else "it has no settings of its own"
                raise ConfigError(f"method={name!r} has no setting {key!r}: {listed}.{hint}")
        return self.options(**given)


def vectors_each(attributor: "SourceAttributor") -> int:
    """Vectors of a query that have to be held at once; of Source only those to score with.

    Those that are carried on to the segment before wait on disk where both do not fit: see `carries_on_disk`.
    """
    walks = attributor.method in ("source", "fast-source") and isinstance(attributor.curvature, JointCurvature)
    return 1 if walks else 2


def num_vector_bytes(attributor: "SourceAttributor", num_queries: int) -> int:
    """What vectors of some queries over all trained parameters take, in each of the processes that share them."""
    names = [(stage, name) for stage in attributor.record.stages for name in stage.trainable]
    # Stages that train the same weights have them in common.
    sizes = {stage.canonical_name(name): int(np.prod(stage.tensor_info[name]["shape"])) for stage, name in names}
    held = (attributor.vector_dtype or attributor.dtype).itemsize
    return num_queries * sum(sizes.values()) * held // attributor.vector_shards


def carries_on_disk(attributor: "SourceAttributor", num_queries: int) -> bool:
    """Whether vectors that are carried on from a segment to the one before have no room beside those that score."""
    budget, stages = attributor.query_budget, attributor.record.stages
    several = sum(len(stage.segments) for stage in stages) > 1
    walks = vectors_each(attributor) == 1
    return walks and several and budget is not None and 2 * num_vector_bytes(attributor, num_queries) > budget


def queries_together(attributor: "SourceAttributor", num_queries: int, method: Method) -> int:
    """How many of the queries are taken at once: all, or as many as the memory budget has room for."""
    if method.together:
        return num_queries
    size, each = num_vector_bytes(attributor, 1), vectors_each(attributor)
    return queries_at_once(attributor.query_budget, size, 1, num_queries, each)


def in_chunks(attributor: "SourceAttributor", queries: Queries, method: Method) -> Scores:
    """Scores of a method, of some queries after another where the vectors of all do not fit the memory budget."""
    step = queries_together(attributor, len(queries), method)
    if step >= len(queries):
        yield from method.score(attributor, queries)
        return
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(queries), step):
        for stage, scores in method.score(attributor, queries.part(slice(start, start + step))):
            found.setdefault(stage.name, []).append(scores)
    for stage in reversed(attributor.record.stages):
        if stage.name in found:
            yield stage, np.concatenate(found[stage.name])
