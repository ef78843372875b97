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
"""Paths that people give: of a record, of scores, of an index."""

from pathlib import Path
from typing import Any

from .errors import ConfigError


def checked_path(given: Any, what: str, fix: str) -> Path:
    """A given path.

    Args:
        given: should be a string or a `Path`.
        what: is opened or written, to begin the error with.
        fix: what to pass.

    Raises:
        ConfigError: if it is something else.
    """
    if isinstance(given, (str, Path)):
        return Path(given).expanduser()
    kind = "None" if given is None else f"a {type(given).__name__}"
    raise ConfigError(f"{what} needs a path, not {kind}: {fix}.")
