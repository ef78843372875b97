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
"""The preconditioner against what real torch optimizers do to real weights."""

import copy

import pytest
import torch
from optimizers import preconditioner
from torch.optim import SGD, Adam, AdamW

from hf_source.errors import UnsupportedError
from hf_source.recording.optimizers import build_optimizer, describe_optimizer
from hf_source.recording.segments import SegmentAccumulator


def weights(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(parameters, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3},
    ],
)
def test_sgd_preconditioner_is_the_total_effect_of_one_gradient(constants):
    """Perturb the gradient of one step in mid-run and add up, over the rest of the run, what it moved."""
    (base,) = weights((5,))
    impulse = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    ends = []
    for bump in (0, 1):
        parameter = torch.nn.Parameter(base.detach().clone())
        optimizer = SGD([parameter], lr=0.1, **constants)
        for step in range(400):
            give_gradients([parameter], seed=step)
            if step == 3:
                parameter.grad += bump * impulse
            optimizer.step()
        ends.append(parameter.detach().clone())
    found = preconditioner(optimizer, parameter)
    assert found.ndim == 0
    torch.testing.assert_close(ends[1] - ends[0], -0.1 * found * impulse, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_preconditioner_is_the_step_of_adam_without_momentum(kind, flags):
    """With beta1 = 0, one update is exactly `-lr P g` plus the decay, at every step including the first."""
    parameters = weights((4, 3), (7,))
    optimizer = kind(parameters, lr=0.01, betas=(0.0, 0.95), eps=1e-3, weight_decay=0.0, **flags)
    for step in range(4):
        give_gradients(parameters, seed=step)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        for old, parameter in zip(before, parameters, strict=True):
            scale = preconditioner(optimizer, parameter)
            torch.testing.assert_close(parameter.detach() - old, -0.01 * scale * parameter.grad, rtol=1e-7, atol=1e-12)


def test_entries_that_never_had_a_gradient_have_no_preconditioner():
    (parameter,) = weights((3,))
    optimizer = Adam([parameter], lr=0.1)
    assert preconditioner(optimizer, parameter).eq(0).all()
    parameter.grad = torch.tensor([0.0, 1.0, -1e-3], dtype=torch.float64)
    optimizer.step()
    found = preconditioner(optimizer, parameter)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1e3], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("chunk", "on_cpu"), [(None, False), (4, False), (1, False), (4, True)])
def test_accumulated_preconditioner_is_the_weighted_sum(monkeypatch, chunk, on_cpu):
    """Whatever the chunks, groups, missing gradients and zero gradients: the same as one tensor at a time."""
    if chunk is not None:
        monkeypatch.setattr("hf_source.recording.segments._CHUNK", {"cpu": chunk})
    parameters = weights((5, 3), (2, 2), (3,), (6,))
    parameters[0] = torch.nn.Parameter(parameters[0].detach().t())  # not contiguous: cannot be cut
    names = ["a", "b", "c", "d"]
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.02, "betas": (0.9, 0.9)}]
    optimizer = AdamW(groups)
    give_gradients(parameters, seed=99)
    optimizer.step()  # moments that exist before recording starts
    description = describe_optimizer(optimizer, dict(zip(parameters, names, strict=True)))
    accumulator = SegmentAccumulator(dict(zip(names, parameters, strict=True)), optimizer, description, on_cpu)
    expected = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    expected_theta = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    rates, total = ([0.1, 0.02], [0.0, 0.03], [0.05, 0.01]), 0.0
    for step, (rate, clip) in enumerate(zip(rates, (1.0, 0.5, 0.25), strict=True)):
        give_gradients(parameters, seed=step)
        parameters[3].grad[0] = 0
        if step == 1:
            parameters[1].grad = None
        for group, value in zip(optimizer.param_groups, rate, strict=True):
            group["lr"] = value
        accumulator.before_update(max(rate), clip)
        for name, parameter in zip(names, parameters, strict=True):
            expected_theta[name] += max(rate) * clip * parameter.detach()
        optimizer.step()
        accumulator.after_update(max(rate), rate, clip, skipped=False)
        total += max(rate) * clip
        for name, parameter in zip(names, parameters, strict=True):
            if parameter.grad is not None:
                group = 0 if name in "ab" else 1
                scale = preconditioner(optimizer, parameter)
                expected[name] += rate[group] * clip * scale
    theta, scale = accumulator.close()
    assert accumulator.effective_learning_rate_sum == pytest.approx(total)
    for name in names:
        torch.testing.assert_close(scale[name], expected[name] / total, rtol=1e-12, atol=0)
        torch.testing.assert_close(theta[name], expected_theta[name] / total, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("optimizer", "copies"), [(AdamW, 2), (SGD, 1)])
def test_recording_holds_at_most_two_copies_of_the_parameters(optimizer, copies):
    parameters = weights((7, 3), (5,))
    optimizer = optimizer(parameters, lr=0.1)
    description = describe_optimizer(optimizer, dict(zip(parameters, "ab", strict=True)))
    accumulator = SegmentAccumulator(dict(zip("ab", parameters, strict=True)), optimizer, description)
    held = sum(tensor.numel() for tensor in accumulator.state()[0].values())
    assert held == copies * sum(p.numel() for p in parameters)


def test_a_skipped_step_leaves_no_trace():
    parameters = weights((3,))
    optimizer = AdamW(parameters, lr=0.1)
    description = describe_optimizer(optimizer, {parameters[0]: "a"})
    accumulator = SegmentAccumulator({"a": parameters[0]}, optimizer, description)
    accumulator.before_update(0.1, 0.5)
    accumulator.after_update(0.1, [0.1], 0.5, skipped=True)
    assert accumulator.effective_learning_rate_sum == accumulator.learning_rate_sum == 0
    assert accumulator.theta["a"].abs().max() < 1e-16


def test_half_precision_is_summed_in_float32():
    """1,000 equal terms: a bfloat16 sum would stop at 256 of them."""
    parameter = torch.nn.Parameter(torch.full((3,), 1.5, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1.0)
    description = describe_optimizer(optimizer, {parameter: "a"})
    accumulator = SegmentAccumulator({"a": parameter}, optimizer, description)
    for _ in range(1000):
        accumulator.before_update(1.0, 1.0)
        accumulator.after_update(1.0, [1.0], 1.0, skipped=False)
    theta, _ = accumulator.close()
    assert theta["a"].dtype == torch.float32
    torch.testing.assert_close(theta["a"], torch.full((3,), 1.5))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adamax(p),
        lambda p: type("MyAdam", (Adam,), {})(p),
    ],
)
def test_other_optimizers_are_refused_with_the_list_of_supported_ones(optimizer):
    parameters = weights((3,))
    with pytest.raises(UnsupportedError, match=r"torch\.optim\.SGD, torch\.optim\.Adam, torch\.optim\.AdamW"):
        describe_optimizer(optimizer(parameters), {parameters[0]: "a"})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: AdamW(p, differentiable=True), "keeps the graph of every step. Set differentiable=False"),
        (lambda p: SGD(p, lr=0.1, maximize=True), r"SGD\(maximize=True\) cannot be attributed: it climbs the loss"),
    ],
)
def test_flags_that_change_the_update_are_refused(optimizer, message):
    parameters = weights((3,))
    with pytest.raises(UnsupportedError, match=message):
        describe_optimizer(optimizer(parameters), {parameters[0]: "a"})


def test_parameters_outside_the_model_are_refused():
    inside, outside = weights((3,), (2,))
    with pytest.raises(UnsupportedError, match="1 parameter"):
        describe_optimizer(SGD([inside, outside], lr=0.1), {inside: "a"})


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: Adam(p, lr=0.1, weight_decay=0.1, eps=1e-3),
        lambda p: Adam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: AdamW(p, lr=0.1, betas=(0.8, 0.9)),
    ],
)
def test_a_rebuilt_optimizer_makes_the_same_updates(optimizer):
    original = weights((4, 2), (3,))
    copies = [copy.deepcopy(p) for p in original]
    first = optimizer(original)
    description = describe_optimizer(first, dict(zip(original, "ab", strict=True)))
    description = type(description).from_dict(description.to_dict())
    second = build_optimizer(description, dict(zip("ab", copies, strict=True)))
    second.param_groups[0]["lr"] = 0.1
    for step in range(3):
        for parameters, made in ((original, first), (copies, second)):
            give_gradients(parameters, seed=step)
            made.step()
    for left, right in zip(original, copies, strict=True):
        assert torch.equal(left, right)
