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
"""What commands open: the record with settings, queries and datasets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def open_attributor(
    records: Sequence[str], recipe: Path | None, overrides: list[str] | None, named: dict[str, Any]
) -> Any:
    """The attributor, with settings from the recipe, then the options given on the command line, then `--set`."""
    import inspect
    from dataclasses import fields

    from .. import SourceAttributor
    from ..attribution import ENSEMBLES, METHODS
    from ..recipes import apply_override, read_settings

    settings = {**(read_settings(recipe) if recipe is not None else {}), **named}
    for override in overrides or []:
        apply_override(settings, override)
    # Objects such as a dataset or a task cannot be written on a command line.
    parameters = inspect.signature(SourceAttributor.__init__).parameters.values()
    known = {p.name: p.default for p in parameters if isinstance(p.default, (str, int))}
    method = METHODS.get(str(settings.get("method", known["method"])))
    ensemble = ENSEMBLES.get(str(settings.get("ensemble")))
    own = [field for owner in (method, ensemble) if owner is not None for field in fields(owner.options)]
    examples = {field.name: field.metadata.get("example", field.default) for field in own}
    known |= {name: example for name, example in examples.items() if isinstance(example, (str, int, float))}
    known |= {"cache_dir": "folder", "memory_budget": "2GiB", "vector_dtype": "bfloat16", "shard_model": True}
    if isinstance(settings.get("memory_budget"), int):
        settings["memory_budget"] = str(settings["memory_budget"])
    known |= {"ensemble": "dropout", "ensemble_size": 10, "index": "runs/capitals-index", "num_segments": 1}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"{key!r} is not a setting of SourceAttributor with this method; it has {', '.join(sorted(known))}."
            )
        if type(value) is not type(known[key]) and not (type(known[key]) is float and type(value) is int):
            raise ConfigError(f"{key}={value!r} should be of type {type(known[key]).__name__}, e.g. {known[key]!r}.")
    return SourceAttributor.from_record(list(records), **settings)


def read_rows(path: str | None) -> Any:
    """A dataset, if a path was given."""
    from ..recipes import load_rows

    return None if path is None else load_rows(path)


def by_stage(given: list[str] | None, option: str) -> dict[str, str]:
    """Stage -> value, from `stage=value`."""
    found = {}
    for text in given or []:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise ConfigError(f"{option} {text}: write it as stage=value, such as sft=chats.")
        found[name] = value
    return found
