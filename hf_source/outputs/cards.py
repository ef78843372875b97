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
"""Cards of repositories on the Hub: what this library writes into one, and what its owner wrote, which stays.

Only what stands between two markers is written anew, and in the YAML header only what the Hub could not do without.
Names and texts come from anywhere and are escaped.
"""

import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ..errors import ConfigError
from ..hub import CARD_FILE
from .tables import shown


BEGIN = (
    "<!-- hf_source begin: written anew by every push. Write above or below; delete this line to keep your text. -->"
)
END = "<!-- hf_source end -->"
_SECTION = re.compile(r"<!-- hf_source begin:.*?-->.*<!-- hf_source end -->", re.DOTALL)
_HEADER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown(value: Any, longest: int = 200) -> str:
    """Any value as plain text of one line, of which Markdown and HTML make nothing."""
    text = " ".join(shown(str(value)).split())
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    escaped = (_ENTITIES.get(c) or (f"\\{c}" if c in string.punctuation else c) for c in text)
    return "".join(escaped)


def code(value: Any) -> str:
    """A name of ours (method, stage, digest) between backticks or quotes: other characters are dropped."""
    return re.sub(r"[^\w.\- ]", "", str(value))


def card(header: Mapping[str, Any], text: str, old: str | None = None, anew: Iterable[str] = ()) -> str:
    """A repository's README.

    Args:
        header: of a new card.
        text: what this library has to say.
        old: the card that is there, kept as far as its owner wrote it.
        anew: what is taken of `header` in an old card's header too.

    Raises:
        ConfigError: if the header of the old card is no YAML.
    """
    section = f"{BEGIN}\n\n{text.strip()}\n\n{END}"
    if old is None:
        return _joined(header, f"\n{section}\n")
    kept, body = _parted(old)
    # A function as replacement: the text is full of backslashes.
    body = _SECTION.sub(lambda _: section, body, count=1)
    return _joined({**kept, **{key: header[key] for key in anew}} if kept else header, body)


def _joined(header: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)}---\n{body}"


def _parted(text: str) -> tuple[dict[str, Any], str]:
    """Header and body of a card."""
    text = text.replace("\r\n", "\n")
    found = _HEADER.match(text)
    if found is None:
        return {}, text
    try:
        header = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"The header of the card ({CARD_FILE}) is no YAML: mend or remove it. ({error})") from error
    if not isinstance(header, dict):
        raise ConfigError(f"The header of the card ({CARD_FILE}) is no YAML mapping: mend or remove it.")
    return header, text[found.end() :]
