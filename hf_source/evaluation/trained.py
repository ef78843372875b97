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
"""Retraining by the user's own Trainer, one subset after the other or in several processes."""

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..attribution.queries import Queries
from ..attribution.rows import collate
from ..data import ROW
from ..errors import ConfigError, RetrainingError
from ..gradients import CausalLMTask, RowLossTask, Task, task_for, task_labels
from ..logs import get_logger
from ..recording import TrainingRecord, canonical_name
from ..recording.rows.matching import match_rows
from .cache import RetrainingCache
from .identity import describe, digest, queries_digest, record_digest
from .protocol import checked_keep
from .rebuilt import rebuilt_trainer, refuse_unknown
from .reorder import fresh_weights
from .stacked import RowsByNumber, chain, measurement_of
from .workers import Failure, run_jobs


logger = get_logger(__name__)

MakeTrainer = Callable[[Dataset, int, str], Any]
"""`make_trainer(dataset, seed, output_dir)` gives a `Trainer` that has not trained yet."""


@dataclass(frozen=True)
class Setup:
    """What a worker needs; it travels to other processes."""

    record: Path
    stage: str
    queries: Queries
    measurement: Task
    make_trainer: MakeTrainer | None = None
    datasets: Mapping[str, Any] = field(default_factory=dict)
    data_collator: Any = None
    fresh: bool = False

    def open(self) -> Callable[[tuple[np.ndarray, int | None]], np.ndarray]:
        """The function that makes one retraining: a mask and a seed -> losses `[queries]`."""
        record = TrainingRecord.load(self.record)
        tokenizer = record.processing_class()
        stages = chain(record, record.stage(self.stage))
        rows = {
            own.name: RowsByNumber(own, self.datasets.get(own.name), tokenizer, self.data_collator) for own in stages
        }
        return partial(_retrain_one, self, record, stages, rows)


def _retrain_one(
    setup: Setup, record: Any, stages: list, rows: dict, job: tuple[np.ndarray, int | None]
) -> np.ndarray:
    keep, seed = job
    weights: dict[str, torch.Tensor] = {}
    if setup.fresh and seed is not None:
        weights = {stages[0].canonical_name(name): w for name, w in fresh_weights(stages[0], seed).items()}
    trainer = None
    for stage in stages:
        first = stage is stages[0]
        mask = keep if first else np.isin(np.arange(stage.num_rows), rows[stage.name].numbers)
        mask = mask & np.isin(np.arange(stage.num_rows), rows[stage.name].numbers)
        with tempfile.TemporaryDirectory(prefix="retraining-") as folder:
            if first and setup.make_trainer is not None:
                dataset = _subset(stage, setup.datasets.get(stage.name), record, setup.data_collator, mask)
                trainer = setup.make_trainer(dataset, stage.training["seed"] if seed is None else seed, folder)
            else:
                trainer = rebuilt_trainer(
                    stage, rows[stage.name], mask, seed, folder, weights=weights, data_collator=setup.data_collator
                )
            trainer.train()
        weights = {canonical_name(name): p.detach().cpu() for name, p in trainer.model.named_parameters()}
    return _losses(trainer.accelerator.unwrap_model(trainer.model), setup, record)


def _subset(stage: Any, dataset: Any, record: Any, data_collator: Any, mask: np.ndarray) -> Dataset:
    """The rows that are kept, as they were given, or as the record holds them."""
    matched = match_rows(stage, dataset, record.processing_class(), data_collator)
    # Of the record's own rows what trained, without what else is known of them.
    given, numbers = (
        (matched.given, matched.given_numbers) if dataset is not None else (matched.dataset, matched.numbers)
    )
    chosen = [place for place, number in enumerate(numbers) if number < len(mask) and mask[number]]
    rows = given.select(chosen)
    return rows.remove_columns(ROW) if dataset is None and ROW in rows.column_names else rows


@torch.no_grad()
def _losses(model: torch.nn.Module, setup: Setup, record: Any) -> np.ndarray:
    model.eval()
    task, rows = setup.measurement, setup.queries.rows
    own = task if isinstance(task, RowLossTask) else CausalLMTask()
    made = setup.data_collator if setup.queries.are_rows and setup.data_collator is not None else None
    collator = made or own.collator(record.processing_class())
    device = next(model.parameters()).device
    losses = []
    for start in range(0, len(rows), 16):
        batch = collate(collator, rows[start : start + 16], device, own.columns)
        losses.append(task.row_losses(task.forward(model, batch), task_labels(task, batch)).double().cpu())
    return torch.cat(losses).numpy()


class TrainerRetraining:
    """Trains a stage (and those after it) again with a real Trainer, on the rows that are left (see `Retraining`).

    By default the Trainer is rebuilt from the record: initial weights, rows, arguments, optimizer and learning rates.
    It then draws the recorded batches less the rows that are left out, whose items leave the normalizer too. With a
    `seed` it draws batches of its own from the rows that are kept, in every stage: fewer rows make fewer steps.

    `make_trainer` is your own recipe instead, of the stage whose rows are left out; later stages are rebuilt from the
    record. Without a seed it is given the recorded one; the order is then what that seed makes of fewer rows.

    Args:
        record: a complete record.
        queries: what is measured at the end, under the last stage's model.
        stage: whose rows are left out; may be left out if there is only one.
        make_trainer: `(dataset, seed, output_dir) -> Trainer`; with workers a function at the top of a module. A YAML
            recipe becomes one by `hf_source.recipes.trainer_of(path)`. It is told apart by its own source text: if
            what it calls changes, use another `cache`.
        datasets: stage name -> dataset, as the Trainer took it; default the (tokenised) rows in the record.
        measurement: what a query measures; by default the loss of its text.
        data_collator: the Trainer's, if it was not the default one.
        fresh: with a `seed`, start from newly initialised weights; for stages that train a model from scratch.
        num_workers: processes that train at once, each with one thread; 0 trains in this process.
        cache: see `StackedRetraining`.
        progress: show a bar.

    Raises:
        UnsupportedError: if a stage was not trained by a plain Trainer and there is no `make_trainer`.
        ConfigError: if `fresh` is asked for a stage that did not start from scratch.
    """

    def __init__(
        self,
        record: TrainingRecord,
        queries: Queries,
        *,
        stage: str | None = None,
        make_trainer: MakeTrainer | None = None,
        datasets: Mapping[str, Any] | None = None,
        measurement: Task | None = None,
        data_collator: Any = None,
        fresh: bool = False,
        num_workers: int = 0,
        cache: RetrainingCache | str | Path | None = None,
        progress: bool = True,
    ) -> None:
        record.require_complete()
        if num_workers < 0:
            raise ConfigError(f"num_workers={num_workers}: give 0 for this process, or how many processes.")
        self.record, self.stage = record, record.stage(stage)
        for later in chain(record, self.stage):
            if later is not self.stage or make_trainer is None:
                refuse_unknown(later)
        if fresh and (self.stage.parent is not None or self.stage.model["peft"] or make_trainer is not None):
            raise ConfigError(
                f"fresh=True: the weights of stage {self.stage.name!r} cannot be initialised anew, as it did not "
                "start from scratch, or make_trainer builds its model. Leave it out."
            )
        last = record.stages[-1]
        encoded = queries.encode(record.processing_class(), last.context_length, last.is_encoder_decoder)
        self._setup = Setup(
            record.path,
            self.stage.name,
            encoded,
            measurement or measurement_of(encoded, task_for(last)),
            make_trainer,
            dict(datasets or {}),
            data_collator,
            fresh,
        )
        self.num_workers, self.progress = num_workers, progress
        self.num_rows, self.num_queries = self.stage.num_rows, len(queries)
        self.cache = RetrainingCache.of(cache, record.path)

    @property
    def at_once(self) -> int:
        """How many are trained together."""
        return max(1, self.num_workers)

    def settings(self) -> dict[str, Any]:
        """What the losses depend on."""
        setup = self._setup
        return {
            "retraining": "trainer",
            "record": record_digest(self.record, self.stage),
            "stage": self.stage.name,
            "queries": queries_digest(setup.queries),
            "make_trainer": _identity(setup.make_trainer),
            "measurement": describe(setup.measurement),
            "data_collator": describe(setup.data_collator),
            "fresh": setup.fresh,
        }

    def missing(self, keep: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Positions of the masks that have not been trained yet, int64."""
        return self.cache.missing(self.settings(), checked_keep(keep, self.num_rows), seed)

    def losses(self, keep: np.ndarray, seed: int | None = None) -> np.ndarray:
        """See `Retraining.losses`.

        Raises:
            RetrainingError: if a retraining failed, or its process died twice; those that finished are kept.
        """
        keep = checked_keep(keep, self.num_rows)
        return self.cache.fill(self.settings(), keep, seed, self.num_queries, self._train)

    def _train(self, keep: np.ndarray, seed: int | None) -> Iterator[tuple[list[int], np.ndarray]]:
        failed: dict[int, Failure] = {}
        done = 0
        bar = tqdm(total=len(keep), desc=f"retraining {self.stage.name!r}", disable=not self.progress, leave=False)
        with bar:
            for position, result in run_jobs(self._setup.open, [(mask, seed) for mask in keep], self.num_workers):
                bar.update()
                if isinstance(result, Failure):
                    failed[position] = result
                    logger.warning(f"Retraining without rows {_some(~keep[position])} failed: {result.reason}.")
                    if not done:  # the others would fail alike
                        break
                else:
                    done += 1
                    yield [position], result[None]
        if failed:
            position, failure = next(iter(failed.items()))
            raise RetrainingError(
                f"{len(failed)} of {len(keep)} retrainings failed (seed {seed}); the first left out rows "
                f"{_some(~keep[position])}: {failure.reason}. The {done} that finished are kept: call again to go "
                f"on.\n"
                f"{failure.details}".rstrip()
            )


def _some(removed: np.ndarray) -> str:
    rows = np.flatnonzero(removed)
    return ", ".join(map(str, rows[:8])) + (f", ... ({len(rows)} in all)" if len(rows) > 8 else "")


def _identity(make_trainer: MakeTrainer | None) -> Any:
    """A recipe by its name, its text, and what was bound to it."""
    if make_trainer is None:
        return "rebuilt from the record"
    bound = [make_trainer.args, make_trainer.keywords] if isinstance(make_trainer, partial) else []
    function = make_trainer.func if isinstance(make_trainer, partial) else make_trainer
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return {"name": describe(function), "source": digest(source), "bound": describe(bound)}
