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
"""What the checkpoint folders of an ordinary Trainer hold; read without pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...errors import RecordError
from ..names import named_parameters
from ..recorder import SIDECAR
from .hub import download_record


@dataclass
class Checkpoint:
    """One checkpoint folder: `step` optimizer steps were done."""

    folder: Path
    step: int
    state: dict[str, Any]

    @classmethod
    def read(cls, source: str | Path) -> "Checkpoint":
        """Find a checkpoint by folder or Hub id (`user/name@revision`)."""
        folder = Path(source).expanduser()
        if not folder.is_dir() and str(source).count("/") == 1:
            repo_id, _, revision = str(source).partition("@")
            folder = download_record(repo_id, revision or None)
        file = folder / "trainer_state.json"
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            return cls(folder, int(state["global_step"]), state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{folder} is no checkpoint of a Trainer: {file.name} cannot be read ({error}). Pass folders such as "
                "'out/checkpoint-500'."
            ) from error

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors of the model's or adapter's safetensors files."""
        files = [path for path in sorted(self.folder.glob("*.safetensors")) if path.stem != SIDECAR]
        if not files:
            raise RecordError(
                f"{self.folder} holds no model.safetensors. A sharded checkpoint must be merged first "
                "(`accelerate merge-weights`); anything else than safetensors is not read."
            )
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.folder / name).is_file()

    def torch_file(self, name: str) -> Any:
        """`optimizer.pt` or `scheduler.pt`, or `None`; never unpickles anything but tensors and plain values."""
        file = self.folder / name
        return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None

    def load_weights(self, model: torch.nn.Module, trained: Sequence[str]) -> None:
        """Put the weights into a model, in place.

        Args:
            model: of the run.
            trained: names of the parameters that must be there; others are left as they are where they are not.

        Raises:
            RecordError: if one of them is missing, or of another shape or dtype.
        """
        saved = self.weights()
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        adapters = list(getattr(model, "peft_config", {}))
        with torch.no_grad():
            for name, parameter in named_parameters(model):
                keys = [key for alias in aliases[id(parameter)] for key in _saved_names(alias, adapters)]
                tensor = next((saved[key] for key in keys if key in saved), None)
                if tensor is None and name not in trained:
                    continue
                if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                    has = "no such tensor" if tensor is None else f"one of shape {tuple(tensor.shape)}, {tensor.dtype}"
                    raise RecordError(
                        f"The model has `{name}` of shape {tuple(parameter.shape)}, {parameter.dtype}; {self.folder} "
                        f"has {has}. Pass the model that was trained, in its dtype."
                    )
                parameter.copy_(tensor)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> list[float]:
        """Give an optimizer the moments in `optimizer.pt`, whose ids follow the groups: first those that decay.

        Returns:
            Learning rates of the groups in the step to come.

        Raises:
            RecordError: if groups or shapes are not those of the optimizer.
        """
        file, saved = self.folder / "optimizer.pt", self.torch_file("optimizer.pt")
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        own = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != own:
            raise RecordError(
                f"{file} trains groups of {sizes} parameters, the model and `args` give groups of {own}. Pass "
                "`model=` with requires_grad set as in training, and the run's weight_decay."
            )
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in saved["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    raise RecordError(
                        f"`{key}` of parameter {number} in {file} has shape {tuple(value.shape)}, but "
                        f"`{names[parameter]}` in its place has {tuple(parameter.shape)}. Pass the model that was "
                        "trained, with the same parameters frozen."
                    )
        optimizer.load_state_dict(saved)
        return [float(group["lr"]) for group in saved["param_groups"]]


def _saved_names(name: str, adapters: Sequence[str]) -> list[str]:
    """Names that a parameter may have in a checkpoint: PEFT leaves out the adapter's."""
    names = [name]
    for adapter in adapters:
        names += [name.replace(f".modules_to_save.{adapter}.", "."), name.replace(f".{adapter}.", ".")]
    return names
