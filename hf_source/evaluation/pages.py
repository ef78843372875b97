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
"""A report as Markdown and as one self-contained HTML page; everything that was given is escaped."""

import json
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..errors import ConfigError
from .plot import draw


if TYPE_CHECKING:
    from .report import Report

_MARKS = "\\`*_{}[]()<>#+-!|~&$"


def html(report: "Report") -> str:
    """The page: plot, tables, figures of every query, settings. No script, no network."""
    return _rendered("report.html.j2", report, True, plot=_picture(report))


def markdown(report: "Report") -> str:
    """The same as Markdown tables."""
    return _rendered("report.md.j2", report, False)


def _rendered(template: str, report: "Report", escape: bool, **more: object) -> str:
    from .report import figure, seconds

    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"figure": figure, "seconds": seconds, "plain": _plain, "json": _json}
    source = (files("hf_source.evaluation") / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(report=report, sections=report.sections(), **more)


def _picture(report: "Report") -> Markup:
    """The plot as an `<svg>` element; nothing if matplotlib is not installed."""
    try:
        svg = draw(report.title, report.sections(), "svg").decode()
    except ConfigError:
        return Markup("")
    return Markup(svg[svg.index("<svg") :])  # matplotlib escapes texts, or draws them as paths


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    line = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in _MARKS else letter for letter in line if letter.isprintable())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
