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
"""What cannot be recorded correctly is refused before the first step, with the reason and the fix."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import UnsupportedError
from ..logs import get_logger
from .deepspeed import refuse_deepspeed
from .losses import describe_loss
from .models import plain_model
from .precision import refuse_formats
from .rows.packing import refuse_leaks
from .rows.streams import is_stream
from .smoothing import refuse_unshifted_smoothing


logger = get_logger(__name__)


def refuse_unsupported(trainer: Any) -> None:
    """Check everything about a Trainer that is known before training starts.

    Raises:
        UnsupportedError: naming what cannot be recorded, why, and what to change.
    """
    refuse_unshifted_smoothing(trainer)
    _refuse_ways_to_share(trainer)
    refuse_formats(trainer)
    refuse_moving_momentum(trainer.lr_scheduler)
    _refuse_compiled(trainer.model)
    _refuse_adapters(trainer.model)
    _refuse_batch_norm(trainer.model)
    if getattr(trainer, "padding_free", False):
        with trainer.accelerator.autocast():
            refuse_leaks(trainer.model, trainer.args.device)
    warn_about_noise(trainer)


def refuse_moving_momentum(scheduler: Any) -> None:
    """Refuse schedules that change more than the learning rate.

    Raises:
        UnsupportedError: for `OneCycleLR` and `CyclicLR` with `cycle_momentum=True`, which is their default.
    """
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        if getattr(one, "cycle_momentum", False):
            raise UnsupportedError(
                f"{type(one).__name__} changes the momentum (betas) during training, which a record holds once per "
                f"stage. Set {type(one).__name__}(cycle_momentum=False)."
            )


def warn_about_resuming(trainer: Any, folder: Path) -> None:
    """Say when the Trainer will not go on with the rows that an uninterrupted run would have seen next.

    Args:
        trainer: the trainer.
        folder: checkpoint that it resumes from.
    """
    args = trainer.args
    state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    accelerator = trainer.accelerator
    reason = None
    if args.ignore_data_skip:
        reason = "ignore_data_skip=True starts the epoch again. Leave it out"
    elif str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "group_by_length":
        reason = "train_sampling_strategy='group_by_length' draws a new order. Use 'random' or 'batch_rebalance'"
    elif not accelerator.dataloader_config.use_seedable_sampler:
        reason = "use_seedable_sampler=False draws a new order. Leave it out"
    elif is_stream(trainer.train_dataset) and state["epoch"] >= 1:
        reason = "the Trainer starts the stream again. Resume in its first epoch, or collect it in a Dataset"
    if reason is not None:
        logger.warning(
            f"In the resumed epoch some rows train twice and others never: {reason} to resume as if nothing had "
            "happened. The record counts what really happens."
        )


_ADAPTERS_WITH_A_LOSS = {
    "ADALORA": "adds a term for orthogonal adapters to the loss, and changes ranks while it trains",
    "CPT": "weighs the tokens of its prompt in a loss of its own",
}


def _refuse_adapters(model: torch.nn.Module) -> None:
    for config in getattr(model, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _ADAPTERS_WITH_A_LOSS:
            raise UnsupportedError(
                f"The PEFT method {kind} {_ADAPTERS_WITH_A_LOSS[kind]}, which belongs to no row and is not in the "
                "record. Use another method, such as LoRA."
            )


def _refuse_compiled(model: torch.nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "The model was compiled before the trainer took it, so the trainer cannot see which inputs it takes and "
            "drops them. Pass the plain model, and set torch_compile=True."
        )


_DEVICES = ("CPU", "GPU", "XPU", "NPU", "MLU", "MUSA", "SDAA")
_DATA_PARALLEL = ("NO", "FSDP", "DEEPSPEED", *(f"MULTI_{device}" for device in _DEVICES))


def _refuse_ways_to_share(trainer: Any) -> None:
    """Processes may share the rows of a step; other ways of sharing the work are refused."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"One process drives {args.n_gpu} GPUs (nn.DataParallel), where the loss of a row depends on which GPU it "
            "came to. Start the script with `accelerate launch` (or `torchrun --nproc_per_node`), one process per "
            "GPU, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    if trainer.is_deepspeed_enabled:
        refuse_deepspeed(trainer)
    if trainer.is_fsdp_enabled:
        _refuse_ways_to_shard(trainer)
    kind = str(getattr(accelerator.distributed_type, "name", accelerator.distributed_type))
    shared = [size() for size in (trainer.get_tp_size, trainer.get_cp_size, trainer.get_sp_size)]
    if kind not in _DATA_PARALLEL or max(shared) > 1 or trainer.is_distributed_loading_by_transformers:
        raise UnsupportedError(
            f"The processes share the work in a way that recording does not know ({kind}; tensor, context and "
            f"sequence parallel sizes {shared}): several of them may see the same rows. Use data parallelism only, "
            "with `accelerate launch` and without parallelism_config or a tensor-parallel plan."
        )
    if args.world_size > 1 and getattr(args, "enable_jit_checkpoint", False):
        raise UnsupportedError(
            "enable_jit_checkpoint saves when the signal reaches a process, which may be at another step on each, so "
            "their rows cannot be put together. Set enable_jit_checkpoint=False and save often (save_steps)."
        )
    if args.world_size > 1 and args.auto_find_batch_size:
        raise UnsupportedError(
            "auto_find_batch_size starts again where memory ran out, which may be one process of several. Set "
            "auto_find_batch_size=False and a per_device_train_batch_size that fits."
        )


def _refuse_ways_to_shard(trainer: Any) -> None:
    plugin, parallel = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.parallelism_config
    if plugin.fsdp_version != 2:
        raise UnsupportedError(
            "FSDP1 flattens the weights into one tensor per layer, which recording cannot take apart. Use FSDP2: "
            "fsdp_config={'version': 2} (or `fsdp_version: 2` in the accelerate config)."
        )
    if parallel is not None and parallel.dp_replicate_size > 1:
        raise UnsupportedError(
            f"dp_replicate_size={parallel.dp_replicate_size} shards weights over some processes and copies them to "
            "others, which recording has not been tested with. Shard over all processes: leave parallelism_config out."
        )
    if trainer.args.torch_compile:
        raise UnsupportedError("FSDP with torch_compile cannot be recorded yet. Set torch_compile=False.")


def _refuse_batch_norm(model: torch.nn.Module) -> None:
    """Batch normalisation mixes rows while it trains; one that stays in evaluation mode is a fixed scale and shift."""
    before = model.training
    model.train()  # as the Trainer does at every step
    mixing = [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]
    model.train(before)
    if mixing:
        name, kind = mixing[0]
        raise UnsupportedError(
            f"The module `{name}` is a {kind}: in training its output for a row depends on the rest of the batch, so "
            "a row has no loss of its own. Replace it by LayerNorm or GroupNorm, or freeze its statistics: give it a "
            "`train` method that stays in evaluation mode."
        )


def has_router_loss(model: torch.nn.Module) -> bool:
    """Whether a mixture of experts adds a loss of its routing, which is the batch's and no row's."""
    return bool(getattr(getattr(plain_model(model), "config", None), "output_router_logits", False))


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether any module drops activations, or whole layers, in training."""
    config = getattr(plain_model(model), "config", None)
    masks = getattr(config, "apply_spec_augment", False) and (config.mask_time_prob or config.mask_feature_prob)
    return bool(masks) or any(drops(module) for module in model.modules())


def drops(module: torch.nn.Module) -> bool:
    """Whether this module, apart from those inside it, drops anything in training."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Attention modules of recent models hold the probability as a plain number, others that of skipping a layer.
    names = ["attention_dropout", "layerdrop"]
    names += ["dropout"] if isinstance(module, torch.nn.RNNBase) else []
    names += ["drop_prob"] if type(module).__name__.endswith("DropPath") else []
    values = [getattr(module, name, 0) for name in names]
    return any(isinstance(value, float) and value > 0 for value in values)


def warn_about_unknown_loss(reason: str) -> None:
    """Say that attribution will have to be told what a row's loss is."""
    logger.warning(
        f"The loss of a row is not known ({reason}). Row weights in the record assume that the loss is the mean over "
        "its items (labels other than -100, or rows), and attribution will ask for `task=`."
    )


def warn_about_noise(trainer: Any) -> None:
    """Say which randomness of training the scores will average over."""
    if has_dropout(trainer.model):
        logger.warning(
            "The model trains with dropout. Scores describe the model without dropout, and a replay of the record "
            "draws other masks. Set the dropout probabilities of the model's config to 0 for exact attribution."
        )
    if has_router_loss(trainer.model):
        logger.warning(
            "The model adds a router loss over the whole batch to its loss (output_router_logits=True). It belongs to "
            "no row and is not attributed; set output_router_logits=False for exact attribution."
        )
    if reason := describe_loss(trainer)["reason"]:
        warn_about_unknown_loss(reason)
    if trainer.args.neftune_noise_alpha:
        logger.warning(
            "neftune_noise_alpha adds noise to the embeddings in training. Scores describe the model without it; set "
            "neftune_noise_alpha=None for exact attribution."
        )
