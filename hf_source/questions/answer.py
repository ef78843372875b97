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
"""What every question is answered with: a table, what its columns say, findings in words, and how far to trust it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..outputs.tables import shown
from .check import Check
from .scored import Scored, Source, settings_of, trust_of


NOT_MEASURED = (
    "Nobody has measured yet how far to trust these scores on this run: `hf-source evaluate` does (and `verify` tests "
    "an answer itself, where it can)."
)
NO_SCORES = "This answer rests on no influence scores: the rows themselves were compared."
_UNSIGNED = {"share", "share_of_rows", "similarity", "support", "loss", "loss_per_token", "value", "self_influence"}
_SHOWN = 20
_LONGEST = 160


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        question: what was asked, in words.
        table: one line for each thing that was found, the most important first.
        columns: column -> what it says, with sign and unit.
        findings: the answer in sentences.
        trust: what was measured of these scores on this run, or that nothing was.
        check: predictions held against training again, if that was asked for.
        settings: of the question and of the scores, JSON-able.
    """

    question: str
    table: Dataset
    columns: Mapping[str, str]
    findings: Sequence[str]
    trust: str
    check: Check | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """Findings, then what training again showed, then how far to trust them."""
        return [*self.findings, *([str(self.check)] if self.check else []), self.trust]

    def __rich__(self) -> Group:
        """For the terminal: the first lines of the table, its columns explained, and the sentences."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, feature in self.table.features.items():
            number = getattr(feature, "dtype", "").startswith(("int", "float"))
            table.add_column(Text(shown(name)), justify="right" if number else "left", overflow="fold")
        for row in self.table.select(range(min(_SHOWN, len(self.table)))):
            table.add_row(*(Text(cell(value, name not in _UNSIGNED)) for name, value in row.items()))
        parts: list[Any] = [Text(shown(self.question), "bold"), table]
        if len(self.table) > _SHOWN:
            parts.append(Text(f"... and {len(self.table) - _SHOWN:,} more in `table`", "dim"))
        parts += [Text.assemble((f"{name}: ", "dim"), (shown(what), "dim")) for name, what in self.columns.items()]
        parts += [Text(shown(sentence)) for sentence in self.sentences]
        return Group(*parts)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()

    def to_markdown(self) -> str:
        """The answer as a page."""
        names = self.table.column_names
        lines = [f"# {_in_line(self.question)}", "", *(f"- {_in_line(text)}" for text in self.sentences), ""]
        lines += [f"| {' | '.join(map(_in_cell, names))} |", f"|{'---|' * len(names)}"]
        for row in self.table:
            cells = (_in_cell(cell(value, name not in _UNSIGNED)) for name, value in row.items())
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- `{_in_line(name)}`: {_in_line(what)}" for name, what in self.columns.items()), ""]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> Path:
        """Write `answer.md`, `answer.parquet` and `answer.json` (findings, check, settings).

        Returns:
            The folder.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self.table.to_parquet(str(folder / "answer.parquet"))
        content = {
            "question": self.question,
            "columns": dict(self.columns),
            "findings": list(self.findings),
            "trust": self.trust,
            "check": None if self.check is None else self.check.to_dict(),
            "settings": dict(self.settings),
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / "answer.json").write_text(text + "\n", encoding="utf-8")
        (folder / "answer.md").write_text(self.to_markdown(), encoding="utf-8")
        return folder


def answer(
    source: Source | None,
    scored: Sequence[Scored],
    question: str,
    table: Mapping[str, Any] | Dataset,
    columns: Mapping[str, str],
    findings: Sequence[str],
    check: Check | None = None,
    **settings: Any,
) -> Answer:
    """An answer with the trust note and the settings of the scores it rests on.

    Args:
        source: whose scores they are; `None` for an answer that rests on none.
        scored: the stages of the answer.
        question, columns, findings, check: see `Answer`.
        table: columns of the table, or the table.
        settings: of the question.
    """
    stages = [own.stage for own in scored]
    own = {"stages": stages, "queries": [] if scored[0].queries is None else scored[0].queries.names, **settings}
    return Answer(
        question,
        table if isinstance(table, Dataset) else Dataset.from_dict(dict(table)),
        columns,
        list(findings),
        NO_SCORES if source is None else trust_of(source, stages) or NOT_MEASURED,
        check,
        {"question": own, "scores": {} if source is None else settings_of(source)},
    )


def cell(value: Any, signed: bool = True) -> str:
    """A value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        sign = "+" if signed else ""
        return "-" if value != value else f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"
    text = shown(" ".join(str("-" if value is None else value).split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _in_line(text: str) -> str:
    """Text of a dataset or model cannot become a heading, a link or HTML."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", shown(" ".join(text.split())))


def _in_cell(text: str) -> str:
    return _in_line(text) or " "
