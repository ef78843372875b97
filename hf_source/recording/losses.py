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
"""Which loss a Trainer trains with: what the record says about it, and what attribution chooses its task by."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Trainer

from .heads import HEAD
from .models import is_causal_lm, num_virtual_tokens, plain_model
from .smoothing import label_smoothing


def describe_loss(trainer: Any) -> dict[str, Any]:
    """The `loss` entry of a stage.

    `kind` is `"causal_lm"`, `"seq2seq_lm"`, `"reward"`, `"dpo"` or `"diffusion"`, or `"head"` until the first batch
    (see `heads.py`), with the constants of the loss as `settings`; where the loss of a row is not known, `reason` says
    why.
    """
    kind, settings, reason = _kind(trainer)
    return {
        "kind": kind,
        "normalization": None,
        "label_smoothing": label_smoothing(trainer),
        "custom_function": trainer.compute_loss_func is not None,
        "settings": settings,
        "reason": reason,
    }


def _kind(trainer: Any) -> tuple[str, dict[str, Any], str | None]:
    if trainer.compute_loss_func is not None:
        return "compute_loss_func", {}, "it trained with a compute_loss_func"
    if hasattr(trainer, "diffusion_settings"):
        return "diffusion", trainer.diffusion_settings(), None
    owner = loss_owner(trainer)
    if owner is Trainer:
        return _model_loss(trainer)
    if owner.__module__.startswith("sentence_transformers.") and isinstance(
        getattr(trainer, "loss", None), (torch.nn.Module, Mapping)
    ):
        return _embedding_loss(trainer)
    if owner.__module__.startswith("trl.") and owner.__name__ in _OF_TRL:
        return _OF_TRL[owner.__name__](trainer)
    return "compute_loss", {}, f"{owner.__qualname__} has its own compute_loss"


_IMAGES = "its rows hold images, which are not read yet: train on text alone to attribute them"


def _sft_loss(trainer: Any) -> tuple[str, dict[str, Any], str | None]:
    """TRL's own sum of token losses over the count, computed without the full logits."""
    if trainer._is_vision_dataset:
        return "vision", {}, _IMAGES
    if trainer.args.loss_type in ("nll", "chunked_nll"):
        return "causal_lm", _causal_settings(trainer), None
    reason = "weighs each token's loss by its probability" if trainer.args.loss_type == "dft" else "is another loss"
    return trainer.args.loss_type, {}, f"loss_type='{trainer.args.loss_type}' {reason}: train with loss_type='nll'"


def _embedding_loss(trainer: Any) -> tuple[str, dict[str, Any], str | None]:
    """Sentence-transformers: whatever loss module the trainer was given."""
    losses = trainer.loss.values() if isinstance(trainer.loss, Mapping) else [trainer.loss]
    names = sorted({type(loss).__name__ for loss in losses})
    between = [name for name in names if name not in _LOSSES_OF_ONE_ROW]
    if between:
        return (
            "in_batch",
            {},
            f"its {', '.join(between)} compares each row with the others of its batch, so that a row has no loss of "
            "its own. Train with a loss of single pairs, such as CosineSimilarityLoss, to attribute them",
        )
    return "compute_loss", {}, f"it is sentence-transformers' {', '.join(names)}"


_LOSSES_OF_ONE_ROW = {"CosineSimilarityLoss", "ContrastiveLoss", "MarginMSELoss", "MSELoss", "TripletLoss"}
"""Losses of sentence-transformers that are a mean over rows."""


def _reward_loss(trainer: Any) -> tuple[str, dict[str, Any], str | None]:
    return _pairs(trainer, "reward", {"center_rewards_coefficient": trainer.args.center_rewards_coefficient}, {})


def _dpo_loss(trainer: Any) -> tuple[str, dict[str, Any], str | None]:
    args = trainer.args
    settings = {name: getattr(args, name) for name in ("beta", "max_length", "truncation_mode")}
    settings["reference"] = _reference(trainer)
    others = {
        f"loss_type={list(trainer.loss_types)}: train with loss_type='sigmoid'": list(trainer.loss_types)
        != ["sigmoid"],
        f"loss_weights={args.loss_weights}: leave them out": list(trainer.loss_weights) != [1.0],
        f"f_divergence_type={args.f_divergence_type}: train with 'reverse_kl'": args.f_divergence_type != "reverse_kl",
        _IMAGES: trainer._is_vision_dataset,
        "router_aux_loss_coef adds a loss between rows: set it to 0": trainer.aux_loss_enabled,
        "ld_alpha weighs tokens: leave it out": args.ld_alpha is not None,
        "use_weighting weighs pairs: leave it out": args.use_weighting,
        "sync_ref_model moves the reference model: leave it out": args.sync_ref_model,
        "its reference model is not where the model started: set precompute_ref_log_probs=True, so that the record "
        "holds what it says": settings["reference"] is None,
    }
    return _pairs(trainer, "dpo", settings, others)


def _pairs(
    trainer: Any, kind: str, settings: dict[str, Any], others: Mapping[str, bool]
) -> tuple[str, dict[str, Any], str | None]:
    """A loss of preference pairs, unless one of `others` says that it is another."""
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    own = type(collator).__module__.startswith("trl.") and type(collator).__name__ == "DataCollatorForPreference"
    others = {f"it collated with {type(collator).__name__}: leave data_collator out": not own, **others}
    reason = next((reason for reason, holds in others.items() if holds), None)
    return kind, settings | {"pad_token_id": getattr(collator, "pad_token_id", None)}, reason


@torch.no_grad()
def _reference(trainer: Any) -> str | None:
    """Where the reference model's log-likelihoods come from, or `None` if the record cannot give them."""
    if trainer.precompute_ref_logps:
        return "columns"
    if trainer.ref_model is None:
        return "adapter_off"
    weights = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    own = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    same = weights.keys() == own.keys() and all(torch.equal(own[n], w.to(own[n].device)) for n, w in weights.items())
    return "initial" if same else None


_OF_TRL = {"SFTTrainer": _sft_loss, "RewardTrainer": _reward_loss, "DPOTrainer": _dpo_loss}


def _causal_settings(trainer: Any) -> dict[str, Any]:
    return {"label_smoothing": label_smoothing(trainer), "virtual_tokens": num_virtual_tokens(trainer.model)}


def loss_owner(trainer: Any) -> type:
    """The class whose `compute_loss` is used."""
    return next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))


def _model_loss(trainer: Any) -> tuple[str, dict[str, Any], str | None]:
    model = plain_model(trainer.model)
    if is_causal_lm(model):
        return "causal_lm", _causal_settings(trainer), None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(
        model, "prepare_decoder_input_ids_from_labels"
    ):
        return "seq2seq_lm", {"label_smoothing": label_smoothing(trainer)}, None
    return HEAD, {}, None  # the first batch will tell


@torch.no_grad()
def divides_by_count(
    loss: Callable[[Mapping[str, Any], torch.Tensor], torch.Tensor], inputs: Any, count: Any
) -> bool | None:
    """Whether a loss is divided by the number of items that it is told, or by one of its own.

    T5 and BART, for one, take `num_items_in_batch` as they take any keyword, and average over the micro-batch.

    Args:
        loss: called with inputs and a count.
        inputs: a micro-batch.
        count: number of items; the loss is also computed for twice as many.

    Returns:
        `None` if the micro-batch cannot tell: it has no label, so its loss is 0 or the mean over nothing.
    """
    once, twice = (float(loss(dict(inputs), count * factor)) for factor in (1, 2))
    if not once or math.isnan(once):
        return None
    return abs(once - twice) > 0.25 * abs(once)
