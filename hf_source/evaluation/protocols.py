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
"""The protocols of the linear datamodelling score: what is left out, how often, and how often it is trained again."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError
from .lds import removal_masks
from .protocol import Retraining


@dataclass(frozen=True)
class LDSProtocol:
    """Random subsets that are left out.

    Attributes:
        name: of the protocol.
        fraction: of the rows that is left out, between 0 and 1.
        num_subsets: random subsets.
        num_seeds: retrainings of each, whose losses are averaged; 0 for one in the run's own order.
        seed: of the subsets.
    """

    name: str
    fraction: float
    num_subsets: int
    num_seeds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"fraction={self.fraction}: the share of rows left out lies between 0 and 1.")
        if self.num_subsets < 3:
            raise ConfigError(f"num_subsets={self.num_subsets}: a rank correlation needs at least 3 (64 is usual).")
        if self.num_seeds < 0:
            raise ConfigError(f"num_seeds={self.num_seeds}: give 0 for the run's own order, or how many others.")

    @property
    def seeds(self) -> list[int | None]:
        """What `Retraining.losses` is given."""
        return list(range(self.seed + 1, self.seed + 1 + self.num_seeds)) if self.num_seeds else [None]

    def removed(self, num_rows: int) -> np.ndarray:
        """The subsets: bool `[subsets, rows]`."""
        return removal_masks(num_rows, self.num_subsets, self.fraction, self.seed)

    def losses(self, retraining: Retraining) -> np.ndarray:
        """Losses after training without each subset: float64 `[seeds, subsets, queries]`."""
        keep = ~self.removed(retraining.num_rows)
        return np.stack([retraining.losses(keep, seed) for seed in self.seeds])

    def settings(self) -> dict[str, Any]:
        """For reports."""
        return {
            "protocol": self.name,
            "fraction": self.fraction,
            "num_subsets": self.num_subsets,
            "seeds": self.seeds,
            "subsets_seed": self.seed,
        }

    def __str__(self) -> str:
        again = f", {self.num_seeds} seeds each" if self.num_seeds else ""
        return f"{self.num_subsets} x {self.fraction:.3g} of the rows left out{again}"


PROTOCOLS = {
    # What a score predicts: everything as it was, but for a few rows.
    "removal": LDSProtocol("removal", fraction=0.02, num_subsets=64),
    # Bae et al. 2024 (arXiv 2405.12186), section 5.1: 100 random halves, the losses averaged over retrainings.
    "halves": LDSProtocol("halves", fraction=0.5, num_subsets=100, num_seeds=5),
}


def make_protocol(name: str, **changes: Any) -> LDSProtocol:
    """A protocol by name, with settings that replace its own; `None` replaces nothing.

    Raises:
        ConfigError: if the name is unknown or a setting impossible.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol={name!r} is unknown; choose one of {', '.join(PROTOCOLS)}.")
    return replace(PROTOCOLS[name], **{key: value for key, value in changes.items() if value is not None})
