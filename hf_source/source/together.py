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
each. So a process makes those of its own parameters; `K` and `S P q` are summed over the processes. Vectors either go
from the process that made them to the others, so that each scores its share of the rows; or they stay where they are,
where they are too many for one (`shards`): then each scores rows along its own parameters, and the parts add up.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast, gather, reduce

from ..errors import ConfigError


@dataclass(frozen=True)
class Together:
    """The processes, as one of them sees them; alone by default.

    Attributes:
        index: of this process.
        count: of all of them.
        shards: processes that hold the vectors of all parameters between them; such groups share the rows.
        settle: called before the processes do anything together but going through a model.
    """

    index: int = 0
    count: int = 1
    shards: int = 1
    settle: Callable[[], None] = lambda: None

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def rows(self) -> tuple[int, int]:
        """This process's share of the rows: its number, and that of all shares."""
        return self.index // self.shards, self.count // self.shards

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes that have different parameters; every one gets it."""
        self.settle()
        summed = reduce(tensor, "sum")
        return summed if self.shards == 1 else summed / self.rows[1]  # as many have the same ones

    def union(self, numbers: Iterable[float], device: torch.device) -> list[float]:
        """The different numbers that the processes have, ascending."""
        own = torch.tensor(sorted(numbers), dtype=torch.float64, device=device)
        self.settle()
        sizes = gather(torch.tensor([len(own)], device=device))
        padded = own.new_full((int(sizes.max()),), torch.nan)
        padded[: len(own)] = own
        everyone = gather(padded)
        return everyone[~everyone.isnan()].unique().tolist()

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the processes have; every one waits for all."""
        if self.alone:
            return number
        self.settle()
        return int(gather(torch.tensor([number], device=device)).min())

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Which process, or shard, works on each parameter: the largest first, to the one that has least to do."""
        work, found = [0] * (self.count if self.shards == 1 else self.shards), {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            found[name] = work.index(min(work))
            work[found[name]] += sizes[name]
        return found

    def shard(self, sizes: Mapping[str, int], names: Mapping[str, str]) -> dict[str, str]:
        """The names of this process's parameters, where vectors are sharded.

        Args:
            sizes: of the parameters of all stages, by canonical name, so that they stay where they are.
            names: of a stage, own name -> canonical name.

        Raises:
            ConfigError: if some shard would have none of the names.
        """
        owners = self.owners(sizes)
        if len({owners[canonical] for canonical in names.values()}) < self.shards:
            raise ConfigError(
                f"vector_shards={self.shards}: some process would have no parameter of the {len(names)} that are "
                "attributed. Use fewer shards."
            )
        return {name: canonical for name, canonical in names.items() if owners[canonical] == self.index % self.shards}

    def given(self, tensor: torch.Tensor | None, owner: int, like: "Kind", device: torch.device) -> torch.Tensor:
        """The owner's tensor, on every process.

        Args:
            tensor: the owner's; of no matter on the others.
            owner: index of the process that has it.
            like: its shape and type.
            device: where it goes on the others.
        """
        self.settle()
        if self.index != owner:
            tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
        return broadcast(tensor.to(like.dtype).contiguous(), from_process=owner)


@dataclass(frozen=True)
class Kind:
    """What has to be known of a tensor to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
