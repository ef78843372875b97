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
"""`trackstar`: cosines of preconditioned, projected and whitened gradients."""

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

import torch

from ...curvature.gram import GramSpectrum, pseudo_inverse_root
from ...curvature.preconditioner import as_preconditioners
from ...errors import ConfigError
from ...gradients.projection import SidedProjection, matrix_shape
from ..queries import Queries
from .base import Scores
from .final import stages_at_end
from .projected import ProjectedOptions, query_features, random_sides, row_features, share_of_scores


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


@dataclass(frozen=True)
class TrackStarOptions(ProjectedOptions):
    """Settings of `trackstar`.

    Attributes:
        projection_dim: dimensions of each parameter's projected gradient (the paper has 65,536 in all).
        mix: `lambda`, the queries' share of the Hessian approximation; the paper sets it by task.
        second_moment: multiply gradients with the optimizer's preconditioner, from the record.
        damping: share of each block's mean eigenvalue added to `R`. The paper, with far more rows than dimensions,
            adds none; 0 leaves out the directions in which there is no gradient.
    """

    projection_dim: int = 1024
    mix: float = 0.9
    second_moment: bool = True
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.projection_dim < 1:
            raise ConfigError(
                f"projection_dim={self.projection_dim}: at least one dimension is needed (1024 is usual)."
            )
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"mix={self.mix}: the queries' share of the Hessian is between 0 and 1.")
        if self.damping < 0:
            raise ConfigError(f"damping={self.damping}: give 0 or a positive share of the mean eigenvalue.")

    def projector(self, attributor, stage, gradients, seed=None) -> SidedProjection:
        """See `ProjectedOptions`: `V^{-1/2}` from the record, then a random projection of each parameter."""
        sides = {}
        for name, parameter in gradients.parameters.items():
            rows, columns = matrix_shape(parameter.shape)
            right = min(columns, self.projection_dim // min(rows, isqrt(self.projection_dim)))
            left = min(rows, self.projection_dim // right)
            sides[name] = random_sides(gradients, name, left, right, attributor.seed if seed is None else seed)
        scale = None
        moved = [segment for segment in stage.segments if segment.effective_learning_rate_sum > 0]
        if self.second_moment and moved:
            segment, last = moved[-1], attributor.record.stages[-1]
            known = as_preconditioners(segment.preconditioner(), segment.matrix_sides)
            own = {stage.canonical_name(name): value for name, value in known.items()}
            scale = {name: own[last.canonical_name(name)] for name in gradients.parameters}
        return SidedProjection(gradients, sides, scale)


def trackstar(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """TrackStar (Chang et al. 2024, arXiv 2410.17413): cosines of `R^{-1/2} P V^{-1/2} grad l`; unitless.

    Section 3 of the paper: `V`, the optimizer's second moment, is corrected for by the preconditioner
    that the record holds for the end of the stage (nothing to correct with SGD; a matrix with Muon); `P` projects each
    parameter from both sides; `R = lambda R_queries + (1 - lambda) R_rows` mixes the second moments of both sides'
    projected gradients, so that what all queries have in common counts less: ask about one kind of thing at a time,
    for scores depend on the queries asked together. `R` is block-diagonal, here with a block for each parameter where
    the paper has one for several layers. All parameters that the stage trained are covered, vectors (norms, biases)
    with a projection from one side.
    """
    options: TrackStarOptions = attributor.options
    work = attributor.work(queries)
    for stage, rows, gradients in stages_at_end(attributor):
        projector = options.projector(attributor, stage, gradients)
        features = row_features(attributor, rows, gradients, projector, work)
        asked = query_features(attributor, queries, gradients, projector)
        for part in projector.parts.values():
            mixed = torch.cat(
                [
                    (options.mix / len(asked)) ** 0.5 * asked[:, part],
                    ((1 - options.mix) / len(features)) ** 0.5 * features[:, part],
                ]
            )
            spectrum = GramSpectrum(mixed)
            root = pseudo_inverse_root(options.damping * spectrum.mean)
            asked[:, part] = spectrum.apply(asked[:, part], root)
            features[:, part] = spectrum.apply(features[:, part], root)
        yield stage, share_of_scores(attributor, rows, _unit(asked) @ _unit(features).T)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
