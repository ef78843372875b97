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
"""The task of a recorded stage: chosen by what the record says about its loss, or refused with the way out."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedError
from .diffusion import DiffusionTask
from .heads import ClassificationTask, MultiLabelTask, QuestionAnsweringTask, RegressionTask
from .preference import DPOTask, RewardTask
from .speech import CTCTask
from .task import CausalLMTask, Seq2SeqTask, Task


IN_BATCH = "in_batch"
"""`loss["kind"]` of losses between the rows of a batch: none of them has a loss of its own, whoever asks."""

TASKS: dict[str, Callable[[Mapping[str, Any]], Task]] = {
    "causal_lm": lambda settings: CausalLMTask(**settings),
    "seq2seq_lm": lambda settings: Seq2SeqTask(**settings),
    "reward": RewardTask,
    "dpo": DPOTask,
    "diffusion": lambda settings: DiffusionTask(**settings),
    "ctc": lambda settings: CTCTask(**settings),
    "question_answering": lambda settings: QuestionAnsweringTask(**settings),
    "classification": lambda settings: ClassificationTask(**settings),
    "multi_label": lambda settings: MultiLabelTask(**settings),
    "regression": lambda settings: RegressionTask(**settings),
}
"""`loss["kind"]` of a stage to the task it trained on; called with the loss's recorded settings."""


HEADS = ("ctc", "question_answering", "classification", "multi_label", "regression")
"""Tasks that are recognised by what the model's head computes of the first batch, in the order they are tried."""


def _reason(stage: Any) -> str | None:
    """Why the loss of a row is not known, in words."""
    loss = stage.loss
    if loss.get("reason") or loss["custom_function"]:
        return loss.get("reason") or "it trained with a compute_loss_func"
    return None if loss["kind"] in TASKS else f"its kind is {loss['kind']}"


def is_known(stage: Any) -> bool:
    """Whether the record says what the loss of a row is."""
    return _reason(stage) is None


def task_for(stage: Any) -> Task:
    """The task of a stage.

    Args:
        stage: a `StageRecord`.

    Raises:
        UnsupportedError: if the loss of a row is not known; the message holds the lines that say what it is.
    """
    reason = _reason(stage)
    if reason is None:
        return TASKS[stage.loss["kind"]](stage.loss.get("settings", {}))
    if stage.loss["kind"] == IN_BATCH:
        raise UnsupportedError(f"The rows of stage {stage.name!r} cannot be attributed: {reason}.")
    raise UnsupportedError(
        f"The loss of a row in stage {stage.name!r} is not known ({reason}), so its rows cannot be "
        "attributed before you say what it is:\n\n"
        "    from hf_source import RowLossTask\n\n"
        "    class MyTask(RowLossTask):\n"
        "        def forward(self, model, batch): return model(**batch).logits\n"
        "        def row_losses(self, outputs, labels): return ...  # one number for each row, summed over items\n\n"
        "and pass `task=MyTask()` (and the Trainer's `data_collator=`, if it has one of its own). If the Trainer's "
        "loss is the model's next-token loss after all, pass `task=CausalLMTask()`."
    )
