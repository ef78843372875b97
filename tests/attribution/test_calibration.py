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
"""What `plan()` counts and measures, against what the work does."""

import oracles
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_source.attribution import calibration
from hf_source.attribution.cost import JointCost
from hf_source.curvature.joint import GRAM_BLOCK, add_gram
from hf_source.gradients import CausalLMTask, RowGradients


class Rows:
    """Rows of one length."""

    def __init__(self, length):
        self.lengths = torch.full((4,), length).numpy()

    def collated(self, numbers, device):
        """A batch of them."""
        return oracles.make_batch(tuple(int(self.lengths[number]) for number in numbers))


def bytes_per_token(model, names, length=5, count=4):
    """Of a batch, and of what the sample's columns hold of it."""
    gradients = RowGradients(model, CausalLMTask(), names)
    return calibration._bytes_per_token(gradients, Rows(length), list(range(count)), torch.device("cpu"))


def test_what_a_batch_holds_is_counted_once_and_in_proportion():
    model = oracles.SMALL_MODELS["gpt2"]()
    names = oracles.all_names(model)
    whole, columns = bytes_per_token(model, names)
    inputs = {
        id(module): module.weight.shape[0] for module in model.modules() if type(module).__name__ == "Conv1D"
    }  # what goes into every layer is kept
    assert 8 * sum(inputs.values()) < whole < 50 * 8 * sum(inputs.values())
    again, of_columns = bytes_per_token(model, names, count=2)
    assert again == pytest.approx(whole, rel=0.2) and of_columns == pytest.approx(columns, rel=0.2)


def test_layers_that_are_not_trained_hold_less():
    model = oracles.SMALL_MODELS["llama"]()
    names = oracles.all_names(model)
    last = [name for name in names if "layers.1" in name or "norm" in name][-1:]
    assert bytes_per_token(model, last)[0] < 0.8 * bytes_per_token(model, names)[0]


def test_columns_hold_what_goes_into_a_layer_and_its_gradient_once(monkeypatch):
    """Of two layers with one input, that is one input and two gradients, if factors take less than gradients."""
    model = oracles.SMALL_MODELS["llama"]()
    names = [name for name in oracles.all_names(model) if name.endswith("layers.0.mlp.gate_proj.weight")]
    both = [*names, *(name.replace("gate_proj", "up_proj") for name in names)]
    wide, narrow = model.get_submodule(names[0].removesuffix(".weight")).weight.shape
    monkeypatch.setattr(calibration, "holds_factored", lambda *call: True)
    assert bytes_per_token(model, names)[1] == 8 * (narrow + wide)
    assert bytes_per_token(model, both)[1] == 8 * (narrow + 2 * wide)
    monkeypatch.setattr(calibration, "holds_factored", lambda *call: False)
    assert bytes_per_token(model, both)[1] == 0


def test_operations_of_the_gram_matrix_are_those_that_are_done():
    rows = torch.zeros(2 * GRAM_BLOCK, 24)
    with FlopCounterMode(display=False) as counted:
        add_gram([rows], torch.zeros(len(rows), len(rows)))
    more, none = (JointCost(len(rows), 4, vectors, tail=False).of((4, 6), False) for vectors in (1, 0))
    moved = 40 * 8 * len(rows) * 24
    assert none - moved == counted.get_total_flops() < 2 * len(rows) ** 2 * 24
    assert more > none
