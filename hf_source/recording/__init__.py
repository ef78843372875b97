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
"""What training leaves behind: the trainer that records, and the record."""

from .config import SourceConfig
from .diffusion import SourceDiffusionTrainer
from .names import canonical_name
from .optimizers import CombinedOptimizer
from .reading.record import TrainingRecord
from .reading.replay import replay
from .reading.segment import SegmentRecord
from .reading.stage import StageRecord
from .reading.steps import MicroBatch, StepTable
from .rows.streams import number_rows
from .trainer import RecordingMixin, SourceTrainer


__all__ = [
    "CombinedOptimizer",
    "MicroBatch",
    "RecordingMixin",
    "SegmentRecord",
    "SourceConfig",
    "SourceDiffusionTrainer",
    "SourceTrainer",
    "StageRecord",
    "StepTable",
    "TrainingRecord",
    "canonical_name",
    "number_rows",
    "replay",
]
