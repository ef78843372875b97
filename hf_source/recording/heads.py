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

"""Heads: which loss a model computes that is no language model's, told from its first batch.

Nothing is told from names alone. The losses that the library knows are computed from the model's own predictions, and
one of them has to be what the Trainer computes for the same batch; so a model of one's own is recognised as well as
transformers', and a head with weights of classes or a term of its own is not mistaken for another.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..data import ROW
from ..logs import get_logger
from .models import plain_model
from .smoothing import label_smoothing


logger = get_logger(__name__)

HEAD = "head"
"""`loss["kind"]` of a stage until its first batch."""


@torch.no_grad()
def recognise_head(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to the `loss` entry of a stage: `kind` and `settings`, or the `reason` why it is not known.

    Args:
        trainer: its model is given the batch twice, in evaluation mode.
        inputs: a micro-batch without row numbers.
    """
    from ..gradients.selection import HEADS, TASKS
    from ..gradients.task import task_labels

    model, settings = trainer.model, _settings(trainer)
    if reason := _draws_labels(trainer.data_collator):
        return {"kind": HEAD, "reason": reason}
    model.eval()  # training_step sets it back
    inputs = trainer._prepare_inputs(dict(inputs))
    ids = inputs.get("input_ids")
    if ids is not None and ids.dim() == 3:  # choices
        settings["sequences_per_row"] = ids.shape[1]
    if epsilon := label_smoothing(trainer):
        settings["label_smoothing"] = epsilon
    with trainer.compute_loss_context_manager():
        loss = float(trainer.compute_loss(model, dict(inputs)))
        for kind in HEADS:
            if epsilon and kind != "classification":
                continue
            own = settings | (_ctc_settings(model) if kind == "ctc" else {})
            task = TASKS[kind](own)
            if not task.reads(model, inputs):
                continue
            labels = task_labels(task, inputs)
            outputs = task.forward(model, inputs).float()
            if not task.fits(outputs, labels):
                continue
            items = int(task.num_items(labels).sum())
            found = float(task.row_losses(outputs, labels).sum()) / (1 if task.summed else max(items, 1))
            if abs(found - loss) <= _tolerance(trainer) * max(abs(loss), 1e-3):
                return {"kind": kind, "settings": own, "reason": None}
    name = type(getattr(model, "module", model)).__name__
    return {
        "kind": str(getattr(model, "loss_type", None)),
        "reason": f"{name} computes its loss itself, and it is not the mean of one that is known",
    }


def _settings(trainer: Any) -> dict[str, Any]:
    """How rows came to the model: which columns, by which collator."""
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    columns = None
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        columns = sorted({name for name in trainer._signature_columns if name != ROW})
    named = collator if hasattr(collator, "__qualname__") else type(collator)
    return {"columns": columns, "collator": f"{named.__module__}.{named.__qualname__}"}


def _ctc_settings(model: torch.nn.Module) -> dict[str, Any]:
    config = getattr(plain_model(model), "config", None)
    return {
        "blank": getattr(config, "pad_token_id", None) or 0,
        "reduction": getattr(config, "ctc_loss_reduction", "sum"),
        "zero_infinity": bool(getattr(config, "ctc_zero_infinity", False)),
    }


def _draws_labels(collator: Any) -> str | None:
    """Why the labels of a row are not the same at each visit, if they are not."""
    collator = getattr(collator, "collator", collator)
    if getattr(collator, "mlm", False) or "Permutation" in type(collator).__name__:
        return (
            f"its {type(collator).__name__} masks other tokens of a row at each visit, and the record does not hold "
            "which. Mask each row once beforehand, several times if it is to be seen in several ways: map the dataset "
            "through the collator to `input_ids` and `labels`, and train with DataCollatorForTokenClassification"
        )
    return None


def _tolerance(trainer: Any) -> float:
    narrow = trainer.accelerator.mixed_precision != "no" or next(trainer.model.parameters()).dtype in (
        torch.float16,
        torch.bfloat16,
    )
    return 2e-2 if narrow else 1e-4
