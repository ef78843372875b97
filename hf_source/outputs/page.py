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
"""One self-contained HTML page: what the model said, and the rows of each stage that made it say so.

No script, no network. Everything that comes from a dataset or a model is escaped by the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..attribution.queries import Queries
from ..attribution.tokens import TokenInfluence, Tokens
from .groups import Group
from .numbers import signed
from .pictures import Pictures


SHOWN_OPEN = 3
"""Answers that are unfolded when the page opens."""

_LONG = 400  # characters: longer rows are folded around their strongest part


@dataclass
class Curve:
    """A line to draw: its name, and points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[float] = field(default_factory=list)  # x of vertical lines: segment boundaries

    def path(self, width: float, height: float, end: float, top: float) -> str:
        """SVG path data, with x in `[0, end]` and y in `[0, top]`."""
        places = [(x / end * width, height - min(y, top) / top * height) for x, y in self.points]
        return " ".join(f"{'M' if i == 0 else 'L'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(places))


@dataclass
class AnswerFigures:
    """What a report says of one answer besides its strongest rows.

    Attributes:
        sentences: the findings in words.
        shares: title -> groups of rows: by stage, by the values of a column.
        spreads: stage -> how its scores are distributed (`histogram.Histogram`).
    """

    sentences: Sequence[str] = ()
    shares: Mapping[str, Sequence[Group]] = field(default_factory=dict)
    spreads: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Details:
    """What makes a page a report.

    Attributes:
        facts: short facts below the title, name -> value.
        trust: how far to trust the scores; what to do about it if that was not measured.
        measured: whether it was.
        answers: query -> its figures.
        tokens: influence by token, where it was computed.
        remark: why it was not.
        std: `(query, stage, row)` -> how far the members of an ensemble differ.
        pictures: images of queries and rows, where they are images.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    trust: str = ""
    measured: bool = False
    answers: Mapping[str, AnswerFigures] = field(default_factory=dict)
    tokens: TokenInfluence = field(default_factory=TokenInfluence)
    remark: str = ""
    std: Mapping[tuple[str, str, int], float] = field(default_factory=dict)
    pictures: Pictures = field(default_factory=Pictures)


def write_page(
    path: str | Path,
    title: str,
    queries: Queries,
    top: Dataset,
    *,
    unit: str = "nats",
    marked: Mapping[tuple, str] | None = None,
    summary: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    curves: Sequence[Curve] = (),
    settings: Mapping[str, Any] | None = None,
    details: Details | None = None,
) -> Path:
    """Write the page.

    Args:
        path: file to write.
        title: heading.
        queries: what was asked.
        top: from `SourceAttributor.top`.
        unit: of the scores; empty if they have none.
        marked: `(query, stage, row)` -> note beside a row.
        summary: retrieval figures, `{method: {stage: {measure: value}}}`.
        curves: training losses by stage.
        settings: shown at the end.
        details: what a report says besides.

    Returns:
        The path.
    """
    environment = Environment(
        loader=PackageLoader("hf_source.outputs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "signed": signed}
    details = details or Details()
    html = environment.get_template("page.html.j2").render(
        title=title,
        answers=_answers(queries, top, marked or {}, details),
        shown_open=SHOWN_OPEN,
        unit=unit,
        note="" if details.trust else top.info.description,
        details=details,
        summary=summary or {},
        curves=[
            {
                "name": curve.name,
                "path": curve.path(560, 120, max(x for x, _ in curve.points), max(y for _, y in curve.points)),
                "marks": [mark / max(x for x, _ in curve.points) * 560 for mark in curve.marks],
                "first": curve.points[0][1],
                "last": curve.points[-1][1],
                "end": max(x for x, _ in curve.points),
            }
            for curve in curves
            if curve.points
        ],
        settings=settings or {},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _answers(queries: Queries, top: Dataset, marked: Mapping[tuple, str], details: Details) -> list[dict[str, Any]]:
    """The table of strongest rows, nested as the page shows it: query, stage, supporting and opposing rows."""
    answers = {
        name: {
            "name": name,
            "prompt": prompt,
            "completion": completion,
            "stages": {},
            "largest": 0.0,
            "tokens": shaded(details.tokens.answers.get(name, [])),
            "figures": details.answers.get(name, AnswerFigures()),
            "picture": details.pictures.queries.get(name, ""),
        }
        for name, prompt, completion in queries
    }
    for row in top:
        if row["query"] not in answers:
            continue
        answer, key = answers[row["query"]], (row["query"], row["stage"], row["row"])
        answer["largest"] = max(answer["largest"], abs(row["score"]))  # bars compare the stages of one answer
        stage = answer["stages"].setdefault(row["stage"], {"supporting": [], "opposing": []})
        tokens = shaded(details.tokens.rows.get(key, []))
        more = {"note": marked.get(key, ""), "std": details.std.get(key), "tokens": tokens}
        more["excerpt"] = _excerpt(row["text"] or "", tokens)
        more["picture"] = details.pictures.rows.get((row["stage"], row["row"]), "")
        stage["supporting" if row["rank"] > 0 else "opposing"].append({**row, **more})
    for answer in answers.values():
        answer["largest"] = answer["largest"] or 1.0
    return list(answers.values())


@dataclass(frozen=True)
class Shade:
    """A piece of text with its influence, and how strongly to colour it, 0 to 9."""

    text: str
    score: float | None
    level: int

    @property
    def kind(self) -> str:
        """The class of its colour; none if it has none."""
        return "" if not self.level else f"{'u' if self.score > 0 else 'd'}{self.level}"


def shaded(tokens: Tokens) -> list[Shade]:
    """Tokens with the strength of their colour: their share of the strongest one."""
    largest = max((abs(score) for _, score in tokens if score is not None), default=0.0) or 1.0
    return [Shade(text, score, round(9 * abs(score or 0.0) / largest)) for text, score in tokens]


def _excerpt(text: str, tokens: Sequence[Shade]) -> dict[str, Any] | None:
    """Of a long row the part with its strongest token; `None` for a row that is shown whole."""
    if len(text) <= _LONG:
        return None
    if not tokens:
        return {"before": False, "tokens": [Shade(text[:_LONG], None, 0)]}
    strongest = max(range(len(tokens)), key=lambda place: tokens[place].level)
    first = last = strongest
    size = len(tokens[strongest].text)
    while size < _LONG and (first > 0 or last < len(tokens) - 1):
        for place in (first - 1, last + 1):
            if 0 <= place < len(tokens) and size < _LONG:
                first, last = min(first, place), max(last, place)
                size += len(tokens[place].text)
    # An unlabelled piece may be a long prompt.
    cut = [Shade(each.text[-_LONG:], each.score, each.level) for each in tokens[first : last + 1]]
    return {"before": first > 0, "tokens": cut}


def _percent(value: float) -> str:
    """A length in a style: plain digits whatever the number."""
    return f"{100 * min(max(float(value), 0.0), 1.0):.1f}%"
