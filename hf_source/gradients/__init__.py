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
"""Per-row gradients of every trainable parameter."""

from .diffusion import DiffusionTask
from .heads import ClassificationTask, HeadTask, MultiLabelTask, QuestionAnsweringTask, RegressionTask
from .measurement import (
    MEASUREMENTS,
    AbsoluteError,
    LogitDifference,
    LogProbability,
    Loss,
    Margin,
    Measurement,
    describe_measurement,
    make_measurement,
    measured,
)
from .preference import DPOTask, PairTask, RewardTask
from .rows import Pass, RowGradients
from .selection import is_known, task_for
from .signs import PROBES, SignedTask, curvature_task
from .speech import CTCTask
from .task import (
    CausalLMTask,
    RowLayout,
    RowLossTask,
    Seq2SeqTask,
    Task,
    batch_to,
    labels_of,
    refuse_incomplete,
    task_labels,
)


__all__ = [
    "CTCTask",
    "QuestionAnsweringTask",
    "AbsoluteError",
    "CausalLMTask",
    "ClassificationTask",
    "DPOTask",
    "DiffusionTask",
    "HeadTask",
    "LogProbability",
    "LogitDifference",
    "Loss",
    "MEASUREMENTS",
    "Margin",
    "PROBES",
    "SignedTask",
    "curvature_task",
    "Measurement",
    "MultiLabelTask",
    "RegressionTask",
    "PairTask",
    "RewardTask",
    "Pass",
    "RowGradients",
    "RowLayout",
    "RowLossTask",
    "Seq2SeqTask",
    "Task",
    "batch_to",
    "describe_measurement",
    "is_known",
    "labels_of",
    "make_measurement",
    "measured",
    "refuse_incomplete",
    "task_for",
    "task_labels",
]
