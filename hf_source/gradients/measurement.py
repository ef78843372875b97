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

"""What a query asks about, other than its loss.

A measurement `f_q` is made *loss-like*: the smaller, the better the model says what is asked. A score is the predicted
`f_q(trained without the row) - f_q(trained)`, so a positive score always means that the row supports the answer; a
margin and a difference of logits therefore enter with a minus sign. A score's unit is that of its measurement.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..data import IGNORE_INDEX
from ..errors import ConfigError, DataError
from .heads import MultiLabelTask, RegressionTask
from .preference import PairTask
from .task import Batch, RowLossTask, Task, task_labels, token_losses


class Measurement(Protocol):
    """A number of each row that a query asks about, small where the model says what is asked."""

    def value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The measurement of each row, `[rows]`, from predictions and labels as `task.predictions` gives them."""


@dataclass(frozen=True)
class Loss:
    """The loss of the task, without label smoothing; the default. Nats (squared error: the labels' unit squared)."""


@dataclass(frozen=True)
class LogProbability:
    """`-log p(labels)`, summed over the labels of a row: the negative log-likelihood of a sequence or a class; nats.

    The same as the loss, where the loss is a cross-entropy; of token classification and masked words likewise.
    """

    def value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood, `[rows]`."""
        _refuse_numbers("log-probability", outputs, labels)
        return token_losses(outputs, labels).sum(dim=1)


@dataclass(frozen=True)
class Margin:
    """`-(log p - log(1 - p))` with `p` the probability of the right label, summed over the labels of a row; nats.

    Park et al. 2023 (arXiv 2303.14186, section 3.3) attribute this one: unlike the loss it does not saturate where the
    model is sure. It is the right logit less the log-sum-exp of the others, without cancellation.
    """

    def value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative margin, `[rows]`."""
        _refuse_numbers("margin", outputs, labels)
        asked = labels != IGNORE_INDEX
        right = F.one_hot(labels.clamp_min(0), outputs.shape[-1]).bool()
        own = outputs.masked_fill(~right, 0).sum(dim=-1)
        others = outputs.masked_fill(right, -torch.inf).logsumexp(dim=-1)
        return torch.where(asked, others - own, 0).sum(dim=1)


@dataclass(frozen=True)
class LogitDifference:
    """`-(logit of answer - logit of other)`, summed over the places where a row asks something; unit of a logit.

    Attributes:
        answer: number of a class or token; by default the row's own label.
        other: what it is compared with; by default the most probable of the others.
    """

    answer: int | None = None
    other: int | None = None

    def value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative difference, `[rows]`."""
        _refuse_numbers("logit-difference", outputs, labels)
        for chosen in (self.answer, self.other):
            if chosen is not None and not 0 <= chosen < outputs.shape[-1]:
                raise DataError(
                    f"LogitDifference asks about answer {chosen}, but the model tells {outputs.shape[-1]} apart: give "
                    "the number of a class or token."
                )
        asked = labels != IGNORE_INDEX
        answer = labels.clamp_min(0) if self.answer is None else torch.full_like(labels, self.answer)
        if self.other is None:
            other = outputs.detach().scatter(-1, answer[..., None], -torch.inf).argmax(dim=-1)
        else:
            other = torch.full_like(labels, self.other)
        pick = lambda which: outputs.gather(-1, which[..., None]).squeeze(-1)  # noqa: E731
        return torch.where(asked, pick(other) - pick(answer), 0).sum(dim=1)


@dataclass(frozen=True)
class AbsoluteError:
    """`|prediction - label|`, summed over the numbers of a row; in the labels' unit."""

    def value(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Absolute error, `[rows]`."""
        if outputs.numel() != labels.numel():
            raise ConfigError(
                "measurement='absolute-error' needs a prediction for each label, as a regression has: use 'loss' or "
                "'margin' for classes."
            )
        rows = len(outputs)
        return (outputs.reshape(rows, -1) - labels.reshape(rows, -1).to(outputs)).abs().sum(dim=1)


MEASUREMENTS: dict[str, Measurement] = {
    "loss": Loss(),
    "log-probability": LogProbability(),
    "margin": Margin(),
    "logit-difference": LogitDifference(),
    "absolute-error": AbsoluteError(),
}
"""Measurements by name."""


def make_measurement(measurement: "str | Measurement") -> Measurement:
    """A measurement by its name, or itself.

    Raises:
        ConfigError: if there is no such measurement, or the object has no `value`.
    """
    if isinstance(measurement, str) and measurement in MEASUREMENTS:
        return MEASUREMENTS[measurement]
    if isinstance(measurement, Loss) or (not isinstance(measurement, str | type) and hasattr(measurement, "value")):
        return measurement
    raise ConfigError(
        f"measurement={measurement!r} is unknown: choose one of {', '.join(MEASUREMENTS)}, or give an object with "
        "`value(outputs, labels)`."
    )


def describe_measurement(measurement: Measurement) -> str:
    """A measurement in words that are the same for the same settings."""
    settings = ", ".join(f"{key}={value!r}" for key, value in sorted(vars(measurement).items()))
    return f"{type(measurement).__module__}.{type(measurement).__qualname__}({settings})"


class MeasuredTask(RowLossTask):
    """A task whose row "losses" are what a query measures.

    Args:
        task: what was trained.
        measurement: what is asked.
    """

    def __init__(self, task: RowLossTask, measurement: Measurement) -> None:
        self.task = task
        self.measurement = measurement
        # What retrained models are kept under must tell measurements apart.
        self.what = f"{describe_measurement(measurement)} of {type(task).__qualname__}"
        self.columns = task.columns
        self.sequences_per_row = task.sequences_per_row

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # not there yet, while the object is copied
            raise AttributeError(name)
        return getattr(self.task, name)

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The task's predictions."""
        return self.task.forward(model, batch)

    def labels(self, batch: Batch) -> torch.Tensor:
        """The task's labels."""
        return task_labels(self.task, batch)

    def predictions(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The task's."""
        return self.task.predictions(outputs, labels)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The measurement of each row, `[rows]`."""
        return self.measurement.value(*_as_classes(self.task, outputs, labels))

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """The task's."""
        return self.task.num_items(labels)

    def count_items(self, row: Any) -> int:
        """The task's."""
        return self.task.count_items(row)

    def collator(self, processing_class: Any) -> Any:
        """The task's."""
        return self.task.collator(processing_class)

    def length(self, row: Any) -> int:
        """The task's."""
        return self.task.length(row)

    def prepare(self, model: torch.nn.Module, rows: Any) -> None:
        """The task's."""
        self.task.prepare(model, rows)


def measured(task: Task, measurement: "str | Measurement") -> Task:
    """The task with another measurement in place of its loss.

    Args:
        task: what a query's rows are to the model.
        measurement: by name or as an object.

    Raises:
        ConfigError: if the measurement is unknown, or means nothing for the task.
    """
    measurement = make_measurement(measurement)
    own = task.asked().unsmoothed() if isinstance(task, RowLossTask) else task
    if isinstance(measurement, Loss):
        return own
    if not isinstance(own, RowLossTask):
        raise ConfigError(
            f"{type(own).__name__} is no RowLossTask, so of its outputs only the loss is known: leave `measurement` "
            "out, or subclass hf_source.RowLossTask."
        )
    if isinstance(measurement, AbsoluteError) and not type(own).__module__.startswith(__package__):
        return MeasuredTask(own, measurement)  # a task of the user's own: its outputs will show
    if isinstance(measurement, (AbsoluteError, *_OF_CLASSES)):
        numbers = isinstance(measurement, AbsoluteError)
        if numbers != isinstance(own, RegressionTask):
            kind = "numbers, as a regression predicts them" if numbers else "classes or tokens"
            raise ConfigError(
                f"{type(measurement).__name__} is a measurement of {kind}, which {type(own).__name__} does not "
                "predict: choose another `measurement`."
            )
    return MeasuredTask(own, measurement)


_OF_CLASSES = (LogProbability, Margin, LogitDifference)


def _as_classes(task: RowLossTask, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and labels; a coin with logit `z` as two classes with logits 0 and `z`."""
    if isinstance(task, MultiLabelTask):
        coins, sides = outputs.reshape(len(outputs), -1), labels.reshape(len(labels), -1).round().long()
    elif isinstance(task, PairTask):
        coins, sides = outputs[:, :1], labels[:, :1].round().long()
    else:
        return task.predictions(outputs, labels)
    return torch.stack([torch.zeros_like(coins), coins], dim=-1), sides


def _refuse_numbers(name: str, outputs: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.is_floating_point() or outputs.dim() != labels.dim() + 1:
        raise ConfigError(
            f"measurement={name!r} needs logits of classes or tokens and a whole number for each label: use 'loss' or "
            "'absolute-error' for numbers."
        )
