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
"""What queries measure under a model: their gradients and their values."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..budget import Parts
from ..errors import UnsupportedError
from ..gradients import CausalLMTask, RowGradients, RowLossTask, Task, task_labels
from .queries import Queries
from .rows import collate


if TYPE_CHECKING:
    from .attributor import SourceAttributor


def ask(
    attributor: "SourceAttributor",
    gradients: RowGradients,
    queries: Queries,
    use: Callable[[RowGradients, np.ndarray, dict[str, torch.Tensor]], None],
) -> None:
    """Take queries in batches through the model; fewer at once where memory runs out.

    Args:
        attributor, gradients, queries: who asks, at which weights, and what.
        use: gets the engine of what queries measure, the queries' positions and their batch. What it does for them
            it may have to do again.
    """
    encoded, task = attributor.encode(queries), attributor.measurement(queries)
    collator, columns = _query_collator(attributor, task, queries)
    collated = lambda chosen: collate(collator, [encoded.rows[i] for i in chosen], attributor.device, columns)  # noqa: E731
    if task is not gradients.task:
        if not queries.are_rows:
            _refuse_without_text(attributor, gradients.model)
        if gradients.shards is None:
            gradients = RowGradients(gradients.model, task, list(gradients.parameters))
            gradients.check(collated(range(min(2, len(queries)))))
        else:  # its rules were checked while the model was whole
            gradients = gradients.with_task(task)
    measure = getattr(task, "length", len)
    lengths, parts = np.asarray([measure(row) for row in encoded.rows]), Parts()
    for batch in _batches(attributor, lengths):
        for _ in parts(lambda chosen: use(gradients, chosen, collated(chosen)), batch):
            pass


def _batches(attributor: "SourceAttributor", lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of queries that go through the model together, the longest first."""
    order = np.argsort(lengths, kind="stable")[::-1]
    step = max(1, attributor.max_tokens_per_batch // int(lengths.max()))
    for start in range(0, len(order), step):
        yield order[start : start + step]


@torch.no_grad()
def query_losses(attributor: "SourceAttributor", model: nn.Module, queries: Queries) -> np.ndarray:
    """`f_q` of each query under a model: float64 `[queries]`, nats."""
    encoded, task = attributor.encode(queries), attributor.measurement(queries)
    collator, columns = _query_collator(attributor, task, queries)
    measure = getattr(task, "length", len)
    lengths = np.asarray([measure(row) for row in encoded.rows])
    found, parts = np.zeros(len(queries)), Parts()

    def losses(chosen: np.ndarray) -> torch.Tensor:
        batch = collate(collator, [encoded.rows[i] for i in chosen], attributor.device, columns)
        return task.row_losses(task.forward(model, batch), task_labels(task, batch)).double().cpu()

    for batch in _batches(attributor, lengths):
        for chosen, own in parts(losses, batch):
            found[chosen] = own.numpy()
    return found


def _query_collator(attributor: "SourceAttributor", task: Task, queries: Queries) -> tuple[Any, Sequence[str] | None]:
    if queries.are_rows:
        rows = attributor.rows(attributor.record.stages[-1])
        return rows.collate, rows.columns
    own = task if isinstance(task, RowLossTask) else CausalLMTask()
    return own.collator(attributor.processing_class), own.columns


def _refuse_without_text(attributor: "SourceAttributor", model: nn.Module) -> None:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if plain.get_output_embeddings() is None:
        raise UnsupportedError(
            f"Stage {attributor.record.stages[-1].name!r} trained a {type(plain).__name__}, which says no text: ask "
            "about rows of its own kind instead, with `Queries.from_rows(dataset)`."
        )
