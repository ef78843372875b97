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
"""`logra`: influence functions of gradients projected from both sides of each weight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...budget import Parts
from ...curvature.block import MAX_FULL_SIDE, GradientMoments, as_matrices, eigenvectors
from ...curvature.ekfac import KroneckerMoments
from ...curvature.gram import GramSpectrum, pseudo_inverse
from ...curvature.preconditioner import Diagonal
from ...errors import ConfigError, UnsupportedError
from ...gradients import RowGradients
from ...gradients.projection import SidedProjection, Sides
from ...recording import StageRecord
from ..queries import Queries
from .base import Scores
from .final import stages_at_end
from .projected import ProjectedOptions, query_features, random_sides, row_features, share_of_scores


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


@dataclass(frozen=True)
class LograOptions(ProjectedOptions):
    """Settings of `logra`.

    Attributes:
        rank: dimensions that a module's inputs and its output gradients are each projected to.
        init: projections drawn at `"random"`, or the leading directions of both by `"pca"` (one more pass).
        damping: added to each block of the projected Hessian, as a share of its mean eigenvalue.
        relatif: divide by the row's own `sqrt(g^T H^{-1} g)`, which finds rows that matter to the query more than to
            others (l-RelatIF: Barshan et al. 2020, arXiv 2003.11630).
    """

    rank: int = 64
    init: str = "random"
    damping: float = 0.1
    relatif: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank}: at least one dimension is needed (64 is usual).")
        if self.init not in ("random", "pca"):
            raise ConfigError(f"init={self.init!r} is unknown; choose one of random, pca.")
        if self.damping < 0:
            raise ConfigError(f"damping={self.damping}: give 0 or a positive share of the mean eigenvalue.")

    def num_passes(self, stage: StageRecord) -> int:
        """One for the features, and one for the directions of `"pca"`."""
        return 2 if self.init == "pca" else 1

    def projector(self, attributor, stage, gradients, seed=None) -> SidedProjection:
        """See `ProjectedOptions`; random, for `plan()` too where the directions are not known yet."""
        names = _matrices(stage, gradients)
        seed = attributor.seed if seed is None else seed
        return SidedProjection(
            gradients, {name: random_sides(gradients, name, self.rank, self.rank, seed) for name in names}
        )


def logra(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """LoGra (Choe et al. 2024, arXiv 2405.13954): `(P g_q)^T (P H P^T + lambda)^{-1} P g_m`; unitless.

    Section 3 of the paper: with `P = P_i x P_o` a weight's gradient is projected by projecting what goes into the
    module and the gradient that comes back. `H` is the mean over the rows of the outer products of their own gradients
    (each summed over its loss items), in a block for each weight. `init="pca"` takes the leading eigenvectors of the
    uncentred covariances of inputs and output gradients, as K-FAC has them; of embeddings, heads tied to them and
    weights with a side above 4,096 those of their gradient matrices, with a random projection of the vocabulary and of
    that side.

    Weights of two or more dimensions are covered: Linear, embeddings, heads tied to them, LoRA. Norms and biases
    have no two sides and are left out, as in the paper.

    Raises:
        UnsupportedError: if a stage trained no such weight.
    """
    options: LograOptions = attributor.options
    work = attributor.work(queries)
    for stage, rows, gradients in stages_at_end(attributor):
        projector = options.projector(attributor, stage, gradients)
        gradients = gradients.only(projector.sides)
        if options.init == "pca":
            projector = SidedProjection(
                gradients, _leading(attributor, rows, gradients, projector.sides, options.rank)
            )
        features = row_features(attributor, rows, gradients, projector, work)
        asked = query_features(attributor, queries, gradients, projector)
        own = torch.zeros(len(features), dtype=features.dtype, device=features.device)
        scores = torch.zeros(len(asked), len(features), dtype=features.dtype, device=features.device)
        for part in projector.parts.values():
            spectrum = GramSpectrum(features[:, part] / len(features) ** 0.5)
            inverse = pseudo_inverse(options.damping * spectrum.mean)
            scores += spectrum.apply(asked[:, part], inverse) @ features[:, part].T
            if options.relatif:
                own += (spectrum.apply(features[:, part], inverse) * features[:, part]).sum(dim=1)
        scores = scores / own.sqrt().clamp_min(1e-30) if options.relatif else scores
        yield stage, share_of_scores(attributor, rows, scores)


def _matrices(stage: StageRecord, gradients: RowGradients) -> list[str]:
    names = [name for name, parameter in gradients.parameters.items() if parameter.dim() > 1]
    if not names:
        raise UnsupportedError(
            f"Stage {stage.name!r} trained no weight with an input and an output side, which method='logra' projects: "
            "use method='trackstar' or 'source', which cover norms and biases."
        )
    return names


def _leading(
    attributor: "SourceAttributor", rows: "StageRows", gradients: RowGradients, random: Sides, rank: int
) -> Sides:
    """The leading eigenvectors of each side's covariance over the stage's rows, with their own labels."""
    one = Diagonal(torch.ones((), dtype=attributor.dtype, device=attributor.device))
    moments: dict[str, KroneckerMoments | GradientMoments] = {}
    for name, parameter in gradients.parameters.items():
        if KroneckerMoments.fits(gradients, name) and max(parameter.shape) <= MAX_FULL_SIDE:
            moments[name] = KroneckerMoments(gradients, name, one)
        else:
            moments[name] = GradientMoments(parameter.shape, name in gradients.vocabulary)
    others = [name for name, found in moments.items() if isinstance(found, GradientMoments)]
    title, parts = f"directions of {rows.stage.name}", Parts()
    run = lambda pieces: gradients.run(rows.collated(pieces, attributor.device))  # noqa: E731
    for pieces in attributor.progress(attributor.share(rows.batches(rows.trained)), title):
        for _, done in parts(run, pieces):
            for name in moments.keys() - set(others):
                moments[name].add(done, 1.0)
            for name, _, grads in gradients.blocks(done, others):
                moments[name].add(as_matrices(grads))
    found = {}
    for name, sides in random.items():  # in the same order in every process
        wanted = (moments[name].want_left, moments[name].want_right) if name in others else (True, True)
        known = (moments[name].left, moments[name].right)
        parts = zip(sides, known, wanted, strict=True)
        found[name] = tuple(_directions(attributor, side, moment, rank) if on else side for side, moment, on in parts)
    return found


def _directions(
    attributor: "SourceAttributor", random: torch.Tensor | None, moment: torch.Tensor | None, rank: int
) -> torch.Tensor | None:
    """The `rank` leading eigenvectors of a side, `[rank, length]`; `None` where all are kept."""
    if random is None:
        return None
    if moment is None:  # this process had no row
        moment = random.new_zeros(random.shape[1], random.shape[1])
    return eigenvectors(attributor.total(moment))[:, -rank:].T
