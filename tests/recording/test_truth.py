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
"""The record against a training loop written by hand, which shares no code with the library or the Trainer."""

import math

import numpy as np
import pytest
import torch
from cases import random_rows, tiny_gpt2, tiny_llama, train

from hf_source.recording import SourceTrainer


ROWS, BATCH, ACCUMULATION, EPOCHS, WARMUP = 22, 4, 2, 3, 2
RATE, DECAY, LIMIT = 1e-2, 0.1, 0.7
SETTINGS = {"train_sampling_strategy": "sequential", "num_segments": 2}


def batches_by_hand():
    """Rows in order: micro-batches of 4 (the last of an epoch 2), two of them to a step."""
    rows = list(range(ROWS))
    micro = [rows[start : start + BATCH] for start in range(0, ROWS, BATCH)]
    steps = [micro[start : start + ACCUMULATION] for start in range(0, len(micro), ACCUMULATION)]
    return steps * EPOCHS


def rate_by_hand(step, num_steps):
    if step < WARMUP:
        return RATE * step / WARMUP
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (num_steps - WARMUP)))


def collate_by_hand(dataset, rows):
    width = max(len(dataset[row]["input_ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for place, row in enumerate(rows):
        ids[place, : len(dataset[row]["input_ids"])] = torch.tensor(dataset[row]["input_ids"])
        labels[place, : len(dataset[row]["labels"])] = torch.tensor(dataset[row]["labels"])
    return ids, labels


def loop_by_hand(model, dataset, optimizer, decayed, preconditioner, cuts):
    """Train, and take the averages that the definitions ask for.

    `optimizer` makes one update from clipped gradients; `preconditioner(name)` is `P` of the update just made.
    """
    parameters = dict(model.named_parameters())
    steps = batches_by_hand()
    segments = []
    for number, step in enumerate(steps):
        if number in cuts:
            zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
            segment = {"theta": zeros, "scale": {n: torch.zeros_like(p) for n, p in parameters.items()}, "s": 0.0}
            segment |= {"sum": 0.0, "weights": np.zeros(ROWS), "visits": np.zeros(ROWS, dtype=int)}
            segments.append(segment)
        rate = rate_by_hand(number, len(steps))
        collated = [collate_by_hand(dataset, rows) for rows in step]
        total = sum(int((labels[:, 1:] != -100).sum()) for _, labels in collated)
        model.zero_grad()
        for ids, labels in collated:
            logits = model(
                ids, attention_mask=(torch.arange(ids.shape[1]) < (ids != 0).sum(1, keepdim=True)).long()
            ).logits
            log_probabilities = logits[:, :-1].log_softmax(-1)
            targets = labels[:, 1:]
            picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            (-(picked * (targets != -100)).sum() / total).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
        clip = min(1.0, LIMIT / (norm + 1e-6))
        for parameter in parameters.values():
            parameter.grad *= clip
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.step(rate, parameters, decayed)
        for name in parameters:
            segment["theta"][name] += rate * clip * before[name]
            segment["scale"][name] += rate * clip * preconditioner(optimizer, name)
        segment["s"] += rate * clip
        segment["sum"] += rate
        for rows in step:
            for row in rows:
                segment["weights"][row] += rate * clip / total
                segment["visits"][row] += 1
    return segments


class AdamWByHand:
    """Decoupled weight decay, from the paper's pseudo-code."""

    def __init__(self):
        self.first, self.second, self.count = {}, {}, 0

    @torch.no_grad()
    def step(self, rate, parameters, decayed):
        self.count += 1
        for name, parameter in parameters.items():
            gradient = parameter.grad
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * gradient
            self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * gradient**2
            mean = self.first[name] / (1 - 0.9**self.count)
            parameter -= rate * (DECAY if name in decayed else 0) * parameter
            parameter -= rate * mean * self.scale(name)

    def scale(self, name):
        second = self.second[name] / (1 - 0.999**self.count)
        return torch.where(second > 0, 1 / (second.sqrt() + 1e-8), 0)


class SGDByHand:
    """Momentum 0.8 and weight decay inside the gradient."""

    def __init__(self):
        self.buffer = {}

    @torch.no_grad()
    def step(self, rate, parameters, decayed):
        for name, parameter in parameters.items():
            gradient = parameter.grad + (DECAY if name in decayed else 0) * parameter
            self.buffer[name] = 0.8 * self.buffer.get(name, 0) + gradient
            parameter -= rate * self.buffer[name]


CASES = {
    "adamw": ({}, AdamWByHand, lambda optimizer, name: optimizer.scale(name), 1.0),
    "sgd": ({"optim": "sgd", "optim_args": "momentum=0.8"}, SGDByHand, lambda optimizer, name: 5.0, 5.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_record_is_what_a_loop_by_hand_finds(tmp_path, case):
    settings, optimizer, preconditioner, decay_scale = CASES[case]
    dataset = random_rows(ROWS)
    model = tiny_llama(dtype=torch.float64)
    _, record = train(tmp_path, model, dataset, **SETTINGS, **settings)
    stage = record.stage()
    assert [(s.first_step, s.end_step) for s in stage.segments] == [(0, 4), (4, 9)]  # half of the summed rate each
    assert (stage.steps().clip_factor < 1).any()

    twin = tiny_llama(dtype=torch.float64)
    decayed = {name for name, p in twin.named_parameters() if p.ndim > 1}  # Llama's vectors are all norm weights
    expected = loop_by_hand(twin, dataset, optimizer(), decayed, preconditioner, cuts=(0, 4))
    # transformers computes the loss in float32 whatever the weights are; the loop above does not.
    close = {"rtol": 1e-4, "atol": 1e-6}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(stage.weights("final")[name], parameter.detach(), **close)
    for segment, by_hand in zip(stage.segments, expected, strict=True):
        assert segment.effective_learning_rate_sum == pytest.approx(by_hand["s"], rel=1e-5)
        assert segment.learning_rate_sum == pytest.approx(by_hand["sum"], rel=1e-12)
        np.testing.assert_allclose(segment.row_weights(), by_hand["weights"], rtol=1e-5)
        np.testing.assert_array_equal(segment.num_visits(), by_hand["visits"])
        assert segment.objective_scale() == pytest.approx(1.0, abs=1e-12)
        theta, scale, decay = segment.parameters(), segment.preconditioner(), segment.decay()
        for name in by_hand["theta"]:
            torch.testing.assert_close(theta[name], by_hand["theta"][name] / by_hand["s"], **close)
            target = by_hand["scale"][name] / by_hand["s"]
            # P of an entry with a tiny second moment is large and as uncertain as the gradient there.
            torch.testing.assert_close(scale[name].expand(target.shape), target, rtol=1e-3, atol=1e-6 * target.max())
            strength = DECAY if name in decayed else 0.0
            expected_decay = strength * decay_scale * by_hand["sum"] / by_hand["s"]
            assert decay[name].ndim == 0 and float(decay[name]) == pytest.approx(expected_decay, rel=1e-5)


def test_coupled_decay_of_adam_goes_through_the_preconditioner(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, weight_decay=DECAY)
    _, record = train(tmp_path, model, trainer={"optimizers": (optimizer, None)}, max_grad_norm=0.0)
    for segment in record.stage().segments:
        for name, decay in segment.decay().items():  # without clipping, s = sum of the rates
            torch.testing.assert_close(decay, DECAY * segment.preconditioner()[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_groups_have_their_own_step_sizes_and_decay(tmp_path, kind):
    """`s P` and `s Lambda` are sums over the group's own learning rates, as the steps list them."""
    model = tiny_llama(dtype=torch.float64)
    head = [model.lm_head.weight]
    rest = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    groups = [
        {"params": rest, "lr": 0.005, "weight_decay": 0.1},
        {"params": [], "lr": 9.0},  # moves nothing, so it is no reference
        {"params": head, "lr": 0.02, "weight_decay": 0.3},
    ]
    extra = {"momentum": 0.5} if kind is torch.optim.SGD else {}
    _, record = train(tmp_path, model, trainer={"optimizers": (kind(groups, **extra), None)})
    stage = record.stage()
    table = stage.steps()
    assert table.reference_learning_rate.max() == table.learning_rate[:, 2].max() == pytest.approx(0.02)
    for segment in stage.segments:
        steps = slice(segment.first_step, segment.end_step)
        s = segment.effective_learning_rate_sum
        assert s == pytest.approx((table.reference_learning_rate * table.clip_factor)[steps].sum(), rel=1e-12)
        for name, group, strength in (("model.norm.weight", 0, 0.1), ("lm_head.weight", 2, 0.3)):
            rates = table.learning_rate[steps, group]
            total = 2.0 * rates.sum() if extra else rates.sum()
            assert s * float(segment.decay()[name]) == pytest.approx(strength * total, rel=1e-12)
            if extra:
                moved = 2.0 * (rates * table.clip_factor[steps]).sum()
                assert s * float(segment.preconditioner()[name]) == pytest.approx(moved, rel=1e-12)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_normalizers_are_what_the_trainer_divided_by(tmp_path, make):
    """A row's loss, computed alone and divided by the normalizer, adds up to the loss that the Trainer computed."""
    losses = []

    class Spy(SourceTrainer):
        def compute_loss(self, *args, **kwargs):
            losses.append(super().compute_loss(*args, **kwargs))
            return losses[-1]

    from cases import config

    model = make(dtype=torch.float64)
    dataset = random_rows(ROWS)
    run = Spy(model, config(tmp_path, learning_rate=0.0), train_dataset=dataset)
    run.train()
    from hf_source.recording import TrainingRecord

    stage = TrainingRecord.load(tmp_path / "record").stage()
    batches = [batch for step in stage.steps().micro_batches for batch in step]
    assert len(batches) == len(losses) == 18
    for batch, loss in zip(batches, losses, strict=True):
        summed, items = 0.0, 0
        for row in batch.rows:
            ids, labels = collate_by_hand(dataset, [row])
            picked = (
                model(ids).logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            )
            summed -= (picked * (labels[:, 1:] != -100)).sum().item()
            items += int((labels[:, 1:] != -100).sum())
        assert batch.items == items
        assert summed / batch.normalizer == pytest.approx(loss.item(), rel=1e-5)


def test_objective_scale_says_what_the_trainer_really_minimised(tmp_path):
    """Transformers 5.23 divides GPT-2's loss by all labels, the never-predicted first ones included."""
    _, record = train(tmp_path, tiny_gpt2(), num_segments=1)
    stage = record.stage()
    table = stage.steps()
    weights = table.reference_learning_rate * table.clip_factor
    shares = [sum(b.items for b in step) / step[0].normalizer for step in table.micro_batches]
    expected = float((weights * shares).sum() / weights.sum())
    assert stage.segments[0].objective_scale() == pytest.approx(expected, rel=1e-12)
    total = sum(b.items for step in table.micro_batches for b in step)
    assert total == 3 * sum(sum(label != -100 for label in row["labels"][1:]) for row in random_rows())


def test_step_table_agrees_with_itself(tmp_path):
    """Flat visits, per-step micro-batches and per-segment weights say the same."""
    _, record = train(tmp_path, tiny_llama())
    stage = record.stage()
    table = stage.steps()
    assert len(table) == stage.num_steps == 9
    visits = table.visits()
    flat = [(row, step) for step, batches in enumerate(table.micro_batches) for b in batches for row in b.rows]
    assert list(zip(visits["row"].tolist(), visits["step"].tolist(), strict=True)) == flat
    assert sorted(visits["row"].tolist()) == sorted(list(range(ROWS)) * 3)
    total = np.zeros(ROWS)
    np.add.at(total, visits["row"], visits["weight"])
    np.testing.assert_allclose(sum(s.row_weights() for s in stage.segments), total, rtol=1e-12)
    assert sum(s.num_visits() for s in stage.segments).tolist() == [3] * ROWS
    np.testing.assert_allclose(table.epoch, np.arange(9) / 3, atol=1e-12)
    assert np.isfinite(table.grad_norm).all() and not table.skipped.any()


def test_a_segment_that_did_not_move(tmp_path):
    """The first step of a warmup has learning rate 0: averages are still defined."""
    model = tiny_llama()
    _, record = train(tmp_path, model, segment_boundaries=[1, 5])
    first = record.stage().segments[0]
    assert first.effective_learning_rate_sum == first.learning_rate_sum == 0
    for name, tensor in first.parameters().items():
        assert torch.equal(tensor, record.stage().weights("initial")[name])
    assert all(tensor.eq(0).all() for tensor in first.preconditioner().values())
    assert all(tensor.eq(0).all() for tensor in first.decay().values())
    assert first.row_weights().tolist() == [0.0] * ROWS and first.num_visits().sum() == 8
    assert first.objective_scale() == 1.0
