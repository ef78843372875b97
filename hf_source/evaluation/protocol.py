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
"""What an evaluation needs of training: the losses of the queries had some rows been left out."""

from typing import Protocol

import numpy as np

from ..errors import DataError
from ..recording import StageRecord


class Retraining(Protocol):
    """Trains one stage (and what comes after it) again without some of its rows.

    Attributes:
        stage: the stage whose rows are left out.
        num_rows: its rows.
        num_queries: texts (or rows) whose loss is measured afterwards.
    """

    stage: StageRecord
    num_rows: int
    num_queries: int

    def losses(self, keep: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Losses of the queries after training on the rows that each mask keeps.

        Args:
            keep: bool `[copies, rows]` by row number.
            seed: `None` for the run's own order; a number for another order (and other weights of a model from
                scratch, where the class says so).

        Returns:
            float64 `[copies, queries]`, nats.
        """

    def settings(self) -> dict:
        """What the losses depend on, JSON-able, for reports."""


def checked_keep(keep: np.ndarray, num_rows: int) -> np.ndarray:
    """The masks, if they are bool `[copies, rows]`.

    Raises:
        DataError: otherwise, or if a mask keeps nothing.
    """
    keep = np.asarray(keep)
    if keep.dtype != np.bool_ or keep.ndim != 2 or keep.shape[1] != num_rows:
        raise DataError(
            f"keep must be a bool array [copies, {num_rows}], True for the rows to train on; it is {keep.dtype} of "
            f"shape {keep.shape}."
        )
    if len(keep) and not keep.any(axis=1).all():
        raise DataError("A mask keeps no row at all: there is nothing to train on.")
    return keep
