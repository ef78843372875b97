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
"""The log-odds of the right answer: the model output function of TRAK (Park et al. 2023, arXiv 2303.14186)."""

import torch

from ..data import IGNORE_INDEX
from ..errors import UnsupportedError
from .heads import ClassificationTask
from .preference import PairTask
from .task import Batch, CausalLMTask, RowLossTask, Seq2SeqTask, Task


class LogOdds(RowLossTask):
    """A task's rows measured by minus their log-odds, instead of by their loss.

    A loss item with probability `p` of its label has `f = log(p / (1 - p))`, the margin of section 3.1 of the paper; a
    row has the sum over its items, as the paper takes language modelling (a classification at each token). Of a
    preference pair it is the margin. Label smoothing and centring terms have no part in it.

    Args:
        task: of the rows. One of your own needs a method `log_odds(outputs, labels) -> [rows]`.

    Raises:
        UnsupportedError: if the task has no right answer with a probability.
    """

    def __init__(self, task: Task) -> None:
        if not isinstance(task, (CausalLMTask, Seq2SeqTask, ClassificationTask, PairTask)) and not hasattr(
            task, "log_odds"
        ):
            raise UnsupportedError(
                f"The loss of {type(task).__name__} need not be the probability of a right answer, and TRAK takes "
                "its log-odds: give the task a method `log_odds(outputs, labels) -> [rows]`, or set output='loss'."
            )
        self.task = task

    @property
    def sequences_per_row(self) -> int:
        """See `RowLossTask`."""
        return getattr(self.task, "sequences_per_row", 1)

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The task's own."""
        return self.task.forward(model, batch)

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """The task's own."""
        return self.task.num_items(labels)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`-f` of each row, `[rows]`."""
        odds, asked = self._odds(outputs, labels)
        return -odds.masked_fill(~asked, 0).sum(dim=1)

    def complements(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over each row's items of `1 - p = -d loss / d f`, and their number: `[rows, 2]`."""
        odds, asked = self._odds(outputs, labels)
        return torch.stack([torch.sigmoid(-odds).masked_fill(~asked, 0).sum(dim=1), asked.sum(dim=1)], dim=1)

    def _odds(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`f` of each item and which items there are, both `[rows, items]`."""
        if isinstance(self.task, (CausalLMTask, ClassificationTask)):
            return _token_odds(*self.task.predictions(outputs, labels))
        if isinstance(self.task, Seq2SeqTask):
            return _token_odds(outputs, labels)
        if isinstance(self.task, PairTask):
            odds = torch.where(labels[:, :1] > 0.5, outputs[:, :1], -outputs[:, :1])
        else:
            odds = self.task.log_odds(outputs, labels)[:, None]
        return odds, torch.ones_like(odds, dtype=torch.bool)


def _token_odds(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's logit over the log-sum-exp of the others: exact also where `1 - p` rounds to 0."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    asked = targets != IGNORE_INDEX
    index = targets.clamp_min(0)[..., None]
    others = logits.scatter(-1, index, float("-inf")).logsumexp(dim=-1)
    return logits.gather(-1, index).squeeze(-1) - others, asked
