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
"""How an index ranks rows compared with the full computation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr


def agreement(found: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """Agreement of two score arrays `[queries, rows]`, averaged over queries.

    Returns:
        `rank_correlation` (Spearman), `top10_recall` (share of the ten most supporting rows found among the ten of the
        index, where there are more than ten rows), `queries`, `rows`.
    """
    count, rows = exact.shape
    if rows < 2:
        return {"rank_correlation": 1.0, "top10_recall": 1.0, "queries": count, "rows": rows}
    ranks = [_spearman(own, true) for own, true in zip(found, exact, strict=True)]
    k = min(10, rows)
    return {
        "rank_correlation": round(float(np.mean(ranks)), 4),
        "top10_recall": round(float(recall(found, exact, k, k).mean()), 4),
        "queries": count,
        "rows": rows,
    }


def _spearman(own: np.ndarray, true: np.ndarray) -> float:
    if np.ptp(own) == 0 or np.ptp(true) == 0:
        return float(np.ptp(own) == np.ptp(true))
    return float(spearmanr(own, true)[0])


def recall(found: np.ndarray, exact: np.ndarray, k: int, among: int) -> np.ndarray:
    """Share of each query's `k` best rows that are among the `among` best of another score: `[queries]`."""
    shares = []
    for own, true in zip(found, exact, strict=True):
        best = np.argsort(-true, kind="stable")[:k]
        shares.append(np.isin(best, np.argsort(-own, kind="stable")[:among]).mean())
    return np.asarray(shares)


def accuracy_note(stages: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> str:
    """What is known of an index's scores, as sentences."""
    said = []
    for stage in stages:
        if stage["name"] in wanted and stage["accuracy"]:
            found = stage["accuracy"]
            said.append(
                f"From an index: of stage {stage['name']!r} its scores have a rank correlation of "
                f"{found['rank_correlation']:.2f} with the full computation, and {found['top10_recall']:.0%} of its "
                f"ten best rows (measured when it was built, {found['queries']} queries with labels drawn from the "
                f"model, {found['rows']} rows)."
            )
    return " ".join(said)
