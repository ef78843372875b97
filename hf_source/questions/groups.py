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
"""Which group? Influence of the values of a column, of sources, of clusters.

Scores add, so the score of a group is the sum over its rows,

    total(g) = mean over queries of  sum over m in g of  score(q, m),

the predicted rise of the queries' loss had the group not been trained on. That is a first-order prediction: it is good
for small groups. `verify` trains again without each group and reports what happens.
"""

import numpy as np

from ..attribution.queries import Queries
from ..errors import ConfigError
from ..evaluation.protocol import Retraining
from .answer import Answer, answer
from .check import Check, how, measured_changes, retraining_for
from .grouping import By, Group, grouped
from .scored import Source, scored, unit_of


LARGE = 0.2
"""Share of a stage's rows from which on a group is no small change."""


def groups(
    source: Source,
    queries: Queries | None = None,
    by: By | None = None,
    *,
    clusters: int | None = None,
    stage: str | None = None,
    verify: bool | Retraining = False,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Answer:
    """Influence of groups of rows on the queries.

    Args:
        source: an attributor or an attribution.
        queries: what is asked.
        by: a column of the rows, `"stage"`, or a function of a row (a dict) that gives its group.
        clusters: instead of `by`, so many clusters of each stage's texts by their words.
        stage: whose rows; all stages that have the column by default.
        verify: train again without each group of one stage, and compare. `True` trains many copies at once.
        num_bootstrap, seed: of the intervals and the clusters.

    Returns:
        An answer whose table has a line per group, the most supporting first: `stage`, `group`, `num_rows`, `total`,
        `low`, `high`, `mean`, `share`, `share_of_rows`, and with `verify` also `measured`.

    Raises:
        ConfigError: if it is not said what makes a group, or several stages are to be verified.
        DataError: if there is no such column.
    """
    found = scored(source, queries, stage)
    made = grouped(found, by, clusters, seed)
    used = [own for own in found if any(group.own is own for group in made)]
    queries = found[0].queries
    retraining = retraining_for(source, queries, used, verify)
    made.sort(key=lambda group: -group.totals.mean())
    totals = np.array([group.totals.mean() for group in made])
    intervals = [sum_interval(group.scores.mean(axis=0), num_bootstrap, seed) for group in made]
    absolute = max(float(np.abs(totals).sum()), 1e-30)
    table = {
        "stage": [group.own.stage for group in made],
        "group": [group.name for group in made],
        "num_rows": [len(group.places) for group in made],
        "total": totals.tolist(),
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "mean": [float(total / len(group.places)) for total, group in zip(totals, made, strict=True)],
        "share": (totals / absolute).tolist(),
        "share_of_rows": [len(group.places) / len(group.own.numbers) for group in made],
    }
    unit = unit_of(source) or "no unit"
    columns = {
        "total": f"predicted rise of the queries' loss had the group not been trained on, mean over queries ({unit}); "
        "positive: the group supports them",
        "low, high": "95 % interval from drawing the group's rows anew: wide where few rows make the sum",
        "mean": f"total for each row ({unit})",
        "share": "total over the summed absolute totals",
        "share_of_rows": "of the stage's rows",
    }
    check = None
    if retraining is not None:
        check = verified(retraining, made)
        table["measured"] = check.measured.mean(axis=1).tolist()
        columns["measured"] = "real rise of the queries' loss when trained again without the group"
    findings = _findings(made, totals, table["share_of_rows"], unit)
    what = f"clusters of {clusters}" if by is None else by if isinstance(by, str) else "function"
    return answer(
        source,
        used,
        "Which groups of rows made the model say this?",
        table,
        columns,
        findings,
        check,
        by=str(what),
        verify=bool(verify),
    )


def verified(retraining: Retraining, made: list[Group]) -> Check:
    """Train again without each group.

    Raises:
        ConfigError: if a group is all there is.
    """
    masks = np.stack([group.mask for group in made])
    if (masks.sum(axis=1) >= len(made[0].own.numbers)).any():
        raise ConfigError("A group holds every row of the stage, so nothing is left to train on: choose another `by`.")
    measured = measured_changes(retraining, (~masks).astype(float))
    return Check([group.name for group in made], np.stack([g.totals for g in made]), measured, how(retraining))


def sum_interval(scores: np.ndarray, num_bootstrap: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a sum over rows, by drawing rows anew; NaN for one row.

    Args:
        scores: float64 `[rows]`.
        num_bootstrap, seed: draws.
    """
    if len(scores) < 2 or num_bootstrap < 1:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    at_once = max(1, 2**22 // len(scores))
    sums = []
    for start in range(0, num_bootstrap, at_once):
        count = min(at_once, num_bootstrap - start)
        sums.append(scores[generator.integers(len(scores), size=(count, len(scores)))].sum(axis=1))
    low, high = np.quantile(np.concatenate(sums), [0.025, 0.975])
    return float(low), float(high)


def _findings(made: list[Group], totals: np.ndarray, shares: list[float], unit: str) -> list[str]:
    best, worst = made[0], made[-1]
    said = [f"{best.name!r} supports the queries most: {totals[0]:+.3f} {unit} by {_rows(best)}."]
    if len(made) > 1:
        verb = "opposes them most" if totals[-1] < 0 else "supports them least"
        said.append(f"{worst.name!r} {verb}: {totals[-1]:+.3f} {unit} by {_rows(worst)}.")
    large = [group.name for group, share in zip(made, shares, strict=True) if share > LARGE]
    if large:
        said.append(
            f"{', '.join(map(repr, large[:3]))} {'is' if len(large) == 1 else 'are'} more than {100 * LARGE:.0f} % of "
            "a stage: removing so much is no small change, and the size of its total is not to be relied on."
        )
    return said


def _rows(group: Group) -> str:
    return "1 row" if len(group.places) == 1 else f"{len(group.places):,} rows"
