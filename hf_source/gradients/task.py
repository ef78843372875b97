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
"""What a model was trained to do: its loss per row, the labels it would draw itself, and what a query measures.

A task is any object with the three methods of `Task`; `CausalLMTask` is the one for decoder language models.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..data import IGNORE_INDEX, ROW


Batch = Mapping[str, torch.Tensor]


class Task(Protocol):
    """The small protocol between a training objective and attribution."""

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits (or predictions) of a batch; the first axis is the row."""

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed loss of each row over its loss items, in nats: `[rows]`."""

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Labels drawn from the model's own predictive distribution wherever `labels` has a loss item."""

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of loss items of each row: int64 `[rows]`."""


class CausalLMTask:
    """Next-token prediction: the loss of a row is the summed cross-entropy of its label tokens given what precedes.

    Its Hessian is approximated by the Fisher with labels drawn from the model, which for a softmax equals the
    generalised Gauss-Newton matrix (Martens 2020, arXiv 1412.1193, section 9.2).
    """

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits, float `[rows, tokens, vocabulary]`."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", ROW)}
        return model(**inputs, use_cache=False).logits

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood of each row's label tokens, nats, `[rows]`."""
        return self.token_losses(outputs, labels).sum(dim=1)

    def token_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every label token, `[rows, tokens - 1]`, 0 where nothing is asked."""
        logits, targets = outputs[:, :-1], labels[:, 1:]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view_as(targets)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Each loss item's label drawn from the softmax of its logits; shape and masking of `labels`.

        The draw is made by inverting the distribution function at a uniform number, which gives the same label for
        the same generator on every device and survives rounding differences between two passes.
        """
        with torch.no_grad():
            cumulative = outputs[:, :-1].float().softmax(dim=-1).cumsum(dim=-1)
            uniform = torch.rand(cumulative.shape[:-1], generator=generator).to(cumulative.device)
            drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None]).squeeze(-1)
            drawn = drawn.clamp_max(outputs.shape[-1] - 1)
            sampled = labels.clone()
            asked = labels[:, 1:] != IGNORE_INDEX
            sampled[:, 1:][asked] = drawn[asked].to(labels.dtype)
        return sampled

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Label tokens of each row; the first token is never predicted."""
        return (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)


def batch_to(batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch's tensors on `device`."""
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
