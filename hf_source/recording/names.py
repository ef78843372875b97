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
"""Parameter names that stay the same when a model is wrapped (PEFT, `torch.compile`, DDP, FSDP, checkpointing)."""

from collections.abc import Iterator

import torch


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_DROPPED_ANYWHERE = _WRAPPERS | {"base_layer", "original_module"}


def unwrapped_name(name: str) -> str:
    """The name without what activation checkpointing and FSDP put in; adapters keep their names.

    Example:
        >>> unwrapped_name("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The model's parameters under the names that they have in records."""
    return ((unwrapped_name(name), parameter) for name, parameter in model.named_parameters())


def canonical_name(name: str, prompt_learning: bool = False) -> str:
    """The name that a parameter has in the plain model, whatever wraps the model now.

    Strips `base_model.model.` (PEFT), `.base_layer` (a layer inside a LoRA layer), `module.` (DDP) and `_orig_mod.`
    (`torch.compile`), and PEFT's `modules_to_save.<adapter>` and `original_module`, so that weights of a LoRA stage
    can be matched to those of the full stage before it. Adapter weights (`lora_A`, ...) keep their own names.

    Args:
        name: as in `model.named_parameters()`.
        prompt_learning: whether PEFT's wrapper is one of prompt or prefix tuning, which calls the model `base_model`
            rather than `base_model.model`; the name alone does not tell.

    Example:
        >>> canonical_name("base_model.model.transformer.h.0.attn.c_attn.base_layer.weight")
        'transformer.h.0.attn.c_attn.weight'
    """
    parts = name.split(".")
    while True:
        if parts[0] in ("module", "_orig_mod") and len(parts) > 1:
            parts = parts[1:]
        elif prompt_learning and parts[0] == "base_model" and len(parts) > 1:
            parts, prompt_learning = parts[1:], False
            break
        elif parts[:2] == ["base_model", "model"] and len(parts) > 2:
            parts = parts[2:]
        else:
            break
    kept: list[str] = []
    skip = 0
    for part in parts:
        if skip:
            skip -= 1
        elif part == "modules_to_save":
            skip = 1  # the adapter's name follows
        elif part not in _DROPPED_ANYWHERE:
            kept.append(part)
    return ".".join(kept)
