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
"""When a gradient really moves the weights: momentum spreads it over the steps that follow.

The update of step `j` holds the share `kappa(j, k)` of the gradient of step `k <= j`, which the rule of the optimizer
tells (`optimizers/`). For Adam it is `(1 - beta1) beta1^(j - k) / (1 - beta1^t)` with `t` the number of updates made
by then: the bias correction gives the first gradients several times the weight of later ones, and what training's end
cuts off from the last gradients is lost.

So a visit's weight in a segment is `c_k / N_k * sum over steps j of the segment of eta_j kappa(j, k)`, which is
`eta_k c_k / N_k` without momentum. In short runs the difference decides the ranking of rows.

An optimizer that goes on from an earlier stage (`train()` called again) counts its updates from there. What its
momentum still carries of that stage's last gradients is not credited to that stage's rows. A parameter that was frozen
for some steps is weighed as if its momentum had run on: a row has one weight for all parameters.
"""

import numpy as np

from ..optimizers import GroupDescription


# Shares of a gradient below this are rounding.
_NEGLIGIBLE = 1e-9


def applied_learning_rate(
    group: GroupDescription,
    learning_rate: np.ndarray,
    skipped: np.ndarray,
    first_step: int,
    end_step: int,
    updates_before: int = 0,
) -> np.ndarray:
    """Learning rate with which each step's gradient is applied by the updates of a segment.

    Args:
        group: the optimizer's (first) group.
        learning_rate: `eta`, float64 `[steps]`.
        skipped: bool `[steps]`; a skipped step leaves the momentum as it is.
        first_step, end_step: the segment's updates, `first_step <= j < end_step`.
        updates_before: updates that the optimizer had made when the stage began.

    Returns:
        `sum over j of eta_j kappa(j, k)`, float64 `[end_step]`: for the segment's own steps and those before it.
    """
    skipped = skipped[:end_step]
    made = np.maximum(updates_before + np.cumsum(~skipped), 1)
    shares = group.how.shares(group.constants, made)
    rates = np.where(skipped, 0.0, 1.0 if shares.own_rate else learning_rate[:end_step])
    rates[:first_step] = 0.0
    through_buffer, directly = rates * shares.carried, rates * shares.own
    result, carried = np.zeros(end_step), 0.0
    for step in range(end_step - 1, -1, -1):
        if skipped[step]:
            continue
        carried = through_buffer[step] + shares.beta * carried
        result[step] = carried + directly[step]
        if step < first_step and carried < _NEGLIGIBLE * through_buffer.max():
            break
    if shares.own_rate:
        result *= learning_rate[:end_step]
    return np.where(made == 1, shares.first, 1.0) * result
