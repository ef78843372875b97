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
"""What methods with projected gradients share: features of rows and queries, `[rows, size]`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...gradients import RowGradients
from ...gradients.projection import Projector, random_side
from ...recording import StageRecord
from ...source import Work
from ..asking import ask
from ..queries import Queries


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


@dataclass(frozen=True)
class ProjectedOptions(ABC):
    """Settings of a method that projects gradients; tells `plan()` what they cost."""

    def num_passes(self, stage: StageRecord) -> int:
        """Passes over the stage's rows."""
        return 1

    @abstractmethod
    def projector(
        self, attributor: "SourceAttributor", stage: StageRecord, gradients: RowGradients, seed: int | None = None
    ) -> Projector:
        """What projects the gradients of a stage's rows; drawn from the attributor's seed unless another is given."""


def row_features(
    attributor: "SourceAttributor",
    rows: "StageRows",
    gradients: RowGradients,
    projector: Projector,
    work: Work,
    place: int | None = None,
) -> torch.Tensor:
    """Features of the rows that trained, `[trained rows, size]`, in the order of `rows.trained_rows`.

    Every process projects its share of the rows, and gets them all. A row in several pieces has the sum of theirs.

    Args:
        attributor, rows, gradients, projector: what is projected, and how.
        work: keeps what is done.
        place: number of the segment whose weights the model has, if it is not the end.
    """

    def project(pieces: np.ndarray) -> np.ndarray:
        done = gradients.run(rows.collated(pieces, attributor.device))
        return projector.project(gradients, done).to(result).cpu().numpy().T

    position = np.zeros(rows.stage.num_rows, dtype=np.int64)
    position[rows.trained_rows] = np.arange(len(rows.trained_rows))
    result = torch.zeros(len(rows.trained_rows), projector.size, dtype=_kept(attributor), device=attributor.device)
    batches = attributor.share(rows.batches(rows.trained))
    key, title = f"{rows.stage.index}-{'end' if place is None else place}", f"projecting rows of {rows.stage.name}"
    for pieces, found in work.scored(key, batches, project, attributor.progress, title):
        index = torch.as_tensor(position[rows.row[pieces]], device=attributor.device)
        result.index_add_(0, index, torch.from_numpy(found.T).to(result))
    return attributor.total(result)


def query_features(
    attributor: "SourceAttributor", queries: Queries, gradients: RowGradients, projector: Projector, measure=None
) -> torch.Tensor:
    """Features of the queries, `[queries, size]`.

    Args:
        attributor, queries, gradients, projector: as for rows.
        measure: makes another task of the queries' own.
    """
    result = torch.zeros(len(queries), projector.size, dtype=_kept(attributor), device=attributor.device)

    def fill(engine: RowGradients, chosen: np.ndarray, batch: dict[str, torch.Tensor]) -> None:
        engine = engine if measure is None else engine.with_task(measure(engine.task))
        found = projector.project(engine, engine.run(batch))
        result[torch.as_tensor(chosen.copy(), device=attributor.device)] = found.to(result)

    ask(attributor, gradients, queries, fill)
    return result


def share_of_scores(attributor: "SourceAttributor", rows: "StageRows", scores: torch.Tensor) -> np.ndarray:
    """Scores of the trained rows `[queries, trained rows]` by row number, of this process's share; 0 elsewhere."""
    mine = attributor.share(np.arange(len(rows.trained_rows)))
    result = np.zeros((len(scores), rows.stage.num_rows), dtype=np.float32)
    result[:, rows.trained_rows[mine]] = scores.float().cpu().numpy()[:, mine]
    return result


def random_sides(
    gradients: RowGradients, name: str, left: int, right: int, seed: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Normal random matrices for both sides of a parameter, of at most `left` and `right` dimensions."""
    parameter = gradients.parameters[name]
    rows = parameter.shape[0] if parameter.dim() else 1
    columns = parameter.numel() // rows
    return (
        random_side(left, rows, "normal", seed, f"{name}/left", parameter),
        random_side(right, columns, "normal", seed, f"{name}/right", parameter),
    )


def _kept(attributor: "SourceAttributor") -> torch.dtype:
    """Features are float32, whatever gradients are computed in, unless that is float64."""
    return torch.float64 if attributor.dtype == torch.float64 else torch.float32
