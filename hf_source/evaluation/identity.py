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
"""What says whether two evaluations are of the same training and the same questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..attribution.queries import Queries
from ..recording.digest import digest, record_digest


__all__ = ["describe", "digest", "queries_digest", "record_digest"]


def queries_digest(queries: Queries) -> str:
    """Digest of the queries' tokens; names and texts play no part."""
    rows = queries.rows if queries.rows is not None else [queries.prompts, queries.completions]
    return digest([rows, queries.are_rows])


def describe(thing: Any) -> Any:
    """A task, a collator or a function by its name, and its settings where they are plain values."""
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, Sequence):
        return [describe(value) for value in thing]
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    name = f"{named.__module__}.{named.__qualname__}"
    plain = {
        key: value
        for key, value in getattr(thing, "__dict__", {}).items()
        if named is not thing and isinstance(value, (bool, int, float, str))
    }
    return {"name": name, **plain} if plain else name
