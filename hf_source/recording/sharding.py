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
"""Weights that FSDP2 or DeepSpeed shards over processes: each sums its shard; tensors are whole only when written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class Fragment:
    """This process's part of a parameter, or of what is summed up for it, that DeepSpeed cuts by entries.

    Stands for the parameter wherever its `grad`, `requires_grad`, type and device are asked for.

    Args:
        parameter: the model's parameter.
        whole_shape: its shape.
        start: first entry of the part, in the order of the parameter's memory.
        find: gives the part, `[entries]`, without a copy. DeepSpeed may move it: it is asked each time.

    Attributes:
        reached: whether the running step has a gradient for the parameter.
    """

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        whole_shape: torch.Size,
        start: int,
        find: Callable[[], torch.Tensor],
    ) -> None:
        self.parameter, self.whole_shape, self.start = parameter, whole_shape, start
        self._find = find
        self._kept: torch.Tensor | None = None
        self.reached = False

    @property
    def values(self) -> torch.Tensor:
        """The part, `[entries]`."""
        return self._find().detach() if self._kept is None else self._kept

    @property
    def shape(self) -> torch.Size:
        """The whole parameter's."""
        return self.whole_shape

    @property
    def dtype(self) -> torch.dtype:
        """The part's."""
        return self.values.dtype

    @property
    def requires_grad(self) -> bool:
        """The parameter's."""
        return self.parameter.requires_grad

    @property
    def grad(self) -> bool | None:
        """DeepSpeed takes gradients away: only whether there is one."""
        return True if self.reached else None

    def detach(self) -> Fragment:
        """Itself: no part has a history."""
        return self

    def keep(self) -> None:
        """Let `values` stay what they are now."""
        self._kept = self.values.clone()

    def let_go(self) -> None:
        """Let `values` be the present ones again."""
        self._kept = None

    def watch(self) -> Any:
        """Note in `reached` when a gradient comes; returns the handle that ends it."""

        def note(gradient: torch.Tensor) -> None:
            self.reached = True

        return self.parameter.register_hook(note)

    def of(self, part: torch.Tensor) -> Fragment:
        """Another tensor, of which this process has the same part."""
        return Fragment(self.parameter, self.whole_shape, self.start, lambda: part)

    def whole(self) -> torch.Tensor:
        """The whole tensor on the first process, something on the others. Every process has to call it."""
        part = self.values
        found = torch.zeros(self.whole_shape.numel(), dtype=part.dtype, device=self.parameter.device)
        found[self.start : self.start + part.numel()] = part
        dist.reduce(found, dst=0)
        return found.view(self.whole_shape)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a tensor that the first process gives. Every process has to call it."""
        whole = whole.to(self.parameter.device).contiguous()
        dist.broadcast(whole, src=0)
        return whole.view(-1)[self.start : self.start + self.values.numel()]


def is_sharded(tensor: torch.Tensor | Fragment) -> bool:
    """Whether each process holds a part of the tensor."""
    return isinstance(tensor, (DTensor, Fragment))


def local(tensor: torch.Tensor | Fragment) -> torch.Tensor:
    """This process's part of a tensor, without a copy. FSDP may move it before the first step: ask each time."""
    if isinstance(tensor, Fragment):
        return tensor.values
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def as_sharded(part: torch.Tensor, parameter: torch.Tensor | Fragment) -> torch.Tensor | Fragment:
    """A tensor with one part per process, cut as the parameter is; what is not a part of it comes back as it is."""
    if not is_sharded(parameter) or part.shape != local(parameter).shape:
        return part
    if isinstance(parameter, Fragment):
        return parameter.of(part)
    part = part.to(parameter.device_mesh.device_type)  # communication may know no other device
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole_tensors(tensors: Mapping[str, torch.Tensor | Fragment], keep: bool) -> dict[str, torch.Tensor]:
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
        if is_sharded(tensor):
            tensor = tensor.whole() if isinstance(tensor, Fragment) else tensor.detach().full_tensor()
            tensor = tensor.cpu() if keep else None
        if keep:
            found[name] = tensor
    return found


def part_of(whole: torch.Tensor | None, dtype: torch.dtype, like: torch.Tensor | Fragment) -> torch.Tensor:
    """This process's part of a tensor that one process, the first, has whole. Every process has to call it.

    Args:
        whole: the tensor; `None` on other processes than the first.
        dtype: its type.
        like: a sharded tensor that is cut the same way.
    """
    whole = torch.empty(like.shape, dtype=dtype) if whole is None else whole
    if isinstance(like, Fragment):
        return like.part_of(whole)
    device = like.device_mesh.device_type
    return distribute_tensor(whole.to(device), like.device_mesh, like.placements).to_local()


def put(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a tensor that this process has whole into a parameter, or into its share of one that FSDP2 shards."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        whole = whole.to(mesh.device_type)
        whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None).to_local()
    local(parameter).copy_(whole)


def class_of(model: torch.nn.Module) -> type:
    """The model's class; FSDP2 derives one of its own from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
