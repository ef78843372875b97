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
"""Weights that FSDP2 shards over processes: each sums its own shard; tensors are whole only while they are written."""

from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each process holds a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, without a copy. FSDP may move it before the first step: ask each time."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def as_sharded(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor with one part per process, cut as the parameter is; what is not a part of it comes back as it is."""
    if not isinstance(parameter, DTensor) or part.shape != local(parameter).shape:
        return part
    part = part.to(parameter.device_mesh.device_type)  # communication may know no other device
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole_tensors(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors in CPU memory of those that are sharded, put together one at a time; the others as they are.

    Every process has to call it, with the same names in the same order.

    Args:
        tensors: by name.
        keep: whether this process wants them; if not, it only gives its parts.

    Returns:
        The tensors, or nothing if they are not wanted.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.detach().full_tensor()
            tensor = tensor.cpu() if keep else None
        if keep:
            found[name] = tensor
    return found


def part_of(whole: torch.Tensor | None, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that one process, the first, has whole. Every process has to call it.

    Args:
        whole: the tensor; `None` on other processes than the first.
        dtype: its type.
        like: a sharded tensor that is cut the same way.
    """
    device = like.device_mesh.device_type
    whole = torch.empty(like.shape, dtype=dtype) if whole is None else whole
    return distribute_tensor(whole.to(device), like.device_mesh, like.placements).to_local()


def class_of(model: torch.nn.Module) -> type:
    """The model's class; FSDP2 derives one of its own from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
