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
"""Subset removal: does a query's loss rise without the rows that are said to support it?

For each query, the `k` rows with the largest scores are removed and the stage is trained again; the figure is the rise
of that query's loss,

    QLD_k = mean over queries of  f_q(without the top k of q) - f_q(with all rows),      nats,

as in the subset removal of Bae et al. 2024 (arXiv 2405.12186) and Ilyas et al. 2022 (arXiv 2202.00622),
where it is called brittleness. Without the `k` *lowest* rows the loss should fall. What any removal does is shown by
two controls: random rows, and random rows with the same histogram of a column (label, source, language): a method that
only finds rows of the right class does no better than these.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError
from .estimate import Estimate, bootstrap, mean_estimate
from .row_sets import (
    Removals,
    candidate_rows,
    check_column,
    check_scores,
    check_seeds,
    check_sizes,
    matched_rows,
    ranked,
)


CONTROL = "random"
MATCHED = "matched"


@dataclass(frozen=True)
class Removal:
    """What removing rows did to the queries' losses.

    Attributes:
        method: whose rows; `"random"` for the control.
        direction: `"random"` (the control), `"top"`, `"bottom"`, or `"matched"` (random rows of the classes of the
            method's top rows).
        k: rows removed per query.
        changes: float64 `[seeds, queries]`, loss without the rows minus loss with all, nats (mean over the draws of a
            control).
        random: float64 `[seeds, draws, queries]`, the same for each draw of `k` random rows.
        seconds: of all retrainings that were made together.
        settings: of the evaluation.
    """

    method: str
    direction: str
    k: int
    changes: np.ndarray
    random: np.ndarray
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rise(self) -> Estimate:
        """Mean rise of the loss, nats."""
        return mean_estimate(self.changes)

    @property
    def excess(self) -> Estimate:
        """Mean rise beyond that of random rows, query by query; nats."""
        return mean_estimate(self.changes - self.random.mean(axis=1))

    @property
    def ratio(self) -> Estimate:
        """Mean rise over the mean absolute change that random rows make: the normalised figure, 0 for no effect.

        The absolute change, since random rows move a loss both ways and their mean can be next to nothing.
        """
        size = np.abs(self.random).mean(axis=1)

        def of(seeds: np.ndarray, queries: np.ndarray) -> float:
            chosen = np.ix_(seeds, queries)
            return self.changes[chosen].mean() / max(size[chosen].mean(), np.finfo(float).tiny)

        return bootstrap(of, self.changes.shape)


def subset_removal(
    retraining: Any,
    scores: Mapping[str, np.ndarray],
    k: Sequence[int] = (1, 5, 10),
    *,
    bottom: bool = True,
    num_random: int = 8,
    column: Sequence[Any] | None = None,
    num_matched: int = 2,
    rows: Sequence[int] | None = None,
    seeds: Sequence[int | None] = (None,),
    seed: int = 0,
) -> list[Removal]:
    """Remove each query's top rows by each method, retrain, and measure the loss.

    Retrainings: for each of `seeds`, one with all rows, `num_random` for each of `k` (each tells of all queries), and,
    for each method and each of `k`, one per query, two with `bottom`, and `num_matched` more with `column`. Methods
    that name the same rows share them.

    Args:
        retraining: `losses(keep, seed)`, `stage`, `num_rows`, `num_queries`.
        scores: method -> `[queries, rows]`, by row number, larger = more supportive.
        k: numbers of rows to remove.
        bottom: also remove the lowest rows.
        num_random: random sets for each of `k`.
        column: class of each row, for controls of the same classes.
        num_matched: such controls per query, method and `k`.
        rows: numbers of the rows that may be removed; by default all that trained.
        seeds: of training; `None` is the run's own seed and order.
        seed: of the random rows.

    Returns:
        For each of `k`: the random control, then each method's `top`, `bottom` and `matched`.

    Raises:
        ConfigError: for a `k` that leaves nothing, or no control.
        DataError: if scores or column do not fit.
    """
    scores = {name: check_scores(values, retraining, name) for name, values in scores.items()}
    candidates = candidate_rows(retraining, rows)
    sizes = check_sizes(k, len(candidates))
    if num_random < 1:
        raise ConfigError(
            f"num_random={num_random}: without random rows a rise of the loss says nothing; give 1 or more."
        )
    classes, seeds = check_column(column, retraining.num_rows), check_seeds(seeds)
    if classes is not None and num_matched < 1:
        raise ConfigError(f"num_matched={num_matched}: give 1 or more, or no column to match.")
    generator = np.random.default_rng(seed)
    removals, start = Removals(retraining.num_rows), time.perf_counter()
    queries = range(retraining.num_queries)
    # (method, direction, k) -> retraining's number, [draws, queries]
    asked: dict[tuple[str, str, int], np.ndarray] = {}
    for size in sizes:
        drawn = [removals.add(generator.choice(candidates, size=size, replace=False)) for _ in range(num_random)]
        asked[CONTROL, CONTROL, size] = np.tile(np.array(drawn)[:, None], (1, len(queries)))
        for name, values in scores.items():
            order = ranked(values, candidates)
            asked[name, "top", size] = np.array([[removals.add(order[q, :size]) for q in queries]])
            if bottom:
                asked[name, "bottom", size] = np.array([[removals.add(order[q, -size:]) for q in queries]])
            if classes is not None:
                asked[name, MATCHED, size] = np.array(
                    [
                        [removals.add(matched_rows(order[q, :size], classes, candidates, generator)) for q in queries]
                        for _ in range(num_matched)
                    ]
                )
    changes = removals.changes(retraining, seeds)
    seconds = time.perf_counter() - start
    settings = {
        "num_random": num_random,
        "seeds": list(seeds),
        "seed": seed,
        "retrainings": len(removals) * len(seeds),
    }
    found = {key: changes[:, numbers, np.arange(len(queries))] for key, numbers in asked.items()}
    random = {size: found[CONTROL, CONTROL, size] for size in sizes}
    return [
        Removal(name, way, size, values.mean(axis=1), random[size], seconds, settings)
        for (name, way, size), values in found.items()
    ]
