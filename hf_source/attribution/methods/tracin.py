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

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from ...gradients import RowGradients
from ...recording import SegmentRecord, StageRecord
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
    return along_segments(
        attributor,
        queries,
        lambda gradients: attributor.query_gradients(gradients, queries),
        lambda gradients, segment, vectors, batch: score_rows(gradients, batch, vectors).numpy(),
    )


def along_segments(
    attributor: "SourceAttributor",
    queries: Queries,
    query_vectors: Callable[[RowGradients], Vectors],
    products: Callable[[RowGradients, SegmentRecord, Vectors, dict], np.ndarray],
    refuse: Callable[[StageRecord, RowGradients], None] = lambda stage, gradients: None,
) -> Scores:
    """Sums over the recorded segments of products at their weights, times the learning rates of a row's visits.

    Args:
        attributor, queries: who asks, and what.
        query_vectors: what rows are compared with, at the weights that the model has.
        products: `[queries, rows]` of a batch's rows with them.
        refuse: raises where a stage cannot be scored.
    """
    work = attributor.work(queries)
    for stage in reversed(attributor.record.stages):
        rows, gradients = own_model(attributor, stage)
        refuse(stage, gradients)
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        for segment in stage.segments:
            # Weights are loaded, and queries asked, once there is a batch that is not done.
            vectors = cache(partial(_entered, stage, segment, gradients, query_vectors))
            compute = partial(_of_pieces, attributor, rows, gradients, segment, vectors, products)
            weights = segment.row_weights()[rows.example]
            batches = attributor.share(rows.batches(np.flatnonzero(weights)))
            key, title = f"{stage.index}-{segment.index}", f"scoring {stage.name}, segment {segment.index + 1}"
            for pieces, found in work.scored(key, batches, compute, attributor.progress, title):
                np.add.at(scores, (slice(None), rows.row[pieces]), found * weights[pieces])
        yield stage, scores


def _entered(stage, segment, gradients, query_vectors) -> Vectors:
    """The queries' vectors at a segment's weights, which the model has from then on."""
    stage.load_weights(gradients.model, segment.index)
    return query_vectors(gradients)


def _of_pieces(attributor, rows, gradients, segment, vectors, products, pieces) -> np.ndarray:
    held = vectors()
    return products(gradients, segment, held, rows.collated(pieces, attributor.device))


def own_model(attributor: "SourceAttributor", stage: StageRecord) -> tuple["StageRows", RowGradients]:
    """A stage's rows, and the engine of the model that it trained."""
    return attributor.rows(stage), attributor.engine(stage, attributor.build_model(stage), stage.trainable)
