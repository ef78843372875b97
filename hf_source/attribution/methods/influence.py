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

from typing import TYPE_CHECKING

import numpy as np

from ...curvature import ekfac_inverse, joint_inverse
from ...errors import ConfigError
from ...gradients import RowGradients
from ...source import draw_sample
from ..queries import Queries
from .base import Scores, Vectors
from .final import final_gradients


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


def influence(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Influence functions at the final weights: `grad f_q^T (H + lambda)^{-1} grad l_m / N`; nats.

    Koh & Liang 2017 (arXiv 1703.04730, equation 2), with the curvature of each stage's own rows: `"ekfac"` is that of
    Grosse et al. 2023 (arXiv 2308.03296), `"joint"` takes all layers at once; damping .1 of the mean eigenvalue. `N`
    counts the stage's loss items. Training is taken to have converged, which is what Source does without.

    Raises:
        ConfigError: for another curvature.
    """
    if attributor.curvature_name not in ("ekfac", "joint"):
        raise ConfigError(
            f"method='influence' inverts a curvature that curvature={attributor.curvature_name!r} is not: set it to "
            "'ekfac' or 'joint'."
        )

    def solved(rows: "StageRows", gradients: RowGradients, vectors: Vectors) -> Vectors:
        weights = np.zeros(len(rows.row))
        weights[rows.trained] = 1.0
        sample = draw_sample(rows, weights, gradients, attributor.walk_settings(), attributor.seed)
        if attributor.curvature_name == "ekfac":
            found = ekfac_inverse(vectors, sample)
        else:
            found = joint_inverse(vectors, sample, memory_budget=attributor.memory_budget)
        items = int(rows.items[rows.trained].sum())
        return {name: vector / items for name, vector in found.items()}

    return final_gradients(attributor, queries, transform=solved)
