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
"""Finished retrainings on disk: each is one small file, named by what it was, so that nothing is trained twice.

The name is a digest of everything that the losses depend on (the record's content or the recipe, the rows kept, the
seed, the queries' tokens). A file appears whole or not at all; several processes may write at once, and what one of
them finished before it was killed stays.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .identity import digest


VERSION = 1
"""Raised when the same settings begin to mean another training."""

Compute = Callable[[np.ndarray, int | None], Iterable[tuple[list[int], np.ndarray]]]


class RetrainingCache:
    """Losses of queries after retraining, by content.

    Args:
        folder: where the files are; made when the first one is written.

    Attributes:
        hits, misses: retrainings that were found, and that were made, since the cache was opened.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.hits = 0
        self.misses = 0

    @classmethod
    def of(cls, given: "RetrainingCache | str | Path | None", record_path: Path) -> "RetrainingCache":
        """A cache as given; by default `evaluations/retrainings` in the record's folder."""
        if isinstance(given, cls):
            return given
        return cls(record_path / "evaluations" / "retrainings" if given is None else given)

    def key(self, settings: Mapping[str, Any], keep: np.ndarray, seed: int | None) -> str:
        """Name of one retraining: `keep` is bool `[rows]`."""
        packed = np.packbits(np.asarray(keep, dtype=bool)).tobytes().hex()
        return digest([VERSION, settings, len(keep), packed, seed])

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> np.ndarray | None:
        """Losses `[queries]` of a finished retraining, or `None`; a file that cannot be read counts as none."""
        try:
            return load_file(self._file(key))["losses"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def put(self, key: str, losses: np.ndarray) -> None:
        """Store a finished retraining."""
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{key}.{uuid.uuid4().hex}.tmp")  # as many writers as there are, on any machine
        try:
            save_file({"losses": np.ascontiguousarray(losses, dtype=np.float64)}, temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def missing(self, settings: Mapping[str, Any], keep: np.ndarray, seed: int | None) -> np.ndarray:
        """Positions of the masks whose losses are not there, int64."""
        there = [self.get(self.key(settings, mask, seed)) is not None for mask in keep]
        return np.flatnonzero(~np.asarray(there, dtype=bool))

    def fill(
        self, settings: Mapping[str, Any], keep: np.ndarray, seed: int | None, num_queries: int, compute: Compute
    ) -> np.ndarray:
        """Losses of every mask: those that are there are read, the others computed and stored as they come.

        Args:
            settings: everything else that the losses depend on, JSON-able.
            keep: bool `[copies, rows]`; equal masks are trained once.
            seed: of the order.
            num_queries: of the result.
            compute: called with the masks that are missing and the seed; yields positions among them, and their
                losses `[positions, queries]`, in any order.

        Returns:
            float64 `[copies, queries]`.
        """
        keys = [self.key(settings, mask, seed) for mask in keep]
        losses = np.full((len(keep), num_queries), np.nan)
        missing: dict[str, list[int]] = {}
        for copy, key in enumerate(keys):
            found = None if key in missing else self.get(key)
            if found is None:
                missing.setdefault(key, []).append(copy)
            else:
                losses[copy] = found
                self.hits += 1
        if missing:
            names = list(missing)
            for name, values in self._computed(names, compute(keep[[copies[0] for copies in missing.values()]], seed)):
                losses[missing[name]] = values
        return losses

    def _computed(
        self, names: list[str], results: Iterable[tuple[list[int], np.ndarray]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        for positions, values in results:
            for position, value in zip(positions, values, strict=True):
                self.put(names[position], value)
                self.misses += 1
                yield names[position], value
