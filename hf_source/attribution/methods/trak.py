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
"""`trak`: gradients of the log-odds, randomly projected, as features of a linear model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...budget import Parts
from ...curvature.gram import GramSpectrum, pseudo_inverse
from ...errors import ConfigError
from ...gradients import RowGradients, Task
from ...gradients.log_odds import LogOdds
from ...gradients.projection import KINDS, DenseProjection
from ...recording import StageRecord
from ..queries import Queries
from .base import Scores
from .final import stages_at_end
from .projected import ProjectedOptions, query_features, row_features, share_of_scores
from .tracin import own_model


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


@dataclass(frozen=True)
class TrakOptions(ProjectedOptions):
    """Settings of `trak`.

    Attributes:
        projection_dim: `k`, dimensions of the features. TRAK is a linear regression on them: take fewer than there are
            rows, or it explains each row by itself.
        projection: entries of the random matrix, `"rademacher"` or `"normal"`.
        output: what is linear in the features, `"log-odds"` of the right answer as in the paper, or `"loss"` (its
            negative, with `Q = 1`) for losses that are no probability's.
        checkpoints: `"final"` weights, or the average over the average weights of each of the stage's `"segments"`.
        damping: added to `Phi^T Phi`, as a share of its mean eigenvalue; the paper adds none.
    """

    projection_dim: int = 2048
    projection: str = "rademacher"
    output: str = "log-odds"
    checkpoints: str = "final"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.projection_dim < 1:
            raise ConfigError(
                f"projection_dim={self.projection_dim}: at least one dimension is needed (2048 is usual)."
            )
        choices = {"projection": KINDS, "output": ("log-odds", "loss"), "checkpoints": ("final", "segments")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        if self.damping < 0:
            raise ConfigError(f"damping={self.damping}: give 0 or a positive share of the mean eigenvalue.")

    def num_passes(self, stage: StageRecord) -> int:
        """One for the features of each checkpoint; with log-odds a forward pass for `Q`, a third of one, is on top."""
        return len(stage.segments) if self.checkpoints == "segments" else 1

    def projector(self, attributor, stage, gradients, seed=None) -> DenseProjection:
        """See `ProjectedOptions`."""
        return DenseProjection(self.projection_dim, self.projection, attributor.seed if seed is None else seed)


def trak(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """TRAK (Park et al. 2023, arXiv 2303.14186): `phi(q)^T (Phi^T Phi)^{-1} Phi^T Q`; unitless.

    `phi = P^T grad f` of the model output function `f`, the log-odds of the right answer, `Phi` the rows' features and
    `Q = diag(1 - p)` (section 3.2 of the paper). For language models `f` of a row or query is the sum over its
    label tokens, each a classification, and its entry of `Q` the mean of `1 - p` over them. All parameters that the
    stage trained are in the gradient. Where `Phi^T Phi` is singular its pseudo-inverse is taken.

    With `checkpoints="segments"` the kernel and `Q` are averaged apart, as over models in the paper, each segment with
    a projection of its own; of one run, where the paper trains models on random subsets, or takes
    checkpoints to save that. The soft threshold that closes the paper's algorithm is left out.

    Raises:
        UnsupportedError: if a task has no log-odds.
    """
    options: TrakOptions = attributor.options
    measure = LogOdds if options.output == "log-odds" else lambda task: task
    for stage in attributor.record.stages:
        measure(attributor.rows(stage).task)  # refuses before the work
    work = attributor.work(queries)
    for stage, rows, gradients in _stages(attributor):
        kernel = complements = 0.0
        checkpoints = range(len(stage.segments)) if options.checkpoints == "segments" else [None]
        for segment in checkpoints:
            if segment is not None:
                stage.load_weights(gradients.model, segment)
            projector = options.projector(attributor, stage, gradients, attributor.seed + 7919 * (segment or 0))
            measured = gradients.with_task(measure(rows.task))
            features = row_features(attributor, rows, measured, projector, work, segment)
            asked = query_features(attributor, queries, gradients, projector, measure)
            spectrum = GramSpectrum(features)
            solved = spectrum.apply(asked, pseudo_inverse(options.damping * spectrum.mean))
            kernel = kernel + solved @ features.T / len(checkpoints)
            complements = complements + _complements(attributor, rows, measured.task, gradients) / len(checkpoints)
        yield stage, share_of_scores(attributor, rows, kernel * complements)


def _stages(attributor: "SourceAttributor"):
    """The stages with the models that their checkpoints are of."""
    if attributor.options.checkpoints == "final":
        yield from stages_at_end(attributor)
        return
    for stage in reversed(attributor.record.stages):
        rows, gradients = own_model(attributor, stage)
        yield stage, rows, gradients


@torch.no_grad()
def _complements(
    attributor: "SourceAttributor", rows: "StageRows", task: Task, gradients: RowGradients
) -> torch.Tensor:
    """The diagonal of `Q`, mean of `1 - p` over each row's items, `[trained rows]`."""
    if not isinstance(task, LogOdds):
        return torch.ones(len(rows.trained_rows), device=attributor.device)
    place = np.zeros(rows.stage.num_rows, dtype=np.int64)
    place[rows.trained_rows] = np.arange(len(rows.trained_rows))
    sums = torch.zeros(len(rows.trained_rows), 2, dtype=torch.float64, device=attributor.device)

    def complements(pieces: np.ndarray) -> torch.Tensor:
        batch = rows.collated(pieces, attributor.device)
        return task.complements(task.forward(gradients.model, batch), batch["labels"])

    parts = Parts()
    for batch in attributor.share(rows.batches(rows.trained)):
        for pieces, found in parts(complements, batch):
            sums.index_add_(0, torch.as_tensor(place[rows.row[pieces]], device=attributor.device), found.to(sums))
    sums = attributor.total(sums)
    return sums[:, 0] / sums[:, 1].clamp_min(1)
