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
"""Bases in 4 or 8 bits (bitsandbytes) under an adapter: what their weights are made of, and how to put them back.

A quantised weight is packed numbers and a state beside them (`weight.absmax`, `weight.quant_map`, ... or `SCB`). Both
are frozen, and stored as they are, so a rebuilt model computes what the trained one did, to the bit.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedError
from .names import canonical_name, unwrapped_name


_BITS = {"Linear4bit": "4bit", "LinearNF4": "4bit", "LinearFP4": "4bit", "Linear8bitLt": "8bit"}


def _quantized(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        unwrapped_name(name): module
        for name, module in model.named_modules()
        if type(module).__module__.startswith("bitsandbytes.nn") and type(module).__name__ in _BITS
    }


def describe_quantized(model: torch.nn.Module, prompt_learning: bool) -> dict[str, dict[str, Any]]:
    """Every quantised layer, by its name in the plain model, and what it is built with."""
    found = {}
    for name, module in _quantized(model).items():
        plain = canonical_name(name, prompt_learning)
        if _BITS[type(module).__name__] == "8bit":
            found[plain] = {"bits": "8bit", "threshold": float(module.state.threshold)}
            continue
        weight, compute = module.weight, module.compute_dtype
        found[plain] = {
            "bits": "4bit",
            "quant_type": weight.quant_type,
            "compress_statistics": bool(weight.compress_statistics),
            "compute_dtype": None if compute is None else str(compute).removeprefix("torch."),
        }
    return found


def quantization_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Quantised weights and their state, by name.

    Read through `state_dict`, because a layer that has run on a CPU may keep its weight packed in another way.
    """
    found = {}
    for name, module in _quantized(model).items():
        found |= {f"{name}.{key}": value for key, value in module.state_dict().items() if key != "bias"}
    return found


def place_quantized(model: torch.nn.Module, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty quantised layers into an empty plain model.

    Raises:
        UnsupportedError: if bitsandbytes is not installed.
    """
    if not described:
        return
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnsupportedError(
            "The recorded model has a quantised base, which needs bitsandbytes to be rebuilt: `pip install "
            "bitsandbytes`, or pass `model=`."
        ) from error
    for name, layer in described.items():
        before = model.get_submodule(name)
        # GPT-2's Conv1D holds the sizes as nx and nf.
        sizes = getattr(before, "in_features", None) or before.nx, getattr(before, "out_features", None) or before.nf
        options: dict[str, Any] = {"bias": before.bias is not None, "device": "meta"}
        if layer["bits"] == "8bit":
            made = bitsandbytes.nn.Linear8bitLt(
                *sizes, has_fp16_weights=False, threshold=layer["threshold"], **options
            )
        else:
            options |= {key: layer[key] for key in ("quant_type", "compress_statistics")}
            compute = layer["compute_dtype"]
            options["compute_dtype"] = None if compute is None else getattr(torch, compute)
            made = bitsandbytes.nn.Linear4bit(*sizes, **options)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made)
    # PEFT chooses its layers by these.
    model.is_loaded_in_4bit = any(layer["bits"] == "4bit" for layer in described.values())
    model.is_loaded_in_8bit = any(layer["bits"] == "8bit" for layer in described.values())


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep quantised layers from packing their weights for inference on a CPU.

    Where the CPU knows bfloat16, bitsandbytes packs a 4-bit weight at the first forward pass in evaluation mode whose
    input needs no gradient, and from then on passes no gradient through the layer, without a word.
    """
    for module in _quantized(model).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks


def fill_quantized(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Put recorded weights into the quantised layers.

    Args:
        model: with empty layers from `place_quantized`.
        tensors: by the model's names; both those of weights and of their state.

    Returns:
        Names of the parameters that are done.
    """
    done = set()
    for name, module in _quantized(model).items():
        key = f"{name}.weight"
        if _BITS[type(module).__name__] == "8bit":
            packed = tensors[key]
            module.weight = type(module.weight)(
                packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=tensors[f"{name}.SCB"]
            )
        else:
            prefix = f"{key}."
            state = {other.removeprefix(prefix): value for other, value in tensors.items() if other.startswith(prefix)}
            module.weight = type(module.weight).from_prequantized(
                tensors[key], state, requires_grad=False, device="cpu", module=module
            )
        done.add(key)
    keep_differentiable(model)
    return done
