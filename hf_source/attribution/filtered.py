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
"""Two-stage search: a cheap filter proposes rows, Source scores those alone, and says what the filter may have missed.

The walk to the scoring vectors costs the same; the pass over the rows shrinks to the candidates. Beside them some of
the other rows, drawn at random, are scored too. The share of them that outranks the k-th best candidate, times the
number of rows that were left out, is an unbiased estimate of how many rows the filter missed: its recall is `k` of `k`
plus those.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from ..budget import naming_the_fix
from ..errors import ConfigError, UnsupportedError
from ..outputs.columns import top_table, with_note
from ..recording import StageRecord
from ..source import walk
from .methods import METHODS
from .queries import Queries
from .rows import StageRows


if TYPE_CHECKING:
    from .attributor import SourceAttributor


NUM_DRAWN = 256
"""Rows beside the candidates that tell what was missed."""


def filtered_top(
    attributor: "SourceAttributor",
    queries: Queries,
    k: int,
    opposing: bool,
    stages: list[StageRecord],
    filter: "str | Path | SourceAttributor",
    candidates: int,
) -> Dataset:
    """See `SourceAttributor.top`.

    A filter whose scores have a sign (an index, or another method that predicts nats) proposes as many opposing rows
    as supporting ones, if both are wanted; one of similarity proposes the most similar.

    Raises:
        UnsupportedError: for a method that does not walk, or an ensemble.
        ConfigError: if there are fewer candidates than rows wanted, or no such filter.
    """
    check_filter(attributor)
    if candidates < k * (1 + opposing):
        raise ConfigError(
            f"candidates={candidates}: at least as many as rows wanted ({k * (1 + opposing)}) are needed."
        )
    proposing, name = proposer(attributor, filter)
    signed = opposing and METHODS[proposing.method].nats
    proposed, drawn = {}, {}
    for stage in attributor.record.stages:
        trained, chosen = attributor.rows(stage).trained_rows, np.zeros(stage.num_rows, dtype=bool)
        if stage in stages:
            scores = proposing._stage_scores(stage, queries)[:, trained]
            chosen[trained[_best(scores, candidates, signed)]] = True
        others = trained[~chosen[trained]] if stage in stages else trained[:0]
        generator = np.random.default_rng(attributor.seed)
        proposed[stage.name] = np.flatnonzero(chosen)
        drawn[stage.name] = np.sort(generator.choice(others, size=min(NUM_DRAWN, len(others)), replace=False))
    found = _scores(attributor, queries, stages, proposed, drawn)
    parts, notes = [], []
    for stage in stages:
        rows = attributor.rows(stage)
        scored = np.concatenate([proposed[stage.name], drawn[stage.name]])
        text = lambda row, rows=rows: rows.text(row, processing_class=attributor.processing_class)  # noqa: E731
        parts.append((stage.name, found[stage.name][:, scored], scored, text))
        notes.append(_note(stage, name, found[stage.name], proposed, drawn, len(rows.trained_rows), k))
    table = top_table(parts, queries.names, k, opposing)
    return with_note(table, "\n".join([*notes, attributor._notes([stage.name for stage in stages])]).strip())


def check_filter(attributor: "SourceAttributor") -> None:
    """Raise if the attributor's scores cannot be those of a few rows.

    Raises:
        UnsupportedError: for a method that does not walk, or an ensemble.
        ConfigError: if it answers from an index.
    """
    if attributor.method not in ("source", "fast-source") or attributor.ensemble is not None:
        what = f"method={attributor.method!r}" if attributor.ensemble is None else "an ensemble"
        raise UnsupportedError(f"{what} scores all rows at once: a filter is for method='source' of one record.")
    if attributor.index is not None:
        raise ConfigError("Scores from an index need no filter: leave out `filter=`, or `index=` to score candidates.")


def proposer(
    attributor: "SourceAttributor", filter: "str | Path | SourceAttributor"
) -> tuple["SourceAttributor", str]:
    """The attributor that proposes, and what to call it."""
    if not isinstance(filter, (str, Path)):
        if filter.record.path != attributor.record.path:
            raise ConfigError(f"The filter reads another record ({filter.record.path}): make it of the same one.")
        return filter, filter.method if filter.index is None else "an index"
    if str(filter) in METHODS:
        return attributor.like(method=str(filter)), str(filter)
    return attributor.like(index=filter), "an index"


def _best(scores: np.ndarray, count: int, both_ends: bool) -> np.ndarray:
    """Columns of the `count` largest scores of any row, or of the largest and the smallest."""
    size = scores.shape[1]
    if count >= size:
        return np.arange(size)
    if not both_ends:
        return np.unique(np.argpartition(-scores, count - 1, axis=1)[:, :count])
    ends = (-scores, (count + 1) // 2), (scores, count // 2)
    return np.unique(np.concatenate([np.argpartition(e, max(n - 1, 0), axis=1)[:, :n].ravel() for e, n in ends]))


@dataclass
class _Chosen:
    """Rows of a stage of which only some are scored: what a walk reads of its targets.

    Attributes:
        rows: all of them.
        chosen: bool by row number.
    """

    rows: StageRows
    chosen: np.ndarray

    def __post_init__(self) -> None:
        self.row, self.example, self.collated = self.rows.row, self.rows.example, self.rows.collated
        self.count = len(self.chosen)

    def batches(self, pieces: np.ndarray) -> list[np.ndarray]:
        """Batches of the pieces whose rows are chosen."""
        return self.rows.batches(pieces[self.chosen[self.row[pieces]]])


@naming_the_fix()
def _scores(
    attributor: "SourceAttributor", queries: Queries, stages: list[StageRecord], *numbers: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores by row number of the rows of each stage, as deep as they are wanted; 0 elsewhere."""
    record = attributor.record
    record.require_complete()
    targets = {stage.name: _Chosen(attributor.rows(stage), np.zeros(stage.num_rows, bool)) for stage in record.stages}
    for some in numbers:
        for name, chosen in some.items():
            targets[name].chosen[chosen] = True
    checkpoints = getattr(attributor.options, "checkpoints", False)
    found, first = {}, min(stage.index for stage in stages)
    for stage, scores in walk(
        record.stages,
        attributor.all_rows(),
        lambda gradients: attributor.query_gradients(gradients, queries),
        replace(attributor.walk_settings(), checkpoints=checkpoints, targets=targets),
        attributor.build_model,
    ):
        found[stage.name] = attributor.total(torch.as_tensor(scores, device=attributor.device)).cpu().numpy()
        if stage.index == first:
            break
    return found


def _note(stage, name, scores, proposed, drawn, total: int, k: int) -> str:
    """What was scored, and what is likely to have been missed."""
    own, others = proposed[stage.name], drawn[stage.name]
    said = f"Of stage {stage.name!r} {name} proposed {len(own):,} of {total:,} rows"
    if not len(others):
        return f"{said}: all are scored."
    recall = estimated_recall(scores[:, own], scores[:, others], total - len(own), k)
    return (
        f"{said}, which are scored; estimated recall of the {min(k, len(own))} most supporting rows: {recall:.2f} "
        f"({len(others)} of the others, drawn at random, were scored too)."
    )


def estimated_recall(proposed: np.ndarray, drawn: np.ndarray, num_others: int, k: int) -> float:
    """Share of the best rows that were proposed, by a random sample of those that were not.

    Args:
        proposed: `[queries, candidates]`.
        drawn: `[queries, sample]`, scores of rows drawn from those that were not proposed.
        num_others: how many those are.
        k: rows wanted.

    Returns:
        `k / (k + missed)`, `missed` the estimated number of rows above the k-th best candidate; over all queries.
    """
    k = min(k, proposed.shape[1])
    threshold = np.sort(proposed, axis=1)[:, -k]
    missed = (drawn > threshold[:, None]).mean(axis=1) * num_others
    return float((k / (k + missed)).mean())
