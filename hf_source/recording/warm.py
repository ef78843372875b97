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
"""An optimizer that brings moments from earlier training: `train()` called again, or `optimizers=` that made steps.

Its first updates depend on them, so the record stores them beside the initial weights.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .writer import RecordWriter


if TYPE_CHECKING:
    from .reading.stage import StageRecord

STATE_FILE = "optimizer.safetensors"


def save_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], writer: RecordWriter
) -> None:
    """Store what an optimizer carries, as `<stage>/optimizer.safetensors` and `stage["optimizer_start"]`.

    Raises:
        UnsupportedError: if it carries anything else than tensors and plain numbers.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    updates = 0
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{names[parameter]}"] = value
            elif value is None or isinstance(value, (bool, int, float)):
                scalars.setdefault(key, {})[names[parameter]] = value
            else:
                raise UnsupportedError(
                    f"{type(optimizer).__name__} carries `{key}`, a {type(value).__name__}, from earlier training, "
                    "which the record cannot store. Make a new trainer for a new stage."
                )
        updates = max(updates, int(state.get("step") or 0))
    writer.stage["optimizer_start"] = {"updates": updates, "scalars": scalars}
    writer.add_tensors(STATE_FILE, tensors)


def load_optimizer_state(
    stage: "StageRecord", optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Give an optimizer what the recorded one carried when the stage began; nothing if that was fresh."""
    start = stage.data.get("optimizer_start")
    if start is None:
        return
    for name, value in stage.tensors(STATE_FILE).items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters[parameter_name]
        # As torch.optim.Optimizer.load_state_dict: moments follow their weights, a step counter stays where it is.
        if value.shape == parameter.shape and value.is_floating_point() and key != "step":
            value = value.to(parameter.device, parameter.dtype)
        optimizer.state[parameter][key] = value
    for key, values in start["scalars"].items():
        for name, value in values.items():
            optimizer.state[parameters[name]][key] = value


def refuse_moments(stage: "StageRecord", what: str) -> None:
    """Raise if the stage began with moments of earlier training, for methods that start an optimizer afresh.

    Raises:
        UnsupportedError: naming what cannot be done.
    """
    if stage.data.get("optimizer_start") is not None:
        raise UnsupportedError(
            f"Stage {stage.name!r} began with moments that its optimizer brought from earlier training, which {what} "
            "does not carry. Train each stage with a trainer of its own, or use method='source' and replay."
        )
