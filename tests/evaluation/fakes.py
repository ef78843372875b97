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
"""A training whose answer is known: losses are linear in the rows that are missing."""

from types import SimpleNamespace

import numpy as np


class LinearRetraining:
    """`loss = base + sum of the missing rows' effects + noise of the seed`.

    Args:
        effects: `[queries, rows]`, what a query's loss rises by without a row.
        noise: standard deviation of a seed's own effect on every retraining.
    """

    def __init__(self, effects: np.ndarray, noise: float = 0.0) -> None:
        self.effects = np.asarray(effects, dtype=np.float64)
        self.num_queries, self.num_rows = self.effects.shape
        self.stage = SimpleNamespace(name="fake")
        self.noise = noise
        self.trained: list[np.ndarray] = []

    def losses(self, keep: np.ndarray, seed: int | None = None) -> np.ndarray:
        self.trained.append(keep)
        losses = 3.0 + (~keep) @ self.effects.T
        generator = np.random.default_rng(seed)
        base = generator.normal(size=self.num_queries) if seed is not None else 0.0  # another model altogether
        return losses + base + self.noise * generator.normal(size=losses.shape)
