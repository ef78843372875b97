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
"""`tracin`: products of gradients along the run."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...gradients import RowGradients
from ...recording import StageRecord
from ...source import score_rows
from ..queries import Queries
from .base import Scores, Vectors


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


def tracin(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """TracInCP (Pruthi et al. 2020, arXiv 2002.08484, equation 2) over the recorded segments.

    `sum over segments of w_m <grad f_q(theta_l), grad l_m(theta_l)>`, `w_m` the summed learning rate of the row's real
    visits. No preconditioner, as in the paper, so the unit is nats for SGD only.
    """
    work = attributor.work(queries)
    for stage in reversed(attributor.record.stages):
        rows, gradients = own_model(attributor, stage)
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        for segment in stage.segments:
            weights = segment.row_weights()[rows.example]
            batches, dots = attributor.share(rows.batches(np.flatnonzero(weights))), _Dots(attributor, queries, stage)
            compute = partial(dots, segment.index, rows, gradients)
            title = f"scoring {stage.name}, segment {segment.index + 1}"
            key = f"{stage.index}-{segment.index}"
            for pieces, found in work.scored(key, batches, compute, attributor.progress, title):
                np.add.at(scores, (slice(None), rows.row[pieces]), found * weights[pieces])
        yield stage, scores


class _Dots:
    """Products of row and query gradients at a segment's weights, which are loaded when the first are asked for."""

    def __init__(self, attributor: "SourceAttributor", queries: Queries, stage: StageRecord) -> None:
        self.attributor, self.queries, self.stage = attributor, queries, stage
        self.vectors: Vectors | None = None

    def __call__(self, segment: int, rows: "StageRows", gradients: RowGradients, pieces: np.ndarray) -> np.ndarray:
        """Of some pieces, `[queries, pieces]`."""
        if self.vectors is None:
            self.stage.load_weights(gradients.model, segment)
            self.vectors = self.attributor.query_gradients(gradients, self.queries)
        return score_rows(gradients, rows.collated(pieces, self.attributor.device), self.vectors).numpy()


def own_model(attributor: "SourceAttributor", stage: StageRecord) -> tuple["StageRows", RowGradients]:
    """A stage's rows, and the engine of the model that it trained."""
    rows = attributor.rows(stage)
    gradients = RowGradients(attributor.build_model(stage), rows.task, stage.trainable)
    rows.prepare(gradients)
    gradients.check(rows.collated(rows.shortest(2), attributor.device))
    return rows, gradients
