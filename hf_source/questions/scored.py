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
"""Scores of some stages with the rows they belong to, from an attributor or from an attribution that was shared."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..attribution.attributor import SourceAttributor
from ..attribution.methods import METHODS
from ..attribution.queries import Queries
from ..attribution.rows import row_text
from ..data import ROW
from ..errors import ConfigError, DataError
from ..outputs.attribution_files import Attribution


Source = SourceAttributor | Attribution
"""What questions are asked of."""


@dataclass(frozen=True)
class Scored:
    """Scores of the rows that one stage trained on.

    Attributes:
        stage: its name.
        queries: what was asked; `None` where nothing was.
        scores: float64 `[queries, rows]`; positive, the row supports what was asked.
        numbers: int64 `[rows]`, the rows' numbers in training.
        num_rows: rows of the stage, those that never trained included.
        dataset: the rows, in the same order.
        text: a row as people read it, by its number.
    """

    stage: str
    queries: Queries | None
    scores: np.ndarray
    numbers: np.ndarray
    num_rows: int
    dataset: Dataset
    text: Callable[[int], str]

    @property
    def mean(self) -> np.ndarray:
        """Mean over the queries: float64 `[rows]`."""
        return self.scores.mean(axis=0)

    def has(self, column: str) -> bool:
        """Whether the rows have a column."""
        return column in self.dataset.column_names

    def column(self, name: str) -> list[Any]:
        """Values of a column.

        Raises:
            DataError: if there is no such column.
        """
        if not self.has(name):
            raise no_column(name, [self])
        return self.dataset.with_format(None)[name][:]

    def mask(self, places: np.ndarray) -> np.ndarray:
        """Rows as bool `[num_rows]` by number, from a bool mask or positions."""
        chosen = np.zeros(self.num_rows, dtype=bool)
        chosen[self.numbers[places]] = True
        return chosen


def no_column(name: str, scored: Sequence[Scored]) -> DataError:
    """What is said where a column is missing."""
    there = "; ".join(f"{own.stage}: {', '.join(own.dataset.column_names)}" for own in scored)
    return DataError(
        f"No stage's rows have a column {name!r} ({there}): choose one of these, or give the dataset that was trained "
        "on with that column (`datasets=`, `--dataset`)."
    )


def scored(source: Source, queries: Queries | None, stage: str | None = None) -> list[Scored]:
    """Scores of one stage, or of all of them.

    Args:
        source: an attributor, or an attribution.
        queries: what to ask; of an attribution by default all of its queries, else some of them.
        stage: its name; all by default.

    Raises:
        ConfigError: if there are no queries, or the source is something else.
        DataError: if an attribution does not have the queries or the stage.
    """
    if isinstance(source, SourceAttributor):
        if queries is None:
            raise ConfigError("Say what to ask: pass `queries=`, from `attributor.generate` or Queries.from_text.")
        names = [own.name for own in source.record.stages] if stage is None else [source.record.stage(stage).name]
        encoded = source.encode(queries)
        found = {name: _of_attributor(source, encoded, name) for name in reversed(names)}  # a walk goes backwards
        return [found[name] for name in names]
    if isinstance(source, Attribution):
        names = list(source.stages) if stage is None else [stage]
        return [_of_attribution(source, queries, name) for name in names]
    raise ConfigError(f"{type(source).__name__} holds no scores: ask a SourceAttributor or an Attribution.")


def _of_attributor(attributor: SourceAttributor, queries: Queries, name: str) -> Scored:
    stage = attributor.record.stage(name)
    rows = attributor.rows(stage)
    scores = attributor.scores(attributor.datasets.get(name), queries, name)
    there = np.flatnonzero(np.isin(rows.numbers, rows.trained_rows))
    return Scored(
        name,
        queries,
        scores[:, there].astype(np.float64),
        rows.numbers[there],
        stage.num_rows,
        rows.given if len(there) == len(rows.given) else rows.given.select(there),
        lambda number: rows.text(int(number), attributor.processing_class),
    )


def _of_attribution(attribution: Attribution, queries: Queries | None, name: str) -> Scored:
    scores = attribution.scores(name)
    known = attribution.queries
    chosen = _places(known, queries)
    dataset = attribution.stages[name]
    numbers = np.asarray(dataset[ROW][:], dtype=np.int64)
    place = {int(number): position for position, number in enumerate(numbers)}
    count = int(numbers.max(initial=-1)) + 1
    text = lambda number: row_text(dataset[place[int(number)]])  # noqa: E731
    return Scored(name, known.select(chosen), scores[chosen].astype(np.float64), numbers, count, dataset, text)


def _places(known: Queries, queries: Queries | None) -> list[int]:
    if queries is None:
        return list(range(len(known)))
    key = lambda query: query if known.are_rows else query[1:]  # noqa: E731  rows have no text to go by
    place = {key(query): position for position, query in reversed(list(enumerate(known)))}
    missing = [query[0] for query in queries if key(query) not in place]
    if missing:
        raise DataError(
            f"The attribution has no query {missing[0]!r} with that prompt and completion; it has "
            f"{', '.join(known.names[:10])}. Ask one of these, or an attributor."
        )
    return [place[key(query)] for query in queries]


def unit_of(source: Source) -> str:
    """Unit of the scores; empty if they have none."""
    if isinstance(source, Attribution):
        return str(source.about.get("unit", ""))
    if not METHODS[source.method].nats:
        return ""
    return "nats" if "measurement" not in source.settings() else "the measurement's unit"


def settings_of(source: Source) -> dict[str, Any]:
    """Settings of the scores."""
    return dict(source.settings if isinstance(source, Attribution) else source.settings())


def trust_of(source: Source, stages: Iterable[str]) -> str:
    """What is known of the scores of some stages; empty if nothing is."""
    if isinstance(source, Attribution):
        return "\n".join(note for note in (source.note, source.trust) if note)
    return "\n".join(note for note in (source.note, source.trust(stages)) if note)
