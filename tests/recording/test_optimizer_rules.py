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
"""Every optimizer's rule against what the optimizer does to real weights.

A rule claims `update_j = -eta_j sum over k of kappa(j, k) P_j g_k`. `P` is a function of the second moments alone, so
with the moments frozen the response of the update to a change of one gradient is exactly linear, and is checked by
this equation, at every step including the first, on gradients of very different sizes.
"""

import copy

import numpy as np
import pytest
import torch
from optimizers import RATES, before_update, describe, give_gradients, preconditioner, run, weights
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop
from transformers.optimization import Adafactor as TransformersAdafactor

from hf_source.recording.optimizers import build_optimizer, rule_named
from hf_source.recording.reading.momentum import applied_learning_rate
from hf_source.recording.segments import SegmentAccumulator


STEPS = len(RATES)
FAMILIES = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgd dampening": lambda p: SGD(p, lr=0.1, momentum=0.7, dampening=0.3),
    "sgd nesterov": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "sgd nesterov foreach": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, foreach=True),
    "adam": lambda p: Adam(p, betas=(0.8, 0.95), eps=1e-3),
    "adamw fused": lambda p: AdamW(p, betas=(0.8, 0.95), weight_decay=0.0, fused=True),
    "amsgrad": lambda p: AdamW(p, betas=(0.8, 0.6), weight_decay=0.0, amsgrad=True),
    "nadam": lambda p: NAdam(p, betas=(0.8, 0.95), eps=1e-3, momentum_decay=0.3),
    "nadam foreach": lambda p: NAdam(p, betas=(0.8, 0.95), foreach=True),
    "radam": lambda p: RAdam(p, betas=(0.8, 0.95), eps=1e-2),  # rectified from step 6 on
    "radam foreach": lambda p: RAdam(p, betas=(0.8, 0.95), eps=1e-2, foreach=True),
    "rmsprop": lambda p: RMSprop(p, alpha=0.8, eps=1e-3),
    "rmsprop momentum": lambda p: RMSprop(p, alpha=0.8, momentum=0.7),
    "rmsprop centered": lambda p: RMSprop(p, alpha=0.8, momentum=0.7, centered=True),
    "adagrad": lambda p: Adagrad(p, eps=1e-3),
    "adafactor": lambda p: Adafactor(p, weight_decay=0.0),
    "adafactor of small weights": lambda p: Adafactor(p, eps=(None, 5.0), weight_decay=0.0),
    "adafactor clipped": lambda p: Adafactor(p, d=1.0, beta2_decay=-0.1, eps=(0.3, 0.1), weight_decay=0.0),
    "adafactor foreach": lambda p: Adafactor(p, beta2_decay=-0.1, weight_decay=0.0, foreach=True),
    "hf adafactor": lambda p: TransformersAdafactor(p, lr=0.1, relative_step=False, scale_parameter=False),
    "hf adafactor scaled": lambda p: TransformersAdafactor(p, lr=0.1, relative_step=False, clip_threshold=0.4),
    "hf adafactor momentum": lambda p: TransformersAdafactor(
        p, lr=0.1, relative_step=False, scale_parameter=False, beta1=0.7
    ),
    "hf adafactor relative": lambda p: TransformersAdafactor(p, clip_threshold=0.4, warmup_init=True),
    "adagrad decay": lambda p: Adagrad(p, lr_decay=0.2, initial_accumulator_value=0.5),
}
DECAYS = {
    "sgd": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3), False),
    "adam": (lambda p: Adam(p, weight_decay=0.3), False),
    "adam decoupled": (lambda p: Adam(p, weight_decay=0.3, decoupled_weight_decay=True), True),
    "adamw": (lambda p: AdamW(p, weight_decay=0.3), True),
    "nadam": (lambda p: NAdam(p, weight_decay=0.3), False),
    "nadam decoupled": (lambda p: NAdam(p, weight_decay=0.3, decoupled_weight_decay=True), True),
    "radam": (lambda p: RAdam(p, weight_decay=0.3), False),
    "radam decoupled": (lambda p: RAdam(p, weight_decay=0.3, decoupled_weight_decay=True), True),
    "rmsprop": (lambda p: RMSprop(p, weight_decay=0.3), False),
    "adagrad": (lambda p: Adagrad(p, weight_decay=0.3), False),
    "adafactor": (lambda p: Adafactor(p, weight_decay=0.3), True),
    "hf adafactor": (
        lambda p: TransformersAdafactor(p, lr=0.1, relative_step=False, scale_parameter=False, weight_decay=0.3),
        True,
    ),
}
# NAdam keeps the product of its momenta in float32.
TOLERANCE = {"nadam": 1e-5, "nadam foreach": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_the_shares_of_the_gradients_through_the_preconditioner(family):
    parameters = weights((4, 3), (5,))
    optimizer = FAMILIES[family](parameters)
    (group,) = describe(optimizer, parameters).groups
    updates, gradients, scales = run(optimizer, parameters)
    skipped, rates = np.zeros(STEPS, dtype=bool), np.array(RATES)
    if "relative" in family:
        rates = 1e-6 * np.arange(1, STEPS + 1)
    for step in range(STEPS):
        rate = applied_learning_rate(group, rates, skipped, step, step + 1)  # eta_j kappa(j, k), by k
        for index, update in enumerate(updates[step]):
            expected = torch.zeros_like(update)
            for k in range(step + 1):
                scale = scales[k if group.how.buffers_steps else step][index]
                expected -= rate[k] * scale * gradients[k][index]
            largest = float(expected.abs().max()) or 1.0
            tolerance = TOLERANCE.get(family, 1e-12)  # rounding of sums of nine terms
            torch.testing.assert_close(update, expected, rtol=0, atol=tolerance * largest + 1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_gradient_moves_the_weights_by_the_sum_of_its_shares(family):
    """Of a gradient early in a long run: the shares over all updates, in units of `P`, add up to 1."""
    parameters = weights((3,))
    (group,) = describe(FAMILIES[family](parameters), parameters).groups
    rates = np.ones(400)
    skipped = np.zeros(400, dtype=bool)
    skipped[7] = True
    total = applied_learning_rate(group, rates, skipped, 0, 400)
    assert total[7] == 0
    if "nadam" not in family:  # its shares are those of two momenta and add up to about 1
        np.testing.assert_allclose(total[60:200], 1, rtol=2e-3)
    else:
        assert abs(total[60:200] - 1).max() < 0.15


@pytest.mark.parametrize("case", DECAYS)
def test_weight_decay_acts_as_described(case):
    make, decoupled = DECAYS[case]
    (parameter,) = weights((5,))
    optimizer = make([parameter])
    (group,) = describe(optimizer, [parameter]).groups
    assert group.weight_decay == 0.3 and group.decoupled_weight_decay is decoupled
    give_gradients([parameter], seed=1)
    before, gradient = parameter.detach().clone(), parameter.grad.clone()
    optimizer.param_groups[0]["lr"] = 0.1
    note = before_update(optimizer, parameter)
    optimizer.step()
    if not decoupled:
        gradient = gradient + 0.3 * before
    share = applied_learning_rate(group, np.array([0.1]), np.zeros(1, dtype=bool), 0, 1)[0]
    expected = before - share * preconditioner(optimizer, parameter, note) * gradient
    expected = expected - 0.1 * 0.3 * before if decoupled else expected
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6 if "nadam" in case else 1e-12, atol=0)


@pytest.mark.parametrize("case", [*FAMILIES, *(f"decay {case}" for case in DECAYS)])
def test_a_rebuilt_optimizer_makes_the_same_updates(case):
    make = DECAYS[case.removeprefix("decay ")][0] if case.startswith("decay ") else FAMILIES[case]
    original = weights((4, 3), (5,))
    copies = [copy.deepcopy(p) for p in original]
    first = make(original)
    second = build_optimizer(describe(first, original), dict(zip("ab", copies, strict=True)))
    assert type(second) is type(first)
    run(first, original)
    run(second, copies)  # with the learning rates set anew at each step, as a replay sets them
    for a, b in zip(original, copies, strict=True):
        # The same operations, in another order where one of them is fused.
        torch.testing.assert_close(a, b, rtol=1e-13 if not TOLERANCE.get(case) else 1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 4])
def test_accumulated_preconditioner_is_the_weighted_sum(monkeypatch, family, chunk):
    """Chunked or not, with a parameter that lacks its gradient now and then, and across a resume."""
    if chunk is not None:
        monkeypatch.setattr("hf_source.recording.segments._CHUNK", {"cpu": chunk})
    parameters, names = weights((4, 3), (5,)), "ab"
    optimizer = FAMILIES[family](parameters)
    description = describe(optimizer, parameters)

    def accumulator():
        return SegmentAccumulator(dict(zip(names, parameters, strict=True)), optimizer, description)

    sums = accumulator()
    expected = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    total = 0.0
    for step, rate in enumerate(RATES):
        give_gradients(parameters, seed=step)
        if step in (1, 2):
            parameters[1].grad = None
        optimizer.param_groups[0]["lr"] = rate
        before = [before_update(optimizer, p) for p in parameters]
        sums.before_update(rate, 0.5)
        optimizer.step()
        sums.after_update(rate, [rate], 0.5, skipped=False)
        total += 0.5 * rate
        for name, parameter, note in zip(names, parameters, before, strict=True):
            if parameter.grad is not None:
                expected[name] += 0.5 * rate * preconditioner(optimizer, parameter, note)
        if step == 5:
            tensors, scalars = copy.deepcopy(sums.state())
            sums = accumulator()
            sums.load_state(tensors, scalars)
    _, scale = sums.close()
    for name in names:
        found = scale[name].expand(expected[name].shape)
        torch.testing.assert_close(found, expected[name] / total, rtol=1e-12, atol=0)


def test_a_record_of_an_unknown_optimizer_says_who_can_read_it():
    from hf_source.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="optimizer Sophia, which this hf_source does not know"):
        rule_named("Sophia")
