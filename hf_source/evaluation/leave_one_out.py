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
"""Leave one out: is a score the number of nats that removing its row really costs?

Single rows are removed one at a time and the stage is trained again; predicted and real changes of the query's loss
are compared in rank (Spearman), along a line (Pearson) and in size,

    relative error = ||predicted - real|| / ||real||        over the rows of a query,

which is 0 for perfect predictions and 1 for a method that always says 0 (Koh & Liang 2017, arXiv 1703.04730, figure 2;
Basu et al. 2021, arXiv 2006.14651). The rows are each query's top and bottom ones, where a score claims something, and
random ones, which most rows are like.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from ..errors import ConfigError
from .estimate import Estimate, mean_estimate
from .row_sets import Removals, candidate_rows, check_scores, check_seeds, ranked


GROUPS = ("top", "random", "bottom")


@dataclass(frozen=True)
class LeaveOneOut:
    """Predicted and real effects of single rows.

    Attributes:
        method: whose scores.
        rows: int64 `[queries, removed]`, row numbers.
        groups: `[removed]`, why the row was chosen: `"top"`, `"random"`, `"bottom"`.
        predicted: float64 `[queries, removed]`, scores.
        real: float64 `[seeds, queries, removed]`, loss without the row minus loss with it, nats.
        seconds: of all retrainings that were made together.
        settings: of the evaluation.
    """

    method: str
    rows: np.ndarray
    groups: list[str]
    predicted: np.ndarray
    real: np.ndarray
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spearman(self) -> Estimate:
        """Mean rank correlation over the rows of a query."""
        return self._mean(lambda predicted, real: spearmanr(predicted, real).statistic)

    @property
    def pearson(self) -> Estimate:
        """Mean linear correlation over the rows of a query."""
        return self._mean(lambda predicted, real: pearsonr(predicted, real).statistic)

    @property
    def relative_error(self) -> Estimate:
        """Mean relative error of the predicted nats; only for methods whose scores are nats."""
        return mean_estimate(relative_errors(self.predicted, self.real.mean(axis=0)))

    def _mean(self, correlation: Any) -> Estimate:
        real = self.real.mean(axis=0)
        return mean_estimate([_or_zero(correlation, a, b) for a, b in zip(self.predicted, real, strict=True)])

    def figure(self, path: str | Path) -> None:
        """Draw predicted against real nats, one colour for each group of rows: `.png`, `.svg` or `.pdf`.

        Raises:
            ConfigError: if matplotlib is not installed, or the name ends otherwise.
        """
        if Path(path).suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"{path}: end the name of a figure in .svg, .png or .pdf.")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("The figure needs matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        real, groups = self.real.mean(axis=0), np.asarray(self.groups)
        for group in GROUPS:
            chosen = groups == group
            if chosen.any():
                axes.scatter(self.predicted[:, chosen], real[:, chosen], s=12, alpha=0.7, label=group)
        ends = [min(self.predicted.min(), real.min()), max(self.predicted.max(), real.max())]
        axes.plot(ends, ends, color="grey", linewidth=1, label="predicted = real")
        axes.set_xlabel(f"predicted by {self.method} (nats)")
        axes.set_ylabel("retrained without the row (nats)")
        axes.set_title(f"Spearman {self.spearman.value:.2f}, relative error {self.relative_error.value:.2f}")
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def relative_errors(predicted: np.ndarray, real: np.ndarray) -> np.ndarray:
    """`||predicted - real|| / ||real||` of each query: `[queries, rows]` twice to float64 `[queries]`."""
    norms = np.linalg.norm(real, axis=1).clip(np.finfo(np.float64).tiny)
    return np.linalg.norm(np.asarray(predicted, dtype=np.float64) - real, axis=1) / norms


def _or_zero(correlation: Any, first: np.ndarray, second: np.ndarray) -> float:
    """0 where one side is constant: it says nothing of the order."""
    return float(correlation(first, second)) if np.ptp(first) > 0 and np.ptp(second) > 0 else 0.0


def leave_one_out(
    retraining: Any,
    scores: Mapping[str, np.ndarray],
    *,
    num_top: int = 4,
    num_random: int = 4,
    num_bottom: int = 4,
    chosen_by: str | None = None,
    rows: Sequence[int] | None = None,
    seeds: Sequence[int | None] = (None,),
    seed: int = 0,
) -> list[LeaveOneOut]:
    """Remove single rows, retrain, and compare each method's scores with what happened.

    All methods are judged by the same rows, or one that names its own would be judged by easier ones.

    Args:
        retraining: `losses(keep, seed)`, `stage`, `num_rows`, `num_queries`.
        scores: method -> `[queries, rows]`, by row number.
        num_top, num_random, num_bottom: rows of each kind for a query, at least three together.
        chosen_by: the method whose top and bottom rows are removed; the first by default.
        rows: numbers of the rows that may be removed; by default all that trained.
        seeds: of training; `None` is the run's own seed and order.
        seed: of the random rows.

    Raises:
        ConfigError: for fewer than three rows, more than there are, or an unknown `chosen_by`.
        DataError: if scores do not fit.
    """
    scores = {name: check_scores(values, retraining, name) for name, values in scores.items()}
    chosen_by = next(iter(scores)) if chosen_by is None else chosen_by
    if chosen_by not in scores:
        raise ConfigError(f"chosen_by={chosen_by!r} is none of the methods {', '.join(scores)}.")
    candidates, seeds = candidate_rows(retraining, rows), check_seeds(seeds)
    wanted = num_top + num_random + num_bottom
    if min(num_top, num_random, num_bottom) < 0 or not 3 <= wanted <= len(candidates):
        raise ConfigError(
            f"num_top={num_top}, num_random={num_random}, num_bottom={num_bottom}: give 3 to {len(candidates)} rows "
            "in all; fewer have no rank correlation."
        )
    chosen = _choose(ranked(scores[chosen_by], candidates), num_top, num_random, num_bottom, seed)
    removals, start = Removals(retraining.num_rows), time.perf_counter()
    numbers = np.array([[removals.add([row]) for row in own] for own in chosen])
    changes = removals.changes(retraining, seeds)
    real = changes[:, numbers, np.arange(len(chosen))[:, None]]
    seconds = time.perf_counter() - start
    groups = ["top"] * num_top + ["random"] * num_random + ["bottom"] * num_bottom
    settings = {"chosen_by": chosen_by, "seeds": list(seeds), "seed": seed, "retrainings": len(removals) * len(seeds)}
    return [
        LeaveOneOut(name, chosen, groups, np.take_along_axis(values, chosen, axis=1), real, seconds, settings)
        for name, values in scores.items()
    ]


def _choose(order: np.ndarray, num_top: int, num_random: int, num_bottom: int, seed: int) -> np.ndarray:
    """Top, random others, bottom of every query: `[queries, removed]`."""
    generator = np.random.default_rng(seed)
    end = order.shape[1] - num_bottom
    return np.stack(
        [
            np.concatenate([own[:num_top], generator.choice(own[num_top:end], num_random, replace=False), own[end:]])
            for own in order
        ]
    )
