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
"""Finished work on disk, so that an attribution that was killed goes on where it was.

Everything is written beside its name and then renamed, so that a file is whole or missing. What a folder holds belongs
to one attribution: its name is a digest of everything that the numbers depend on (`SourceAttributor` makes it), so
nothing is ever taken for another's.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..budget import Parts
from ..errors import DataError


class Work:
    """Scores and vectors that are done.

    Args:
        folder: where to keep them; `None` keeps nothing.
        flush_seconds: scores are written this often, and all that were not are computed again after a kill.
    """

    def __init__(self, folder: Path | None = None, flush_seconds: float = 30.0) -> None:
        self.folder = folder
        self.flush_seconds = flush_seconds
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def scored(
        self,
        key: str,
        batches: Sequence[np.ndarray],
        compute: Callable[[np.ndarray], np.ndarray],
        progress: Callable[[Sequence, str], Any] = lambda items, title: items,
        title: str = "",
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Scores of one batch of pieces after another, in order; those on disk are not computed.

        Args:
            key: what the scores are of.
            batches: piece numbers.
            compute: gives the scores `[queries, pieces]` of a batch, float32; of parts of it where memory runs out.
            progress, title: wraps the batches that are left.

        Yields:
            Piece numbers, and their scores; of what was on disk several batches at once.
        """
        done = 0
        while (found := self.load(f"{key}.scores-{done}")) is not None:
            yield found["pieces"].numpy(), found["scores"].numpy()
            done += int(found["batches"])
        held, start, parts = [], time.monotonic(), Parts()
        for index in progress(range(done, len(batches)), title):
            scores = np.concatenate([found for _, found in parts(compute, batches[index])], axis=1)
            held.append((batches[index], scores))
            if time.monotonic() - start >= self.flush_seconds or index == len(batches) - 1:
                self._save_scores(f"{key}.scores-{done}", held)
                done, held, start = index + 1, [], time.monotonic()
            yield batches[index], scores

    def _save_scores(self, name: str, held: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        if self.folder is None:
            return
        tensors = {
            "pieces": torch.from_numpy(np.concatenate([pieces for pieces, _ in held])),
            "scores": torch.from_numpy(np.concatenate([scores for _, scores in held], axis=1)),
            "batches": torch.tensor(len(held)),
        }
        self.save(name, tensors)

    def has(self, name: str) -> bool:
        """Whether something is there."""
        return self.folder is not None and self._file(name).exists()

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors, whole or not at all."""
        if self.folder is None:
            return
        target = self._file(name)
        part = target.with_suffix(f".{os.getpid()}.part")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor] | None:
        """What was written; `None` if it was not.

        Raises:
            DataError: if the file is damaged.
        """
        if not self.has(name):
            return None
        try:
            # Copies, for memory that is aligned otherwise may make products round in another way.
            # By way of the CPU: safetensors does not know the names that several processes give to theirs.
            return {key: tensor.to(device, copy=True) for key, tensor in load_file(self._file(name)).items()}
        except Exception as error:
            raise DataError(
                f"{self._file(name)} is damaged ({error}): delete {self.folder} and start again."
            ) from error

    def drop(self, *names: str) -> None:
        """Delete what is no longer needed."""
        if self.folder is not None:
            for name in names:
                self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
