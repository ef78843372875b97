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
"""Products of gradients at the final weights: `grad-dot`, `grad-cos`, and the ground of other methods."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...gradients import DPOTask, RowGradients
from ...gradients.changes import without_changes
from ...recording import StageRecord
from ...source import score_rows
from ..queries import Queries
from .base import Scores, Vectors


if TYPE_CHECKING:
    from ..attributor import SourceAttributor
    from ..rows import StageRows


def grad_dot(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Dot product of query and row gradients at the final weights (Charpiat et al. 2019): unitless."""
    return final_gradients(attributor, queries)


def grad_cos(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Cosine of query and row gradients at the final weights: unitless, between -1 and 1."""
    return final_gradients(attributor, queries, cosine=True)


def final_gradients(
    attributor: "SourceAttributor",
    queries: Queries,
    transform: Callable[["StageRows", RowGradients, Vectors], Vectors] | None = None,
    cosine: bool = False,
) -> Scores:
    """Products of row and query gradients at the final weights, all stages.

    Args:
        attributor: with its record.
        queries: what to explain.
        transform: turns the query gradients into the vectors that a stage's rows are compared with.
        cosine: divide by both norms.
    """
    work = attributor.work(queries)
    for stage, rows, gradients in stages_at_end(attributor):
        vectors = work.load(f"{stage.index}.vectors", attributor.device)
        if vectors is None:
            vectors = attributor.query_gradients(gradients, queries)
            if transform is not None:
                vectors = transform(rows, gradients, vectors)
                work.save(f"{stage.index}.vectors", vectors)
        compared = partial(_compared, rows, gradients, vectors, attributor.device, cosine)
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        batches, title = attributor.share(rows.batches(rows.trained)), f"scoring {stage.name}"
        for pieces, found in work.scored(f"{stage.index}", batches, compared, attributor.progress, title):
            np.add.at(scores, (slice(None), rows.row[pieces]), found)
        if cosine:
            squares = torch.stack([vector.flatten(1).square().sum(dim=1) for vector in vectors.values()])
            scores /= squares.sum(dim=0).sqrt().cpu().clamp_min(1e-30).numpy()[:, None]
        yield stage, scores


def _compared(rows, gradients, vectors, device, cosine, pieces) -> np.ndarray:
    """Scores of some rows, float32 `[queries, rows]`."""
    batch = rows.collated(pieces, device)
    dots = score_rows(gradients, batch, vectors)
    dots = dots / _row_norms(gradients, batch) if cosine else dots
    return dots.float().numpy()


def stages_at_end(attributor: "SourceAttributor") -> Iterator[tuple[StageRecord, "StageRows", RowGradients]]:
    """Every stage, last to first, with its rows and the engine of the final model for what the stage trained."""
    last = attributor.record.stages[-1]
    model = attributor.build_model(last)
    last.load_weights(model, "final")
    names = {last.canonical_name(name): name for name, _ in model.named_parameters()}
    for stage in reversed(attributor.record.stages):
        own = [stage.canonical_name(name) for name in stage.trainable]
        trained = attributor.final_parameters(model, [names[name] for name in own if name in names])
        rows = attributor.rows(stage)
        gradients = RowGradients(model, rows.task, trained)
        if stage is last:
            rows.prepare(gradients)
            last.load_weights(model, "final")
        elif isinstance(rows.task, DPOTask):
            with without_changes():
                rows.task.prepare(attributor.build_model(stage), rows)
        gradients.check(rows.collated(rows.shortest(2), attributor.device))
        yield stage, rows, gradients


def _row_norms(gradients: RowGradients, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    done = gradients.run(batch)
    total = torch.zeros(done.num_rows)
    for _, rows, grads in gradients.blocks(done):
        total[rows] += grads.flatten(1).square().sum(dim=1).cpu()
    return total.sqrt().clamp_min(1e-30)
