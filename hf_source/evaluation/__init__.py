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
"""Evidence: does a score say what retraining would show?"""

from .agreement import Agreement, agreement
from .cache import RetrainingCache
from .estimate import Estimate, bootstrap, mean_estimate
from .evaluate import evaluate
from .experiments import Experiment
from .lds import LDS, linear_datamodelling_score, removal_masks
from .leave_one_out import LeaveOneOut, leave_one_out
from .mislabelled import Mislabelled, corrupt_labels, find_mislabelled
from .protocol import Retraining
from .protocols import PROTOCOLS, LDSProtocol
from .removal import Removal, subset_removal
from .report import Entry, Report
from .retraining import losses_of, retrain, retrain_in_chunks
from .retrieval import Retrieval, retrieval
from .stacked import StackedRetraining
from .tail_patch import TailPatch, tail_patch
from .trained import TrainerRetraining


__all__ = [
    "LDS",
    "PROTOCOLS",
    "Agreement",
    "Entry",
    "Estimate",
    "Experiment",
    "LDSProtocol",
    "LeaveOneOut",
    "Mislabelled",
    "Removal",
    "Report",
    "Retraining",
    "RetrainingCache",
    "Retrieval",
    "StackedRetraining",
    "TailPatch",
    "TrainerRetraining",
    "agreement",
    "bootstrap",
    "corrupt_labels",
    "evaluate",
    "find_mislabelled",
    "leave_one_out",
    "linear_datamodelling_score",
    "losses_of",
    "mean_estimate",
    "removal_masks",
    "retrain",
    "retrain_in_chunks",
    "retrieval",
    "subset_removal",
    "tail_patch",
]
