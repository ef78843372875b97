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
"""bitsandbytes' optimizers: 32-bit states like any other, 8-bit ones to the rounding of their state."""

import copy

import numpy as np
import pytest
import torch
from cases import distance, random_rows, tiny_llama, train
from optimizers import RATES, before_update, describe, give_gradients, preconditioner, run, weights

from hf_source.errors import UnsupportedError
from hf_source.recording import replay
from hf_source.recording.optimizers import build_optimizer
from hf_source.recording.optimizers.bitsandbytes import dequantised
from hf_source.recording.reading.momentum import applied_learning_rate
from hf_source.recording.segments import SegmentAccumulator


bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(autouse=True)
def no_overrides_of_earlier_runs():
    """The Trainer tells bitsandbytes' one manager which parameters to keep in 32 bits; it never forgets."""
    bnb.optim.GlobalOptimManager.get_instance().initialize()


IN_32_BITS = {
    "Adam": lambda p: bnb.optim.Adam(p, betas=(0.8, 0.95), eps=1e-3),
    "AdamW": lambda p: bnb.optim.AdamW(p, betas=(0.8, 0.95), weight_decay=0.0),
    "AdamW8bit with small parameters": lambda p: bnb.optim.AdamW8bit(p, betas=(0.8, 0.95), weight_decay=0.0),
    "PagedAdamW": lambda p: bnb.optim.PagedAdamW(p, betas=(0.8, 0.95), weight_decay=0.0),
    "PagedAdamW32bit": lambda p: bnb.optim.PagedAdamW32bit(p, weight_decay=0.0),
    "RMSprop": lambda p: bnb.optim.RMSprop(p, alpha=0.9),
    "Adagrad": lambda p: bnb.optim.Adagrad(p),
    "SGD": lambda p: bnb.optim.SGD(p, lr=0.1, momentum=0.8),
}
IN_8_BITS = {
    "AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, betas=(0.0, 0.95), weight_decay=0.0, min_8bit_size=16),
    "PagedAdamW8bit": lambda p: bnb.optim.PagedAdamW8bit(p, betas=(0.0, 0.9), weight_decay=0.0, min_8bit_size=16),
    "Adam optim_bits": lambda p: bnb.optim.Adam(p, betas=(0.0, 0.95), optim_bits=8, min_8bit_size=16),
    "RMSprop8bit": lambda p: bnb.optim.RMSprop8bit(p, alpha=0.9, min_8bit_size=16),
    "Adagrad8bit": lambda p: bnb.optim.Adagrad8bit(p, min_8bit_size=16),
}


@pytest.mark.parametrize("family", IN_32_BITS)
def test_updates_are_the_shares_of_the_gradients_through_the_preconditioner(family):
    parameters = weights((4, 3), (5,), dtype=torch.float32)
    optimizer = IN_32_BITS[family](parameters)
    (group,) = describe(optimizer, parameters).groups
    assert group.constants["eight_bit"] == []
    updates, gradients, scales = run(optimizer, parameters)
    for step in range(len(RATES)):
        rate = applied_learning_rate(group, np.array(RATES), np.zeros(len(RATES), dtype=bool), step, step + 1)
        for index, update in enumerate(updates[step]):
            expected = -sum(rate[k] * scales[step][index] * gradients[k][index] for k in range(step + 1))
            # The difference of two float32 weights of size 1.
            torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", IN_8_BITS)
def test_with_a_state_in_8_bits(family):
    """The moment of the update is that before its rounding, whatever was lost of the older ones."""
    parameters = weights((40, 30), (9,), dtype=torch.float32)
    optimizer = IN_8_BITS[family](parameters)
    (group,) = describe(optimizer, parameters).groups
    assert group.constants["eight_bit"] == ["a"]
    updates, gradients, scales = run(optimizer, parameters)
    assert describe(optimizer, parameters).groups == [group]  # once the state is there, it says the same
    assert optimizer.state[parameters[0]]["state1"].dtype == torch.uint8
    for step, rate in enumerate(RATES):
        for index, update in enumerate(updates[step]):
            expected = -rate * scales[step][index] * gradients[step][index]
            torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("piece", [None, slice(250, 530)])
def test_numbers_are_dequantised_as_bitsandbytes_does(piece):
    parameters = weights((40, 30), dtype=torch.float32)
    optimizer = IN_8_BITS["AdamW8bit"](parameters)
    run(optimizer, parameters)
    state = optimizer.state[parameters[0]]
    kept, absmax, code = state["state2"], state["absmax2"], state["qmap2"]
    expected = bnb.functional.dequantize_blockwise(kept, absmax=absmax, code=code, blocksize=256)
    expected = expected.view(40, 30) if piece is None else expected.view(-1)[piece]
    assert torch.equal(dequantised(kept, absmax, code, piece), expected)


def test_the_sum_over_steps_knows_the_moments_before_their_rounding(monkeypatch):
    monkeypatch.setattr("hf_source.recording.segments._CHUNK", {"cpu": 300})
    (parameter,) = weights((40, 30), dtype=torch.float32)
    optimizer = IN_8_BITS["AdamW8bit"]([parameter])
    sums = SegmentAccumulator({"a": parameter}, optimizer, describe(optimizer, [parameter]))
    expected = torch.zeros_like(parameter)
    for step, rate in enumerate(RATES):
        give_gradients([parameter], seed=step)
        optimizer.param_groups[0]["lr"] = rate
        note = before_update(optimizer, parameter)
        sums.before_update(rate, 1.0)
        optimizer.step()
        sums.after_update(rate, [rate], 1.0, skipped=False)
        expected += rate * preconditioner(optimizer, parameter, note)
    torch.testing.assert_close(sums.close()[1]["a"], expected / sum(RATES), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", [*IN_32_BITS, *IN_8_BITS])
def test_a_rebuilt_optimizer_makes_the_same_updates(case):
    make = IN_32_BITS.get(case) or IN_8_BITS[case]
    original = weights((40, 30), (5,), dtype=torch.float32)
    copies = [copy.deepcopy(p) for p in original]
    first = make(original)
    second = build_optimizer(describe(first, original), dict(zip("ab", copies, strict=True)))
    run(first, original)
    run(second, copies)
    assert all(torch.equal(a, b) for a, b in zip(original, copies, strict=True))


@pytest.mark.parametrize(
    ("settings", "eight_bit"),
    [
        ({"optim": "adamw_bnb_8bit"}, True),
        ({"optim": "paged_adamw_8bit"}, True),
        ({"optim": "paged_adamw_32bit"}, False),
        ({"optim": "rmsprop_bnb_8bit", "learning_rate": 1e-3}, True),
    ],
)
def test_a_recorded_run_replays(tmp_path, settings, eight_bit):
    """Large enough that its matrices are kept in 8 bits; the Trainer keeps embeddings in 32."""
    model = tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=80)
    _, record = train(tmp_path, model, **settings)
    stage = record.stage()
    kept = {name for group in stage.groups for name in group.constants["eight_bit"]}
    assert ("model.layers.1.mlp.up_proj.weight" in kept) == eight_bit
    assert "model.embed_tokens.weight" not in kept and model.model.embed_tokens.weight.numel() > 4096
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, random_rows()).named_parameters())
    moved = distance(stage.weights("initial"), final)
    # In float32, and roundings of a state amplify the rounding of a gradient.
    assert moved > 0.1 and distance(again, final) <= 0.02 * moved
    for segment in stage.segments:
        assert all(torch.isfinite(scale).all() for scale in segment.preconditioner().values())


def test_settings_that_a_record_cannot_hold_are_refused():
    parameters = weights((40, 30), dtype=torch.float32)
    optimizer = bnb.optim.AdamW(parameters)
    optimizer.args.max_unorm = 1.0
    with pytest.raises(UnsupportedError, match="max_unorm.* norm. Leave max_unorm out"):
        describe(optimizer, parameters)
    optimizer = bnb.optim.AdamW(parameters)
    optimizer.mng.pid2config[id(parameters[0])] = {"lr": 0.5}
    with pytest.raises(UnsupportedError, match=r"overrides \['lr'\] of single parameters"):
        describe(optimizer, parameters)
    del optimizer.mng.pid2config[id(parameters[0])]
    with pytest.raises(UnsupportedError, match="Lion cannot be attributed: it steps by the sign of its momentum"):
        describe(bnb.optim.Lion(parameters), parameters)
