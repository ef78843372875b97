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
"""A report: one HTML file that says which rows made the model say it, how much of it, and how far to trust that.

It is made of an `Attribution`, so that scores which were saved or shared give the same report without the model; an
attributor adds what only the model can tell, the influence of single tokens, which can be saved along.
"""

from collections.abc import Iterable, Mapping
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..attribution.queries import Queries
from ..attribution.tokens import TokenInfluence
from ..errors import ConfigError, DataError
from ..paths import checked_path
from .attribution_files import Attribution
from .groups import Group, column_groups, group_of, grouping_columns
from .histogram import histogram
from .numbers import signed
from .page import AnswerFigures, Details, write_page
from .pictures import pictures_of


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor


NOT_MEASURED = (
    "Scores of these settings were not evaluated on this run. The command hf-source evaluate trains it again without "
    "some of its rows and says how well scores foretell what that does; a report then shows the figure here."
)


def write_report(
    path: str | Path,
    attribution: Attribution,
    *,
    title: str = "Why did the model say this?",
    columns: Iterable[str] | None = None,
    tokens: TokenInfluence | None = None,
    std: Mapping[tuple[str, str, int], float] | None = None,
    remark: str | None = None,
) -> Path:
    """Write a report of scores as one HTML file that needs nothing else.

    Args:
        path: file to write.
        attribution: from `load_attribution`, or of an attributor (`SourceAttributor.report`).
        title: heading.
        columns: of the datasets, whose values make groups; by default those that look like labels or sources.
        tokens: influence by token, for shading; by default what the attribution has.
        std: `(query, stage, row)` -> how far an ensemble's members differ.
        remark: shown at the end; by default what the attribution says of its tokens.

    Returns:
        The path.

    Raises:
        ConfigError: if the file's name does not end in `.html`.
        DataError: if no stage has one of the columns, or a column's values make no groups.
    """
    _check_name(path)
    columns = None if columns is None else list(columns)
    for column in columns or []:
        if not any(column in rows.column_names for rows in attribution.stages.values()):
            known = sorted({name for rows in attribution.stages.values() for name in rows.column_names})
            raise DataError(f"No stage has a column {column!r} to group by; there are {', '.join(known)}.")
    unit = attribution.about.get("unit", "")
    scores = {stage: attribution.scores(stage) for stage in attribution.stages}
    details = Details(
        facts=_facts(attribution),
        trust="\n".join(part for part in (attribution.note, attribution.trust or NOT_MEASURED) if part),
        measured=bool(attribution.trust),
        answers={
            name: _figures(attribution, {stage: found[place] for stage, found in scores.items()}, name, unit, columns)
            for place, name in enumerate(attribution.queries.names)
        },
        tokens=attribution.tokens if tokens is None else tokens,
        remark=attribution.about.get("remark", "") if remark is None else remark,
        std=std or {},
        pictures=pictures_of(attribution),
    )
    return write_page(
        path,
        title,
        attribution.queries,
        attribution.top,
        unit=unit,
        settings={**attribution.settings, **_origin(attribution)},
        details=details,
    )


def report_of(
    attributor: "SourceAttributor",
    path: str | Path,
    queries: Queries | None = None,
    stages: Iterable[str] | None = None,
    k: int = 5,
    *,
    title: str | None = None,
    columns: Iterable[str] | None = None,
    shaded: int = 8,
) -> Path:
    """Attribute, and write the report. See `SourceAttributor.report`."""
    from .sharing import collect

    _check_name(path)
    attribution = collect(attributor, queries, stages, k, shaded=shaded)
    if not attributor.accelerator.is_main_process:
        return Path(path)
    given = {} if title is None else {"title": title}
    return write_report(path, attribution, columns=columns, std=_spread(attributor, attribution), **given)


def _check_name(path: Any) -> None:
    if checked_path(path, "A report", "pass the HTML file to write").suffix != ".html":
        raise ConfigError(f"path={str(path)!r}: a report is HTML, so end the name in .html.")


def _spread(attributor: "SourceAttributor", attribution: Attribution) -> dict[tuple[str, str, int], float]:
    """How far the members of an ensemble differ about the rows shown."""
    if attributor.ensemble is None or attributor.ensemble.size < 2:
        return {}
    found = {}
    for stage in attribution.stages:
        std = attributor.scores_std(attributor.datasets.get(stage), attribution.queries, stage)
        numbers = attributor.rows(attributor.record.stage(stage)).numbers
        place = {int(number): index for index, number in enumerate(numbers)}
        for row in attribution.top:
            if row["stage"] == stage:
                query = attribution.queries.names.index(row["query"])
                found[row["query"], stage, row["row"]] = float(std[query, place[row["row"]]])
    return found


def _facts(attribution: Attribution) -> dict[str, Any]:
    rows = sum(len(dataset) for dataset in attribution.stages.values())
    return {
        "method": attribution.settings.get("method", ""),
        "stages": ", ".join(attribution.stages),
        "training rows": f"{rows:,}",
        "answers": f"{len(attribution.queries):,}",
        "unit": attribution.about.get("unit") or "none",
    }


def _origin(attribution: Attribution) -> dict[str, Any]:
    """Where the scores come from, as the last lines of the settings."""
    record = attribution.about.get("record", {})
    found = {"record": record.get("repo_id") or "", "record digest": record.get("digest", "")[:16]}
    for stage, about in attribution.about.get("stages", {}).items():
        found[f"stage {stage}"] = (
            f"{about['model']}, {about['optimizer']}, {about['steps']:,} steps in {about['segments']} segments"
        )
    return {
        key: value for key, value in {**found, "hf_source": attribution.about.get("hf_source", "")}.items() if value
    }


def _figures(
    attribution: Attribution, scores: Mapping[str, np.ndarray], query: str, unit: str, columns: list[str] | None
) -> AnswerFigures:
    """What the scores of all rows say of one answer, `[rows]` for each stage."""
    by_stage = [group_of(stage, found) for stage, found in scores.items()]
    shares: dict[str, list[Group]] = {"stage": by_stage} if len(by_stage) > 1 else {}
    for stage, rows in attribution.stages.items():
        for column in grouping_columns(rows, columns):
            name = f"{column}, stage {stage}" if len(by_stage) > 1 else column
            shares[name] = column_groups(rows, column, scores[stage])
    spreads = {stage: histogram(found) for stage, found in scores.items()}
    top = [row for row in attribution.top if row["query"] == query]
    return AnswerFigures(_sentences(by_stage, top, unit), shares, spreads)


def _sentences(stages: list[Group], top: list[Mapping[str, Any]], unit: str) -> list[str]:
    """The findings in words, for who reads nothing else."""
    found = []
    support = sum(group.supporting for group in stages)
    if len(stages) > 1 and support > 0:
        parts = [f"{100 * group.supporting / support:.0f} % from stage {group.name}" for group in stages]
        found.append(f"The support for this answer comes {', '.join(parts[:-1])} and {parts[-1]}.")
    best = max(top, key=lambda row: row["score"], default=None)
    if best is not None and best["score"] > 0:
        text = f"Its strongest support is row {best['row']} of stage {best['stage']}, worth {signed(best['score'])}"
        if unit == "nats":
            text += f" nats: without it the answer would have {_factor(-best['score'])} its probability"
        found.append(text + ".")
    worst = min(top, key=lambda row: row["score"], default=None)
    if worst is not None and worst["score"] < 0:
        text = f"Row {worst['row']} of stage {worst['stage']} opposes it most, with {signed(worst['score'])}"
        if unit == "nats":
            text += f" nats: without it the answer would have {_factor(-worst['score'])} its probability"
        found.append(text + ".")
    return found


def _factor(change: float) -> str:
    """`e^change` as people say it; beyond what a first-order prediction can mean, a bound."""
    if change > 3:
        return "more than 20 times"
    return f"{exp(change):.2g} times" if change > -4.6 else "less than 0.01 times"
