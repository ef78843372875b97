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
"""What the number format of training does to a step: the clip factor as it was rounded."""

import torch


def clip_factor(norm: float | torch.Tensor, limit: float | None) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplied the gradients with.

    Args:
        norm: the gradient's norm before clipping. A tensor keeps the type in which the factor was computed: in
            bfloat16 it is rounded to 8 bits, up to 0.4 % off.
        limit: `max_grad_norm`; 0 or `None` for no clipping.
    """
    if not limit or limit <= 0:
        return 1.0
    factor = limit / (norm + 1e-6)
    return min(1.0, float(factor))
