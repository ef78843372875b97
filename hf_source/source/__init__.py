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
"""The Source walk through segments and stages."""

from .products import DIRECTIONS_BYTES, ExactProducts, Products, SampledProducts
from .replay_cost import ReplayCost, replay_cost
from .self_influence import self_influence
from .stages import WalkSettings, wanted_parameters
from .together import Together
from .unrolled import refuse_inexact, refuse_other_runs, state_stride, unroll
from .walk import draw_sample, score_rows, segment_flow, walk
from .work import Work


__all__ = [
    "DIRECTIONS_BYTES",
    "ExactProducts",
    "Products",
    "ReplayCost",
    "SampledProducts",
    "Together",
    "WalkSettings",
    "Work",
    "draw_sample",
    "refuse_inexact",
    "refuse_other_runs",
    "replay_cost",
    "score_rows",
    "segment_flow",
    "self_influence",
    "state_stride",
    "unroll",
    "walk",
    "wanted_parameters",
]
