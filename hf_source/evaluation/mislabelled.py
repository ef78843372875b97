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
"""Mislabelled rows: do scores put the wrong ones first in a list to check?

A wrong label must be learnt from its own row, since no other row supports it: its *self-influence* is large (Koh &
Liang 2017, arXiv 1703.04730, section 5.4; Pruthi et al. 2020, arXiv 2002.08484, section 4.1). To compare with: the
row's loss at the final weights, and its influence on clean queries, which it opposes. `corrupt_labels` makes rows
whose labels are known to be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import rankdata

from ..errors import ConfigError, DataError
from .estimate import Estimate, bootstrap


KNOWN = "is_corrupted"


@dataclass(frozen=True)
class Mislabelled:
    """How early wrong rows come in a list, most suspicious row first.

    Attributes:
        auroc: probability that a wrong row is more suspicious than a right one (ties count half); .5 is chance.
        precision: `k` -> share of wrong rows among the first `k`.
        found: share of the rows checked -> share of the wrong rows found; the share itself is chance.
        num_wrong, num_rows: how many.
    """

    auroc: Estimate
    precision: dict[int, Estimate]
    found: dict[float, Estimate]
    num_wrong: int
    num_rows: int


def find_mislabelled(
    suspicion: np.ndarray,
    known: Sequence[bool],
    k: Sequence[int] = (10,),
    checked: Sequence[float] = (0.05, 0.1, 0.2),
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Mislabelled:
    """Judge a list of rows by what is known of them; intervals by drawing rows anew.

    Args:
        suspicion: `[rows]`, larger = more suspicious: self-influence, loss, or minus the influence on clean queries.
        known: whether a row is wrong, `[rows]`.
        k: numbers of rows for `precision`.
        checked: shares of the rows for `found`.
        num_bootstrap, seed: of the intervals.

    Raises:
        DataError: if the lengths differ, suspicion is not finite, or rows are all right or all wrong.
        ConfigError: for a `k` or a share out of range.
    """
    suspicion, known = np.asarray(suspicion, dtype=np.float64), np.asarray(known, dtype=bool)
    if suspicion.shape != known.shape or suspicion.ndim != 1:
        raise DataError(f"suspicion has shape {suspicion.shape}, known {known.shape}: give one value of each per row.")
    if not np.isfinite(suspicion).all():
        raise DataError("Suspicion is not finite for every row, so rows cannot be ranked.")
    if known.all() or not known.any():
        raise DataError("All rows are known to be right, or all to be wrong: there is nothing to tell apart.")
    count = len(known)
    if any(not 1 <= size <= count for size in k) or any(not 0 < share <= 1 for share in checked):
        raise ConfigError(f"k={list(k)}, checked={list(checked)}: give 1 to {count} rows and shares above 0 up to 1.")
    # Ties are broken by chance, not by the order of the rows, where wrong ones may well stand together.
    order = np.lexsort((np.random.default_rng(seed).permutation(count), -suspicion))

    def estimate(figure) -> Estimate:
        def drawn(_, rows):
            rows = np.sort(rows)  # places in the list: a draw keeps its order
            return figure(suspicion[order][rows], known[order][rows])

        return bootstrap(drawn, (1, count), num_bootstrap, seed)

    return Mislabelled(
        estimate(auroc),
        {int(size): estimate(lambda _, wrong, n=int(size): wrong[:n].mean()) for size in k},
        {float(share): estimate(lambda _, wrong, share=share: _found(wrong, share)) for share in checked},
        int(known.sum()),
        count,
    )


def auroc(suspicion: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the receiver operating characteristic, from ranks (Mann & Whitney 1947); NaN without both kinds."""
    positives = int(wrong.sum())
    negatives = len(wrong) - positives
    if not positives or not negatives:
        return float("nan")
    above = rankdata(suspicion)[wrong].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _found(wrong: np.ndarray, share: float) -> float:
    total = wrong.sum()
    return float(wrong[: max(1, round(share * len(wrong)))].sum() / total) if total else float("nan")


def corrupt_labels(
    dataset: Dataset, fraction: float, seed: int = 0, column: str = "label", within: str | None = None
) -> Dataset:
    """Give some rows a wrong label, and say which in a bool column `is_corrupted`.

    A corrupted row gets one of the other values of the column, in proportion to how often they occur: labels keep
    looking as they do, and none of them is right by accident.

    Args:
        dataset: rows.
        fraction: share of the rows to corrupt, at least one row.
        seed: of rows and labels.
        column: the label's, of numbers or texts (such as the `completion` of a fact).
        within: another column; the wrong label comes from a row with the same value of it, so that it stays of the
            right kind. Rows that have no other label of their kind are left alone.

    Raises:
        ConfigError: for a fraction that is not above 0 and below 1.
        DataError: if there is no such column, too few rows have another label to get, or `is_corrupted` exists.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction}: give a share of the rows above 0 and below 1.")
    for name in (column, within):
        if name is not None and name not in dataset.column_names:
            raise DataError(f"The dataset has no column {name!r}; it has {', '.join(dataset.column_names)}.")
    if KNOWN in dataset.column_names:
        raise DataError(f"The dataset has a column {KNOWN!r} already: its labels were corrupted before.")
    labels = dataset.with_format(None)[column][:]
    if any(isinstance(label, (list, dict)) for label in labels):
        raise DataError(f"Column {column!r} holds lists, not labels: corrupt labels before rows are tokenised.")
    kinds = [None] * len(labels) if within is None else dataset.with_format(None)[within][:]
    by_kind: dict[Any, list] = {}
    for kind, label in zip(kinds, labels, strict=True):
        by_kind.setdefault(kind, []).append(label)
    varied = {kind for kind, own in by_kind.items() if len(set(own)) > 1}
    possible = np.flatnonzero([kind in varied for kind in kinds])
    wanted = max(1, round(fraction * len(labels)))
    if len(possible) < wanted:
        raise DataError(
            f"{wanted} rows of column {column!r} are to be corrupted, but only {len(possible)} have another label of "
            "their kind to get (the others have the same value in every row): corrupt fewer."
        )
    generator = np.random.default_rng(seed)
    chosen = generator.choice(possible, size=wanted, replace=False)
    new = list(labels)
    for row in chosen:
        others = [label for label in by_kind[kinds[row]] if label != labels[row]]
        new[row] = others[generator.integers(len(others))]
    known = np.zeros(len(labels), dtype=bool)
    known[chosen] = True
    feature = dataset.features[column]
    return dataset.remove_columns(column).add_column(column, new, feature=feature).add_column(KNOWN, known)
