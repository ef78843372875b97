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
"""Weights at the end of a stage, wherever they are stored."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..writer import stage_folder


if TYPE_CHECKING:
    from .stage import StageRecord


class EndWeights(Mapping[str, torch.Tensor]):
    """Weights at the end of a stage by canonical name; tensors are read on access.

    Frozen weights that a stage shares with its parent are found there.
    """

    def __init__(self, stage: "StageRecord", stack: contextlib.ExitStack) -> None:
        self._found: dict[str, tuple[Any, str]] = {}
        names = ["final.safetensors"]
        names += ["frozen.safetensors"] if stage.data["frozen"] == "stored" else []
        for name in names:
            key = f"{stage_folder(stage.index, stage.name)}/{name}"
            if key not in stage.data["files"]:
                stage.require_complete()
            stage.record.check_size(stage.data["files"], key)
            file = stack.enter_context(safe_open(stage.record.path / key, framework="pt"))
            for own in file.keys():
                self._found.setdefault(stage.canonical_name(own), (file, own))
        self._parent = None
        if stage.data["frozen"] == "parent":
            self._parent = EndWeights(stage.record.stage(stage.parent), stack)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._found:
            file, key = self._found[name]
            return file.get_tensor(key)
        if self._parent is None:
            raise KeyError(name)
        return self._parent[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found or (self._parent is not None and name in self._parent)

    def __iter__(self) -> Iterator[str]:
        yield from self._found
        if self._parent is not None:
            yield from (name for name in self._parent if name not in self._found)

    def __len__(self) -> int:
        return sum(1 for _ in self)
