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
"""Speech: connectionist temporal classification (CTC), where a row's label is a sequence that no frame is tied to."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from ..data import IGNORE_INDEX
from .heads import HeadTask, predictions_of
from .task import Batch, labels_of


_CTC_CLASSES = frozenset(MODEL_FOR_CTC_MAPPING_NAMES.values())


class CTCTask(HeadTask):
    """`-log p(sequence)`, with `p` the sum over all ways to lay the sequence out over the frames (Graves et al. 2006).

    A row is one item. `ctc_loss_reduction="sum"` adds rows up; `"mean"` divides each by the length of its sequence and
    averages over rows.

    Labels for the curvature are drawn from the model: a token for each frame from its softmax, repeats and blanks
    taken out, which is a draw from `p`. The Fisher of it is the curvature; it is no Gauss-Newton matrix of the logits,
    in which this loss is not convex. Where a row's loss is divided by its length `n`, so must be its Fisher: the
    gradient of a drawn sequence enters with `1 / sqrt(n)`, `n` the length of the row's own.

    Args:
        blank: token that says nothing.
        reduction: `"sum"` or `"mean"`.
        zero_infinity: count sequences that do not fit into their frames as 0.
        settings: see `HeadTask`.
    """

    def __init__(self, blank: int = 0, reduction: str = "sum", zero_infinity: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity
        self.summed = reduction == "sum"

    def reads(self, model: torch.nn.Module, batch: Batch) -> bool:
        """Whether the model is one of transformers' for CTC."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        named = any(cls.__name__ in _CTC_CLASSES for cls in type(plain).__mro__)
        return named and super().reads(model, batch)

    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """The model's class says it."""
        return not labels.is_floating_point()

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of every frame, and in the last place whether it is one: float `[rows, frames, tokens + 1]`."""
        logits = predictions_of(model, batch)
        rows, frames = logits.shape[:2]
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(dim=-1)
        else:
            lengths = torch.full((rows,), batch["input_values"].shape[-1], device=logits.device)
        lengths = model._get_feat_extract_output_lengths(lengths).to(logits.device)
        real = torch.arange(frames, device=logits.device) < lengths[:, None]
        return torch.cat([logits, real[..., None].to(logits)], dim=-1)

    def labels(self, batch: Batch) -> torch.Tensor:
        """Tokens of each row (negative where there is none), and in the last place what its loss is divided by."""
        labels = labels_of(batch)
        lengths = (labels >= 0).sum(dim=1).clamp_min(1)
        return torch.cat([labels, torch.ones_like(lengths)[:, None] if self.summed else lengths[:, None]], dim=1)

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """One for each row."""
        return torch.ones(len(labels), dtype=torch.int64)

    def count_items(self, row: Mapping[str, Any]) -> int:
        """One."""
        return 1

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each row's sequence, nats (per token if divided by its length), `[rows]`."""
        tokens, divisor = labels[:, :-1], labels[:, -1]
        log_probs = outputs[..., :-1].log_softmax(dim=-1).transpose(0, 1)
        asked = tokens >= 0
        losses = F.ctc_loss(
            log_probs,
            tokens[asked],
            outputs[..., -1].sum(dim=1).long(),
            asked.sum(dim=1),
            blank=self.blank,
            reduction="none",
            zero_infinity=self.zero_infinity,
        )
        divisor = divisor.to(losses)
        return losses / torch.where(divisor > 0, divisor, divisor.abs().sqrt())

    @torch.no_grad()
    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Sequences drawn from the model, and what they are divided by with a minus sign."""
        cumulative = outputs[..., :-1].double().softmax(dim=-1).cumsum(dim=-1).cpu()
        uniform = torch.rand(cumulative.shape[:-1], generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, uniform[..., None]).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)
        sampled = torch.full((len(drawn), drawn.shape[1] + 1), IGNORE_INDEX, dtype=labels.dtype)
        for row, (path, frames) in enumerate(zip(drawn, outputs[..., -1].sum(dim=1).long().tolist(), strict=True)):
            kept = torch.unique_consecutive(path[:frames])
            kept = kept[kept != self.blank]
            sampled[row, : len(kept)] = kept
        sampled[:, -1] = -labels[:, -1].abs().cpu()
        return sampled.to(labels.device)
