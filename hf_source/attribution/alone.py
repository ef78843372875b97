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
"""What a row says of itself, without a query: its influence on its own loss, and that loss."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..budget import Parts
from ..recording import StageRecord
from ..source import self_influence


if TYPE_CHECKING:
    from .attributor import SourceAttributor
    from .rows import StageRows


def own_influence(attributor: "SourceAttributor", stage: StageRecord, rows: "StageRows") -> np.ndarray:
    """Influence of each row of a stage on its own loss, float64 `[rows]` by row number, nats."""
    with attributor.entered(stage, stage.trainable) as gradients:
        found = self_influence(stage, rows, gradients, attributor.walk_settings())
    return attributor.total(torch.as_tensor(found, device=attributor.device)).cpu().numpy()


def final_losses(attributor: "SourceAttributor", stage: StageRecord, rows: "StageRows") -> np.ndarray:
    """Loss of each row at the stage's final weights, float64 `[rows]` by row number, nats."""
    found, parts = np.zeros(stage.num_rows), Parts()
    with attributor.entered(stage) as gradients:
        losses_of = lambda some: gradients.run(rows.collated(some, attributor.device)).losses  # noqa: E731
        for batch in attributor.progress(rows.batches(rows.trained), f"losses of {stage.name}"):
            for pieces, losses in parts(losses_of, batch):
                np.add.at(found, rows.row[pieces], losses.double().cpu().numpy())
    return found
