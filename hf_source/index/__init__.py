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
"""An index of a record on disk: new queries are answered without another pass over the rows."""

from .build import NUMBERS, build_index
from .coordinates import Coordinates
from .planning import plan_index
from .responses import Responses
from .search import SourceIndex, index_scores, refuse_unfit


__all__ = [
    "NUMBERS",
    "Coordinates",
    "Responses",
    "SourceIndex",
    "build_index",
    "index_scores",
    "plan_index",
    "refuse_unfit",
]
