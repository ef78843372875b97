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

from .cache import RetrainingCache
from .evaluate import evaluate
from .lds import LDS, linear_datamodelling_score, removal_masks
from .protocol import Retraining
from .protocols import PROTOCOLS, LDSProtocol
from .report import Entry, Report
from .retraining import losses_of, retrain, retrain_in_chunks
from .retrieval import Retrieval, retrieval
from .stacked import StackedRetraining


__all__ = [
    "LDS",
    "PROTOCOLS",
    "LDSProtocol",
    "Entry",
    "Report",
    "Retraining",
    "RetrainingCache",
    "Retrieval",
    "StackedRetraining",
    "evaluate",
    "linear_datamodelling_score",
    "losses_of",
    "removal_masks",
    "retrain",
    "retrain_in_chunks",
    "retrieval",
]
