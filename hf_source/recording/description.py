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
"""What a stage was: the part of `record.json` that is known when training starts, and the files that go with it."""

import copy
import json
import uuid
from collections.abc import Mapping
from typing import Any

import torch

from ..data import ROW, content_fingerprint, dataset_digest
from ..errors import UnsupportedError
from ..hub import source_of
from ..logs import get_logger
from .checks import has_dropout, has_router_loss
from .config import RecordingOptions
from .losses import describe_loss
from .models import is_prompt_learning, num_virtual_tokens, plain_model
from .names import canonical_name, named_parameters, unwrapped_name
from .optimizers import OptimizerDescription
from .quantized import describe_quantized, quantization_state
from .reading.stage import StageRecord
from .rows.streams import column_names, is_stream
from .sharding import class_of
from .writer import RecordWriter


logger = get_logger(__name__)


def describe_stage(trainer: Any, options: RecordingOptions, optimizer: OptimizerDescription) -> dict[str, Any]:
    """The stage's entry of `record.json` at its start, without index, parent, files and segments."""
    model = trainer.model
    trained = {name for group in optimizer.groups for name in group.parameters}
    return {
        "name": options.stage,
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "num_steps": 0,
        "visits": "recorded",
        "loss": describe_loss(trainer),
        "optimizer": optimizer.to_dict(),
        "trainable": {n: _describe_tensor(p) for n, p in named_parameters(model) if n in trained},
        "frozen_parameters": {n: _describe_tensor(t) for n, t in frozen_tensors(model, trained).items()},
        "buffers": {unwrapped_name(n): _describe_tensor(b)["dtype"] for n, b in model.named_buffers()},
        "dataset": _describe_dataset(trainer, options),
        "collator": {"class": _class_name(getattr(trainer.data_collator, "collator", trainer.data_collator))},
        "training": describe_training(trainer),
        "model": _describe_model(model),
        "segments": [],
        "files": {},
    }


def describe_training(trainer: Any) -> dict[str, Any]:
    """Settings of the run that people look up; nothing is computed from most of them."""
    args = trainer.args
    return {
        "seed": args.seed,
        "data_seed": args.data_seed,
        "epochs": float(args.num_train_epochs),
        "max_steps": trainer.state.max_steps,
        "per_device_train_batch_size": trainer.state.train_batch_size,
        "num_processes": args.world_size,
        "sharded": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_grad_norm": float(args.max_grad_norm or 0.0),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "sampling_strategy": str(getattr(args, "train_sampling_strategy", "random")),
        "bf16": trainer.accelerator.mixed_precision == "bf16",
        "fp16": trainer.accelerator.mixed_precision == "fp16",
        "fused_optimizer": any(bool(group.get("fused")) for group in trainer.optimizer.param_groups),
        "dropout": has_dropout(trainer.model),
        "neftune_noise_alpha": args.neftune_noise_alpha,
        "router_loss": has_router_loss(trainer.model),
    }


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": list(getattr(tensor, "ds_shape", tensor.shape)),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


def _class_name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)  # a function or class, else an object of one
    return f"{named.__module__}.{named.__qualname__}"


def _describe_dataset(trainer: Any, options: RecordingOptions) -> dict[str, Any]:
    dataset = trainer.train_dataset
    stream = is_stream(dataset)
    # Of a stream, rows and fingerprint are known when it has been read, see `StreamRows`.
    return {
        "fingerprint": None if stream else content_fingerprint(dataset),
        "num_rows": trainer.num_train_rows,
        "columns": [name for name in column_names(dataset) if name != ROW],
        "kind": trainer.train_rows_kind,
        "max_length": options.max_length if trainer.train_rows_kind in ("text", "prompt_completion") else None,
        "row_numbers": "column" if trainer.rows_were_numbered else "position",
        "given": _describe_given(trainer.given_dataset),
        "source": source_of(trainer.given_dataset),
        "packing": trainer.packing,
        "num_examples": trainer.num_train_examples or trainer.num_train_rows,
        "stream": stream,
    }


def _describe_given(dataset: Any) -> dict[str, Any] | None:
    """The training set as the user has it, which the Trainer may have tokenised, filtered and shuffled since."""
    if dataset is None:
        return None
    columns = [name for name in dataset.column_names if name != ROW]
    return {"columns": columns, "digest": dataset_digest(dataset, columns)}


def _describe_model(model: torch.nn.Module) -> dict[str, Any]:
    plain = plain_model(model)
    adapters = list(getattr(model, "peft_config", {})) if plain is not model else []
    if len(adapters) > 1:
        reference = " DPOTrainer adds `ref` to a PEFT model: give it the base model and `peft_config=`."
        raise UnsupportedError(
            f"The PEFT model carries the adapters {adapters}; a record describes one. Delete the others "
            "(`model.delete_adapter(name)`), or merge them into the base model first."
            + (reference if "ref" in adapters else "")
        )
    return {
        "class": class_of(plain).__name__,
        "module": class_of(plain).__module__,
        "peft": bool(adapters),
        "adapter_name": adapters[0] if adapters else None,
        "prompt_learning": is_prompt_learning(model),
        "virtual_tokens": num_virtual_tokens(model),
        "quantized": describe_quantized(model, is_prompt_learning(model)),
        "base": str(getattr(getattr(plain, "config", None), "_name_or_path", "") or ""),
        "has_config": hasattr(plain, "config") and hasattr(plain.config, "save_pretrained"),
        "diffusers": _diffusers_config(plain),
    }


def _diffusers_config(model: torch.nn.Module) -> dict[str, Any] | None:
    """The settings from which diffusers builds one of its models."""
    if not class_of(model).__module__.startswith("diffusers."):
        return None
    settings = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return json.loads(json.dumps(settings))


def save_model_files(model: torch.nn.Module, writer: RecordWriter) -> None:
    """Write the configuration of the model, its generation and its adapter to `<stage>/model`."""
    plain, folder = plain_model(model), writer.folder / "model"
    if not writer.stage["model"]["has_config"]:
        return
    config = copy.deepcopy(plain.config)
    # Set by from_pretrained and save_pretrained only: a model built from a config does not have it yet.
    config.architectures = [class_of(plain).__name__]
    config.save_pretrained(folder)
    if getattr(plain, "generation_config", None) is not None and plain.can_generate():
        plain.generation_config.save_pretrained(folder)
    if writer.stage["model"]["peft"]:
        model.peft_config[writer.stage["model"]["adapter_name"]].save_pretrained(str(folder))
    for file in sorted(folder.iterdir()):
        writer.list_file(f"model/{file.name}")


def frozen_tensors(model: torch.nn.Module, trained: set[str]) -> dict[str, torch.Tensor]:
    """Parameters that do not train, buffers that belong to the saved state, and what quantised weights need."""
    frozen = {name: p for name, p in named_parameters(model) if name not in trained}
    saved = {unwrapped_name(name) for name in model.state_dict()}
    buffers = {unwrapped_name(name): buffer for name, buffer in model.named_buffers()}
    return frozen | {name: buffer for name, buffer in buffers.items() if name in saved} | quantization_state(model)


def save_frozen(
    frozen: Mapping[str, torch.Tensor], writer: RecordWriter, parent: StageRecord | None, store: bool
) -> str:
    """Store what does not train (see `frozen_tensors`), or say where it can be found.

    Returns:
        `"none"` (everything trains), `"parent"` (equal to the weights at the end of the stage before), `"stored"`, or
        `"omitted"` (`record_frozen_weights=False`).
    """
    if not frozen:
        return "none"
    prompt_learning = writer.stage["model"]["prompt_learning"]
    if parent is not None and not differing(frozen, parent, prompt_learning, require_all=True):
        return "parent"
    if not store:
        return "omitted"
    writer.add_tensors("frozen.safetensors", frozen)
    return "stored"


def differing(
    tensors: Mapping[str, torch.Tensor], parent: StageRecord, prompt_learning: bool, *, require_all: bool
) -> list[str]:
    """Names of tensors that are not what the parent stage ended with.

    Args:
        tensors: present tensors, under this stage's names.
        parent: the stage before.
        prompt_learning: see `canonical_name`.
        require_all: count tensors that the parent does not know as different too.
    """
    found = []
    with parent.end_weights() as known:
        for name, tensor in tensors.items():
            key = canonical_name(name, prompt_learning)
            if key not in known:
                found += [name] if require_all else []
                continue
            before = known[key]
            # The parent may have been trained in a wider or narrower type than this stage.
            if before.shape != tensor.shape or not torch.equal(before.to(tensor.dtype), tensor.detach().cpu()):
                found.append(name)
    return found


def continues(tensors: Mapping[str, torch.Tensor], parent: StageRecord, prompt_learning: bool) -> bool:
    """Whether a model of these parameters starts where the parent stage ended; warns if it does not."""
    names = {canonical_name(name, prompt_learning) for name in tensors}
    missing = [name for name in parent.trainable if parent.canonical_name(name) not in names]
    changed = differing(tensors, parent, prompt_learning, require_all=False)
    if missing or changed:
        logger.warning(
            f"This stage does not start from the weights that stage '{parent.name}' ended with "
            f"({len(changed)} tensors differ, such as {changed[:1] or missing[:1]}; {len(missing)} are gone). "
            "Influence of earlier stages cannot be traced through it. Pass the model that the earlier stage trained, "
            "or use another record_dir."
        )
    return not missing and not changed


def save_tokenizer(processing_class: Any, writer: RecordWriter) -> None:
    """Save the tokenizer at the record's root, where every stage finds it."""
    if processing_class is not None and hasattr(processing_class, "save_pretrained"):
        writer.share_folder("tokenizer", lambda folder: processing_class.save_pretrained(str(folder)))
