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

import importlib

import oracles
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_source import budget
from hf_source.attribution import calibration
from hf_source.attribution.cost import JointCost
from hf_source.curvature.columns import Columns, Narrowed, column_bytes, holds_factored
from hf_source.curvature.joint import GRAM_BLOCK, add_gram
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.gradients.rules import Call, linear_weight


replay_cost = importlib.import_module("hf_source.source.replay_cost")  # the package has a function of that name


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


def test_a_narrow_type_decides_what_is_held_factored():
    """Four tokens of 8 + 8 numbers take as much as a matrix of 64 of them, and half of it in bfloat16."""
    call = Call(None, (torch.zeros(2, 4, 8),), {}, (), (torch.zeros(2, 4, 8),))
    parameter = torch.zeros(8, 8)
    assert not holds_factored(linear_weight, call, 2, parameter)
    assert holds_factored(linear_weight, call, 2, parameter, torch.bfloat16)
    wide, narrow = Columns(2, parameter, 1.0, 2**20), Columns(2, parameter, 1.0, 2**20, Narrowed(torch.bfloat16))
    for columns in (wide, narrow):
        columns.add(slice(0, 2), linear_weight, call)
    assert wide.dense is not None and narrow.dense is None
    expected = column_bytes(parameter, 2, 8, [linear_weight], torch.bfloat16)
    assert sum(part.call.input.nbytes + part.call.grad.nbytes for part in narrow.parts) == expected


@pytest.mark.skipif(budget._malloc_trim() is None, reason="no glibc")
def test_memory_that_was_freed_in_small_pieces_goes_back_to_the_system():
    kept = [torch.ones(2**16) for _ in range(2 * 400)]  # 256 KiB each
    before = budget.held_by_process()
    del kept[::2]  # every other one, so that no end of the heap comes free
    held = budget.held_by_process()
    budget.give_back(now=False)  # has the process grown since the last time?
    budget.give_back()
    assert before - budget.held_by_process() > 0.8 * 100 * 2**20 > before - held
    assert float(sum(each.sum() for each in kept)) == 400 * 2**16


def test_a_long_step_of_a_replay_is_timed_once(monkeypatch):
    spent = iter([0.0, 2.0, 10.0, 10.1, 20.0, 20.1])
    monkeypatch.setattr(replay_cost, "clock", lambda device: next(spent))
    assert replay_cost._shortest(lambda: None, torch.device("cpu")) == 2.0
    assert replay_cost._shortest(lambda: None, torch.device("cpu")) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("rank", "factored", "narrow", "expected"),
    [
        (8, False, False, 15 * 8**3 + 4 * 8**2 * 600),
        (300, False, True, 15 * 300**3 + 4 * 300**2 * 600),
        (400, False, False, 15 * 600**3),
        (400, False, True, 15 * 600**3 * 0.5),
        (8, True, False, 15 * 600**3 * 0.05),
        (64, True, False, 15 * 600**3 * 0.5),
    ],
)
def test_directions_of_a_side_are_no_more_than_its_gradients_have_rows(rank, factored, narrow, expected):
    """An adapter's long side: all of its directions are looked for only where there may be as many."""
    own = JointCost(rank // 4, 16, 0, narrow=narrow)
    whole = JointCost(rank // 4, 16, 0, tail=False, narrow=narrow)
    eigen = own.of((4, 600), factored) - whole.of((4, 600), factored) - rank // 4 * 4 * 2400 * 604
    assert eigen == pytest.approx(expected + 15 * 4**3)


@pytest.mark.parametrize(
    ("seconds", "left"), [(0.002, [[0, 1, 2], [1, 2, 3], [2, 3]]), (2.5, [[1, 2, 3]]), (90, [[1, 2]])]
)
def test_a_timing_takes_no_longer_than_it_may(monkeypatch, seconds, left):
    """Two rows take so long; of a batch of a large model a few rows are timed, and at least two."""
    times, asked = iter([0.0, seconds]), []
    monkeypatch.setattr(calibration, "clock", lambda device: next(times))
    chosen = [[0, 1, 2], [1, 2, 3], [2, 3]]
    assert calibration._affordable(asked.append, Rows(5), chosen, torch.device("cpu")) == left
    assert [len(batch["input_ids"]) for batch in asked] == [2, 2]  # a warm-up, and what was timed
