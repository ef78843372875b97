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
"""Tail patch: does one more step on the rows that a method names make the model likelier to say it?

From the final weights `theta_T`, an optimizer takes one step on the query's top `k` rows as one batch, and

    tail patch = log p(completion | theta') - log p(completion | theta_T),      nats,

is compared with that of random rows (Chang et al. 2024, arXiv 2410.17413). It costs no retraining and so goes where
retraining cannot, but it measures what rows would *add* now, not what they did: a row that the model has learnt
completely adds nothing.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..attribution.asking import query_losses
from ..errors import ConfigError
from ..gradients import RowLossTask, task_labels
from ..recording.optimizers import OptimizerDescription, build_optimizer
from .estimate import Estimate, mean_estimate
from .removal import CONTROL
from .row_sets import check_sizes, ranked


if TYPE_CHECKING:
    from ..attribution import Queries, SourceAttributor


OPTIMIZERS = ("recorded", "sgd")


@dataclass(frozen=True)
class TailPatch:
    """What a step on some rows did to the queries.

    Attributes:
        method: whose top rows; `"random"` for the control.
        k: rows of the step.
        gains: float64 `[draws, queries]`, change of the completion's log-probability, nats (one draw for a method).
        random: float64 `[draws, queries]`, the same for random rows.
        seconds: of this method and `k`.
        settings: of the evaluation.
    """

    method: str
    k: int
    gains: np.ndarray
    random: np.ndarray
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gain(self) -> Estimate:
        """Mean gain, nats."""
        return mean_estimate(self.gains.mean(axis=0))

    @property
    def excess(self) -> Estimate:
        """Mean gain beyond that of random rows, query by query; nats."""
        return mean_estimate(self.gains.mean(axis=0) - self.random.mean(axis=0))


def tail_patch(
    attributor: "SourceAttributor",
    queries: "Queries",
    scores: Mapping[str, np.ndarray],
    k: Sequence[int] = (10,),
    *,
    stage: str | None = None,
    learning_rate: float | None = None,
    optimizer: str = "recorded",
    steps: int = 1,
    num_random: int = 4,
    seed: int = 0,
) -> list[TailPatch]:
    """Take a step on each query's top rows by each method, from the final weights, and measure the query.

    Args:
        attributor: with the record; its method does not matter.
        queries: what is asked.
        scores: method -> `[queries, rows]`, by row number, larger = more supportive.
        k: numbers of rows in the step.
        stage: whose rows; may be left out if there is only one. The model is that of the last stage.
        learning_rate: of the step. By default the largest recorded one. The figure depends on it: too small and the
            gain is in proportion to it, too large and the step overshoots; compare methods at one rate.
        optimizer: `"recorded"`, the last stage's, with moments that start at 0 and its weight decay off; or `"sgd"`.
        steps: number of steps, all on the same rows.
        num_random: batches of random rows for each of `k`.
        seed: of the random rows.

    Returns:
        For each of `k`: the random control, then each method.

    Raises:
        ConfigError: for a learning rate, a number of steps, or a `k` that makes no sense.
        DataError: if a query cannot be used.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}.")
    if steps < 1 or num_random < 1:
        raise ConfigError(f"steps={steps}, num_random={num_random}: give at least 1 of each.")
    if learning_rate is not None and not learning_rate > 0:
        raise ConfigError(f"learning_rate={learning_rate}: give a number above 0.")
    patch = _Patch(attributor, queries, stage, learning_rate, optimizer, steps)
    candidates = patch.rows.trained_rows
    scores = {name: patch.checked(values, name) for name, values in scores.items()}
    generator, found = np.random.default_rng(seed), []
    settings = {"learning_rate": patch.learning_rate, "optimizer": optimizer, "steps": steps}
    settings |= {"num_random": num_random, "seed": seed}
    for size in check_sizes(k, len(candidates)):
        start = time.perf_counter()
        drawn = [generator.choice(candidates, size=size, replace=False) for _ in range(num_random)]
        random = np.stack([patch.gains(own) for own in drawn])
        found.append(TailPatch(CONTROL, size, random, random, time.perf_counter() - start, settings))
        for name, values in scores.items():
            start = time.perf_counter()
            tops = ranked(values, candidates)[:, :size]
            gains = np.array([[patch.gains(own, query) for query, own in enumerate(tops)]])
            found.append(TailPatch(name, size, gains, random, time.perf_counter() - start, settings))
    return found


class _Patch:
    """The model at its final weights, and steps from there."""

    def __init__(self, attributor, queries, stage, learning_rate, optimizer, steps) -> None:
        self.attributor, self.steps, self.optimizer = attributor, steps, optimizer
        record, last = attributor.record.stage(stage), attributor.record.stages[-1]
        self.rows = attributor.rows(record)
        self.queries = attributor.encode(queries)
        self.model = attributor.build_model(last)
        last.load_weights(self.model, "final")
        if isinstance(self.rows.task, RowLossTask):
            self.rows.task.prepare(attributor.build_model(record), self.rows)
        own = dict(self.model.named_parameters())
        self.trained = {name: own[name] for name in last.trainable}
        for name, parameter in own.items():
            parameter.requires_grad_(name in self.trained)
        self.start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.description = _without_decay(OptimizerDescription.from_dict(last.optimizer))
        rates = last.steps().reference_learning_rate
        self.learning_rate = float(learning_rate or rates.max(initial=0.0))
        if not self.learning_rate > 0:
            raise ConfigError("The recorded learning rate is 0: give `learning_rate=`.")
        self.before = query_losses(attributor, self.model, self.queries)

    def checked(self, scores: np.ndarray, name: str) -> np.ndarray:
        scores = np.asarray(scores, dtype=np.float64)
        expected = (len(self.queries), self.rows.stage.num_rows)
        if scores.shape != expected or not np.isfinite(scores).all():
            raise ConfigError(f"Scores {name!r} have shape {scores.shape}; give finite ones of shape {expected}.")
        return scores

    def gains(self, rows: np.ndarray, query: int | None = None) -> np.ndarray:
        """Gain of every query, or of one, after steps on the rows; the weights are put back."""
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.trained.values(), lr=self.learning_rate)
        else:
            optimizer = build_optimizer(self.description, self.trained)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
        for _ in range(self.steps):
            self._backward(rows)
            optimizer.step()
        chosen = np.arange(len(self.queries)) if query is None else np.array([query])
        after = query_losses(self.attributor, self.model, self.queries.select(chosen))
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.start[name])
        gains = self.before[chosen] - after
        return gains if query is None else gains[0]

    def _backward(self, rows: np.ndarray) -> None:
        """Gradient of the mean loss over the rows' items, as a Trainer takes it of one batch."""
        self.model.zero_grad(set_to_none=True)
        task, pieces = self.rows.task, np.flatnonzero(np.isin(self.rows.row, rows))
        pieces = np.intersect1d(pieces, self.rows.trained)
        items = max(int(self.rows.items[pieces].sum()), 1)
        for part in self.rows.batches(pieces):
            batch = self.rows.collated(part, self.attributor.device)
            (task.row_losses(task.forward(self.model, batch), task_labels(task, batch)).sum() / items).backward()


def _without_decay(description: OptimizerDescription) -> OptimizerDescription:
    """Weight decay changes the query by itself, whatever the rows are."""
    described = copy.deepcopy(description.to_dict())
    for group in described["groups"]:
        group["weight_decay"] = 0.0
    return OptimizerDescription.from_dict(described)
