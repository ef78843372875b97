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
"""Random signs in the place of labels drawn from the model: the same curvature on average, with less noise.

The Hessian of a softmax's loss in its logits is `diag(p) - p p^T`. The gradient `p - e_y` of a label `y ~ p` has that
covariance, but where the model is sure, nearly all labels are the likely one and say nothing, and rare ones say all of
it at once. With `s = sqrt(p)` and signs `x` of all classes, which are uncorrelated,

    z = s * x - p <s, x> = diag(s) (1 - s s^T) x

has the same covariance, as `s` has length 1, and every draw says something of every class. (Probes of random signs are
those of Hutchinson 1990, doi 10.1080/03610919008812866.)

A draw has to be made again in later passes. What is kept of it is one number per label, a code of 62 random bits. The
sign of class `c = j k + l` is that of bit sums, `(-1)^(|code & R_j| + |code & Q_l|)` with fixed random masks `R` and
`Q`, `k` of them each: signs of two classes are independent as long as no two classes have the same mask `R_j xor Q_l`.
"""

import functools

import torch

from ..data import IGNORE_INDEX
from .heads import ClassificationTask, QuestionAnsweringTask
from .task import Batch, CausalLMTask, RowLossTask, Seq2SeqTask, Task


PROBES = ("labels", "signs")
"""What sampled gradients are drawn with."""

_BITS = 62
_SOFTMAX = (CausalLMTask, Seq2SeqTask, ClassificationTask, QuestionAnsweringTask)


def curvature_task(task: Task, probes: str = "labels") -> Task:
    """The task whose drawn labels give the Gauss-Newton matrix of a task's loss.

    Args:
        task: as trained; a smoothed cross-entropy has the curvature of the plain one.
        probes: `"labels"` from the model, or `"signs"`, for losses that are the cross-entropy of a softmax. Others,
            and losses of one's own, draw labels as ever.
    """
    plain = task.unsmoothed() if isinstance(task, RowLossTask) else task
    # Exactly these: a subclass may have another loss.
    return SignedTask(plain) if probes == "signs" and type(plain) in _SOFTMAX else plain


class SignedTask(RowLossTask):
    """A task whose labels are codes of signs, and whose loss is `<logits, z>`: its gradient in the logits is `z`.

    Args:
        task: of a softmax, whose predictions it has.
    """

    def __init__(self, task: RowLossTask) -> None:
        self.task = task
        self.sequences_per_row = task.sequences_per_row

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of a batch."""
        return self.task.forward(model, batch)

    def labels(self, batch: Batch) -> torch.Tensor:
        """The task's own labels, which say where codes are drawn."""
        return self.task.labels(batch)

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Loss items of each row, of labels and of codes."""
        return self.task.num_items(labels)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Codes, int64, negative and below -100; shape and masking of `labels`."""
        codes = torch.randint(0, 2**_BITS, labels.shape, generator=generator).to(labels.device)
        return torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX - 1 - codes)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`<logits, z>` of each row, `[rows]`."""
        logits, codes = self.task.predictions(outputs, labels)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return (logits * directions(logits.detach(), codes)).flatten(1).sum(dim=1)


@torch.no_grad()
def directions(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`z` of every label, of the shape of the logits `[..., classes]`; 0 where there is none.

    Args:
        logits: of the model.
        codes: int64 `[...]` of `SignedTask.sample_labels`.
    """
    probability = logits.softmax(dim=-1)
    found = signs(IGNORE_INDEX - 1 - codes, logits.shape[-1]).to(probability).mul_(probability.sqrt())
    found -= probability * found.sum(dim=-1, keepdim=True)
    return found.mul_((codes != IGNORE_INDEX)[..., None])


def signs(codes: torch.Tensor, classes: int) -> torch.Tensor:
    """Signs of all classes, int8 `[..., classes]`, by codes `[...]`."""
    left, right = (masks.to(codes.device) for masks in _masks(classes))
    rows, columns = (1 - 2 * _parity(codes[..., None] & masks).to(torch.int8) for masks in (left, right))
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)[..., :classes]


@functools.lru_cache
def _masks(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    side = max(1, round(classes**0.5))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(1, 2**_BITS, (size,), generator=generator) for size in (-(-classes // side), side))


def _parity(bits: torch.Tensor) -> torch.Tensor:
    """Whether the number of bits set is odd."""
    for shift in (32, 16, 8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return bits & 1
