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
"""Versions of `record.json`: an older one is brought up to date step by step, in memory, when it is read.

A change of the format raises `SCHEMA_VERSION` and adds to `_UPGRADES` a function that turns the version before into
the new one. A key that readers look up with a default needs neither.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RecordError
from .optimizers import name_rules


SCHEMA_VERSION = 2
"""The version that is written.

- 1: the first.
- 2: a stage says how its visits are known (`visits`), its optimizer's groups name their rule, and some of its steps
  hold a few weights, for a cheap replay.
"""


def _to_2(data: dict[str, Any]) -> None:
    for stage in data["stages"]:
        stage.setdefault("visits", "recorded")
        name_rules(stage["optimizer"])


_UPGRADES: dict[int, Callable[[dict[str, Any]], None]] = {1: _to_2}
"""Version -> what turns it, in place, into the next."""


def upgraded(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """The content of a `record.json` in the present version; the file and `data` stay as they are.

    Raises:
        RecordError: if a newer hf_source wrote it.
        KeyError, TypeError: if it is no record.
    """
    found = data["schema_version"]
    if not isinstance(found, int) or not 1 <= found <= SCHEMA_VERSION:
        raise RecordError(
            f"{file} has schema version {found}, this hf_source reads versions 1 to {SCHEMA_VERSION}. Install the "
            f"hf_source that wrote it ({data.get('library_versions', {}).get('hf_source', 'unknown')}) or a newer "
            "one, or record the run again."
        )
    data = copy.deepcopy(data)
    for version in range(found, SCHEMA_VERSION):
        _UPGRADES[version](data)
        data["schema_version"] = version + 1
    return data
