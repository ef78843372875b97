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

    Returns:
        The path.
    """
    environment = Environment(
        loader=PackageLoader("hf_source.outputs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("page.html.j2").render(
        title=title,
        answers=_answers(queries, top, marked or {}),
        unit=unit,
        note=top.info.description,
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


def _answers(queries: Queries, top: Dataset, marked: Mapping[tuple, str]) -> list[dict[str, Any]]:
    """The table of strongest rows, nested as the page shows it: query, stage, supporting and opposing rows."""
    answers = {
        name: {"name": name, "prompt": prompt, "completion": completion, "stages": {}, "largest": 0.0}
        for name, prompt, completion in queries
    }
    for row in top:
        if row["query"] not in answers:
            continue
        answer = answers[row["query"]]
        answer["largest"] = max(answer["largest"], abs(row["score"]))  # bars compare the stages of one answer
        stage = answer["stages"].setdefault(row["stage"], {"supporting": [], "opposing": []})
        note = marked.get((row["query"], row["stage"], row["row"]), "")
        stage["supporting" if row["rank"] > 0 else "opposing"].append({**row, "note": note})
    for answer in answers.values():
        answer["largest"] = answer["largest"] or 1.0
    return list(answers.values())
