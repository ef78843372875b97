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
"""An independent witness of training: which rows the model's forward saw, and which optimizer step took them.

It knows nothing of row numbers: rows are recognised by their tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Spy:
    """Watches a model while it trains; use it as a context manager around `train()`.

    Args:
        model: the model that trains.
        token_rows: `input_ids` of every row, all different; a row's position is its number.

    Attributes:
        steps: for each update really made, its micro-batches as `(rows, num_items_in_batch)`.
    """

    def __init__(self, model: torch.nn.Module, token_rows: Iterable[list[int]]) -> None:
        self.model = model
        self.number = {tuple(ids): row for row, ids in enumerate(token_rows)}
        self.steps: list[list[tuple[list[int], float]]] = []
        self._waiting: list[tuple[list[int], float]] = []

    def __enter__(self) -> "Spy":
        self._handles = [
            self.model.register_forward_pre_hook(self._forward, with_kwargs=True),
            register_optimizer_step_post_hook(self._update),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, model, args, kwargs) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation
        if all(parameter.grad is None for parameter in model.parameters()):
            self._waiting = []  # whatever was run before has left no gradient behind
        masks = kwargs["attention_mask"].bool()
        tokens = [tuple(ids[mask].tolist()) for ids, mask in zip(kwargs["input_ids"], masks, strict=True)]
        self._waiting.append(([self.number[row] for row in tokens], float(kwargs["num_items_in_batch"])))

    def _update(self, optimizer, args, kwargs) -> None:
        self.steps.append(self._waiting)
        self._waiting = []

    @property
    def rows(self) -> list[int]:
        """Rows in the order in which they were trained on."""
        return [row for step in self.steps for rows, _ in step for row in rows]


def recorded(stage: Any) -> list[list[tuple[list[int], float]]]:
    """The same, as a `StageRecord` tells it."""
    return [[(batch.rows, batch.normalizer) for batch in step] for step in stage.steps().micro_batches]
