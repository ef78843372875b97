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

from typing import TYPE_CHECKING

import numpy as np

from ...gradients import RowGradients
from ...recording import StageRecord
from ...source import score_rows
from ..queries import Queries
from .base import Scores


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


def tracin(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """TracInCP (Pruthi et al. 2020, arXiv 2002.08484, equation 2) over the recorded segments.

    `sum over segments of w_m <grad f_q(theta_l), grad l_m(theta_l)>`, `w_m` the summed learning rate of the row's real
    visits. No preconditioner, as in the paper, so the unit is nats for SGD only.
    """
    for stage in reversed(attributor.record.stages):
        rows, gradients = own_model(attributor, stage)
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        for segment in stage.segments:
            stage.load_weights(gradients.model, segment.index)
            vectors = attributor.query_gradients(gradients, queries)
            weights = segment.row_weights()[rows.example]
            title = f"scoring {stage.name}, segment {segment.index + 1}"
            for pieces in attributor.progress(attributor.share(rows.batches(np.flatnonzero(weights))), title):
                dots = score_rows(gradients, rows.collated(pieces, attributor.device), vectors)
                np.add.at(scores, (slice(None), rows.row[pieces]), dots.numpy() * weights[pieces])
        yield stage, scores


def own_model(attributor: "SourceAttributor", stage: StageRecord) -> tuple["StageRows", RowGradients]:
    """A stage's rows, and the engine of the model that it trained."""
    rows = attributor.rows(stage)
    gradients = RowGradients(attributor.build_model(stage), rows.task, stage.trainable)
    rows.prepare(gradients)
    gradients.check(rows.collated(rows.shortest(2), attributor.device))
    return rows, gradients
