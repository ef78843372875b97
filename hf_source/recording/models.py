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
"""What kind of model this is."""

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def plain_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def is_prompt_learning(model: torch.nn.Module) -> bool:
    """Whether a PEFT model learns a prompt or a prefix, rather than changes to layers."""
    return any(getattr(config, "is_prompt_learning", False) for config in _adapters(model))


def num_virtual_tokens(model: torch.nn.Module) -> int:
    """Tokens that a learned prompt puts before every row. A prefix (of keys and values) has none: it has no logits."""
    prompts = [config for config in _adapters(model) if getattr(config, "is_prompt_learning", False)]
    return sum(config.num_virtual_tokens for config in prompts if config.peft_type.value != "PREFIX_TUNING")


def _adapters(model: torch.nn.Module) -> list:
    return list(getattr(model, "peft_config", {}).values()) if plain_model(model) is not model else []


def predicted_labels(model: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """The labels that a loss asks for: a causal model has nothing to tell a row's first token from."""
    return labels[..., 1:] if is_causal_lm(model) and not num_virtual_tokens(model) else labels


def context_length(model: torch.nn.Module) -> int | None:
    """Tokens that the model's context holds, where its configuration says."""
    config = getattr(plain_model(model), "config", None)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(found, int) or found <= 0:  # some configurations write -1 for "any"
        return None
    return found - num_virtual_tokens(model)


def num_embeddings(model: torch.nn.Module) -> int | None:
    """Tokens that the model has embeddings of; `None` of one that reads no tokens, such as a network for images."""
    try:
        return getattr(plain_model(model).get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, RuntimeError):  # not of transformers; or of it, which raises where it finds no such layer
        return None


_CAUSAL_LM_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def is_causal_lm(model: torch.nn.Module) -> bool:
    """Whether the model's loss is the next-token loss of transformers' causal language models."""
    plain = plain_model(model)
    loss_type = getattr(plain, "loss_type", None)
    # transformers leaves it open for classes such as GPT2LMHeadModel, and then falls back to this very loss.
    known = any(cls.__name__ in _CAUSAL_LM_CLASSES for cls in type(plain).__mro__)
    causal = loss_type == "ForCausalLM" or (loss_type is None and known)
    return causal and not getattr(plain.config, "is_encoder_decoder", False)
