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
"""What the number format of training does to a step: rounding of the clip factor, loss scaling, skipped steps.

In fp16 the loss is multiplied by a scale before backward, so that small gradients do not vanish, and gradients are
divided by it before they are clipped: norm and gradients are those of the loss itself. If one overflows, the step is
left out and the scale shrinks. The record notes the scale where it changes, `stage["loss_scales"]`, because a replay
rounds as training did only with the same scale.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError


# Where gradients overflow at this scale already, no other will help.
_SMALLEST_SCALE = 2.0**-20


def refuse_formats(trainer: Any) -> None:
    """Refuse number formats whose steps cannot be followed.

    Raises:
        UnsupportedError: for fp8, and for fp16 with FSDP.
    """
    found = str(trainer.accelerator.mixed_precision)
    if found not in ("no", "bf16", "fp16"):
        raise UnsupportedError(
            f"Mixed precision {found!r} quantises activations and gradients with a state that the record does not "
            "hold. Use bf16=True, fp16=True or float32."
        )
    if found == "fp16" and trainer.is_fsdp_enabled:
        raise UnsupportedError(
            "With FSDP each process scales and checks its own shard of an fp16 gradient, which recording does not "
            "follow. Use bf16=True, or train fp16 with plain data parallelism."
        )


def loss_scale(trainer: Any) -> float | None:
    """Scale of the running step's loss; `None` where losses are not scaled."""
    scaler = trainer.accelerator.scaler
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None


def refuse_broken_gradient(norm: float, step: int, scale: float | None) -> None:
    """A gradient that is not finite ends training, unless its step will be skipped.

    Raises:
        UnsupportedError: if the weights would be lost, or no scale is small enough.
    """
    if math.isfinite(norm) or (scale is not None and scale >= _SMALLEST_SCALE):
        return
    if scale is not None:
        raise UnsupportedError(
            f"The gradient of optimizer step {step} is not finite ({norm}) even with losses scaled by {scale:g}: no "
            "step moves the weights any more. Use bf16=True, or look for rows with broken labels."
        )
    raise UnsupportedError(
        f"The gradient of optimizer step {step} has norm {norm}: from here on the weights are not numbers. Lower the "
        "learning rate, lengthen the warmup, or look for rows with broken labels."
    )


def note_scale(scales: list[dict[str, Any]], step: int, scale: float) -> None:
    """Add a step's scale, if it is another than before it."""
    if not scales or scales[-1]["scale"] != scale:
        scales.append({"step": step, "scale": scale})


def scale_at(scales: Sequence[Mapping[str, Any]], step: int) -> float:
    """Scale of a step's loss; 1 where losses were not scaled."""
    found = 1.0
    for change in scales:
        if change["step"] > step:
            break
        found = change["scale"]
    return found


def clip_factor(norm: float | torch.Tensor, limit: float | None) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplied the gradients with.

    Args:
        norm: the gradient's norm before clipping. A tensor keeps the type in which the factor was computed: in
            bfloat16 it is rounded to 8 bits, up to 0.4 % off.
        limit: `max_grad_norm`; 0 or `None` for no clipping.
    """
    if not math.isfinite(float(norm)):
        return 0.0  # nothing moves: the step is skipped
    if not limit or limit <= 0:
        return 1.0
    factor = limit / (norm + 1e-6)
    return min(1.0, float(factor))
