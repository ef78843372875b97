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
"""Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""

import re
from html import unescape

from latex2mathml.converter import convert


_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    """What pymdownx.arithmatex marked as a formula, drawn."""
    return _FORMULA.sub(_drawn, html)


def _drawn(found: re.Match) -> str:
    tag, bracket, formula = found.groups()
    display = "inline" if bracket == "(" else "block"
    return f'<{tag} class="formula">{convert(unescape(formula).strip(), display=display)}</{tag}>'
