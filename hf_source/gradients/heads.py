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

"""Tasks of models with another head than a language model's: classification and regression, of texts, images or own.

Each has the loss that transformers' heads compute. A row's loss is summed over its *items*, so that what was trained,
the mean over all items of a batch, is the sum of row losses over the number of items: one item for a class, one for
each of several labels that may hold together, one for each number of a regression.

The labels for the curvature are drawn such that the covariance of the loss's gradient is the Hessian of the loss in
the predictions, and the Fisher therefore the Gauss-Newton matrix of what was trained (Martens 2020, arXiv 1412.1193).
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from ..data import IGNORE_INDEX, ROW
from ..errors import ConfigError
from .task import Batch, RowLossTask, drawn, token_losses


LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
"""Columns that hold what is to be predicted; the Trainer's collators call the second and third `labels`."""


class HeadTask(RowLossTask):
    """What the tasks of heads share: how a batch is made, and what of the model's output the loss is computed from.

    Args:
        columns: columns that reach the collator, as the Trainer chose them; all by default.
        collator: name of the class or function that made batches.
        sequences_per_row: sequences that the model makes of one row.
    """

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        collator: str | None = None,
        sequences_per_row: int = 1,
    ) -> None:
        self.columns = None if columns is None else tuple(columns)
        self.collator_name = collator
        self.sequences_per_row = sequences_per_row

    summed = False
    """Whether the head adds its items up, instead of taking their mean over a batch."""

    needs_labels = True
    """Whether a row says what is to be predicted."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits or predictions of a batch; the first axis is the row."""
        return predictions_of(model, batch)

    def reads(self, model: torch.nn.Module, batch: Batch) -> bool:
        """Whether a batch holds what the task compares predictions with."""
        return "labels" in batch or "label" in batch

    @abstractmethod
    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """Whether predictions and labels can be those of this task."""

    def count_items(self, row: Mapping[str, Any]) -> int:
        """Loss items of one row that is not collated yet."""
        for name in LABELS:
            if row.get(name) is not None:
                return int(self.num_items(torch.as_tensor(row[name])[None]))
        return 1

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of a row, or its numbers by the thousand: the activations of an image are fewer than its pixels."""
        if "input_ids" in row:
            return max(1, _numel(row["input_ids"]))
        return max([1, *(_numel(value) // 1000 for value in row.values() if isinstance(value, list))])

    def collator(self, processing_class: Any) -> Callable[[list], Batch]:
        """The Trainer's own collators, by the name that was recorded.

        Raises:
            ConfigError: for any other.
        """
        name = (self.collator_name or "default_data_collator").rpartition(".")[2]
        if name not in COLLATORS:
            raise ConfigError(
                f"The rows were collated by {self.collator_name}, which the record does not hold: pass it as "
                "`data_collator=`."
            )
        return COLLATORS[name](processing_class)


COLLATORS: dict[str, Callable[[Any], Callable[[list], Batch]]] = {
    "default_data_collator": lambda processing_class: default_data_collator,
    "DefaultDataCollator": lambda processing_class: default_data_collator,
    "DataCollatorWithPadding": DataCollatorWithPadding,
    "DataCollatorForTokenClassification": DataCollatorForTokenClassification,
    "DataCollatorForMultipleChoice": DataCollatorForMultipleChoice,
}
"""Collators that only pad and stack, by name; called with the tokenizer."""


class ClassificationTask(HeadTask):
    """One class for each label: of a text, an image, a token, or the right one of several choices.

    A loss item is a label other than -100, its loss the (smoothed) cross-entropy.

    Args:
        label_smoothing: see `CausalLMTask`.
        settings: see `HeadTask`.
    """

    def __init__(self, label_smoothing: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.label_smoothing = label_smoothing
        self._settings = settings

    def unsmoothed(self) -> "ClassificationTask":
        """See `RowLossTask.unsmoothed`."""
        return type(self)(**self._settings) if self.label_smoothing else self

    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """Logits of every class, and a whole number for each."""
        shaped = outputs.dim() > 1 and labels.numel() == outputs[..., 0].numel() and outputs.shape[-1] > 1
        return shaped and not labels.is_floating_point() and int(labels.max()) < outputs.shape[-1]

    def predictions(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[rows, labels, classes]`, and the labels `[rows, labels]`."""
        rows = len(outputs)
        return outputs.reshape(rows, -1, outputs.shape[-1]), labels.reshape(rows, -1)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of each row's labels, nats, `[rows]`."""
        return token_losses(*self.predictions(outputs, labels), self.label_smoothing).sum(dim=1)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Each label drawn from the softmax of its logits; shape and masking of `labels`."""
        return drawn(*self.predictions(outputs, labels), generator).view_as(labels)


class QuestionAnsweringTask(ClassificationTask):
    """The first and the last token of an answer: two items of a row, each a class out of the row's tokens.

    A position beyond the tokens asks nothing, as in transformers' head, which averages first and last tokens apart:
    that is the mean over items where a row lacks both or none.
    """

    def reads(self, model: torch.nn.Module, batch: Batch) -> bool:
        """Whether a batch holds positions."""
        return "start_positions" in batch and "end_positions" in batch

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of first and last token, float `[rows, 2, tokens]`."""
        outputs = model(**model_inputs(model, batch))
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)

    def labels(self, batch: Batch) -> torch.Tensor:
        """First and last token, int64 `[rows, 2]`, -100 where there is none."""
        tokens = batch["input_ids"].shape[1]
        both = [batch[name].reshape(-1).clamp(0, tokens) for name in ("start_positions", "end_positions")]
        labels = torch.stack(both, dim=1)
        return labels.masked_fill(labels == tokens, IGNORE_INDEX)

    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """Positions say it."""
        return True

    def count_items(self, row: Mapping[str, Any]) -> int:
        """Positions among the row's tokens."""
        return sum(row[name] < len(row["input_ids"]) for name in ("start_positions", "end_positions"))


class MultiLabelTask(HeadTask):
    """Labels that may hold together, each with a coin of its own: the binary cross-entropy of every one is an item.

    Labels drawn for the curvature are coins of probability `sigmoid(logit)`: `p - y` then has covariance `p (1 - p)`,
    which is the second derivative of the loss.
    """

    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """A logit for each label, which lies between 0 and 1."""
        return outputs.numel() == labels.numel() and bool(((labels >= 0) & (labels <= 1)).all())

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of each row."""
        return torch.full((len(labels),), labels[0].numel(), dtype=torch.int64)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed binary cross-entropy of each row's labels, nats, `[rows]`."""
        rows = len(outputs)
        outputs, labels = outputs.reshape(rows, -1), labels.reshape(rows, -1).to(outputs)
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(dim=1)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A coin for each label, by the model's own probability."""
        uniform = torch.rand(labels.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        return (uniform < outputs.reshape(labels.shape).sigmoid()).to(labels)


class RegressionTask(HeadTask):
    """The squared error `(prediction - label)^2` of every number; each is an item.

    It is the negative log-likelihood of a Gaussian with variance 1/2, but for a constant. Labels for the curvature
    have that variance: with `y = prediction + noise` the gradient `-2 noise` has covariance `4 / 2`, which is the
    second derivative of the loss. (A variance of 1 would double the curvature.) The noise is `+- sqrt(1/2)`, not a
    Gaussian's: the covariance is the same, and with one number a row the sample has no noise but that of its rows.
    """

    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """A prediction for each number."""
        return outputs.numel() == labels.numel()

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Numbers of each row."""
        return torch.full((len(labels),), labels[0].numel(), dtype=torch.int64)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed squared error of each row, in the labels' unit squared, `[rows]`."""
        rows = len(outputs)
        return (outputs.reshape(rows, -1) - labels.reshape(rows, -1).to(outputs)).square().sum(dim=1)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The predictions with noise of variance 1/2, of either sign."""
        signs = torch.randint(0, 2, labels.shape, generator=generator).to(outputs) * 2 - 1
        drawn_labels = outputs.reshape(labels.shape) + signs * 0.5**0.5
        return drawn_labels.to(labels.dtype if labels.is_floating_point() else outputs.dtype)


def model_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model is given of a batch: no labels, unless its `forward` asks for them, and its own precision."""
    accepted = inspect.signature(model.forward).parameters
    wanted = {name: p.default is inspect.Parameter.empty for name, p in accepted.items()}
    dtype = next(model.parameters()).dtype
    inputs = {
        key: value.to(dtype) if value.is_floating_point() and key not in LABELS else value
        for key, value in batch.items()
        if key != ROW and (key not in LABELS or wanted.get(key, False))
    }
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def predictions_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What a model predicts for a batch, without its loss.

    A model of one's own may return a tensor, a tuple (its loss first, where it had labels) or a dictionary (`logits`,
    or its first tensor but `loss`), as for the Trainer.
    """
    inputs = model_inputs(model, batch)
    outputs = model(**inputs)
    if isinstance(outputs, Mapping):
        if "logits" in outputs:
            return outputs["logits"]
        return next(value for key, value in outputs.items() if key != "loss" and isinstance(value, torch.Tensor))
    if isinstance(outputs, (tuple, list)):
        return outputs[1 if any(key in LABELS for key in inputs) else 0]
    return outputs


def _numel(value: Any) -> int:
    count = 1
    while isinstance(value, list):
        count *= len(value)
        value = value[0] if value else None
    return count
