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
"""Retraining many copies at once, from the record alone: for models small enough that a step is mostly overhead."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..attribution.changed import replaced
from ..attribution.queries import Queries
from ..data import IGNORE_INDEX
from ..errors import ConfigError, DataError, UnsupportedError
from ..gradients import CausalLMTask, DiffusionTask, RowLossTask, Seq2SeqTask, Task, task_for
from ..logs import get_logger
from ..recording import StageRecord, TrainingRecord
from ..recording.reading.assumed import require_recorded_visits
from ..recording.rows.matching import match_rows
from .cache import RetrainingCache
from .identity import describe, digest, queries_digest, record_digest
from .protocol import checked_keep
from .reorder import fresh_weights, reordered
from .retraining import losses_of, retrain


logger = get_logger(__name__)


@contextlib.contextmanager
def _stackable() -> Iterator[None]:
    """Say what to do about a model with an operation of which torch has no stacked form.

    Raises:
        UnsupportedError: naming it.
    """
    try:
        yield
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UnsupportedError(
            f"Copies of this model cannot be trained at once (torch: {str(error).splitlines()[0]}). Train one after "
            "another: `retraining=TrainerRetraining(record, queries)`, or --retraining trainer."
        ) from error


class StackedRetraining:
    """Trains copies of a recorded stage, and of the stages after it, each without rows of its own (see `Retraining`).

    Every copy makes the recorded steps. What is left out is a row's term in the sum of its batch: *the row's items
    stay in the normalizer*, which is exactly what a score predicts. (A `Trainer` on fewer rows would divide by fewer
    items and, for large subsets, make fewer steps: that is `TrainerRetraining`.) Dropout is off.

    A `seed` gives the rows of the stage other places among the recorded visits, and divides every batch by the items
    that are then in it. Weights are as recorded, unless `fresh` asks for new ones.

    Args:
        record: a complete record.
        queries: what is measured at the end, under the last stage's model.
        stage: whose rows are left out; may be left out if there is only one.
        datasets: stage name -> dataset, where the record does not hold the rows.
        task: stage name -> task, where the record does not say what a row's loss is.
        measurement: what a query measures: its `row_losses`; by default the loss of its text.
        data_collator: the Trainer's, if it was not the default one.
        model: gives a fresh model for a stage, for architectures that transformers cannot rebuild.
        fresh: with a `seed`, start from newly initialised weights; for stages that train a model from scratch.
        chunk: copies trained at once.
        dtype: of training.
        cache: where finished retrainings are kept: a `RetrainingCache`, a folder, or by default the record's.
        progress: show a bar.
        changed: row number -> tokenised row of the stage to train on instead (`hf_source.attribution.changed_rows`).

    Raises:
        UnsupportedError: if the record does not say which row was trained on when, or a later stage does not go on
            from the stage.
        RecordError, DataError: if the record is not complete, or its rows are not there.
    """

    def __init__(
        self,
        record: TrainingRecord,
        queries: Queries,
        *,
        stage: str | None = None,
        datasets: Mapping[str, Any] | None = None,
        task: Mapping[str, Task] | Task | None = None,
        measurement: Task | None = None,
        data_collator: Any = None,
        model: Callable[[StageRecord], torch.nn.Module] | None = None,
        fresh: bool = False,
        chunk: int = 16,
        dtype: torch.dtype = torch.float32,
        cache: RetrainingCache | str | Path | None = None,
        progress: bool = True,
        changed: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        record.require_complete()
        self.record = record
        self.stage = record.stage(stage)
        self.stages = chain(record, self.stage)
        for later in self.stages:
            require_recorded_visits(later, "trained again")
            if later.packing is not None:
                raise UnsupportedError(
                    f"Stage {later.name!r} packed its rows into sequences, of which copies cannot leave parts out: "
                    "use TrainerRetraining."
                )
            if later.training.get("dropout"):
                logger.warning(f"Stage '{later.name}' trained with dropout; stacked copies train without.")
        if fresh and (self.stage.parent is not None or self.stage.model["peft"]):
            raise ConfigError(
                f"fresh=True: stage {self.stage.name!r} did not start from scratch, so its weights cannot be "
                "initialised anew. Leave it out: another seed then means another order."
            )
        last = record.stages[-1]
        self.queries = queries.encode(record.processing_class(), last.context_length, last.is_encoder_decoder)
        self.tasks = {own.name: _task_of(task, own) for own in self.stages}
        self.measurement = measurement or measurement_of(self.queries, self.tasks[last.name])
        self.data_collator, self.fresh, self.chunk, self.dtype = data_collator, fresh, chunk, dtype
        self._make_model = model
        self.cache = RetrainingCache.of(cache, record.path)
        self.progress = progress
        self.num_rows = self.stage.num_rows
        self.num_queries = len(queries)
        self._rows = {
            own.name: RowsByNumber(own, (datasets or {}).get(own.name), record.processing_class(), data_collator)
            for own in self.stages
        }
        self._changed = digest(sorted(changed.items())) if changed else ""
        if changed:
            self._rows[self.stage.name].replace(changed)

    def settings(self) -> dict[str, Any]:
        """What the losses depend on."""
        return {
            "retraining": "stacked",
            "record": record_digest(self.record, self.stage),
            "stage": self.stage.name,
            "queries": queries_digest(self.queries),
            "tasks": {name: describe(task) for name, task in self.tasks.items()},
            "measurement": describe(self.measurement),
            "data_collator": describe(self.data_collator),
            "fresh": self.fresh,
            "dtype": str(self.dtype),
            **({"changed": self._changed} if self._changed else {}),
        }

    def losses(self, keep: np.ndarray, seed: int | None = None) -> np.ndarray:
        """See `Retraining.losses`."""
        keep = checked_keep(keep, self.num_rows)
        return self.cache.fill(self.settings(), keep, seed, self.num_queries, self._train)

    def weighted_losses(self, weights: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Losses after training with a weight of its own for each row; what `losses` does with 0 and 1. Not kept.

        Args:
            weights: float `[copies, rows]` by row number: 0 leaves a row out, 2 counts its gradient twice. Batches are
                divided by the recorded items, whatever the weights.
            seed: see `Retraining.losses`.

        Returns:
            float64 `[copies, queries]`.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.ndim != 2 or weights.shape[1] != self.num_rows or not np.isfinite(weights).all():
            raise DataError(
                f"weights must be finite numbers [copies, {self.num_rows}]; their shape is {weights.shape}."
            )
        return np.concatenate([losses for _, losses in self._train(weights, seed)])

    @property
    def at_once(self) -> int:
        """How many are trained together."""
        return self.chunk

    def missing(self, keep: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Positions of the masks that have not been trained yet, int64."""
        return self.cache.missing(self.settings(), checked_keep(keep, self.num_rows), seed)

    def _train(self, keep: np.ndarray, seed: int | None) -> Iterator[tuple[list[int], np.ndarray]]:
        starts = range(0, len(keep), self.chunk)
        bar = tqdm(total=len(keep), desc=f"retraining {self.stage.name!r}", disable=not self.progress, leave=False)
        with bar:
            for start in starts:
                copies = list(range(start, min(start + self.chunk, len(keep))))
                with _stackable():
                    losses = self._losses(keep[copies], seed)
                yield copies, losses
                bar.update(len(copies))

    def _losses(self, keep: np.ndarray, seed: int | None) -> np.ndarray:
        """Losses of one chunk: through the stage without rows, then through the later ones with all of theirs."""
        copies, start = len(keep), None
        if self.fresh and seed is not None:
            weights = fresh_weights(self.stage, seed)
            start = {name: value.expand(copies, *value.shape) for name, value in weights.items()}
        for stage in self.stages:
            rows = self._rows[stage.name]
            task = self.tasks[stage.name]
            masks = keep if stage is self.stage else np.ones((copies, stage.num_rows), dtype=bool)
            if isinstance(task, DiffusionTask) and stage is self.stage:
                task = task.drawn_anew(seed)
            if seed is not None and stage is self.stage:
                stage = reordered(stage, rows.numbers, rows.counts(task.count_items), rows.counts(_labels), seed)
            options = {"task": task, "dtype": self.dtype, "data_collator": self.data_collator}
            model, start = retrain(stage, rows, masks, start=start, model=self._make_model, **options)
        collator = self.data_collator if self.queries.are_rows else None
        if collator is None and isinstance(self.measurement, RowLossTask):
            collator = self.measurement.collator(self.stages[-1].record.processing_class())
        return losses_of(model, start, self.queries.rows, self.measurement, "loss", collator)


class RowsByNumber(Sequence):
    """Rows of a stage by their number in training, whatever the order of the dataset.

    Attributes:
        numbers: int64, of the rows that there are; the Trainer may have filtered others out.
    """

    def __init__(self, stage: StageRecord, dataset: Any, processing_class: Any, data_collator: Any) -> None:
        matched = match_rows(stage, dataset, processing_class, data_collator)
        self.stage, self.dataset, self.numbers = stage, matched.dataset.with_format(None), matched.numbers
        self._place = {int(number): place for place, number in enumerate(matched.numbers)}

    def replace(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Put others in the place of some rows, by number."""
        self.dataset, self._place = replaced(self.dataset, self._place, rows)

    def __len__(self) -> int:
        return self.stage.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.dataset[self._place[number]]

    def counts(self, count: Callable[[Mapping[str, Any]], int]) -> np.ndarray:
        """Something counted of every row, int64 `[rows]`; 0 where there is none."""
        counts = np.zeros(len(self), dtype=np.int64)
        for number in self.numbers:
            counts[number] = count(self[int(number)])
        return counts


def _labels(row: Mapping[str, Any]) -> int:
    labels = row.get("labels", row.get("input_ids"))
    return sum(label != IGNORE_INDEX for label in labels) if isinstance(labels, list) else 1


def chain(record: TrainingRecord, stage: StageRecord) -> list[StageRecord]:
    """The stage and all that train after it.

    Raises:
        UnsupportedError: if one of them did not start from the weights that the one before ended with.
    """
    stages = record.stages[stage.index :]
    for later in stages[1:]:
        if not later.continues_parent:
            raise UnsupportedError(
                f"Stage {later.name!r} does not go on from {later.parent!r}, so leaving rows out of {stage.name!r} "
                f"does not reach the last model: evaluate a stage from {later.name!r} on."
            )
    return stages


def measurement_of(queries: Queries, task: Task) -> Task:
    """What queries measure, as attribution does it: see `SourceAttributor.measurement`."""
    if queries.are_rows:
        return task.asked() if isinstance(task, RowLossTask) else task
    if isinstance(task, (CausalLMTask, Seq2SeqTask)):
        return task.unsmoothed()
    return CausalLMTask()


def _task_of(given: Mapping[str, Task] | Task | None, stage: StageRecord) -> Task:
    if isinstance(given, Mapping):
        return given.get(stage.name) or task_for(stage)
    return given or task_for(stage)
