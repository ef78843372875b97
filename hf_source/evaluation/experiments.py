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
"""One call from an attributor and queries to a report, for every evaluation but the LDS (`evaluate`)."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..attribution import METHODS
from ..attribution.attributor import SourceAttributor
from ..attribution.queries import Queries
from ..errors import ConfigError, DataError
from ..recording import StageRecord
from .agreement import agreement
from .entries import (
    agreement_entries,
    leave_one_out_entries,
    mislabelled_entries,
    removal_entries,
    retrieval_entries,
    tail_patch_entries,
)
from .evaluate import Methods, attributors_of, stacked_for, timed_scores
from .leave_one_out import leave_one_out
from .mislabelled import KNOWN, find_mislabelled
from .protocol import Retraining
from .removal import subset_removal
from .report import Report
from .retrieval import retrieval
from .tail_patch import tail_patch


class Experiment:
    """Evaluations of methods on one stage of a recorded run; each gives a `Report`, and scores are computed once.

    Args:
        attributor: of the record; other methods take its settings.
        queries: what is asked; only `mislabelled` can do without.
        methods: names, or label -> settings of `SourceAttributor`; by default the attributor's own.
        stage: whose rows are judged; may be left out if there is only one.
        retraining: how training is done again; by default `StackedRetraining`.
        cache: see `StackedRetraining`.
        progress: show bars.

    Example:
        >>> experiment = Experiment(attributor, queries, methods=["source", "bm25"])
        >>> experiment.subset_removal(k=(1, 5)).write("out/removal")
    """

    def __init__(
        self,
        attributor: SourceAttributor,
        queries: Queries | None = None,
        *,
        methods: Methods | None = None,
        stage: str | None = None,
        retraining: Retraining | None = None,
        cache: Any = None,
        progress: bool = True,
    ) -> None:
        attributor.record.require_complete()
        self.attributor = attributor
        self.queries = None if queries is None else attributor.encode(queries)
        self.labelled = attributors_of(attributor, methods)
        self.stage: StageRecord = attributor.record.stage(stage)
        self._retraining, self._cache, self._progress = retraining, cache, progress
        self._scores: dict[str, tuple[np.ndarray, float]] = {}

    def scores(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Scores by row number, and the seconds they took, of every method."""
        for label, own in self.labelled.items():
            if label not in self._scores:
                self._scores[label] = self._score(own)
        return {n: found for n, (found, _) in self._scores.items()}, {n: s for n, (_, s) in self._scores.items()}

    def _score(self, attributor: SourceAttributor) -> tuple[np.ndarray, float]:
        where = SimpleNamespace(stage=self.stage, num_rows=self.stage.num_rows)
        return timed_scores(attributor, self._asked(), where)

    def _asked(self) -> Queries:
        if self.queries is None:
            raise ConfigError("This evaluation needs queries: give prompts and completions.")
        return self.queries

    def _reader(self) -> SourceAttributor:
        """One that knows losses: methods that read texts do not."""
        given = self.attributor
        return given.like(method="grad-dot") if METHODS[given.method].reads_text else given

    @property
    def retraining(self) -> Retraining:
        """How training is done again."""
        if self._retraining is None:
            options = {"stage": self.stage.name, "cache": self._cache, "progress": self._progress}
            self._retraining = stacked_for(self.attributor, self._asked(), **options)
        return self._retraining

    @property
    def nats(self) -> list[str]:
        """Labels of methods whose scores are nats."""
        return [label for label, own in self.labelled.items() if METHODS[own.method].nats]

    def subset_removal(self, match: str | None = None, **settings: Any) -> Report:
        """Remove each query's top rows; `settings` of `subset_removal`.

        Args:
            match: column of the dataset whose classes a further control keeps.
            settings: see `hf_source.evaluation.subset_removal`.
        """
        column = None if match is None else self.column(match)
        scores, seconds = self.scores()
        found = subset_removal(self.retraining, scores, column=column, **settings)
        return self._report("Subset removal", removal_entries(found, self._asked().names, self.stage.name, seconds))

    def leave_one_out(self, figures: str | Path | None = None, **settings: Any) -> Report:
        """Remove single rows; `settings` of `leave_one_out`.

        Args:
            figures: folder for one figure of predicted against real nats for each method.
            settings: see `hf_source.evaluation.leave_one_out`.
        """
        scores, seconds = self.scores()
        found = leave_one_out(self.retraining, scores, **settings)
        for number, one in enumerate(found if figures is not None else ()):
            one.figure(Path(figures, f"leave_one_out_{number}_{self.labelled[one.method].method}.svg"))
        names = self._asked().names
        return self._report("Leave one out", leave_one_out_entries(found, names, self.stage.name, seconds, self.nats))

    def tail_patch(self, **settings: Any) -> Report:
        """One more step on the top rows; `settings` of `tail_patch`."""
        scores, seconds = self.scores()
        found = tail_patch(self._reader(), self._asked(), scores, stage=self.stage.name, **settings)
        return self._report("Tail patch", tail_patch_entries(found, self._asked().names, self.stage.name, seconds))

    def agreement(self, **settings: Any) -> Report:
        """Compare with the exact derivative, over the rows that trained; `settings` of `agreement`."""
        scores, seconds = self.scores()
        exact, taken = self._score(self.attributor.like(method="unrolled"))
        rows = self.attributor.rows(self.stage).trained_rows
        found = {label: agreement(own, exact, rows=rows, **settings) for label, own in scores.items()}
        entries = agreement_entries(found, self._asked().names, self.stage.name, seconds, self.nats)
        report = self._report("Agreement with the exact derivative", entries)
        report.settings["unrolled_seconds"] = round(taken, 1)
        return report

    def mislabelled(self, known: str | Sequence[bool] = KNOWN, **settings: Any) -> Report:
        """Find wrong rows by self-influence, by loss and, with queries, by what methods say of clean queries.

        Args:
            known: column of the dataset that says which rows are wrong, or the values by row number.
            settings: see `hf_source.evaluation.find_mislabelled`.

        Raises:
            DataError: if the column is missing, or does not hold true and false.
        """
        rows = self.attributor.rows(self.stage).trained_rows
        wrong = np.asarray(self.column(known) if isinstance(known, str) else known)
        if wrong.shape != (self.stage.num_rows,) or not set(wrong[rows].tolist()) <= {True, False}:
            raise DataError(f"{known!r} does not say true or false of each of the {self.stage.num_rows} rows.")
        wrong = wrong[rows].astype(bool)
        found, seconds = {}, {}
        for label, own in self.labelled.items():
            if own.method == "source":
                begun = time.perf_counter()
                by_place = own.self_influence(stage=self.stage.name)
                by_number = np.zeros(self.stage.num_rows)
                by_number[own.rows(self.stage).numbers] = by_place
                found[f"{label}, self-influence"] = by_number[rows]
                seconds[f"{label}, self-influence"] = time.perf_counter() - begun
        begun = time.perf_counter()
        found["loss"] = self._reader().row_losses(self.stage.name)[rows]
        seconds["loss"] = time.perf_counter() - begun
        if self.queries is not None:
            for label, scores in self.scores()[0].items():
                found[f"{label}, influence on the queries"] = -scores[:, rows].mean(axis=0)
                seconds[f"{label}, influence on the queries"] = self._scores[label][1]
        judged = {label: find_mislabelled(own, wrong, **settings) for label, own in found.items()}
        return self._report("Mislabelled rows", mislabelled_entries(judged, self.stage.name, seconds))

    def retrieval(self, right_rows: Sequence[int | None]) -> Report:
        """Rank the row that states the fact; `right_rows` by row number, `None` for a query that has none.

        Raises:
            DataError: if there is not one for each query, or a number is none of the stage's.
        """
        names = self._asked().names
        if len(right_rows) != len(names):
            raise DataError(f"{len(right_rows)} right rows for {len(names)} queries: give one for each, or `None`.")
        for row in right_rows:
            if row is not None and not 0 <= row < self.stage.num_rows:
                raise DataError(f"Right row {row} is none of the {self.stage.num_rows} rows of {self.stage.name!r}.")
        if all(row is None for row in right_rows):
            raise DataError("No query has a right row, so there is nothing to retrieve.")
        scores, seconds = self.scores()
        found = {label: retrieval(own, right_rows) for label, own in scores.items()}
        asked = [name for name, row in zip(names, right_rows, strict=True) if row is not None]
        return self._report("Fact retrieval", retrieval_entries(found, asked, self.stage.name, seconds))

    def column(self, name: str) -> list[Any]:
        """A column of the stage's dataset by row number, `None` for rows that it does not hold.

        Raises:
            DataError: if there is no such column.
        """
        rows = self.attributor.rows(self.stage)
        if name not in rows.given.column_names:
            raise DataError(
                f"The rows of stage {self.stage.name!r} have no column {name!r}; they have "
                f"{', '.join(rows.given.column_names)}. Pass the dataset that was trained on, with that column."
            )
        values: list[Any] = [None] * self.stage.num_rows
        for number, value in zip(rows.numbers.tolist(), rows.given.with_format(None)[name], strict=True):
            if number < len(values):
                values[number] = value
        return values

    def _report(self, title: str, entries: list) -> Report:
        settings: Mapping[str, Any] = {
            "record": str(self.attributor.record.path),
            "stage": self.stage.name,
            "queries": 0 if self.queries is None else len(self.queries),
            "methods": {label: own.settings() for label, own in self.labelled.items()},
        }
        return Report(f"{title}: {self.attributor.record.path.name}, stage {self.stage.name}", settings, entries)
