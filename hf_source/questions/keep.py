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
"""Which data to keep? The rows that help a held-out target most, against random rows of the same number.

Rows are ranked by their mean score over the target queries, and the first `budget` of them are kept. Whether that
helps is shown by training on them, on as many random rows (several draws) and on all rows, and by the loss of queries
that had no part in the choice (`judge`).
"""

from collections.abc import Sequence

import numpy as np

from ..attribution.queries import Queries
from ..errors import ConfigError
from ..evaluation.protocol import Retraining
from ..evaluation.row_sets import check_seeds
from .answer import Answer, answer
from .check import how, retraining_for
from .scored import Scored, Source, scored, unit_of


def keep(
    source: Source,
    target: Queries | None = None,
    budget: int | float = 0.5,
    *,
    judge: Queries | None = None,
    stage: str | None = None,
    verify: bool | Retraining = False,
    num_random: int = 3,
    seeds: Sequence[int | None] = (None,),
    seed: int = 0,
) -> Answer:
    """Choose rows by their influence on a target.

    Args:
        source: an attributor or an attribution.
        target: what the model should say; the scores are of these.
        budget: rows to keep, or a share of them between 0 and 1.
        judge: other queries of the same kind, whose loss says how good the choice is; by default the target itself,
            which flatters the choice.
        stage: whose rows are chosen; needed if there are several.
        verify: train on the chosen rows, on random ones and on all. `True` trains many copies at once; or a
            `Retraining` of the judge's queries.
        num_random: draws of random rows.
        seeds: orders of training to average over, see `Retraining.losses`.
        seed: of the random rows.

    Returns:
        An answer whose table has the rows to keep, best first: `rank`, `row`, `score`, `text`.

    Raises:
        ConfigError: if the budget is impossible, or there are several stages.
    """
    found = scored(source, target, stage)
    if len(found) != 1:
        raise ConfigError(f"Rows of one stage are chosen at a time: choose stage= from {[s.stage for s in found]}.")
    own = found[0]
    count = kept_rows(budget, len(own.numbers))
    if num_random < 1:
        raise ConfigError(f"num_random={num_random}: at least one draw of random rows is needed to compare with.")
    order = np.argsort(-own.mean, kind="stable")
    chosen = order[:count]
    asked = judge if judge is not None else own.queries
    retraining = retraining_for(source, asked, found, verify)
    unit = unit_of(source) or "no unit"
    findings = [
        f"Keep {count:,} of {len(own.numbers):,} rows of stage {own.stage!r}: those with a mean score from "
        f"{own.mean[chosen[-1]]:+.4g} up ({unit}); {int((own.mean < 0).sum()):,} rows oppose the target."
    ]
    settings = {"budget": count, "num_random": num_random, "judge": asked.names}
    if retraining is not None:
        figures = selection_losses(retraining, own, chosen, num_random, check_seeds(seeds), seed)
        findings.append(_verdict(figures, count, judge is None, how(retraining)))
        settings["losses"] = figures
    return answer(
        source,
        found,
        "Which rows are worth keeping for the target?",
        {
            "rank": list(range(1, count + 1)),
            "row": own.numbers[chosen].tolist(),
            "score": own.mean[chosen].tolist(),
            "text": [own.text(number) for number in own.numbers[chosen]],
        },
        {"score": f"mean over the target's queries ({unit}); positive: the row helps"},
        findings,
        **settings,
    )


def kept_rows(budget: int | float, num_rows: int) -> int:
    """Number of rows of a budget.

    Raises:
        ConfigError: if it is not between 1 and all but one row.
    """
    count = round(budget * num_rows) if isinstance(budget, float) and budget < 1 else budget
    if isinstance(budget, bool) or int(count) != count or not 1 <= count < num_rows:
        raise ConfigError(
            f"budget={budget}: give a number of rows from 1 to {num_rows - 1}, or a share of them such as 0.5."
        )
    return int(count)


def selection_losses(
    retraining: Retraining,
    own: Scored,
    chosen: np.ndarray,
    num_random: int = 3,
    seeds: Sequence[int | None] = (None,),
    seed: int = 0,
) -> dict[str, list[float]]:
    """Mean loss of the judge's queries after training on different rows, one figure for each seed (and draw).

    Args:
        retraining: how to train; measures the judge's queries.
        own: the stage.
        chosen: positions of the rows chosen.
        num_random, seeds, seed: see `keep`.

    Returns:
        `"chosen"`, `"random"` (seed by seed, draw by draw), `"all"`.
    """
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(len(own.numbers), size=len(chosen), replace=False) for _ in range(num_random)]
    masks = np.stack([own.mask(places) for places in (np.arange(len(own.numbers)), chosen, *drawn)])
    losses = np.stack([retraining.losses(masks, each).mean(axis=1) for each in seeds])  # [seeds, masks]
    return {
        "all": losses[:, 0].tolist(), "chosen": losses[:, 1].tolist(), "random": losses[:, 2:].ravel().tolist()
    }  # fmt: skip


def _verdict(figures: dict[str, list[float]], count: int, same: bool, trained: str) -> str:
    chosen, random, everything = (float(np.mean(figures[key])) for key in ("chosen", "random", "all"))
    beaten = sum(chosen < loss for loss in figures["random"])
    judged = "the target itself, which flatters the choice" if same else "the judge's queries"
    return (
        f"Trained again ({trained}), loss of {judged}: {chosen:.3f} on the {count:,} chosen rows, {random:.3f} on as "
        f"many random ones (better than {beaten} of {len(figures['random'])} draws), {everything:.3f} on all rows."
    )
