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
"""Parameter names that stay the same when a model is wrapped (PEFT, `torch.compile`, DDP)."""

_DROPPED_ANYWHERE = {"_orig_mod", "base_layer", "original_module"}


def canonical_name(name: str) -> str:
    """The name that a parameter has in the plain model, whatever wraps the model now.

    Strips `base_model.model.` (PEFT), `.base_layer` (a layer inside a LoRA layer), `module.` (DDP) and `_orig_mod.`
    (`torch.compile`), and PEFT's `modules_to_save.<adapter>` and `original_module`, so that weights of a LoRA stage
    can be matched to those of the full stage before it. Adapter weights (`lora_A`, ...) keep their own names.

    Example:
        >>> canonical_name("base_model.model.transformer.h.0.attn.c_attn.base_layer.weight")
        'transformer.h.0.attn.c_attn.weight'
    """
    parts = name.split(".")
    while True:
        if parts[0] in ("module", "_orig_mod") and len(parts) > 1:
            parts = parts[1:]
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
