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

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import CurvatureName, EnsembleName, Method


def named_settings(
    method: Method | None,
    curvature: CurvatureName | None,
    num_samples: int | None,
    ensemble: EnsembleName | None = None,
    ensemble_size: int | None = None,
    index: str | None = None,
) -> dict[str, Any]:
    """The options that were given."""
    named = {"method": method and method.value, "curvature": curvature and curvature.value, "num_samples": num_samples}
    named |= {"ensemble": ensemble and ensemble.value, "ensemble_size": ensemble_size, "index": index}
    return {key: value for key, value in named.items() if value is not None}


def open_attributor(
    records: list[str], recipe: Path | None, overrides: list[str] | None, named: dict[str, Any]
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
    known |= {"cache_dir": "folder", "memory_budget": "2GiB"}
    if isinstance(settings.get("memory_budget"), int):
        settings["memory_budget"] = str(settings["memory_budget"])
    known |= {"ensemble": "dropout", "ensemble_size": 10, "index": "runs/capitals-index"}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"{key!r} is not a setting of SourceAttributor with this method; it has {', '.join(sorted(known))}."
            )
        if type(value) is not type(known[key]) and not (type(known[key]) is float and type(value) is int):
            raise ConfigError(f"{key}={value!r} should be of type {type(known[key]).__name__}, e.g. {known[key]!r}.")
    return SourceAttributor.from_record(records, **settings)


def read_queries(
    attributor: Any, file: Path | None, prompts: list[str] | None, completions: list[str] | None, max_new_tokens: int
) -> Any:
    """Queries of a file, of prompts with completions, or of prompts that the model completes.

    Raises:
        ConfigError: if there is none of them or more than one, or a file that is no file of queries.
    """
    from .. import Queries
    from ..recipes import load_rows

    if (file is None) == (not prompts):
        raise ConfigError("Say what to explain: either --queries FILE, or --prompt (with --completion, or generated).")
    if file is not None:
        rows = load_rows(file)
        if "input_ids" in rows.column_names:
            queries = Queries.from_dataset(rows, attributor.processing_class)
            given = {"prompt", "completion"} <= set(rows.column_names)
            return Queries(queries.names, rows["prompt"][:], rows["completion"][:], queries.rows) if given else queries
        missing = {"prompt", "completion"} - set(rows.column_names)
        if missing:
            raise ConfigError(f"{file} has no column {sorted(missing)[0]!r}: queries have prompt and completion.")
        names = rows["name"][:] if "name" in rows.column_names else None
        return Queries.from_text(rows["prompt"][:], rows["completion"][:], names)
    if completions:
        if len(completions) != len(prompts):
            raise ConfigError(f"{len(prompts)} --prompt but {len(completions)} --completion: give one for each.")
        return Queries.from_text(prompts, completions)
    return attributor.generate(prompts, max_new_tokens=max_new_tokens)


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


def open_with_datasets(
    record: str,
    recipe: Path | None,
    settings: list[str] | None,
    datasets: list[str] | None,
    method: Any,
    curvature: Any,
    num_samples: int | None,
    index: str | None = None,
) -> Any:
    """The attributor of a command that takes datasets by stage."""
    from ..recipes import load_rows

    given = by_stage(datasets, "--dataset")
    attributor = open_attributor(
        [record], recipe, settings, named_settings(method, curvature, num_samples, index=index)
    )
    for name, path in given.items():
        attributor.set_dataset(name, load_rows(path))
    return attributor
