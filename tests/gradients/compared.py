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

"""Per-row gradients beside autograd's, for the tests of what the engine cannot take apart."""

import oracles
from torch import nn

from hf_source.gradients import CausalLMTask, RowGradients


def engine(model: nn.Module) -> RowGradients:
    return RowGradients(model.double(), CausalLMTask(), oracles.all_names(model))


def worst_error(gradients: RowGradients, batch) -> float:
    """Largest difference to autograd over all rows and parameters, relative to the largest gradient."""
    names = list(gradients.parameters)
    reference = oracles.split(
        oracles.row_gradients(oracles.trainable(gradients.model), names, batch), gradients.model, names
    )
    scale = max(abs(block).max() for block in reference.values())
    blocks = list(gradients.blocks(gradients.run(batch)))
    assert sum(rows.stop - rows.start for _, rows, _ in blocks) == len(batch["input_ids"]) * len(names)
    return max(
        float(abs(block.reshape(len(block), -1).numpy() - reference[name][rows]).max()) / scale
        for name, rows, block in blocks
    )
