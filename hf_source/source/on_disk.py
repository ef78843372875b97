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
"""Vectors that wait on disk: those carried on to the segment before, while this one's rows are scored."""

import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np
import torch


class VectorsOnDisk(MutableMapping):
    """Name -> tensor, each in a file of its own; the files go with the object.

    A tensor that was taken out is a copy: what is done to it has to be put back.

    Args:
        folder: where to make a folder for them.
        device: that tensors are given on.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="carried-", dir=folder)
        self._device = device
        self._kinds: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self._files = 0

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._kinds:
            number = self._kinds[name][0]
        else:
            number, self._files = self._files, self._files + 1
        self._kinds[name] = number, tensor.dtype, tensor.shape
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(self._file(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        _, dtype, shape = self._kinds[name]
        held = torch.from_numpy(np.fromfile(self._file(name), dtype=np.uint8))
        return held.view(dtype).view(shape).to(self._device)

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()
        del self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._kinds))

    def __len__(self) -> int:
        return len(self._kinds)

    def _file(self, name: str) -> Path:
        return Path(self._folder.name) / str(self._kinds[name][0])
