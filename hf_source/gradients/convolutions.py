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
"""Per-row gradients of convolutions, transposed ones, and norms whose features are channels.

A convolution is a Linear layer over patches of its input: with every patch as a vector, what goes into the weight and
the gradients that come back are those of a Linear with one token for each place of the output. `call.input` is
`[rows, in, *places]`, `call.grad` `[rows, out, *places]`, in one, two or three dimensions.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .rules import Call, Rule


def conv_weight(call: Call, rows: int) -> torch.Tensor:
    """`[rows, out, in / groups, *kernel]`, for any stride, padding, dilation and number of groups."""
    inputs, grads = conv_sides(call, rows)
    return torch.einsum("rgpo,rgpk->rgok", grads, inputs).reshape(rows, *call.module.weight.shape)


def conv_sides(call: Call, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution as a Linear: inputs `[rows, groups, places, in / groups x kernel]`, gradients `[..., out]`."""
    module = call.module
    padded = _padded(call.input, module)
    inputs = _patches(padded, module.kernel_size, module.stride, module.dilation, call.grad.shape[2:])
    return _grouped(inputs, rows, module.groups), _grouped(call.grad.flatten(2)[:, :, None], rows, module.groups)


def conv_transpose_weight(call: Call, rows: int) -> torch.Tensor:
    """`[rows, in, out / groups, *kernel]`.

    A transposed convolution is the adjoint of a convolution with the same weight, so that its weight's gradient is
    that of the convolution which turns the gradient of its output into that of its input.
    """
    module = call.module
    grads = F.pad(call.grad, [side for pad in reversed(module.padding) for side in (pad, pad)])
    patches = _patches(grads, module.kernel_size, module.stride, module.dilation, call.input.shape[2:])
    patches = _grouped(patches, rows, module.groups)
    inputs = _grouped(call.input.flatten(2)[:, :, None], rows, module.groups)
    return torch.einsum("rgpi,rgpk->rgik", inputs, patches).reshape(rows, *module.weight.shape)


def channel_bias(call: Call, rows: int) -> torch.Tensor:
    """Bias of a channel: `[rows, out]`."""
    return _over_places(call.grad, rows)


def channel_norm_weight(call: Call, rows: int) -> torch.Tensor:
    """Scale of a channel, `[rows, channels]`; like `norm_weight`, from the norm at scale 1 and 0."""
    shape = call.module.weight
    with torch.no_grad():
        at_one, at_zero = (
            torch.func.functional_call(call.module, {"weight": scale}, (call.input,))
            for scale in (torch.ones_like(shape), torch.zeros_like(shape))
        )
    return _over_places(call.grad * (at_one - at_zero), rows)


def channel_rules(module: nn.Module) -> dict[str, Rule]:
    """The rules of convolutions and channel norms; empty for any other module."""
    forward = type(module).forward
    if any(forward is kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {"weight": conv_weight, "bias": channel_bias}
    if any(forward is kind.forward for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return {"weight": conv_transpose_weight, "bias": channel_bias}
    # Batch normalisation with its running statistics is a fixed scale and shift; with the batch's it is refused.
    norms = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    if any(forward is kind.forward for kind in norms):
        return {"weight": channel_norm_weight, "bias": channel_bias}
    return {}


def mixes_rows(module: nn.Module) -> bool:
    """Whether a module, in evaluation mode, normalises by the statistics of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def _padded(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The input with its borders, `"same"` and every padding mode included."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(tensor, module._reversed_padding_repeated_twice, mode=mode)


def _patches(tensor: torch.Tensor, kernel, stride, dilation, places: torch.Size) -> torch.Tensor:
    """`[rows, channels, kernel elements, places]` of a padded tensor: a view until it is reshaped."""
    dims = len(kernel)
    for dim in range(dims):
        reach = dilation[dim] * (kernel[dim] - 1) + 1
        tensor = tensor.unfold(2 + dim, reach, stride[dim])[..., :: dilation[dim]]
    # Rows at the end that no whole patch of the output needs (output padding of transposed convolutions) are left out.
    tensor = tensor[(slice(None), slice(None), *(slice(0, size) for size in places))]
    order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return tensor.permute(order).flatten(2 + dims).flatten(2, 1 + dims)


def _grouped(tensor: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """`[sequences, channels, kernel, places]` as `[rows, groups, places of a row, channels / groups x kernel]`."""
    sequences, channels, kernel, places = tensor.shape
    tensor = tensor.reshape(rows, sequences // rows, groups, channels // groups * kernel, places)
    return tensor.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _over_places(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum over everything but rows and channels."""
    return tensor.reshape(rows, -1, tensor.shape[1], tensor[0, 0].numel()).sum(dim=(1, 3))
