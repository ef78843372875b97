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
"""How far to trust a score: what was measured on the very run, by the same method with the same settings.

Evaluations leave one small JSON file per figure in the record's folder `evaluations`. A figure speaks only for scores
of the same record (by content), stage, method and settings; anything else is silently left aside.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recording import TrainingRecord
from ..recording.digest import digest, record_digest
from ..recording.writer import write_json


FOLDER = "evaluations"
_SHOWN = "LDS"


def store_evaluation(record: TrainingRecord, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Keep one figure beside the record.

    Args:
        record: what was evaluated.
        entry: the figure: `Entry.to_dict()`.
        settings: of the attributor: `SourceAttributor.settings()`.
    """
    content = {"record_digest": record_digest(record), "attributor": dict(settings), "entry": dict(entry)}
    kept = {key: value for key, value in entry["settings"].items() if not key.endswith("seconds")}
    name = digest([content["record_digest"], settings, entry["evaluation"], entry["stage"], entry["measure"], kept])
    path = record.path / FOLDER / f"{name[:24]}.json"
    write_json(path, content)
    return path


def stored_evaluations(record: TrainingRecord) -> Iterator[dict[str, Any]]:
    """Figures of this very record; files of other records, and broken ones, are passed over."""
    files = sorted((record.path / FOLDER).glob("*.json"))
    own = record_digest(record) if files else None
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            same = found["record_digest"] == own
            found["attributor"], found["entry"]["stage"], found["entry"]["measure"], found["entry"]["value"] + 0
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if same:
            yield found


def trust_note(record: TrainingRecord, stages: Sequence[str], settings: Mapping[str, Any]) -> str:
    """What is known of scores of some stages with these settings, as sentences; empty if nothing is."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for found in stored_evaluations(record):
        entry = found["entry"]
        if found["attributor"] != dict(settings) or entry["measure"] != _SHOWN or entry["stage"] not in stages:
            continue
        key = (entry["stage"], entry["evaluation"])
        if key not in best or _size(entry) > _size(best[key]):
            best[key] = entry
    return " ".join(_sentence(best[key]) for key in sorted(best, key=lambda key: (stages.index(key[0]), key[1])))


def _size(entry: Mapping[str, Any]) -> int:
    """How much an evaluation rests on."""
    settings = entry.get("settings", {})
    return settings.get("num_subsets", 0) * len(settings.get("seeds", [0])) * max(1, len(entry.get("per_query", {})))


def _sentence(entry: Mapping[str, Any]) -> str:
    settings, interval = entry["settings"], ""
    if entry.get("low") is not None:
        interval = f" [{entry['low']:.2f}, {entry['high']:.2f}]"
    seeds = [seed for seed in settings.get("seeds", []) if seed is not None]
    again = f", {len(seeds)} trainings each" if seeds else ""
    return (
        f"Measured on this run: with these settings the {entry['method']} scores of stage {entry['stage']!r} have an "
        f"LDS of {entry['value']:.2f}{interval} ({settings.get('num_subsets')} subsets of "
        f"{100 * settings.get('fraction', 0):.3g} % of the rows left out{again}, "
        f"{len(entry.get('per_query', {}))} queries; 1 would be a perfect ranking)."
    )
