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
"""Rebuilding a trained model from its record: no checkpoint and no network needed."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights

from ...errors import ConfigError, RecordError, UnsupportedError
from ..quantized import fill_quantized, place_quantized


if TYPE_CHECKING:
    from .stage import StageRecord


def build_model(stage: "StageRecord", dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model at the end of a stage. See `StageRecord.build_model`."""
    stage.require_complete()
    # On the meta device nothing is initialised: the weights are about to be read, and the random state stays.
    with init_empty_weights(include_buffers=False):
        model = _empty_model(stage)
    if hasattr(model, "tie_weights"):  # models of diffusers share none
        model.tie_weights()
    place_quantized(model, stage.model.get("quantized", {}))
    if stage.model["peft"]:
        model = _with_empty_adapter(model, stage)
    tensors = _all_weights(stage)
    _fill(model, tensors, stage, dtype)
    _fill_buffers(model, tensors, stage, dtype)
    return model.eval()


def _empty_model(stage: "StageRecord") -> torch.nn.Module:
    name = stage.model["class"]
    if (settings := stage.model.get("diffusers")) is not None:
        return _of_diffusers(name, settings)
    cls = getattr(transformers, name, None)
    if not stage.model["has_config"] or not isinstance(cls, type):
        raise UnsupportedError(
            f"Stage '{stage.name}' trained a {stage.model['module']}.{name}, which transformers cannot build. Build "
            "it yourself, put in its weights with stage.load_weights(model, 'final'), and pass it as `model=`."
        )
    folder = stage.path / "model"
    model = cls(cls.config_class.from_pretrained(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _of_diffusers(name: str, settings: Mapping[str, Any]) -> torch.nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"{name} is a model of diffusers: `pip install hf_source[diffusion]`.") from error
    if not hasattr(diffusers, name):
        raise UnsupportedError(f"The installed diffusers has no {name}: install the version that the record names.")
    return getattr(diffusers, name).from_config(dict(settings))


def _with_empty_adapter(model: torch.nn.Module, stage: "StageRecord") -> torch.nn.Module:
    from peft import PeftConfig, get_peft_model

    config = copy.deepcopy(PeftConfig.from_pretrained(str(stage.path / "model")))
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others (PiSSA, OLoRA) would decompose base weights that are not there yet
    with init_empty_weights(include_buffers=False):
        return get_peft_model(model, config, adapter_name=stage.model["adapter_name"], autocast_adapter_dtype=False)


def _all_weights(stage: "StageRecord") -> dict[str, torch.Tensor]:
    """Final trained weights, frozen weights and saved buffers, under this stage's names."""
    tensors = stage.weights("final")
    where = stage.data["frozen"]
    if where == "omitted":
        raise RecordError(
            f"Stage '{stage.name}' was recorded with record_frozen_weights=False, so the model cannot be rebuilt from "
            f"the record alone{_base(stage)}. Pass `model=` (the trained model), or record with "
            "record_frozen_weights=True."
        )
    if where == "stored":
        tensors |= stage.tensors("frozen.safetensors")
    if where == "parent":
        with stage.record.stage(stage.parent).end_weights() as known:
            tensors |= {name: known[stage.canonical_name(name)] for name in stage.frozen}
    return tensors


def _base(stage: "StageRecord") -> str:
    """Where the weights that are missing came from."""
    base = stage.model.get("base")
    return f" (its base was loaded from {base!r})" if base else ""


def _fill(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], stage: "StageRecord", dtype: torch.dtype | None
) -> None:
    """Put the weights into the empty model; parameters that are shared stay shared."""
    places = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places[parameter].append((module, attribute))
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in tensors]
    if missing:
        raise RecordError(
            f"The {stage.model['class']} that transformers {transformers.__version__} builds has {len(missing)} "
            f"parameters that stage '{stage.name}' has not recorded, such as {missing[0]}. Install the transformers "
            f"of the run ({stage.record.data['library_versions'].get('transformers')}), or pass `model=`."
        )
    trained = set(stage.trainable)
    done = fill_quantized(model, tensors)
    for name, parameter in parameters.items():
        if name in done:
            continue
        wanted = dtype or getattr(torch, stage.tensor_info[name]["dtype"])
        filled = torch.nn.Parameter(tensors[name].to(wanted), requires_grad=name in trained)
        for module, attribute in places[parameter]:
            module._parameters[attribute] = filled


def _fill_buffers(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], stage: "StageRecord", dtype: torch.dtype | None
) -> None:
    recorded = stage.data["buffers"]
    for name, buffer in list(model.named_buffers()):
        wanted = getattr(torch, recorded[name]) if name in recorded else buffer.dtype
        if dtype is torch.float64 and buffer.is_floating_point():
            wanted = dtype  # Narrower types keep the training's: rotary frequencies, say, are float32 by design.
        owner, _, attribute = name.rpartition(".")
        value = tensors.get(name, buffer)
        model.get_submodule(owner)._buffers[attribute] = value.to(wanted)
