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
"""Processes that walk together: each works on some parameters, and gives the others what became of them.

Blocks of the curvature, and the columns of the sample that they and `K = S P S^T` are made of, belong to one parameter
each. So a process makes those of its own parameters; `K` and `S P q` are summed over the processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast, gather, reduce


@dataclass(frozen=True)
class Together:
    """The processes, as one of them sees them; alone by default.

    Attributes:
        index: of this process.
        count: of all of them.
    """

    index: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes; every one gets it."""
        return tensor if self.alone else reduce(tensor, "sum")

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the processes have; every one waits for all."""
        return number if self.alone else int(gather(torch.tensor([number], device=device)).min())

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Which process works on each parameter: the largest first, to the one that has least to do."""
        work, found = [0] * self.count, {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            found[name] = work.index(min(work))
            work[found[name]] += sizes[name]
        return found

    def given(self, tensor: torch.Tensor | None, owner: int, like: "Kind", device: torch.device) -> torch.Tensor:
        """The owner's tensor, on every process.

        Args:
            tensor: the owner's; of no matter on the others.
            owner: index of the process that has it.
            like: its shape and type.
            device: where it goes on the others.
        """
        if self.alone:
            return tensor
        if self.index != owner:
            tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
        return broadcast(tensor.to(like.dtype).contiguous(), from_process=owner)


@dataclass(frozen=True)
class Kind:
    """What has to be known of a tensor to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
