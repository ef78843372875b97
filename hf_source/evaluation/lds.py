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
"""The linear datamodelling score: do scores predict what retraining without rows really does?

Remove random subsets of rows, retrain, and correlate over subsets, for each query, the predicted change of its loss
(the sum of the removed rows' scores) with the real one: Spearman's rank correlation, averaged over queries (Ilyas et
al. 2022, arXiv 2202.00622; Park et al. 2023, arXiv 2303.14186).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..errors import ConfigError, DataError


@dataclass(frozen=True)
class LDS:
    """Linear datamodelling score.

    Attributes:
        mean: average over queries, between -1 and 1.
        low, high: 95 % bootstrap confidence interval.
        per_query: float64 `[queries]`.
    """

    mean: float
    low: float
    high: float
    per_query: np.ndarray

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def removal_masks(num_rows: int, num_subsets: int, fraction: float, seed: int = 0) -> np.ndarray:
    """Random subsets to remove, each `round(fraction * num_rows)` rows (at least one): bool `[subsets, rows]`."""
    generator = np.random.default_rng(seed)
    removed = np.zeros((num_subsets, num_rows), dtype=bool)
    size = max(1, round(fraction * num_rows))
    for subset in removed:
        subset[generator.choice(num_rows, size=size, replace=False)] = True
    return removed


def linear_datamodelling_score(
    scores: np.ndarray,
    removed: np.ndarray,
    losses: np.ndarray,
    num_bootstrap: int = 1000,
    seed: int = 0,
    over: Sequence[str] = ("queries", "subsets"),
) -> LDS:
    """Correlate predicted with real changes of the queries' losses.

    Args:
        scores: `[queries, rows]`, larger = more supportive.
        removed: bool `[subsets, rows]`.
        losses: `[subsets, queries]` after retraining without each subset, or `[seeds, subsets, queries]`: then their
            mean over seeds is correlated, which is the expected loss over the noise of training.
        num_bootstrap: draws for the interval.
        seed: of the draws.
        over: what is drawn anew: `"queries"` (would other questions give the same figure?), `"subsets"` (would other
            subsets?), or both.

    Raises:
        ConfigError: if `over` names something else.
        DataError: if the shapes do not fit, or a loss is not finite.
    """
    if not over or set(over) - {"queries", "subsets"}:
        raise ConfigError(f"over={tuple(over)}: draw anew 'queries', 'subsets' or both.")
    losses = np.asarray(losses, dtype=np.float64)
    losses = losses.mean(axis=0) if losses.ndim == 3 else losses
    if np.shape(scores) != (losses.shape[1], removed.shape[1]) or len(removed) != len(losses):
        raise DataError(
            f"Scores {np.shape(scores)} [queries, rows], removed {removed.shape} [subsets, rows] and losses "
            f"{losses.shape} [subsets, queries] do not fit together."
        )
    if not np.isfinite(losses).all():
        raise DataError("A loss after retraining is not finite: training diverged. Look at the learning rate.")
    predicted = removed.astype(np.float64) @ np.asarray(scores, dtype=np.float64).T  # (subsets, queries)
    per_query = _spearman(predicted, losses)
    generator = np.random.default_rng(seed)
    everything = {"subsets": np.arange(len(losses)), "queries": np.arange(losses.shape[1])}
    means = []
    for _ in range(num_bootstrap):
        drawn = {
            name: generator.integers(len(all_), size=len(all_)) if name in over else all_
            for name, all_ in everything.items()
        }
        chosen = np.ix_(drawn["subsets"], drawn["queries"])
        means.append(_spearman(predicted[chosen], losses[chosen]).mean())
    low, high = np.quantile(means, [0.025, 0.975]) if means else (np.nan, np.nan)
    return LDS(float(per_query.mean()), float(low), float(high), per_query)


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation of matching columns; 0 where a column is constant."""
    ranks = [rankdata(values, axis=0) for values in (first, second)]
    centred = [values - values.mean(axis=0) for values in ranks]
    norms = [np.sqrt((values**2).sum(axis=0)) for values in centred]
    product, scale = (centred[0] * centred[1]).sum(axis=0), norms[0] * norms[1]
    return np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
