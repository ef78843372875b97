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
"""Label smoothing: the Trainer's own loss `(1 - epsilon) nll + epsilon (mean over the vocabulary of -log p)`.

The Trainer takes the labels away from the model and computes the loss of the logits itself, divided as any other loss:
by the number of items in the whole batch if the model takes that number, else by the micro-batch's own items.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from ..errors import UnsupportedError
from .models import is_causal_lm


def label_smoothing(trainer: Any) -> float:
    """`epsilon` of the loss that a Trainer minimises; 0 where a compute_loss_func stands in the smoother's place."""
    if trainer.label_smoother is None or trainer.compute_loss_func is not None:
        return 0.0
    return float(trainer.label_smoother.epsilon)


def refuse_unshifted_smoothing(trainer: Any) -> None:
    """The Trainer shifts labels by the name of the model's class: others would learn to repeat their input.

    Raises:
        UnsupportedError: for a causal language model that the Trainer does not recognise.
    """
    model = trainer.model
    if not label_smoothing(trainer) or not is_causal_lm(model):
        return
    seen = getattr(model.base_model, "model", None) if hasattr(model, "peft_config") else model
    if seen is None or type(seen).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UnsupportedError(
            "With label_smoothing_factor, Trainer compares each token's prediction with the token itself instead of "
            f"the next one, because it does not know {type(seen).__name__} as a causal language model (it is a class "
            "of your own, or prompt tuning). Set label_smoothing_factor=0, or pass a compute_loss_func that shifts "
            "the labels."
        )


def smoothed_loss(
    epsilon: float, model: torch.nn.Module, outputs: Mapping[str, torch.Tensor], labels: torch.Tensor, count: Any
) -> torch.Tensor:
    """The loss of a micro-batch as the Trainer computes it.

    Args:
        epsilon: the smoothing.
        model: says whether labels are shifted.
        outputs: with `logits`.
        labels: `[rows, tokens]`.
        count: what the summed loss is divided by; `None` for the number of labels.
    """
    smoother = LabelSmoother(epsilon=epsilon)
    return smoother(outputs, labels, shift_labels=is_causal_lm(model), num_items_in_batch=count)
