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
"""Which rows an evaluation removes: those a method names, random ones, and random ones of the same classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError


def candidate_rows(retraining: Any, rows: Sequence[int] | None = None) -> np.ndarray:
    """Numbers of the rows that may be removed: those given, or all that the stage trained on; int64, ascending.

    Raises:
        DataError: for a number that is not a row.
    """
    if rows is None:
        steps = getattr(retraining.stage, "steps", None)
        if steps is None or getattr(retraining.stage, "packing", None) is not None:
            return np.arange(retraining.num_rows)
        return np.unique(steps().visits()["row"])
    found = np.unique(np.asarray(rows, dtype=np.int64))
    if len(found) and (found[0] < 0 or found[-1] >= retraining.num_rows):
        raise DataError(f"Row {found[0] if found[0] < 0 else found[-1]} is none of the {retraining.num_rows} rows.")
    return found


def check_scores(scores: np.ndarray, retraining: Any, method: str = "") -> np.ndarray:
    """Scores as float64 `[queries, rows]`.

    Raises:
        DataError: if they are not those of the retraining's queries and rows, or not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    expected = (retraining.num_queries, retraining.num_rows)
    if scores.shape != expected:
        raise DataError(
            f"Scores {method!r} have shape {scores.shape}, the retraining has {expected[0]} queries and {expected[1]} "
            "rows: give `attributor.scores(None, queries, stage)` of the same queries and stage, by row number."
        )
    if not np.isfinite(scores).all():
        raise DataError(f"Scores {method!r} are not all finite, so rows cannot be ranked.")
    return scores


def check_sizes(sizes: Sequence[int], num_candidates: int) -> list[int]:
    """Numbers of rows to remove, each once and in order.

    Raises:
        ConfigError: if there is none, or one that cannot be removed and leave a row.
    """
    sizes = sorted({int(size) for size in np.atleast_1d(sizes)})
    if not sizes or sizes[0] < 1 or sizes[-1] >= num_candidates:
        raise ConfigError(
            f"k={sizes}: give numbers of rows from 1 to {num_candidates - 1}, as {num_candidates} trained."
        )
    return sizes


def check_seeds(seeds: Sequence[int | None]) -> list[int | None]:
    """Seeds of training, each once.

    Raises:
        ConfigError: if there is none.
    """
    seeds = list(dict.fromkeys(seeds))
    if not seeds:
        raise ConfigError("seeds=[]: give at least one; `None` is the run's own seed and order.")
    return seeds


def ranked(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Candidates of each query, most supporting first, ties by row number: int64 `[queries, candidates]`."""
    return candidates[np.argsort(-scores[:, candidates], axis=1, kind="stable")]


def matched_rows(
    chosen: np.ndarray, column: np.ndarray, candidates: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Random rows with the classes of the chosen ones: as many of each value of the column; int64, as many as chosen.

    Rows other than the chosen ones are preferred. Where a class has too few others, some of the chosen ones stand for
    themselves, which makes the control harder to beat, never easier.

    Args:
        chosen: row numbers.
        column: class of every row, `[rows]`.
        candidates: rows that may be drawn; all chosen ones are among them.
        generator: of the draws.
    """
    found = []
    for value, count in zip(*np.unique(column[chosen], return_counts=True), strict=True):
        own = chosen[column[chosen] == value]
        others = np.setdiff1d(candidates[column[candidates] == value], own)
        drawn = generator.choice(others, size=min(count, len(others)), replace=False)
        found += [drawn, generator.choice(own, size=count - len(drawn), replace=False)]
    return np.concatenate(found).astype(np.int64)


def check_column(column: Sequence[Any] | None, num_rows: int) -> np.ndarray | None:
    """The classes of rows as numbers, int64 `[rows]`; `None` stays `None`.

    Raises:
        DataError: if there is not one value for each row.
    """
    if column is None:
        return None
    values = [str(value) for value in column]
    if len(values) != num_rows:
        raise DataError(
            f"The column to match has {len(values)} values for {num_rows} rows: give one for each, by number."
        )
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


class Removals:
    """Collects sets of rows to remove, each trained once however often it is asked for.

    Args:
        num_rows: rows of the stage.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._numbers: dict[bytes, int] = {}
        self._masks: list[np.ndarray] = []
        self.add(())

    def add(self, rows: Sequence[int]) -> int:
        """The number of the retraining without these rows; 0 is that with all."""
        keep = np.ones(self.num_rows, dtype=bool)
        keep[np.asarray(rows, dtype=np.int64)] = False
        number = self._numbers.setdefault(keep.tobytes(), len(self._masks))
        if number == len(self._masks):
            self._masks.append(keep)
        return number

    def __len__(self) -> int:
        return len(self._masks)

    def changes(self, retraining: Any, seeds: Sequence[int | None] = (None,)) -> np.ndarray:
        """Loss without each set minus loss with all rows: float64 `[seeds, sets, queries]`, nats.

        Each seed is compared with its own training on all rows.
        """
        losses = np.stack([retraining.losses(np.stack(self._masks), seed=seed) for seed in seeds])
        return losses - losses[:, :1]
