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
"""What an evaluation will cost, from its own first retrainings; they are kept, so that nothing is spent twice."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attribution.attributor import SourceAttributor
from ..attribution.queries import Queries
from .evaluate import protocols_of, stacked_for
from .protocol import Retraining
from .protocols import LDSProtocol


@dataclass(frozen=True)
class EvaluationPlan:
    """Cost of the retrainings of an evaluation.

    Attributes:
        retrainings: in all.
        finished: of them in the cache, those that the plan made included.
        seconds_each: that one takes in a batch; `None` if none was left to time.
    """

    retrainings: int
    finished: int
    seconds_each: float | None

    @property
    def seconds(self) -> float:
        """What the retrainings that are missing will take."""
        return (self.retrainings - self.finished) * (self.seconds_each or 0.0)

    def __str__(self) -> str:
        left = self.retrainings - self.finished
        if not left or self.seconds_each is None:
            return f"All {self.retrainings} retrainings are there: only the scores of each method are left."
        return (
            f"{self.retrainings} retrainings, {self.finished} finished; {left} x {self.seconds_each:.2g} s = about "
            f"{self.seconds:.0f} s ({self.seconds / 3600:.1f} hours), and the scores of each method."
        )


def plan_evaluation(
    attributor: SourceAttributor,
    queries: Queries,
    *,
    protocols: Sequence[str | LDSProtocol] = ("removal",),
    retraining: Retraining | None = None,
    **options: Any,
) -> EvaluationPlan:
    """Time the first retrainings of an evaluation.

    Args:
        attributor, queries, protocols, retraining: see `evaluate`.
        options: `stage`, `cache` and the settings of the protocols, as for `evaluate`.
    """
    queries = attributor.encode(queries)
    made = {key: options.pop(key, None) for key in ("stage", "cache")}
    chosen = protocols_of(protocols, **options)
    retraining = retraining or stacked_for(attributor, queries, **made)
    return plan_retraining(retraining, [(p.removed(retraining.num_rows), p.seeds) for p in chosen])


def plan_retraining(
    retraining: Retraining, wanted: Sequence[tuple[np.ndarray, Sequence[int | None]]]
) -> EvaluationPlan:
    """Time one batch of what is missing.

    Args:
        retraining: has `missing` (which masks have no losses yet) and `at_once` (how many train together).
        wanted: masks of removed rows `[subsets, rows]`, and the seeds of each.
    """
    total = sum(len(removed) * len(seeds) for removed, seeds in wanted)
    left, each = 0, None
    for removed, seeds in wanted:
        for seed in seeds:
            missing = retraining.missing(~removed, seed)
            if each is None and len(missing):
                first = missing[: retraining.at_once]
                started = time.perf_counter()
                retraining.losses(~removed[first], seed)
                each = (time.perf_counter() - started) / len(first)
                missing = missing[len(first) :]
            left += len(missing)
    return EvaluationPlan(total, total - left, each)
