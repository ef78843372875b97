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
"""Agreement of a method with the exact derivative (`method="unrolled"`), for a few queries, without retraining.

What is compared is a row's score itself, over all rows: the order (Spearman), the first rows (overlap of the top `k`)
and, for methods in nats, the size (`||scores - exact|| / ||exact||`). It shows what a method's approximations cost;
what a derivative itself misses of a real removal is for `leave_one_out` and the LDS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from ..errors import ConfigError, DataError
from .estimate import Estimate, mean_estimate
from .leave_one_out import relative_errors


@dataclass(frozen=True)
class Agreement:
    """How much of the exact scores a method finds.

    Attributes:
        spearman: mean rank correlation of a query's scores over rows.
        overlap: `k` -> mean share of the exact top `k` rows among the method's top `k`; `k / rows` by chance.
        relative_error: mean of `||scores - exact|| / ||exact||`; of meaning for scores in nats only.
    """

    spearman: Estimate
    overlap: dict[int, Estimate]
    relative_error: Estimate


def agreement(
    scores: np.ndarray, exact: np.ndarray, k: Sequence[int] = (10,), rows: Sequence[int] | None = None
) -> Agreement:
    """Compare scores with exact ones.

    Args:
        scores, exact: `[queries, rows]`.
        k: numbers of top rows compared.
        rows: the rows compared; all by default.

    Raises:
        DataError: if shapes differ, or something is not finite.
        ConfigError: for a `k` that is not between 1 and the number of rows.
    """
    scores, exact = (np.asarray(values, dtype=np.float64) for values in (scores, exact))
    if scores.shape != exact.shape or scores.ndim != 2:
        raise DataError(f"Scores have shape {scores.shape}, exact ones {exact.shape}: give the same queries and rows.")
    if not (np.isfinite(scores).all() and np.isfinite(exact).all()):
        raise DataError("Scores are not all finite, so they cannot be compared.")
    if rows is not None:
        scores, exact = scores[:, rows], exact[:, rows]
    k = sorted({int(size) for size in k})
    if not k or k[0] < 1 or k[-1] > scores.shape[1]:
        raise ConfigError(f"k={k}: give numbers from 1 to {scores.shape[1]}, the number of rows.")
    correlations = [
        spearmanr(a, b).statistic if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0
        for a, b in zip(scores, exact, strict=True)
    ]
    overlap = {size: mean_estimate(_overlap(scores, exact, size)) for size in k}
    return Agreement(mean_estimate(correlations), overlap, mean_estimate(relative_errors(scores, exact)))


def _overlap(scores: np.ndarray, exact: np.ndarray, size: int) -> np.ndarray:
    first, second = (np.argsort(-values, axis=1, kind="stable")[:, :size] for values in (scores, exact))
    return np.array([len(np.intersect1d(a, b)) / size for a, b in zip(first, second, strict=True)])
