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
"""An ensemble of attributors: one member after another is walked through, and only sums are kept."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from ...recording import StageRecord, TrainingRecord
from ..methods import METHODS
from ..plan import Plan
from ..queries import Queries


if TYPE_CHECKING:
    from ..attributor import SourceAttributor

Members = Iterator["SourceAttributor"]

REPLAYING = ("stepwise", "unrolled")
"""Methods that repeat the recorded steps, which only the recorded model itself made."""


@dataclass(frozen=True)
class EnsembleKind:
    """A way to get members.

    Attributes:
        members: from an attributor of one record, the options, and the numbers of its members among all, makes one
            member after another.
        options: dataclass of the kind's own settings, which are keyword arguments of `SourceAttributor`.
        usual_size: members of each record if `ensemble_size` is not given; 0 if a record is a member.
    """

    members: Callable[["SourceAttributor", Any, range], Members]
    options: type
    usual_size: int = 0


class Moments:
    """Mean and variance of arrays that come one after another (Welford 1962), float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: np.ndarray) -> None:
        """Take one more array in."""
        self.count += 1
        values = values.astype(np.float64)
        away = values - self.mean
        self.mean = self.mean + away / self.count
        self._squares = self._squares + away * (values - self.mean)

    def std(self) -> np.ndarray:
        """Sample standard deviation (`n - 1`)."""
        return np.sqrt(self._squares / (self.count - 1))


class Ensemble:
    """Scores averaged over members, each the attributor's own method on another model.

    Members come one after another, so the memory is that of one. A member goes from the last stage back to the one
    that is asked for; ask for the earliest stage first, and those after it cost nothing more.

    Args:
        attributor: whose settings the members have.
        records: of the runs.
        name: of the kind.
        kind: how members are made.
        size: of members in all.
        options: of the kind.
    """

    def __init__(
        self,
        attributor: "SourceAttributor",
        records: Sequence[TrainingRecord],
        name: str,
        kind: EnsembleKind,
        size: int,
        options: Any,
    ) -> None:
        self.attributor, self.records = attributor, list(records)
        self.name, self.kind, self.size, self.options = name, kind, size, options
        self._key, self._found = "", {}

    @property
    def note(self) -> str:
        """What is to be said with every score."""
        per_record = self.size // len(self.records)
        what = {
            "independent": "independently trained models",
            "dropout": f"dropout masks of {_models(len(self.records))}",
            "lora": f"LoRA adapters fine-tuned from {_models(len(self.records))}",
        }[self.name]
        each = f", {per_record} of each" if len(self.records) > 1 and per_record > 1 else ""
        return f"Scores are means over {self.size} {what}{each}."

    def settings(self) -> dict[str, Any]:
        """The settings of `SourceAttributor` that make this ensemble of its records."""
        own = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        size = self.size // len(self.records) if self.kind.usual_size else self.size
        return {"ensemble": self.name, "ensemble_size": size, **own}

    def members(self) -> Members:
        """Attributors of one model each, one after another; use one before you ask for the next."""
        share = self.size // len(self.records)
        for position, record in enumerate(self.records):
            single = self._single(record)
            numbers = range(position * share, (position + 1) * share)
            yield from self.kind.members(single, self.options, numbers)

    def _single(self, record: TrainingRecord) -> "SourceAttributor":
        """The attributor with one record, as if it had been made without an ensemble."""
        single = member_of(self.attributor)
        single.ensemble = None
        if record is not self.attributor.record:
            single.record, single._rows, single._datasets = record, {}, {}
            for stage, dataset in self.attributor._datasets.items():
                single.set_dataset(stage, dataset)
        return single

    def moments(self, stage: StageRecord, queries: Queries) -> Moments:
        """Mean and variance over members of the scores by row number, `[queries, rows]`."""
        for record in self.records:
            record.require_complete()
        key = json.dumps(queries.rows, sort_keys=True)
        if key != self._key:
            self._key, self._found = key, {}
        if stage.name not in self._found:
            names = [each.name for each in self.attributor.record.stages[stage.index :]]
            found = {name: Moments() for name in names}
            numbers = self.attributor.progress(range(self.size), "ensemble")
            for _, member in zip(numbers, self.members(), strict=True):
                for name in reversed(names):
                    found[name].add(member._stage_scores(member.record.stage(name), queries))
            self._found = found
        return self._found[stage.name]

    def plan(self, one: Plan) -> Plan:
        """The cost of all members, from that of one; the memory is that of one."""
        tokens = sum(stage.sample_tokens + stage.score_tokens for stage in one.stages)
        training = self.options.training_tokens(self.attributor) if hasattr(self.options, "training_tokens") else 0
        return replace(
            one,
            seconds=self.size * one.seconds * (1 + training / max(tokens, 1)),
            disk=self.size * one.disk,
            members=self.size,
            training_tokens=training,
        )


def member_of(attributor: "SourceAttributor") -> "SourceAttributor":
    """A copy that has its own walk."""
    member = copy.copy(attributor)
    member._walked, member._walks = {}, {}
    return member


def _models(count: int) -> str:
    return "the model" if count == 1 else f"{count} independently trained models"


def make_ensemble(
    attributor: "SourceAttributor",
    records: Sequence[TrainingRecord],
    name: str | None,
    size: int | None,
    given: dict[str, Any],
    kinds: dict[str, EnsembleKind],
) -> Ensemble | None:
    """The ensemble that the settings ask for; `None` for one model as it is.

    Args:
        attributor: whose settings the members have.
        records: of the runs.
        name: of the kind; by default `"independent"` if there are several records.
        size: members of each record; all records for `"independent"`.
        given: settings of the kind.
        kinds: all there are.

    Raises:
        ConfigError: if the kind is unknown, or its settings make no sense.
    """
    name = name or ("independent" if len(records) > 1 else None)
    if name is None:
        if size is not None:
            raise ConfigError(f"ensemble_size={size} needs `ensemble=`: one of {', '.join(kinds)}.")
        return None
    if name not in kinds:
        raise ConfigError(f"ensemble={name!r} is unknown; choose one of {', '.join(kinds)}.")
    kind = kinds[name]
    if METHODS[attributor.method].reads_text:
        raise ConfigError(
            f"method={attributor.method!r} compares texts, without a model: an ensemble changes nothing. Leave it out."
        )
    if attributor.method == "auto":
        raise ConfigError(
            f"method='auto' chooses for one run, ensemble={name!r} averages over several models: name the method, "
            "such as method='source'."
        )
    if name == "independent":
        if len(records) < 2:
            raise ConfigError(
                "ensemble='independent' averages over several recorded runs: give their records, "
                'SourceAttributor.from_record(["runs/a", "runs/b"]).'
            )
        if size not in (None, len(records)):
            raise ConfigError(f"ensemble_size={size}, but there are {len(records)} records: leave it out.")
    elif attributor.method in REPLAYING:
        raise ConfigError(
            f"method={attributor.method!r} repeats the recorded steps, which a model with ensemble={name!r} did not "
            "make: use method='source', or ensemble='independent' with several records."
        )
    each = kind.usual_size if size is None else size
    if each < 1 and name != "independent":
        raise ConfigError(f"ensemble_size={each}: at least one member is needed ({kind.usual_size} is usual).")
    total = len(records) * (1 if name == "independent" else each)
    options = kind.options(**given)
    if hasattr(options, "check"):
        options.check(attributor)
    return Ensemble(attributor, records, name, kind, total, options)


def split_settings(
    given: dict[str, Any], name: str | None, kinds: dict[str, EnsembleKind]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments that belong to the ensemble, and the others.

    Raises:
        ConfigError: for a setting of another kind of ensemble.
    """
    users = {field.name: kind for kind, value in kinds.items() for field in fields(value.options)}
    for key in given:
        if key in users and users[key] != name and name in (None, *kinds):
            raise ConfigError(f"{key}= is a setting of ensemble={users[key]!r}, but ensemble is {name!r}.")
    own = {key: value for key, value in given.items() if key in users}
    return own, {key: value for key, value in given.items() if key not in users}
