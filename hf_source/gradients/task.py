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
"""What a model was trained to do: its loss per row, the labels it would draw itself, and what a query measures.

`CausalLMTask` is the task of decoder language models, `Seq2SeqTask` that of encoder-decoders, `preference.py` has
those of pairs, `heads.py` those of classification and regression. A task of your own is a subclass of `RowLossTask`
with two methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..data import IGNORE_INDEX, ROW, CausalLMCollator
from ..errors import ConfigError


Batch = Mapping[str, torch.Tensor]


class Task(Protocol):
    """The small protocol between a training objective and attribution; `RowLossTask` has defaults for most of it."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits (or predictions) of a batch; the first axis is the row."""

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed loss of each row over its loss items, in nats: `[rows]`."""

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Labels drawn from the model's own predictive distribution wherever `labels` has a loss item."""

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of loss items of each row: int64 `[rows]`."""


class RowLayout:
    """How a stage's rows come in batches, whatever their loss is: all that is known where no task is.

    Attributes:
        columns: columns of a row that its collator reads; `None` for all but `source_row`.
    """

    columns: tuple[str, ...] | None = None

    def collator(self, processing_class: Any) -> Callable[[list], Batch]:
        """Makes a batch of rows, where the user gives no `data_collator`."""
        return CausalLMCollator(processing_class)

    def count_items(self, row: Mapping[str, Any]) -> int:
        """Loss items of one row that is not collated yet."""
        labels = row.get("labels", row.get("input_ids"))
        return sum(label != IGNORE_INDEX for label in labels) if isinstance(labels, list) else 1

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of a row, for batches of a limited size."""
        return max((len(value) for value in row.values() if isinstance(value, (list, str))), default=1)


class RowLossTask(RowLayout, ABC):
    """Base of a task of your own, for a Trainer whose loss per row the library does not know.

    Write `forward` and `row_losses`; rows then come in batches as the Trainer's collator makes them, and the curvature
    is the *empirical* Fisher: outer products of the rows' own gradients, which overstates the curvature of what is
    not learnt yet. With `sample_labels` as well it is the Fisher, which is the Gauss-Newton matrix of a softmax, a
    sigmoid or a squared error.

    Attributes:
        columns: columns of a row that its collator reads; `None` for all but `source_row`.
        sequences_per_row: sequences that `forward` gives the model for one row, row by row (2 for pairs).

    Example:
        >>> class Regression(RowLossTask):
        ...     def forward(self, model, batch):
        ...         return model(batch["input_ids"]).logits
        ...     def row_losses(self, outputs, labels):
        ...         return (outputs[:, 0] - labels).square()
    """

    sequences_per_row = 1

    @abstractmethod
    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Predictions for a batch, which holds what the collator made; the first axis is the row."""

    @abstractmethod
    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each row, `[rows]`, from predictions and `batch["labels"]` (zeros `[rows]` if there are none).

        Summed over the row's loss items: what the Trainer minimised is the sum over rows, divided by the number of
        items.
        """

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Labels for the curvature; the row's own by default."""
        return labels

    def labels(self, batch: Batch) -> torch.Tensor:
        """What `row_losses` compares predictions with, `[rows, ...]`: the batch's `labels` by default."""
        return labels_of(batch)

    def predictions(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and the labels that they tell, place by place: what measurements other than the loss read."""
        return outputs, labels

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Loss items of each row: labels other than -100 if they are whole numbers, else the row itself."""
        if labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.int64)
        return labels.ne(IGNORE_INDEX).reshape(len(labels), -1).sum(dim=1)

    def prepare(self, model: torch.nn.Module, rows: Any) -> None:
        """Called with the stage's model and rows before the stage is walked through."""

    def at_epochs(self, epochs: Sequence[int]) -> None:
        """Told which epochs' visits of rows are meant, before they are read: of a task whose visits differ."""

    def complete(self, batch: Batch) -> Batch:
        """The batch with what else the task reads of it, which torch.func's transforms could not compute inside."""
        return batch

    def asked(self) -> "RowLossTask":
        """The task of queries that are rows of this kind."""
        return self

    def unsmoothed(self) -> "RowLossTask":
        """The task without label smoothing: that of queries, and of labels drawn from the model."""
        return self


def refuse_incomplete(task: Task | None) -> None:
    """A task of the user's own says what a row's loss is, before anything is computed, whatever its base class.

    Raises:
        ConfigError: if it does not.
    """
    if isinstance(task, type):
        raise ConfigError(f"task={task.__name__} is a class: make one of it, task={task.__name__}().")
    for method in ("forward", "row_losses"):
        if task is not None and not hasattr(type(task), method):
            raise ConfigError(
                f"task={type(task).__name__} has no `{method}`: write `forward(model, batch)` (the predictions) and "
                "`row_losses(outputs, labels)` (one loss a row); see `hf_source.RowLossTask`."
            )


def labels_of(batch: Batch) -> torch.Tensor:
    """The batch's `labels` or `label`; zeros `[rows]` where it has neither."""
    for name in ("labels", "label"):
        if name in batch:
            return batch[name]
    first = next(iter(batch.values()))
    return torch.zeros(len(first), dtype=torch.int64, device=first.device)


def task_labels(task: "Task", batch: Batch) -> torch.Tensor:
    """The labels of a batch as the task reads them; a task that is no `RowLossTask` has them in `labels`."""
    return task.labels(batch) if isinstance(task, RowLossTask) else labels_of(batch)


class CausalLMTask(RowLossTask):
    """Next-token prediction: the loss of a row is the summed cross-entropy of its label tokens given what precedes.

    Its Hessian is approximated by the Fisher with labels drawn from the model, which for a softmax equals the
    generalised Gauss-Newton matrix (Martens 2020, arXiv 1412.1193, section 9.2).

    With label smoothing the loss of an item is the cross-entropy of `q = (1 - epsilon) e_label + epsilon / V`. Its
    Hessian in the logits, `diag(p) - p p^T`, does not depend on `q`, so the Gauss-Newton matrix is that of the plain
    loss; and it is the covariance of `p - e_y` under labels `y ~ p`, so the Fisher takes the plain loss of labels
    drawn from the softmax (`unsmoothed`).

    Args:
        label_smoothing: `epsilon`.
        virtual_tokens: tokens that a learned prompt puts before every row. The first label is told from them.
    """

    columns = ("input_ids", "labels", "attention_mask")

    def __init__(self, label_smoothing: float = 0.0, virtual_tokens: int = 0) -> None:
        self.label_smoothing = label_smoothing
        self.virtual_tokens = virtual_tokens

    def unsmoothed(self) -> "CausalLMTask":
        """See `RowLossTask.unsmoothed`."""
        return CausalLMTask(virtual_tokens=self.virtual_tokens) if self.label_smoothing else self

    def predictions(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and the labels that they tell, `[rows, predictions, vocabulary]` and `[rows, predictions]`."""
        if self.virtual_tokens:
            return outputs[:, self.virtual_tokens - 1 : -1], labels
        return outputs[:, :-1], labels[:, 1:]

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits, float `[rows, tokens, vocabulary]`."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", ROW)}
        return model(**inputs, use_cache=False).logits

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed (smoothed) negative log-likelihood of each row's label tokens, nats, `[rows]`."""
        return self.token_losses(outputs, labels).sum(dim=1)

    def token_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every label token, `[rows, tokens - 1]`, 0 where nothing is asked."""
        if self.virtual_tokens:
            return token_losses(*self.predictions(outputs, labels), self.label_smoothing)
        # Labels are moved to their logits, of which a part would be a copy.
        moved = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return token_losses(outputs, moved, self.label_smoothing)[:, :-1]

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Each loss item's label drawn from the softmax of its logits; shape and masking of `labels`.

        The draw is made by inverting the distribution function at a uniform number, which gives the same label for
        the same generator on every device and survives rounding differences between two passes.
        """
        sampled = labels.clone()
        logits, targets = self.predictions(outputs, labels)
        sampled[:, self._first :] = drawn(logits, targets, generator)
        return sampled

    @property
    def _first(self) -> int:
        """The first label that something tells."""
        return 0 if self.virtual_tokens else 1

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Label tokens of each row; the first token is only predicted from a learned prompt."""
        return (labels[:, self._first :] != IGNORE_INDEX).sum(dim=1)

    def count_items(self, row: Mapping[str, Any]) -> int:
        """Label tokens of one row."""
        return sum(label != IGNORE_INDEX for label in (row.get("labels") or row["input_ids"])[self._first :])

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of one row."""
        return len(row["input_ids"])


class Seq2SeqTask(RowLossTask):
    """Encoder-decoder language models: the summed cross-entropy of a row's label tokens, which are not shifted.

    The decoder reads the row's own labels, shifted to the right, also where the labels of the loss are drawn from the
    model.

    Args:
        label_smoothing: see `CausalLMTask`.
    """

    columns = ("input_ids", "labels", "attention_mask")

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def unsmoothed(self) -> "Seq2SeqTask":
        """See `RowLossTask.unsmoothed`."""
        return Seq2SeqTask() if self.label_smoothing else self

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the decoder, float `[rows, label tokens, vocabulary]`."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", ROW)}
        if "decoder_input_ids" not in inputs:
            # Through PEFT's wrapper: adapters of encoder-decoders are wrapped models too.
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return model(**inputs, use_cache=False).logits

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood of each row's label tokens, nats, `[rows]`."""
        return self.token_losses(outputs, labels).sum(dim=1)

    def token_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every label token, `[rows, tokens]`, 0 where nothing is asked."""
        return token_losses(outputs, labels, self.label_smoothing)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Each loss item's label drawn from the softmax of its logits; shape and masking of `labels`."""
        return drawn(outputs, labels, generator)

    def collator(self, processing_class: Any) -> Callable[[list], Batch]:
        """Pads inputs and labels to the right."""
        return Seq2SeqCollator(processing_class)

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens that a row takes in the encoder and the decoder."""
        return len(row["input_ids"]) + len(row["labels"])


class Seq2SeqCollator(CausalLMCollator):
    """Right-pads inputs and labels, each to the longest of its own."""

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows; a given `attention_mask` is kept."""
        batch = super().__call__(rows)
        if all(row.get("attention_mask") is not None for row in rows):
            masks = [torch.as_tensor(row["attention_mask"]) for row in rows]
            batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        return batch


def token_losses(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of every target, 0 where there is none."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view_as(targets)


@torch.no_grad()
def drawn(logits: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Targets drawn from the softmax of the logits, where there is a target."""
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.rand(cumulative.shape[:-1], generator=generator).to(cumulative.device)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None]).squeeze(-1)
    drawn = drawn.clamp_max(logits.shape[-1] - 1)
    return torch.where(targets != IGNORE_INDEX, drawn.to(targets.dtype), targets)


def batch_to(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch's tensors on `device`."""
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def batch_rows(batch: Batch, rows: range) -> Batch:
    """Some rows of a batch, padded as it is."""
    return {key: value[rows.start : rows.stop] for key, value in batch.items()}
