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
"""What evaluations found, in one place: a table, a plot, JSON with every setting, and pages to read."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, DataError
from ..outputs.tables import shown
from ..recording.writer import atomic_write, library_versions
from .plot import draw


@dataclass(frozen=True)
class Entry:
    """One figure.

    Attributes:
        evaluation: what was evaluated, e.g. `"removal"` or `"leave-one-out"`.
        method: whose scores.
        value: the figure; `measure` is its name.
        low, high: 95 % confidence interval, `None` where there is none.
        seconds: that computing the scores took.
        settings: of the method and of the evaluation, JSON-able.
        per_query: query name -> figure, where the value is their mean.
        measure: what the figure is.
        stage: whose rows were evaluated.
    """

    evaluation: str
    method: str
    value: float
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_query: Mapping[str, float] = field(default_factory=dict)
    measure: str = "LDS"
    stage: str = ""

    @property
    def interval(self) -> str:
        """`.83 [.79, .86]`."""
        return (
            figure(self.value)
            if self.low is None
            else f"{figure(self.value)} [{figure(self.low)}, {figure(self.high)}]"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not a finite number is `None`."""
        return _finite(asdict(self))


def figure(value: float | None) -> str:
    """A figure as the tables show it."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 and f"{value:.2f}"[-4:] != "1.00" else f"{value:.2f}"


class Report:
    """A list of figures, and what they are of.

    Args:
        title: heading.
        settings: what holds for all of them, such as the record's digest; versions and machine are added.
        entries: figures.

    Example:
        >>> report = Report("My run")
        >>> report.add(Entry("removal", "source", 0.83, 0.79, 0.86))
        >>> report.entries[0].interval
        '.83 [.79, .86]'
    """

    def __init__(self, title: str, settings: Mapping[str, Any] | None = None, entries: Sequence[Entry] = ()) -> None:
        self.title = title
        self.settings = {"versions": library_versions(), "machine": machine(), **(settings or {})}
        self.entries = list(entries)

    def add(self, entry: Entry) -> None:
        """Append a figure."""
        self.entries.append(entry)

    def sections(self) -> dict[tuple[str, str, str], list[Entry]]:
        """Entries by evaluation, stage and measure, in the order in which they came."""
        found: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.evaluation, entry.stage, entry.measure), []).append(entry)
        return found

    def table(self) -> Table:
        """For the terminal (`rich`)."""
        table = Table(title=Text(shown(self.title)), title_justify="left")
        for name in ("evaluation", "stage", "method"):
            table.add_column(name)
        for name in ("measure", "figure, 95 % interval", "seconds"):
            table.add_column(name, justify="right" if name == "seconds" else "left")
        for entry in self.entries:
            cells = (
                entry.evaluation,
                entry.stage,
                entry.method,
                entry.measure,
                entry.interval,
                seconds(entry.seconds),
            )
            table.add_row(*(Text(shown(cell)) for cell in cells))
        return table

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "title": self.title,
            "settings": _finite(self.settings),
            "entries": [entry.to_dict() for entry in self.entries],
        }

    def to_json(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return _written(path, text + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            DataError: if it is something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            report = cls(data["title"], entries=[_entry(entry) for entry in data["entries"]])
            report.settings = data["settings"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no report of an evaluation: {error!r}. Pass its report.json.") from error
        return report

    def plot(self, path: str | Path) -> Path:
        """Draw the figures with their intervals: `.svg`, `.png` or `.pdf`.

        Raises:
            ConfigError: if matplotlib is not installed, there is nothing to draw, or the ending is another.
        """
        path = Path(path)
        if path.suffix not in (".svg", ".png", ".pdf"):
            raise ConfigError(f"{path}: end the name of a plot in .svg, .png or .pdf.")
        content = draw(self.title, self.sections(), path.suffix[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: temporary.write_bytes(content))
        return path

    def write(self, folder: str | Path) -> Path:
        """Write `report.json`, `report.md` and `report.html` (with the plot inside, if matplotlib is installed)."""
        from .pages import html, markdown

        folder = Path(folder)
        self.to_json(folder / "report.json")
        _written(folder / "report.md", markdown(self))
        _written(folder / "report.html", html(self))
        return folder


def machine() -> dict[str, Any]:
    """What figures of time depend on."""
    found: dict[str, Any] = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def seconds(value: float | None) -> str:
    """A time as the tables show it."""
    return "" if value is None else f"{value:.1f}"


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(**{**data, "value": math.nan if data["value"] is None else data["value"]})


def _written(path: str | Path, text: str) -> Path:
    path = Path(path)
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN, no arrays and no tuples."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
