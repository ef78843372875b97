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
"""A few weights in a few steps of the record: enough to see whether a short replay goes the way that training went.

After 1, 2, 4, 8, ... steps, the record holds of every trained tensor its sum and some entries, float64. Both are
linear, so those of a segment's average weights are the average of those of its steps.
"""

from collections.abc import Mapping, Sequence

import torch


_ENTRIES = 256
"""Entries per sample, over all tensors; at least one of each tensor."""


def is_sampled(num_steps: int) -> bool:
    """Whether the weights after so many steps are sampled."""
    return num_steps > 0 and num_steps & (num_steps - 1) == 0


@torch.no_grad()
def sample_weights(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Sum and evenly spread entries of each tensor.

    Args:
        tensors: trained weights, in the order of `stage.trainable`.

    Returns:
        float64 `[values]` on the CPU; `None` if there is no tensor (on processes that do not write).
    """
    if not tensors:
        return None
    each = max(1, _ENTRIES // len(tensors))
    values = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(each, flat.numel()), dtype=torch.float64).long()
        values += [flat.sum(dtype=torch.float64)[None], flat[places.to(flat.device)].double()]
    return torch.cat(values).cpu()


def sample_of(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """`sample_weights` of weights by name."""
    return sample_weights([weights[name] for name in names])
