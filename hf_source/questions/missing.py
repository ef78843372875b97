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
"""What is missing? Queries that no row supports, and the regions where they lie.

Every query has rows that score high, one that nothing in the data speaks of too: a badly known answer has a large
gradient, and large scores of both signs. So what counts is not how much support there is, but how it compares with the
opposition,

    support(q) = sum of the k strongest supporting scores / sum of the k strongest opposing ones (without their sign),

over the rows of all stages. Where rows say it, the supporting side stands out; where none does, scores are about as
large on both sides. A query with a support below `threshold` (1: opposed as strongly as supported) counts as missing.
A *region* is a group of queries; it is undersampled if a larger share of its queries is missing than of all.

Ask with the *right* answers. Of what a model says by itself the rule tells nothing: wrong answers are made of rows
too.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from ..attribution.asking import query_losses
from ..attribution.attributor import SourceAttributor
from ..attribution.methods import METHODS
from ..attribution.queries import Queries
from ..data import IGNORE_INDEX
from ..errors import ConfigError, DataError
from .answer import Answer, answer
from .scored import Scored, Source, scored, unit_of


def missing(
    source: Source,
    queries: Queries | None = None,
    by: Sequence[str] | None = None,
    *,
    k: int = 1,
    threshold: float = 1.0,
    stage: str | None = None,
) -> Answer:
    """Queries that the training rows say nothing of.

    Args:
        source: an attributor or an attribution.
        queries: what the model should know, with the right completions.
        by: the region of each query, e.g. its topic; the findings then name undersampled ones.
        k: rows on each side that are compared.
        threshold: support below which a query counts as missing.
        stage: whose rows; all stages together by default.

    Returns:
        An answer whose table has a line per query, the least supported first: `query`, `missing`, `support`,
        `strongest`, `opposing`, `loss_per_token` (of an attributor), `stage`, `row`, `text` (of the strongest row).

    Raises:
        ConfigError: if k or the threshold is impossible.
        DataError: if there is not one region for each query.
    """
    found = scored(source, queries, stage)
    queries = found[0].queries
    num_rows = sum(len(own.numbers) for own in found)
    if not 1 <= k <= num_rows // 2 or threshold <= 0:
        raise ConfigError(f"k={k}, threshold={threshold}: give 1 to {num_rows // 2} rows and a threshold above 0.")
    if by is not None and len(by) != len(queries):
        raise DataError(f"{len(by)} regions for {len(queries)} queries: give one for each.")
    scores = np.concatenate([own.scores for own in found], axis=1)
    support, strongest, opposing = supports(scores, k)
    lacking = support < threshold
    order = np.argsort(support, kind="stable")
    best = [_row(found, int(place)) for place in scores.argmax(axis=1)]
    table = {
        "query": [queries.names[place] for place in order],
        "missing": lacking[order].tolist(),
        "support": support[order].tolist(),
        "strongest": strongest[order].tolist(),
        "opposing": opposing[order].tolist(),
    }
    if isinstance(source, SourceAttributor) and not METHODS[source.method].reads_text:
        table["loss_per_token"] = _losses(source, queries)[order].tolist()
    if by is not None:
        table["region"] = [str(by[place]) for place in order]
    table |= {
        "stage": [best[place][0].stage for place in order],
        "row": [best[place][1] for place in order],
        "text": [best[place][0].text(best[place][1]) for place in order],
    }
    unit = unit_of(source) or "no unit"
    return answer(
        source,
        found,
        "Which queries does no row support?",
        table,
        {
            "missing": f"support is below {threshold:g}",
            "support": f"the {k} strongest supporting over the {k} strongest opposing scores",
            "strongest": f"sum of the {k} strongest supporting scores ({unit})",
            "opposing": f"sum of the {k} strongest opposing scores ({unit})",
            "stage, row, text": "the row that supports the query most",
        },
        _findings(queries, support, lacking, threshold, by),
        k=k,
        threshold=threshold,
        num_missing=int(lacking.sum()),
    )


def supports(scores: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Support of each query, and the sums it is made of: all `[queries]`.

    Args:
        scores: `[queries, rows]`.
        k: rows on each side. Scores of the wrong sign count as 0.
    """
    ordered = np.sort(scores, axis=1)
    strongest = np.clip(ordered[:, -k:], 0, None).sum(axis=1)
    opposing = np.clip(ordered[:, :k], None, 0).sum(axis=1)
    return strongest / np.maximum(-opposing, 1e-12), strongest, opposing


def _row(found: Sequence[Scored], place: int) -> tuple[Scored, int]:
    """The stage and number of a row, by its position among the rows of all stages."""
    for own in found:
        if place < len(own.numbers):
            return own, int(own.numbers[place])
        place -= len(own.numbers)
    raise IndexError(place)


def _losses(attributor: SourceAttributor, queries: Queries) -> np.ndarray:
    """What each query measures under the final model, for each token asked about."""
    stage = attributor.record.stages[-1]
    model = attributor.build_model(stage)
    stage.load_weights(model, "final")
    encoded = attributor.encode(queries)
    counts = np.ones(len(queries))
    if not queries.are_rows:
        counts = np.array([sum(label != IGNORE_INDEX for label in row["labels"]) for row in encoded.rows])
    return query_losses(attributor, model, encoded) / counts


def _findings(
    queries: Queries, support: np.ndarray, lacking: np.ndarray, threshold: float, by: Sequence[str] | None
) -> list[str]:
    count, total = int(lacking.sum()), len(lacking)
    said = [
        f"{count} of {total} queries are missing from the data: their support is below {threshold:g} (the median is "
        f"{np.median(support):.2f})."
    ]
    for region in dict.fromkeys(by or ()):
        own = np.array([value == region for value in by])
        inside = int(lacking[own].sum())
        chance = binomtest(inside, int(own.sum()), max(count / total, 1e-9), alternative="greater").pvalue
        if inside and inside / own.sum() > count / total:
            said.append(
                f"Region {str(region)!r}: {inside} of {int(own.sum())} queries are missing (p = {chance:.2g} if its "
                "share were that of all)."
            )
    return said
