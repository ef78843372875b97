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
"""Can I trust this? What was measured of scores on this run, and what stands against relying on them."""

from typing import Any

from ..attribution.attributor import SourceAttributor
from ..errors import ConfigError
from ..outputs.attribution_files import Attribution
from ..outputs.trust import stored_evaluations
from .answer import NOT_MEASURED, Answer
from .scored import Source, settings_of


_WEAK, _FEW_QUERIES, _FEW_SUBSETS = 0.3, 10, 32


def trust(source: Source, *, stage: str | None = None) -> Answer:
    """Every evaluation of this very record that is kept beside it, those of the same settings first.

    Args:
        source: an attributor; or an attribution, which knows what was said when it was made.
        stage: only figures of this stage.

    Returns:
        An answer whose table has `stage`, `evaluation`, `method`, `same_settings`, `measure`, `value`, `low`, `high`,
        `num_queries`, `num_subsets`.

    Raises:
        ConfigError: if the source is something else.
    """
    if isinstance(source, Attribution):
        found: list[dict[str, Any]] = []
        note, said = source.note, source.trust
        stages = list(source.stages) if stage is None else [stage]
    elif isinstance(source, SourceAttributor):
        names = [own.name for own in source.record.stages]
        stages = names if stage is None else [source.record.stage(stage).name]
        found = [_line(each, source) for each in stored_evaluations(source.record)]
        found = sorted((line for line in found if line["stage"] in stages), key=lambda line: not line["same_settings"])
        note, said = source.note, source.trust(stages)
    else:
        raise ConfigError(f"{type(source).__name__} holds no scores: ask a SourceAttributor or an Attribution.")
    columns = ("stage", "evaluation", "method", "same_settings", "measure", "value", "low", "high")
    columns += ("num_queries", "num_subsets")
    return Answer(
        "Can I trust these scores?",
        _dataset({name: [line[name] for line in found] for name in columns}),
        {
            "same_settings": "whether it was measured of scores with the settings asked about; others say little",
            "value": "the figure, e.g. the LDS: rank correlation of predicted and real changes, 1 is perfect",
            "low, high": "its 95 % interval",
        },
        _findings(found, note, stages),
        said or NOT_MEASURED,
        None,
        {"question": {"stages": stages}, "scores": settings_of(source)},
    )


def _line(found: dict[str, Any], attributor: SourceAttributor) -> dict[str, Any]:
    entry, nan = found["entry"], float("nan")
    return {
        **{name: str(entry.get(name, "")) for name in ("stage", "evaluation", "method", "measure")},
        "same_settings": found["attributor"] == attributor.settings(),
        "value": float(entry["value"]),
        "low": nan if entry.get("low") is None else float(entry["low"]),
        "high": nan if entry.get("high") is None else float(entry["high"]),
        "num_queries": len(entry.get("per_query", {})),
        "num_subsets": int(entry.get("settings", {}).get("num_subsets", 0)),
    }


def _findings(found: list[dict[str, Any]], note: str, stages: list[str]) -> list[str]:
    said = [note] if note else []
    own = [line for line in found if line["same_settings"]]
    if found and not own:
        said.append(f"{len(found)} figures were measured on this run, none of them with these settings.")
    missing = [stage for stage in stages if stage not in {line["stage"] for line in own}]
    if own and missing:
        said.append(f"Nothing was measured of stage {', '.join(map(repr, missing))}.")
    for line in own:
        where = f"{line['evaluation']}, stage {line['stage']!r}"
        if line["measure"] == "LDS" and line["low"] == line["low"] and line["low"] <= 0:
            said.append(f"{where}: the interval holds 0, so this may be chance.")
        elif line["measure"] == "LDS" and line["value"] < _WEAK:
            said.append(f"{where}: an LDS of {line['value']:.2f} is weak; look at many rows, not at single ones.")
        if line["num_queries"] < _FEW_QUERIES or 0 < line["num_subsets"] < _FEW_SUBSETS:
            said.append(
                f"{where}: {line['num_queries']} queries and {line['num_subsets']} subsets are few; from about "
                f"{_FEW_QUERIES} and {_FEW_SUBSETS} on the interval is of use."
            )
    return said


def _dataset(columns: dict[str, list]) -> Any:
    from datasets import Dataset, Features, Value

    texts = dict.fromkeys(("stage", "evaluation", "method", "measure"), Value("string"))
    numbers = dict.fromkeys(("value", "low", "high"), Value("float64"))
    counts = dict.fromkeys(("num_queries", "num_subsets"), Value("int64"))
    kinds = {**texts, "same_settings": Value("bool"), **numbers, **counts}
    return Dataset.from_dict(columns, features=Features({name: kinds[name] for name in columns}))
