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
"""Muon, whose preconditioner is a matrix, and optimizers combined with it."""

import copy

import numpy as np
import pytest
import torch
from cases import config, distance, random_rows, tiny_llama, train
from optimizers import RATES, describe, give_gradients, weights
from torch.optim import AdamW, Muon

from hf_source.errors import UnsupportedError
from hf_source.recording import SourceTrainer, TrainingRecord, replay
from hf_source.recording.optimizers import CombinedOptimizer, build_optimizer
from hf_source.recording.optimizers.muon import MuonRule
from hf_source.recording.reading.momentum import applied_learning_rate
from hf_source.recording.segments import SegmentAccumulator


FAMILIES = {
    "nesterov": lambda p: Muon(p, weight_decay=0.0),
    "plain": lambda p: Muon(p, momentum=0.8, nesterov=False, weight_decay=0.0),
    "no momentum": lambda p: Muon(p, momentum=0.0, nesterov=False, weight_decay=0.0),
    "as adamw": lambda p: Muon(p, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    "three steps": lambda p: Muon(p, weight_decay=0.0, ns_steps=3, ns_coefficients=(1.5, -0.5, 0.0)),
}
SHAPES = (4, 7), (6, 3), (5, 5)


def orthogonalised(grad, coefficients, steps, eps):
    """Torch's function in the type of its argument; torch's own is in bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonalised)


def through(matrix, gradient, shape):
    return matrix @ gradient if shape[0] <= shape[1] else gradient @ matrix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact", [True, False])
def test_updates_are_the_shares_of_the_gradients_through_the_matrix(request, family, exact):
    if exact:
        request.getfixturevalue("in_float64")
    parameters = weights(*SHAPES)
    optimizer = FAMILIES[family](parameters)
    (group,) = describe(optimizer, parameters).groups
    optimizer_run = _run_counting(optimizer, parameters)
    for step, (updates, gradients_so_far, scales) in enumerate(optimizer_run):
        rate = applied_learning_rate(group, np.array(RATES), np.zeros(len(RATES), dtype=bool), step, step + 1)
        for index, update in enumerate(updates):
            mixed = sum(rate[k] * gradients_so_far[k][index] for k in range(step + 1))
            expected = -through(scales[index], mixed, SHAPES[index])
            # bfloat16 has three digits, of which five steps of a cubic growth leave less.
            tolerance = 1e-12 if exact else 0.05
            size = float(expected.abs().max()) or 1.0
            torch.testing.assert_close(update, expected, rtol=0, atol=tolerance * size + 1e-15)


def _run_counting(optimizer, parameters):
    """As `run`, with the number of updates that Muon itself does not count."""
    gradients = []
    for step, rate in enumerate(RATES):
        give_gradients(parameters, seed=step)
        gradients.append([p.grad.clone() for p in parameters])
        optimizer.param_groups[0]["lr"] = rate
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        (group,) = describe(optimizer, parameters).groups
        scales = [
            group.how.preconditioner(p, optimizer.state[p], group.constants, step + 1).double() for p in parameters
        ]
        yield [p.detach() - b for p, b in zip(parameters, before, strict=True)], gradients, scales


def test_the_matrix_is_symmetric_and_about_the_inverse_root():
    (parameter,) = weights((5, 9))
    optimizer = Muon([parameter], momentum=0.0, nesterov=False)
    parameter.grad = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    (group,) = describe(optimizer, [parameter]).groups
    scale = group.how.preconditioner(parameter, optimizer.state[parameter], group.constants, 1)
    torch.testing.assert_close(scale, scale.T, rtol=0, atol=0)
    values = torch.linalg.svdvals(scale @ parameter.grad)
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shares_of_an_update_add_up_to_one(family):
    """So that the first matrices, made of little momentum, do not dominate the average."""
    parameters = weights(*SHAPES)
    (group,) = describe(FAMILIES[family](parameters), parameters).groups
    for step in range(6):
        rates = applied_learning_rate(group, np.ones(6), np.zeros(6, dtype=bool), step, step + 1)
        assert rates.sum() == pytest.approx(1.0, rel=1e-12)


def test_coefficients_that_may_climb_are_refused():
    parameters = weights((4, 4))
    with pytest.raises(UnsupportedError, match="Muon.*is not positive"):
        describe(Muon(parameters, ns_coefficients=(1.0, -3.0, 1.0)), parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rebuilt_optimizer_makes_the_same_updates(family):
    original = weights(*SHAPES)
    copies = [copy.deepcopy(p) for p in original]
    first = FAMILIES[family](original)
    second = build_optimizer(describe(first, original), dict(zip("abc", copies, strict=True)))
    run_plain(first, original)
    run_plain(second, copies)
    assert all(torch.equal(a, b) for a, b in zip(original, copies, strict=True))


def run_plain(optimizer, parameters):
    for step, rate in enumerate(RATES):
        give_gradients(parameters, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


@pytest.mark.parametrize("every", [2, 3])
def test_the_average_takes_every_so_many_th_update(monkeypatch, every):
    """With the weights of those that it stands for, and across a resume."""
    monkeypatch.setattr(MuonRule, "every", every)
    parameters = weights(*SHAPES)
    optimizer = Muon(parameters)
    description = describe(optimizer, parameters)
    named = dict(zip("abc", parameters, strict=True))
    sums = SegmentAccumulator(named, optimizer, description)
    assert {name: tuple(tensor.shape) for name, tensor in sums.scale.items()} == {
        "a": (4, 4),
        "b": (3, 3),
        "c": (5, 5),
    }
    expected = {name: torch.zeros_like(sums.scale[name]) for name in named}
    looked_at = total = 0.0
    for step, rate in enumerate(RATES):
        give_gradients(parameters, seed=step)
        optimizer.param_groups[0]["lr"] = rate
        sums.before_update(rate, 0.5)
        optimizer.step()
        sums.after_update(rate, [rate], 0.5, skipped=False)
        total += rate
        if rate and (step == 0 or (step + 1) % every == 0):
            looked_at += rate
            for name, parameter in named.items():
                how, state = description.groups[0].how, optimizer.state[parameter]
                scale = how.preconditioner(parameter, state, description.groups[0].constants, step + 1)
                expected[name] += rate * scale
        if step == 4:
            tensors, scalars = copy.deepcopy(sums.state())
            sums = SegmentAccumulator(named, optimizer, description)
            sums.load_state(tensors, scalars)
    assert sums.scalars()["matrix_sides"] == {"a": "left", "b": "right", "c": "left"}
    for name, scale in sums.close()[1].items():
        torch.testing.assert_close(scale, expected[name] / looked_at, rtol=1e-12, atol=1e-15)


def matrices_and_rest(model):
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    return matrices, [p for p in named.values() if not any(p is m for m in matrices)]


def test_a_run_of_matrices_alone_replays(tmp_path):
    """What Muon does not take is frozen."""
    model = tiny_llama(dtype=torch.float64)
    matrices, rest = matrices_and_rest(model)
    for parameter in rest:
        parameter.requires_grad_(False)
    _, record = train(tmp_path, model, trainer={"optimizers": (Muon(matrices, lr=0.02), None)})
    stage = record.stage()
    assert {group.rule for group in stage.groups} == {"Muon"}
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, random_rows()).named_parameters())
    start = stage.weights("initial")
    trained = {name: final[name] for name in start}
    assert distance({name: again[name] for name in start}, trained) <= 1e-9 * distance(start, trained)
    for segment in stage.segments:
        assert set(segment.matrix_sides) == set(stage.trainable)
        for name, matrix in segment.preconditioner().items():
            short = min(stage.tensor_info[name]["shape"])
            assert matrix.shape == (short, short) and torch.linalg.eigvalsh(matrix).min() > 0


def combined(model):
    matrices, rest = matrices_and_rest(model)
    adamw = AdamW([{"params": rest[:1], "weight_decay": 0.0}, {"params": rest[1:]}], lr=0.01, betas=(0.8, 0.95))
    return CombinedOptimizer(Muon(matrices, lr=0.02), adamw)


def test_muon_and_adamw_in_one_run(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    _, record = train(tmp_path, model, trainer={"optimizers": (combined(model), None)})
    stage = record.stage()
    assert [group.rule for group in stage.groups] == ["Muon", "AdamW", "AdamW"]
    assert stage.optimizer["name"] == "CombinedOptimizer"
    assert stage.steps().learning_rate.shape == (9, 3)
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, random_rows()).named_parameters())
    assert distance(again, final) <= 1e-9 * distance(stage.weights("initial"), final)
    assert set(stage.segments[0].matrix_sides) == set(stage.groups[0].parameters)
    decay = stage.segments[0].decay()
    assert float(decay["model.layers.0.mlp.up_proj.weight"]) > 0 and decay["lm_head.weight"].ndim == 0


def test_a_combined_run_resumes_to_the_same_record(tmp_path):
    records = []
    for interrupted in (False, True):
        model = tiny_llama()
        settings = {"save_strategy": "steps", "save_steps": 4, "num_segments": 2}
        folder = tmp_path / str(interrupted)
        _, record = train(folder, model, trainer={"optimizers": (combined(model), None)}, **settings)
        if interrupted:
            model = tiny_llama()
            again = SourceTrainer(
                model, config(folder, **settings), train_dataset=random_rows(), optimizers=(combined(model), None)
            )
            again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-4"))
            record = TrainingRecord.load(folder / "record")
        records.append(record.stage())
    for one, other in zip(records[0].segments, records[1].segments, strict=True):
        for first, second in ((one.parameters(), other.parameters()), (one.preconditioner(), other.preconditioner())):
            assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (stage.weights("final") for stage in records)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_combined():
    first, second = weights((3, 3), (4,))
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer(Muon([first]), AdamW([first, second]))
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="AdamW cannot be combined"):
        CombinedOptimizer(Muon([first]), bnb.optim.AdamW([second]))


def test_parts_of_a_matrix_are_refused(tmp_path, monkeypatch):
    """Under FSDP a process has some rows of it only."""
    model = tiny_llama()
    monkeypatch.setattr("hf_source.recording.start.is_sharded", lambda parameter: True)
    with pytest.raises(UnsupportedError, match="Muon is not known to .* With FSDP use one of SGD, Adam"):
        train(tmp_path, model, trainer={"optimizers": (combined(model), None)})
