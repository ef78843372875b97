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
"""`datainf`: influence functions of adapters, with an inverse in closed form."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...budget import Parts
from ...errors import ConfigError, UnsupportedError
from ...gradients import RowGradients
from ...gradients.rows import as_rows
from ...recording import StageRecord
from ..queries import Queries
from .base import Scores, Vectors
from .final import final_gradients


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


@dataclass(frozen=True)
class DataInfOptions:
    """Settings of `datainf`.

    Attributes:
        damping: `lambda_l` of a parameter, as a share of the mean square of its gradients' entries.
        full_parameters: also score stages that trained other parameters than LoRA's. The error of the closed form
            grows with the square of a parameter's size, so that it is no influence function there.
    """

    damping: float = 0.1
    full_parameters: bool = False

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ConfigError(f"damping={self.damping}: the closed form divides by it; 0.1 is the paper's.")

    def num_passes(self, stage: StageRecord) -> int:
        """For the damping, for the closed form, and for the scores."""
        return 3


def datainf(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """DataInf (Kwon et al. 2023, arXiv 2310.00902) at the final weights; unitless.

    The inverse of a mean of rank-one matrices is taken as the mean of their inverses (section 3 of the paper), each in
    closed form by Sherman and Morrison:

        `sum_l 1 / (n lambda_l) sum_i (v_l^T g_m - (v_l^T g_i) (g_i^T g_m) / (lambda_l + |g_i|^2))`

    with `v` the query's gradient, `g_i` those of the stage's n rows (each summed over its loss items) and
    `lambda_l = .1 / (n d_l) sum_i |g_i|^2`. `l` runs over parameters, each LoRA factor by itself. The paper's sign is
    turned: positive supports. Every parameter that the stage trained is covered.

    Raises:
        UnsupportedError: for a stage that trained more than LoRA's factors, unless `full_parameters`.
    """
    _refuse_full(attributor.record.stages[-1], attributor.options)  # before the queries' gradients

    def solved(rows: "StageRows", gradients: RowGradients, vectors: Vectors) -> Vectors:
        _refuse_full(rows.stage, attributor.options)
        return closed_form(attributor, rows, gradients, vectors, attributor.options.damping)

    return final_gradients(attributor, queries, transform=solved)


def closed_form(
    attributor: "SourceAttributor", rows: "StageRows", gradients: RowGradients, vectors: Vectors, damping: float
) -> Vectors:
    """`(v - mean_i (v^T g_i) / (lambda + |g_i|^2) g_i) / lambda` of every parameter, in two passes over the rows."""
    batches, parts = attributor.share(rows.batches(rows.trained)), Parts()
    run = lambda pieces: gradients.run(rows.collated(pieces, attributor.device))  # noqa: E731
    squares = dict.fromkeys(vectors, torch.zeros((), dtype=torch.float64, device=attributor.device))
    for pieces in attributor.progress(batches, f"damping for {rows.stage.name}"):
        for name, _, grads in (block for _, done in parts(run, pieces) for block in gradients.blocks(done)):
            squares[name] = squares[name] + grads.double().square().sum()
    number = len(rows.trained)
    strength = {
        name: float(damping * attributor.total(squares[name]) / (number * vectors[name][0].numel()))
        for name in vectors
    }
    moved = {name: torch.zeros_like(as_rows(vector)) for name, vector in vectors.items()}
    for pieces in attributor.progress(batches, f"inverse for {rows.stage.name}"):
        for name, _, grads in (block for _, done in parts(run, pieces) for block in gradients.blocks(done)):
            flat = as_rows(grads)
            shares = (as_rows(vectors[name]) @ flat.T) / (strength[name] + flat.square().sum(dim=1)).clamp_min(1e-30)
            moved[name] += shares @ flat / number
    result = {}
    for name, vector in vectors.items():
        # Where no row has a gradient nothing can be changed: the scores are 0 whatever the inverse is.
        inverse = 1 / strength[name] if strength[name] > 0 else 0.0
        result[name] = inverse * (vector - attributor.total(moved[name]).view_as(vector))
    return result


def _refuse_full(stage: StageRecord, options: DataInfOptions) -> None:
    others = [name for name in stage.trainable if ".lora_" not in f".{name}"]
    if others and not options.full_parameters:
        raise UnsupportedError(
            f"method='datainf' is for LoRA, and stage {stage.name!r} trained {others[0]!r} ({len(others)} parameters "
            "are not LoRA's): its error grows with the square of a parameter's size. Use method='influence' or "
            "'source', or set full_parameters=True to see what it gives."
        )
