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
"""Why this error? The rows that push towards a wrong answer and away from the right one.

The question is about the *contrast* of two completions of one prompt, `log p(wrong) - log p(right)`: what both answers
share (the form of a sentence, the topic) cancels out. As scores add,

    push(q, m) = score(wrong, m) - score(right, m),      nats,

is the predicted fall of that contrast had row `m` not been trained on: positive, the row pushes towards the wrong
answer; negative, towards the right one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..attribution.asking import query_losses
from ..attribution.attributor import SourceAttributor
from ..attribution.methods import METHODS
from ..attribution.queries import Queries
from ..errors import ConfigError, DataError
from ..evaluation.protocol import Retraining
from .answer import Answer, answer
from .check import Check, how, measured_changes, retraining_for
from .scored import Scored, scored, unit_of


_MOST = 0.05  # share of a stage's rows beyond which "without these rows" is no small change any more


def why(
    attributor: SourceAttributor,
    prompts: str | Sequence[str],
    right: str | Sequence[str],
    wrong: str | Sequence[str] | None = None,
    *,
    k: int = 10,
    stage: str | None = None,
    names: Sequence[str] | None = None,
    verify: bool | Retraining = False,
    seed: int = 0,
) -> Answer:
    """The rows behind wrong answers.

    Args:
        attributor: of the record.
        prompts: what was asked; one or several.
        right: the right answer to each, with its leading space.
        wrong: what the model said instead; by default it is asked, for as many tokens as the right answer has.
        k: rows per prompt, stage and direction.
        stage: whose rows are listed; all stages by default.
        names: of the prompts, by default `q0`, `q1`, ...
        verify: train again without each prompt's `k` strongest rows (of one stage), and say which answers turn; beside
            it, without `k` random rows. `True` trains many copies at once; or a `Retraining` of `contrast_queries`.
        seed: of the random rows.

    Returns:
        An answer whose table has `query`, `stage`, `rank`, `row`, `push`, `wrong`, `right`, `text`.

    Raises:
        DataError: if there is not one right (and wrong) answer for each prompt, or the model's answer is right.
        ConfigError: if k is below 1, or several stages are to be verified.
    """
    if not isinstance(attributor, SourceAttributor):
        raise ConfigError("`why` asks the model for both answers: give a SourceAttributor, not shared scores.")
    if k < 1:
        raise ConfigError(f"k={k}: at least one row per prompt is needed (10 is usual).")
    queries = contrast_queries(attributor, prompts, right, wrong, names)
    count = len(queries) // 2
    found = scored(attributor, queries, stage)
    retraining = retraining_for(attributor, queries, found, verify)
    pushes = [own.scores[:count] - own.scores[count:] for own in found]
    margins = _margins(attributor, queries)
    labels = [name.removesuffix(", wrong") for name in queries.names[:count]]
    nats = METHODS[attributor.method].nats
    findings = [
        _finding(label, queries, position, margins[position], pushes, found, nats)
        for position, label in enumerate(labels)
    ]
    check, turned = None, {}
    if retraining is not None:
        check, turned = _verified(retraining, found[0], pushes[0], margins, labels, k, seed)
        findings.append(
            f"Without its {turned['rows']} strongest rows of stage {found[0].stage!r}, the right answer becomes the "
            f"likelier one for {turned['turned']} of the {turned['wrong']} wrong answers (without as many random "
            f"rows: {turned['turned_random']})."
        )
    unit = unit_of(attributor) or "no unit"
    return answer(
        attributor,
        found,
        "Which rows push towards the wrong answer?",
        _table(found, pushes, labels, k, count),
        {
            "push": f"wrong - right ({unit}): by how much log p(wrong) - log p(right) would fall without the row; "
            "positive pushes towards the wrong answer",
            "wrong": f"score of the row for the wrong answer ({unit})",
            "right": f"score of the row for the right answer ({unit})",
            "rank": "1, 2, ... push most towards the wrong answer; -1, -2, ... most towards the right one",
        },
        findings,
        check,
        k=k,
        prompts=queries.prompts[:count],
        wrong=queries.completions[:count],
        right=queries.completions[count:],
        margins=margins.tolist(),
        verified=turned,
    )


def contrast_queries(
    attributor: SourceAttributor,
    prompts: str | Sequence[str],
    right: str | Sequence[str],
    wrong: str | Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Queries:
    """The wrong answers, then the right ones, as the queries that `why` scores (and that its retraining measures).

    Args:
        attributor, prompts, right, wrong, names: see `why`.

    Raises:
        DataError: see `why`.
    """
    prompts, right = _listed(prompts), _listed(right)
    names = [f"q{i}" for i in range(len(prompts))] if names is None else list(names)
    given = _said(attributor, prompts, right, names) if wrong is None else _listed(wrong)
    if not len(prompts) == len(right) == len(given) == len(names):
        raise DataError(
            f"{len(prompts)} prompts, {len(right)} right answers, {len(given)} wrong ones and {len(names)} names: "
            "give one of each per prompt."
        )
    for prompt, one, other in zip(prompts, right, given, strict=True):
        if one.strip() == other.strip():
            said = (
                "the model says it itself, so there is no error" if wrong is None else "wrong and right are the same"
            )
            raise DataError(f"{prompt[-40:]!r}: the answer {one!r} is right ({said}): give `wrong=`, or leave it out.")
    labels = [f"{name}, wrong" for name in names] + [f"{name}, right" for name in names]
    return attributor.encode(Queries.from_text(prompts * 2, given + right, labels))


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _said(attributor: SourceAttributor, prompts: list[str], right: list[str], names: list[str]) -> list[str]:
    """What the model says, cut to the length of the right answer, so that the two can be compared."""
    if not len(prompts) == len(right) == len(names):
        raise DataError(f"{len(prompts)} prompts, {len(right)} right answers and {len(names)} names: give as many.")
    encoded = attributor.encode(Queries.from_text(prompts, right, names))
    lengths = [sum(label != -100 for label in row["labels"]) for row in encoded.rows]
    said = []
    for prompt, length in zip(prompts, lengths, strict=True):
        said += attributor.generate([prompt], max_new_tokens=length).completions
    return said


def _margins(attributor: SourceAttributor, queries: Queries) -> np.ndarray:
    """`log p(wrong) - log p(right)` under the final model, float64 `[prompts]`."""
    stage = attributor.record.stages[-1]
    model = attributor.build_model(stage)
    stage.load_weights(model, "final")
    losses = query_losses(attributor, model, queries)
    return losses[len(losses) // 2 :] - losses[: len(losses) // 2]


def _table(
    found: Sequence[Scored], pushes: Sequence[np.ndarray], labels: Sequence[str], k: int, count: int
) -> dict[str, list]:
    lines: list[tuple] = []
    for position, label in enumerate(labels):
        for own, push in zip(found, pushes, strict=True):
            order = np.argsort(-push[position], kind="stable")
            chosen = [(rank + 1, place) for rank, place in enumerate(order[:k])]
            chosen += [(-rank - 1, place) for rank, place in enumerate(order[k:][::-1][:k])]
            for rank, place in chosen:
                number, wrong = int(own.numbers[place]), float(own.scores[position, place])
                right = float(own.scores[count + position, place])
                lines.append((label, own.stage, rank, number, wrong - right, wrong, right, own.text(number)))
    names = ("query", "stage", "rank", "row", "push", "wrong", "right", "text")
    return {name: [line[place] for line in lines] for place, name in enumerate(names)}


def _finding(
    label: str,
    queries: Queries,
    position: int,
    margin: float,
    pushes: Sequence[np.ndarray],
    found: Sequence[Scored],
    nats: bool,
) -> str:
    count = len(queries) // 2
    wrong, right = queries.completions[position], queries.completions[count + position]
    prefers = f"{label}: the model prefers {wrong!r} to {right!r} by {margin:.2f} nats"
    if margin <= 0:
        return f"{label}: the model prefers the right {right!r} to {wrong!r} by {-margin:.2f} nats already."
    if not nats:
        return f"{prefers}."
    best = None
    for own, push in zip(found, pushes, strict=True):
        fallen = np.cumsum(np.sort(push[position])[::-1])
        enough = np.flatnonzero(fallen > margin)
        if len(enough) and enough[0] + 1 <= max(1, _MOST * len(own.numbers)):
            best = min(best or (len(own.numbers), ""), (int(enough[0]) + 1, own.stage))
    if best is None:
        return (
            f"{prefers}. No small set of rows (up to {100 * _MOST:.0f} % of a stage) is predicted to turn it; the "
            "strongest are listed."
        )
    rows = "the strongest row" if best[0] == 1 else f"the {best[0]} strongest rows"
    return f"{prefers}. Predicted to turn without {rows} of stage {best[1]!r}."


def _verified(
    retraining: Retraining,
    own: Scored,
    push: np.ndarray,
    margins: np.ndarray,
    labels: Sequence[str],
    k: int,
    seed: int,
) -> tuple[Check, dict[str, int]]:
    """Train without each prompt's `k` strongest rows, and without random ones."""
    count, generator = len(labels), np.random.default_rng(seed)
    k = min(k, len(own.numbers) - 1)
    top = [np.argsort(-push[position], kind="stable")[:k] for position in range(count)]
    drawn = [generator.choice(len(own.numbers), size=k, replace=False) for _ in range(count)]
    weights = np.stack([~own.mask(places) for places in top + drawn]).astype(float)
    changes = measured_changes(retraining, weights)
    moved = changes[:, count:] - changes[:, :count]  # change of log p(wrong) - log p(right), [sets, prompts]
    each = np.arange(count)
    measured, random = moved[each, each], moved[count + each, each]
    predicted = -np.array([push[position, places].sum() for position, places in enumerate(top)])
    wrong = margins > 0
    turned, by_chance = (int((margins + change <= 0)[wrong].sum()) for change in (measured, random))
    what = "log p(wrong) - log p(right)"
    check = Check(list(labels), predicted[:, None], measured[:, None], how(retraining), what)
    return check, {"rows": k, "wrong": int(wrong.sum()), "turned": turned, "turned_random": by_chance}


def contrast_of(answer: Answer) -> list[dict[str, Any]]:
    """Prompt, wrong and right answer, and `log p(wrong) - log p(right)`, for each prompt of an answer of `why`."""
    own = answer.settings["question"]
    keys = ("prompts", "wrong", "right", "margins")
    return [dict(zip(keys, values, strict=True)) for values in zip(*(own[key] for key in keys), strict=True)]
