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
"""Who deserves credit? Shares per contributor that sum to one.

The rule, for each query: the total of a contributor is the sum of its rows' scores; negative totals count as 0 (who
made the answer less likely is owed nothing, and nothing is taken from others on that account); the rest is divided by
its sum. Shares are averaged over the queries, each with the same weight. Queries that no contributor supports on
balance are left out. With `rule="rows"` the positive part is taken of each row before the sum, so that a contributor's
opposing rows are not held against its supporting ones; that favours those who gave many rows.

No rule of sharing follows from scores alone, and this one is not the Shapley value: contributors who state the same
fact share what the second of them would have been worth alone.
"""

import numpy as np

from ..attribution.queries import Queries
from ..errors import ConfigError, DataError
from ..evaluation.estimate import bootstrap
from .answer import Answer, answer
from .grouping import By, grouped
from .scored import Source, scored, unit_of


RULES = {
    "groups": "for each query, the positive part of the contributor's summed scores over the sum of all such parts",
    "rows": "for each query, the sum of the positive parts of the contributor's scores over that of all contributors",
}


def credit(
    source: Source,
    queries: Queries | None = None,
    by: By = "source",
    *,
    rule: str = "groups",
    stage: str | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Answer:
    """Shares of credit of contributors for what the model said.

    Args:
        source: an attributor or an attribution.
        queries: what the model said.
        by: column that names the contributor of a row, `"stage"`, or a function of a row.
        rule: `"groups"` or `"rows"`, see above.
        stage: whose rows; by default all stages that have the column, a contributor's rows of all of them together.
        num_bootstrap, seed: of the intervals, from drawing queries anew.

    Returns:
        An answer whose table has `contributor`, `share`, `low`, `high`, `num_rows`, `share_of_rows`, `total`; shares
        sum to one.

    Raises:
        ConfigError: if the rule is unknown.
        DataError: if there is no such column, or nobody supports any query.
    """
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r} is unknown; choose one of {', '.join(RULES)}.")
    found = scored(source, queries, stage)
    made = grouped(found, by, None)
    names = list(dict.fromkeys(group.name for group in made))
    rows, totals = np.zeros(len(names), dtype=np.int64), np.zeros((len(names), len(found[0].queries)))
    counted = np.zeros_like(totals)
    for group in made:
        place = names.index(group.name)
        rows[place] += len(group.places)
        totals[place] += group.totals
        counted[place] += np.clip(group.scores, 0, None).sum(axis=1)
    counted = np.clip(totals, 0, None) if rule == "groups" else counted
    sums = counted.sum(axis=0)
    used = np.flatnonzero(sums > 0)
    if not len(used):
        raise DataError("No contributor supports any of the queries, so there is no credit to share: ask others.")
    shares = counted[:, used] / sums[used]
    intervals = [
        bootstrap(lambda _, drawn, own=own: own[drawn].mean(), (1, len(used)), num_bootstrap, seed) for own in shares
    ]
    order = np.argsort([-interval.value for interval in intervals], kind="stable")
    table = {
        "contributor": [names[place] for place in order],
        "share": [intervals[place].value for place in order],
        "low": [intervals[place].low for place in order],
        "high": [intervals[place].high for place in order],
        "num_rows": rows[order].tolist(),
        "share_of_rows": (rows[order] / rows.sum()).tolist(),
        "total": totals[order].mean(axis=1).tolist(),
    }
    unit = unit_of(source) or "no unit"
    best, against = order[0], [name for name, own in zip(names, totals.mean(axis=1), strict=True) if own < 0]
    findings = [
        f"Rule: {RULES[rule]}; shares are averaged over {len(used)} queries and sum to one.",
        f"{names[best]!r} has {100 * intervals[best].value:.0f} % of the credit with "
        f"{100 * rows[best] / rows.sum():.0f} % of the rows.",
    ]
    if against:
        findings.append(
            f"On balance {', '.join(map(repr, against[:5]))} {'opposes' if len(against) == 1 else 'oppose'} the "
            "answers (negative total): in a query where that is so, the share is 0, and nobody pays for it."
        )
    if len(used) < totals.shape[1]:
        findings.append(f"{totals.shape[1] - len(used)} queries that nobody supports on balance are left out.")
    return answer(
        source,
        [own for own in found if any(group.own is own for group in made)],
        "Who deserves credit for what the model said?",
        table,
        {
            "share": f"of the credit: {RULES[rule]}, mean over queries",
            "low, high": "95 % interval from drawing queries anew; none for a single query",
            "total": f"summed scores of the contributor's rows, mean over queries ({unit})",
            "share_of_rows": "what a share by volume would be",
        },
        findings,
        by=by if isinstance(by, str) else "function",
        rule=rule,
    )
