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
"""What should I change? Actions on the training rows, with their predicted effect on the queries, best first.

To first order, leaving a row out changes a query's loss by its score, counting it twice by minus its score, and
replacing it by another row by its score less the score that the other row would have had at the same visits. The
effect of an action is the sum over its rows, averaged over the queries; negative is better. `verify` trains again with
each change and reports what happened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attribution.attributor import SourceAttributor
from ..attribution.changed import changed_rows, with_changed_rows
from ..attribution.queries import Queries
from ..errors import ConfigError, UnsupportedError
from ..evaluation.estimate import mean_estimate
from ..evaluation.evaluate import stacked_for
from ..evaluation.protocol import Retraining
from ..evaluation.stacked import StackedRetraining
from .answer import Answer, answer
from .check import Check, how, measured_changes, retraining_for
from .grouping import By, grouped
from .scored import Scored, Source, scored, unit_of


KINDS = ("drop rows", "drop group", "repeat rows", "repeat group", "relabel")


@dataclass(frozen=True)
class Action:
    """A change of the training rows.

    Attributes:
        kind: one of `KINDS`.
        what: the group's name, or which rows.
        numbers: int64, rows that are concerned.
        weight: that they have afterwards; 1 where their content changes.
        effects: float64 `[queries]`, predicted change of each query's loss.
    """

    kind: str
    what: str
    numbers: np.ndarray
    weight: float
    effects: np.ndarray


def actions(
    source: Source,
    queries: Queries | None = None,
    by: By | None = None,
    *,
    k: int | Sequence[int] = (1, 10),
    relabel: Mapping[int, Mapping[str, Any]] | None = None,
    kinds: Sequence[str] = KINDS,
    stage: str | None = None,
    verify: bool | Retraining = False,
) -> Answer:
    """Ranked changes of a stage's rows that should lower the queries' loss.

    Args:
        source: an attributor or an attribution.
        queries: what the model should say (with the right completions).
        by: column, or function of a row, whose groups may be dropped or repeated.
        k: numbers of single rows to drop (the most opposing) or to repeat (the most supporting).
        relabel: row number -> columns with their right value, e.g. `{17: {"completion": " Suva."}}`: rows to correct.
            Needs an attributor, and one more walk.
        kinds: of actions that are wanted.
        stage: whose rows; needed if there are several.
        verify: train again with every change. `True` trains many copies at once; another `Retraining` can only drop.

    Returns:
        An answer whose table has `action`, `what`, `num_rows`, `predicted`, `low`, `high`, `rows`, and with `verify`
        also `measured`.

    Raises:
        ConfigError: for an unknown kind, an impossible k, several stages, or nothing to relabel with.
        UnsupportedError: if the scores have no unit.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ConfigError(f"kinds={list(kinds)}: choose from {', '.join(KINDS)}.")
    if not unit_of(source):
        raise UnsupportedError("These scores have no unit, so they predict no effect: use method='source'.")
    found = scored(source, queries, stage)
    if len(found) != 1:
        raise ConfigError(f"Rows of one stage are changed at a time: choose stage= from {[s.stage for s in found]}.")
    own = found[0]
    sizes = sorted({int(size) for size in np.atleast_1d(k)})
    if not sizes or not 1 <= sizes[0] <= sizes[-1] < len(own.numbers):
        raise ConfigError(f"k={k}: give numbers of rows from 1 to {len(own.numbers) - 1}.")
    retraining = retraining_for(source, own.queries, found, verify)
    made = [*_single_rows(own, sizes), *(_groups(own, by) if by is not None else [])]
    new_rows: dict[int, dict[str, Any]] = {}
    if relabel:
        action, new_rows = _relabelled(source, own, relabel)
        made.append(action)
    made = [action for action in made if action.kind in kinds]
    made = sorted((a for a in made if a.effects.mean() < 0), key=lambda action: action.effects.mean())
    check = None
    if retraining is not None and made:
        check = _verified(source, retraining, own, made, new_rows)
    return answer(
        source,
        found,
        "What should change in the training rows?",
        _table(made, check),
        _columns(unit_of(source), check is not None),
        _findings(made, own),
        check,
        kinds=list(kinds),
        k=sizes,
        relabelled=sorted(new_rows),
    )


def _single_rows(own: Scored, sizes: Sequence[int]) -> list[Action]:
    order = np.argsort(own.mean, kind="stable")
    found = []
    for size in sizes:
        for kind, places, weight in (("drop rows", order[:size], 0.0), ("repeat rows", order[::-1][:size], 2.0)):
            which = "most opposing" if weight == 0 else "most supporting"
            effects = (1 - weight) * own.scores[:, places].sum(axis=1)
            found.append(Action(kind, f"the {size} {which}", own.numbers[places], weight, effects))
    return found


def _groups(own: Scored, by: By) -> list[Action]:
    return [
        Action(kind, group.name, own.numbers[group.places], weight, (1 - weight) * group.totals)
        for group in grouped([own], by, None)
        for kind, weight in (("drop group", 0.0), ("repeat group", 2.0))
        if kind != "drop group" or len(group.places) < len(own.numbers)
    ]


def _relabelled(
    source: Source, own: Scored, relabel: Mapping[int, Mapping[str, Any]]
) -> tuple[Action, dict[int, dict[str, Any]]]:
    """The predicted effect of right labels: the old rows' scores less those of the new ones at the same visits."""
    if not isinstance(source, SourceAttributor):
        raise ConfigError("relabel= scores rows that were never trained on, which needs an attributor, not scores.")
    stage = source.record.stage(own.stage)
    new_rows = changed_rows(source, stage, relabel)
    other = scored(with_changed_rows(source, stage, new_rows), own.queries, own.stage)[0]
    numbers = np.array(sorted(new_rows), dtype=np.int64)
    places = np.flatnonzero(np.isin(own.numbers, numbers))
    effects = (own.scores[:, places] - other.scores[:, places]).sum(axis=1)
    return Action("relabel", "rows with their right labels", numbers, 1.0, effects), new_rows


def _verified(
    source: SourceAttributor,
    retraining: Retraining,
    own: Scored,
    made: Sequence[Action],
    new_rows: Mapping[int, Mapping[str, Any]],
) -> Check:
    weights = np.ones((len(made), own.num_rows))
    for line, action in zip(weights, made, strict=True):
        line[action.numbers] = action.weight
    measured = np.empty((len(made), len(own.queries)))
    relabelling = np.array([action.kind == "relabel" for action in made])
    if (~relabelling).any():
        measured[~relabelling] = measured_changes(retraining, weights[~relabelling])
    if relabelling.any():
        if not isinstance(retraining, StackedRetraining):
            raise UnsupportedError("Only StackedRetraining can replace rows: use verify=True, or leave relabel= out.")
        options = {"stage": own.stage, "progress": source.show_progress, "cache": retraining.cache}
        changed = stacked_for(source, source.encode(own.queries), changed=new_rows, **options)
        every = np.ones((1, own.num_rows), dtype=bool)
        measured[relabelling] = changed.losses(every) - retraining.losses(every)
    names = [f"{action.kind}: {action.what}" for action in made]
    return Check(names, np.stack([action.effects for action in made]), measured, how(retraining))


def _table(made: Sequence[Action], check: Check | None) -> dict[str, list]:
    effects = [mean_estimate(action.effects) for action in made]
    table = {
        "action": [action.kind for action in made],
        "what": [action.what for action in made],
        "num_rows": [len(action.numbers) for action in made],
        "predicted": [effect.value for effect in effects],
        "low": [effect.low for effect in effects],
        "high": [effect.high for effect in effects],
    }
    if check is not None:
        table["measured"] = check.measured.mean(axis=1).tolist()
    return {**table, "rows": [action.numbers.tolist() for action in made]}


def _columns(unit: str, measured: bool) -> dict[str, str]:
    columns = {
        "predicted": f"change of the queries' loss, mean over queries ({unit}); negative is better",
        "low, high": "95 % interval from drawing queries anew; none for a single query",
        "rows": "numbers of the rows that change",
    }
    return {**columns, "measured": "real change when trained again"} if measured else columns


def _findings(made: Sequence[Action], own: Scored) -> list[str]:
    if not made:
        return [f"No action on stage {own.stage!r} is predicted to lower the queries' loss."]
    best = made[0]
    return [
        f"Best: {best.kind} ({best.what}, {len(best.numbers):,} rows), predicted {best.effects.mean():+.3f}.",
        "Effects are first-order and do not add up: actions share rows. Large ones are predicted too large where the "
        "queries' loss is small already, since it cannot fall below 0.",
    ]
