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
"""Fact retrieval: does the row that states a fact come out on top when the model repeats it?"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .estimate import Estimate, mean_estimate


@dataclass(frozen=True)
class Retrieval:
    """How high the right row ranks among all rows, over queries that have one.

    Attributes:
        recall_at_1, recall_at_5: share of queries whose right row is among the first 1 or 5.
        mrr: mean reciprocal rank.
        num_queries: queries with a right row.
        ranks: int64 `[num_queries]`, place of the right row, 1 for the first.
    """

    recall_at_1: float
    recall_at_5: float
    mrr: float
    num_queries: int
    ranks: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int]:
        """JSON-able, with the keys `recall@1`, `recall@5`, `mrr`, `num_queries`."""
        figures = {"recall@1": self.recall_at_1, "recall@5": self.recall_at_5, "mrr": self.mrr}
        return {**figures, "num_queries": self.num_queries}

    def estimates(self) -> dict[str, Estimate]:
        """The figures with their 95 % intervals over queries, by the keys of `to_dict`."""
        per_query = {"recall@1": self.ranks <= 1, "recall@5": self.ranks <= 5, "mrr": 1 / self.ranks}
        return {name: mean_estimate(values) for name, values in per_query.items()}


def retrieval(scores: np.ndarray, right_rows: Sequence[int | None]) -> Retrieval:
    """Rank the right row of each query by score.

    Ties count against the method: a row that scores as much as the right one ranks before it.

    Args:
        scores: `[queries, rows]`.
        right_rows: the row that states the fact, or `None` to leave the query out.

    Raises:
        ValueError: if no query has a right row.
    """
    asked = [(query, row) for query, row in enumerate(right_rows) if row is not None]
    if not asked:
        raise ValueError("No query has a right row, so there is nothing to retrieve.")
    ranks = np.asarray([int((scores[query] >= scores[query, row]).sum()) for query, row in asked])
    found = float((ranks <= 1).mean()), float((ranks <= 5).mean()), float((1 / ranks).mean())
    return Retrieval(*found, len(ranks), ranks)
