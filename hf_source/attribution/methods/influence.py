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
"""`influence`: the influence function at the final weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...curvature import EKFACInverse, GaussNewtonProducts, JointInverse, conjugate_gradient, systematic_sample
from ...errors import ConfigError
from ...gradients import RowGradients
from ...logs import get_logger
from ...source import draw_sample
from ..queries import Queries
from .base import Scores, Vectors
from .final import final_gradients


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


logger = get_logger(__name__)


@dataclass(frozen=True)
class InfluenceOptions:
    """Settings of `influence`.

    Attributes:
        solver: `"direct"`, the curvature's own inverse, or `"cg"`: that of the Gauss-Newton matrix of the stage's
            rows, by conjugate gradient with the curvature's inverse as the preconditioner (`curvature/conjugate.py`).
        damping: `lambda` as a share of the mean eigenvalue: of each block for `"ekfac"`, of the sample space for
            `"joint"`. The same for both solvers.
        iterations: of conjugate gradient, at most. Each costs about three passes per query over the rows.
        tolerance: a query is done when what is left of `q - (H + lambda) x` is this share of `q`.
        product_rows: rows (pieces of packed ones) that `H` is taken of, drawn once; 0 for all that were trained on.
    """

    solver: str = "direct"
    damping: float = 0.1
    iterations: int = 20
    tolerance: float = 0.01
    product_rows: int = 0

    def __post_init__(self) -> None:
        if self.solver not in ("direct", "cg"):
            raise ConfigError(f"solver={self.solver!r} is unknown; choose 'direct' or 'cg' (conjugate gradient).")
        if not self.damping > 0:
            raise ConfigError(f"damping={self.damping}: the inverse needs a positive damping (0.1 is usual).")
        if self.iterations < 1:
            raise ConfigError(f"iterations={self.iterations}: at least one is needed (20 is usual).")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance} must be at least 0 and below 1 (0.01 is usual).")
        if self.product_rows < 0:
            raise ConfigError(f"product_rows={self.product_rows} must be a number of rows, or 0 for all.")


def influence(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Influence functions at the final weights: `grad f_q^T (H + lambda)^{-1} grad l_m / N`; nats.

    Koh & Liang 2017 (arXiv 1703.04730, equation 2), with the curvature of each stage's own rows: `"ekfac"` is that of
    Grosse et al. 2023 (arXiv 2308.03296), `"joint"` takes all layers at once; with `solver="cg"` it is exact but for
    the damping. `N` counts the stage's loss items. Training is taken to have converged, which is what Source does
    without.

    Raises:
        ConfigError: for another curvature.
        UnsupportedError: with `"cg"`, if the model cannot be differentiated twice, or the loss is not convex.
    """
    if attributor.curvature_name not in ("ekfac", "joint"):
        raise ConfigError(
            f"method='influence' inverts a curvature that curvature={attributor.curvature_name!r} is not: set it to "
            "'ekfac' or 'joint'."
        )
    options = attributor.options

    def solved(rows: "StageRows", gradients: RowGradients, vectors: Vectors) -> Vectors:
        weights = np.zeros(len(rows.row))
        weights[rows.trained] = 1.0
        sample = draw_sample(rows, weights, gradients, attributor.walk_settings(), attributor.seed)
        if attributor.curvature_name == "ekfac":
            inverse = EKFACInverse(vectors, sample, options.damping)
        else:
            inverse = JointInverse(vectors, sample, options.damping, attributor.memory_budget)
        found = inverse(vectors) if options.solver == "direct" else _by_products(rows, gradients, vectors, inverse)
        items = int(rows.items[rows.trained].sum())
        return {name: vector / items for name, vector in found.items()}

    def _by_products(rows: "StageRows", gradients: RowGradients, vectors: Vectors, inverse: Any) -> Vectors:
        if hasattr(gradients.model, "set_attn_implementation"):
            gradients.model.set_attn_implementation("eager")  # fused attention has no second derivative
        numbers = rows.trained
        if options.product_rows:
            numbers = numbers[systematic_sample(np.ones(len(numbers)), options.product_rows, attributor.seed + 1)]
        batches = [rows.collated(pieces, attributor.device) for pieces in rows.batches(numbers)]
        products = GaussNewtonProducts(gradients, batches, attributor.memory_budget)
        alive = {name: vector for name, vector in vectors.items() if inverse.strengths[name] > 0}

        def damped(given: Vectors) -> Vectors:
            moved = products(given)
            return {name: moved[name] + inverse.strengths[name] * vector for name, vector in given.items()}

        if not alive:  # no row has a gradient
            return {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        found, left = conjugate_gradient(
            damped, alive, inverse, options.iterations, options.tolerance, attributor.progress
        )
        if bool((left > options.tolerance).any()):
            logger.warning(
                f"Conjugate gradient stopped after {options.iterations} iterations with up to {float(left.max()):.2g} "
                f"of a query's gradient unexplained (tolerance {options.tolerance:g}): set iterations= higher, or a "
                "larger damping=, if the scores should be those of the converged influence function."
            )
        return {name: found.get(name, torch.zeros_like(vector)) for name, vector in vectors.items()}

    return final_gradients(attributor, queries, transform=solved)
