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
"""Replaying a recorded stage from its record alone.

It proves that the record tells the truth, and it is how rows are removed from training without the Trainer.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import default_data_collator

from ...data import ROW, CausalLMCollator, take_rows
from ...errors import DataError, UnsupportedError
from ...gradients import DPOTask, HeadTask, PairTask, RowLossTask, task_for
from ...gradients.selection import HEADS
from ..checks import drops
from ..models import predicted_labels
from ..optimizers import OptimizerDescription, build_optimizer
from ..rows.matching import match_rows
from ..rows.packing import split
from ..rows.streams import is_stream
from ..smoothing import smoothed_loss
from ..warm import load_optimizer_state
from .assumed import require_recorded_visits
from .stage import StageRecord
from .steps import MicroBatch


# Rows kept in memory between visits: about 128 MB of tokens.
_CACHED_TOKENS = 1 << 24


def replay(
    stage: StageRecord,
    dataset: Any = None,
    *,
    model: torch.nn.Module | None = None,
    dtype: torch.dtype | None = None,
    data_collator: Callable[[list], Mapping[str, Any]] | None = None,
    row_mask: np.ndarray | None = None,
    callback: Callable[[int, torch.nn.Module, torch.optim.Optimizer], None] | None = None,
) -> torch.nn.Module:
    """Train the stage again from its record: recorded rows, learning rates, clip factors and normalizers.

    Args:
        stage: the stage to replay.
        dataset: the rows it trained on, as the Trainer took them; default those that the record holds.
        model: model to train in place; default the stage's, rebuilt. It starts from the recorded initial weights.
        dtype: floating type of the rebuilt model; default that of training.
        data_collator: the run's collator, if it was not the default one.
        row_mask: bool `[num_rows]`; rows that are `False` are left out (of packed sequences: their labels), with
            everything else (normalizers, learning rates, clip factors) as it was.
        callback: called as `callback(step, model, optimizer)` after every optimizer step.

    Returns:
        The model with the weights after the last step, in evaluation mode. With dropout, other masks are drawn than in
        training, so its weights differ.

    Raises:
        DataError: if the dataset is not the one that was recorded, or the mask does not fit it.
        UnsupportedError: if the loss was a function that the record cannot hold.
    """
    require_recorded_visits(stage, "replayed")
    if stage.loss["custom_function"]:
        raise UnsupportedError(
            f"Stage '{stage.name}' trained with a compute_loss_func, which the record does not hold, so it cannot be "
            "replayed. Let the model compute its own loss."
        )
    if model is None:
        model = stage.build_model(dtype)
    stage.load_weights(model, "initial")
    rows = _RowReader(stage, dataset, data_collator)
    mask = _checked_mask(row_mask, stage.num_rows)
    task = task_for(stage) if stage.loss["kind"] in ("reward", "dpo", "diffusion", *HEADS) else None
    if isinstance(task, DPOTask):
        rows.dataset = task.with_reference(rows.dataset, model, stage)
    collator = collator_of(stage, task, data_collator)
    description = OptimizerDescription.from_dict(stage.optimizer)
    trained = _trained_parameters(stage, model)
    optimizer = build_optimizer(description, trained)
    if stage.training.get("fused_optimizer"):  # it rounds otherwise than the loop does, which shows in bfloat16
        for group in optimizer.param_groups:
            group |= {"fused": True} if "fused" in group else {}
    load_optimizer_state(stage, optimizer, trained)
    steps = stage.steps()
    _to_training_mode(model, bool(stage.training.get("dropout", True)))
    for index in range(len(steps)):
        _set_learning_rates(optimizer, steps.learning_rate[index])
        if task is not None:
            task.at_epochs((int(steps.epoch[index]),))
        frozen = stage.frozen_at(index)
        for name, parameter in trained.items():
            parameter.requires_grad_(name not in frozen)
        scale = stage.loss_scale_at(index)
        for batch in steps.micro_batches[index] if not steps.skipped[index] else ():
            kept = _kept(stage, rows, batch, mask)
            if kept:
                _backward(stage, model, collator(kept), batch, scale, task)
        if not steps.skipped[index]:
            _scale_gradients(trained, 1 / scale, float(steps.clip_factor[index]), masked=mask is not None)
            optimizer.step()
        optimizer.zero_grad()
        if callback is not None:
            callback(index, model, optimizer)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return model.eval()


def _to_training_mode(model: torch.nn.Module, dropout: bool) -> None:
    """Training mode, in which quantised layers compute otherwise than in evaluation.

    TRL switches dropout off, and the configuration may name it still: then what drops stays in evaluation mode.
    """
    model.train()
    for module in model.modules() if not dropout else ():
        if drops(module):
            module.eval()


def _kept(
    stage: StageRecord, rows: "_RowReader", batch: MicroBatch, mask: np.ndarray | None
) -> list[Mapping[str, Any]]:
    """Features of the micro-batch's rows that are not left out; a packed sequence comes in pieces."""
    if stage.packing is None:
        return rows(batch.rows if mask is None else [row for row in batch.rows if mask[row]])
    pieces = [piece for example in rows(batch.rows) for piece in split(example)]
    return [piece for piece in pieces if mask is None or mask[piece["row"]]]


def _backward(
    stage: StageRecord,
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    batch: MicroBatch,
    scale: float,
    task: RowLossTask | None,
) -> None:
    """Add the micro-batch's gradient: of its summed loss divided by the recorded normalizer, times `scale`."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in inputs.items() if key != ROW}
    if task is not None:
        with _autocast(stage, device):
            losses = task.row_losses(task.forward(model, inputs), task.labels(inputs))
        (losses.sum() / batch.normalizer * scale).backward()
        return
    tokens = stage.loss["normalization"] == "tokens"
    items = _count_items(model, inputs)
    if not tokens and items == 0:
        return  # the mean over no items is not a number
    loss = _loss(stage, model, inputs, batch.normalizer if tokens else None)
    # In the other case it is the mean over the items that are there.
    ((loss if tokens else loss * (items / batch.normalizer)) * scale).backward()


def _loss(stage: StageRecord, model: torch.nn.Module, inputs: Mapping[str, Any], count: float | None) -> torch.Tensor:
    """The micro-batch's loss, divided by `count` or, without one, by its own items."""
    inputs, labels = dict(inputs), None
    epsilon = stage.loss.get("label_smoothing", 0.0)
    if epsilon:
        labels = inputs.pop("labels")
    with _autocast(stage, next(model.parameters()).device):
        outputs = model(**inputs, **({} if count is None else {"num_items_in_batch": count}))
    if not epsilon:
        return outputs["loss"]
    if stage.autocast is not None:  # Accelerate gives the Trainer what left the model in half precision as float32
        outputs = {"logits": outputs["logits"].float()}
    return smoothed_loss(epsilon, model, outputs, labels, count)


def _count_items(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    labels = inputs.get("labels")
    if labels is None or labels.is_floating_point():
        return len(next(iter(inputs.values())))
    return int(predicted_labels(model, labels).ne(-100).sum())


def _autocast(stage: StageRecord, device: torch.device) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if stage.autocast is None else torch.autocast(device.type, dtype=stage.autocast)


def _scale_gradients(trained: Mapping[str, torch.nn.Parameter], unscale: float, factor: float, masked: bool) -> None:
    """Take the loss scale out again, and clip as recorded.

    If every row of the step was left out, its gradient is 0 rather than absent: moments and weight decay go on.
    """
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    if not gradients and masked:
        for parameter in trained.values():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    for number in (unscale, factor):
        if number != 1.0 and gradients:
            torch._foreach_mul_(gradients, number)


def _set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = float(rate)


def _trained_parameters(stage: StageRecord, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in stage.trainable}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    return trained


_RIGHT_PADDING = {
    f"{CausalLMCollator.__module__}.{CausalLMCollator.__qualname__}",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling",
}
"""Collators that pad rows to the right and change nothing else."""


def collator_of(stage: StageRecord, task: RowLossTask | None, given: Any) -> Callable[[list], Mapping[str, Any]]:
    """What makes a batch of rows: the task's own way for pairs and heads, where no other is given."""
    if isinstance(task, PairTask):
        return task.collator(None)
    if not isinstance(task, HeadTask):
        return given or _default_collator(stage)
    collator, columns = given or task.collator(stage.record.processing_class()), task.columns
    return lambda rows: collator([{k: v for k, v in row.items() if columns is None or k in columns} for row in rows])


def _default_collator(stage: StageRecord) -> Callable[[list], Mapping[str, Any]]:
    recorded = stage.collator["class"]
    if recorded == f"{default_data_collator.__module__}.{default_data_collator.__qualname__}":
        return lambda rows: default_data_collator([{k: v for k, v in row.items() if k != ROW} for row in rows])
    if recorded not in _RIGHT_PADDING:
        raise DataError(
            f"Stage '{stage.name}' collated its rows with {recorded}, which the record does not hold. Pass it as "
            "`data_collator=`."
        )
    return CausalLMCollator(stage.record.processing_class())


def _checked_mask(row_mask: np.ndarray | None, num_rows: int) -> np.ndarray | None:
    if row_mask is None:
        return None
    mask = np.asarray(row_mask)
    if mask.dtype != np.bool_ or mask.shape != (num_rows,):
        raise DataError(
            f"row_mask must be a bool array of shape ({num_rows},), True for the rows to keep; it is {mask.dtype} of "
            f"shape {mask.shape}."
        )
    return mask


class _RowReader:
    """Rows by number, tokenised as in training."""

    def __init__(self, stage: StageRecord, dataset: Any, data_collator: Any) -> None:
        self.dataset, self.position = dataset, None
        tokens = stage.dataset.get("stream") or is_stream(dataset) or isinstance(dataset, datasets.Dataset)
        if dataset is None or tokens:
            matched = match_rows(stage, dataset, stage.record.processing_class(), data_collator)
            self.dataset = matched.dataset
            self.position = {int(row): place for place, row in enumerate(matched.numbers)}
        self._cache: dict[int, dict[str, Any]] = {}
        self._tokens = 0

    def __call__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        wanted = [row for row in rows if row not in self._cache]
        fetched = {}
        if wanted:
            positions = wanted if self.position is None else [self.position[row] for row in wanted]
            fetched = dict(zip(wanted, take_rows(self.dataset, positions), strict=True))
        for row, features in fetched.items():
            features.pop(ROW, None)
            if self._tokens < _CACHED_TOKENS:
                self._cache[row] = {k: torch.tensor(v) if _is_tokens(v) else v for k, v in features.items()}
                self._tokens += len(features.get("input_ids", range(1000)))
        return [self._cache.get(row) or fetched[row] for row in rows]


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)
