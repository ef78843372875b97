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
"""An average with its confidence interval, by drawing queries (and seeds of retraining) anew."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: of the queries asked.
        low, high: 95 % bootstrap confidence interval (Efron 1979); NaN where there is one query only, of which
            nothing can be said.
        per_query: float64 `[queries]`, what was averaged, if it was an average.
    """

    value: float
    low: float
    high: float
    per_query: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_estimate(values: np.ndarray, num_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean over queries, or over seeds and queries.

    Args:
        values: `[queries]` or `[seeds, queries]`; seeds are drawn anew together with the queries, since an interval
            over queries alone would take the noise of one training for a fact.
        num_bootstrap: draws.
        seed: of the draws.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    found = bootstrap(lambda seeds, queries: values[np.ix_(seeds, queries)].mean(), values.shape, num_bootstrap, seed)
    return Estimate(found.value, found.low, found.high, values.mean(axis=0))


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    shape: tuple[int, int],
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Interval of any figure.

    Args:
        statistic: of seed numbers and query numbers; first asked for all of them, then for draws with replacement.
        shape: number of seeds and of queries.
        num_bootstrap: draws.
        seed: of the draws.
    """
    num_seeds, num_queries = shape
    value = float(statistic(np.arange(num_seeds), np.arange(num_queries)))
    if num_queries < 2 or num_bootstrap < 1:
        return Estimate(value, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    drawn = [
        statistic(generator.integers(num_seeds, size=num_seeds), generator.integers(num_queries, size=num_queries))
        for _ in range(num_bootstrap)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))
