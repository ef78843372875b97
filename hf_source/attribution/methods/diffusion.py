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
"""TracIn of diffusion models, and its correction by the norms of gradients (Xie et al. 2024, arXiv 2401.09031)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import ConfigError, UnsupportedError
from ...gradients import DiffusionTask, RowGradients
from ...gradients.rows import as_rows
from ...recording import SegmentRecord, StageRecord
from ..asking import ask
from ..queries import Queries
from .base import Scores, Vectors
from .tracin import along_segments


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


@dataclass(frozen=True)
class DiffusionOptions:
    """Settings of `diffusion-tracin` and `diffusion-retrac`.

    Attributes:
        draws: of a row's recorded timesteps and noises in a segment, how many are looked at; one, as in the paper.
    """

    draws: int = 1

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws={self.draws}: at least one recorded timestep of a row is needed (1 is usual).")


def diffusion_tracin(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Diffusion-TracIn (equation 6 of the paper) over the recorded segments; unitless.

    The query's gradient is averaged over timesteps of a grid, each with a noise; a row's is taken at a timestep and
    noise that training gave it in the segment, and counts by the summed learning rate of its real visits over the
    batch size, which the paper writes as `learning rate x batch x epochs / rows`.
    """
    return _scores(attributor, queries, normalise=False)


def diffusion_retrac(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Diffusion-ReTrac (equation 8): every timestep's gradient is divided by its own norm, of queries and of rows.

    A row whose visits happened to draw timesteps of large gradients would else be influential for everything.
    """
    return _scores(attributor, queries, normalise=True)


def _scores(attributor: "SourceAttributor", queries: Queries, normalise: bool) -> Scores:
    def refuse(stage: StageRecord, gradients: RowGradients) -> None:
        if not isinstance(gradients.task, DiffusionTask):
            raise UnsupportedError(
                f"method={attributor.method!r} reads recorded timesteps, and stage {stage.name!r} trained no "
                "diffusion model: use method='tracin'."
            )

    def products(gradients: RowGradients, segment: SegmentRecord, vectors: Vectors, batch: dict) -> np.ndarray:
        epochs = np.unique(segment.stage.steps().epoch[segment.first_step : segment.end_step].astype(int))
        places = np.linspace(0, len(epochs) - 1, min(attributor.options.draws, len(epochs)) + 2)[1:-1]
        total = 0.0
        for epoch in epochs[places.round().astype(int)]:
            gradients.task.at_epochs((int(epoch),))
            total = total + _products(gradients, batch, vectors, normalise) / len(places)
        return total

    vectors = lambda gradients: _query_vectors(attributor, gradients, queries, normalise)  # noqa: E731
    return along_segments(attributor, queries, vectors, products, refuse)


def _query_vectors(
    attributor: "SourceAttributor", gradients: RowGradients, queries: Queries, normalise: bool
) -> Vectors:
    """Gradients of the queries, averaged over the grid of timesteps: name -> `[queries, *parameter.shape]`."""
    if not normalise:
        return attributor.query_gradients(gradients, queries)
    found = {
        name: torch.zeros((len(queries), *parameter.shape), dtype=attributor.dtype, device=attributor.device)
        for name, parameter in gradients.parameters.items()
    }

    def add(engine: RowGradients, chosen: np.ndarray, batch: dict[str, torch.Tensor]) -> None:
        place, grid = torch.as_tensor(chosen.copy(), device=attributor.device), engine.task.grid
        for vectors in found.values():
            vectors[place] = 0.0
        try:
            for point in range(grid):
                engine.task.at_points([point])
                own = {name: torch.empty_like(vectors[place]) for name, vectors in found.items()}
                for name, rows, grads in engine.blocks(engine.run(batch)):
                    own[name][rows] = grads.to(attributor.dtype)
                norms = sum(as_rows(part).square().sum(dim=1) for part in own.values()).sqrt() * grid
                for name, part in own.items():
                    found[name][place] += (as_rows(part) / norms.clamp_min(1e-30)[:, None]).view_as(part)
        finally:
            engine.task.at_points(range(grid))

    ask(attributor, gradients, queries, add)
    return found


def _products(gradients: RowGradients, batch, vectors: Vectors, normalise: bool) -> np.ndarray:
    """Dot products of every vector with every row's gradient, or with its direction: `[queries, rows]`."""
    done = gradients.run(batch, vectors)
    dots, squares = 0.0, 0.0
    parts: dict[str, list[torch.Tensor]] = {}
    for name, rows, grads in gradients.blocks(done, vectors):
        parts.setdefault(name, []).append(as_rows(grads))
        if rows.stop == done.num_rows:
            columns = torch.cat(parts.pop(name))
            dots = dots + as_rows(vectors[name]) @ columns.T
            squares = squares + columns.square().sum(dim=1)
    return (dots / squares.sqrt().clamp_min(1e-30) if normalise else dots).cpu().numpy()
