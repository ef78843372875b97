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
"""Tasks of heads: rows' gradients against autograd, the Fisher against the explicit Gauss-Newton, measurements."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import default_data_collator

from hf_source.errors import ConfigError, DataError
from hf_source.evaluation.identity import describe
from hf_source.gradients import (
    AbsoluteError,
    CausalLMTask,
    LogitDifference,
    LogProbability,
    Margin,
    RowGradients,
    measured,
    task_labels,
)
from hf_source.gradients.selection import TASKS

from ..heads import HEADS


def engine(name):
    """Model, task and one batch of all rows, float64."""
    head = HEADS[name]
    model = head.model(torch.float64).eval()
    settings = {"sequences_per_row": 3} if name == "choices" else {}
    settings |= {"reduction": "mean"} if name == "speech-mean" else {}
    task = TASKS[head.kind](settings)
    rows = head.rows()
    return model, task, default_data_collator([rows[i] for i in range(len(rows))])


def flat(gradients, batch, labels=None, generator=None):
    done = gradients.run(batch, labels=labels, generator=generator)
    parts = {name: torch.zeros(done.num_rows, p.numel()).double() for name, p in gradients.parameters.items()}
    for name, rows, grads in gradients.blocks(done):
        parts[name][rows] = grads.reshape(len(grads), -1)
    return torch.cat(list(parts.values()), dim=1)


@pytest.mark.parametrize("name", HEADS)
def test_row_gradients_add_up_to_the_models_own_loss(name):
    """The model's loss of a batch is the sum of row losses over their items, and each row's gradient is autograd's."""
    model, task, batch = engine(name)
    gradients = RowGradients(model, task, [name for name, _ in model.named_parameters()])
    gradients.check(batch)
    got = flat(gradients, batch)
    items = task.num_items(task_labels(task, batch))
    cast = {key: v.double() if v.is_floating_point() else v for key, v in batch.items()}
    assert len(got) == len(items) == 12
    whole = 1 if getattr(task, "summed", False) else items.sum()  # as only CTC can be
    for rows, want in [(slice(0, 12), got.sum(dim=0) / whole), (slice(3, 4), got[3] / items[3])]:
        outputs = model(**{key: value[rows] for key, value in cast.items()})
        loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]
        truth = torch.cat([part.flatten() for part in zeros])
        assert (want - truth).norm() <= 1e-6 * truth.norm()  # a few losses of transformers are float32


@pytest.mark.parametrize("name", [name for name in HEADS if HEADS[name].kind != "ctc"])
def test_fisher_is_the_gauss_newton_of_what_was_trained(name):
    """E over drawn labels of the outer product, in a row's predictions, against the Hessian by autograd.

    With J = d predictions / d parameters constant in the labels, both matrices are `J^T (...) J`; comparing the middle
    factor exactly tests scale and shape. An entry of the mean of 40,000 products has the standard error that their
    own spread says; five of them bound the error of every entry, at about as many entries as draws. A loss of CTC has
    no such Hessian in its predictions, see below.
    """
    model, task, batch = engine(name)
    one = {key: value[:1] for key, value in batch.items()}
    with torch.no_grad():
        outputs = task.forward(model, one)
    labels = task_labels(task, one)
    draws = 40_000
    many = outputs.expand(draws, *outputs.shape[1:]).clone().requires_grad_(True)
    drawn = task.sample_labels(many.detach(), labels.expand(draws, *labels.shape[1:]), torch.Generator())
    assert torch.equal(task.num_items(drawn), task.num_items(labels).expand(draws))
    (grads,) = torch.autograd.grad(task.row_losses(many, drawn).sum(), many)
    grads = grads.reshape(draws, -1)
    assert grads.mean(dim=0).abs().max() < 0.03  # a score function has mean 0
    fisher = grads.T @ grads / draws
    error = ((grads.square().T @ grads.square() / draws - fisher.square()).clamp_min(0) / draws).sqrt()
    hessian = torch.autograd.functional.hessian(
        lambda z: task.row_losses(z.reshape(outputs.shape), labels).sum(), outputs.flatten().clone()
    )
    assert ((fisher - hessian).abs() <= 5 * error + 1e-3 * hessian.abs().max()).all()
    assert (fisher.trace() - hessian.trace()).abs() < 0.03 * hessian.trace()


def test_margin_difference_and_probability_of_classes():
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 2])
    task = TASKS["classification"]({})
    p = logits.softmax(dim=1)[range(4), labels]
    got = measured(task, "margin").row_losses(logits, labels)
    torch.testing.assert_close(got, -(p.log() - (1 - p).log()))
    torch.testing.assert_close(measured(task, "log-probability").row_losses(logits, labels), -p.log())
    got = measured(task, LogitDifference(answer=1, other=2)).row_losses(logits, labels)
    torch.testing.assert_close(got, logits[:, 2] - logits[:, 1])
    got = measured(task, "logit-difference").row_losses(logits, labels)
    rest = logits.clone()
    rest[range(4), labels] = -torch.inf
    torch.testing.assert_close(got, rest.max(dim=1).values - logits[range(4), labels])
    sure = torch.tensor([[400.0, 0.0, 0.0]], dtype=torch.float64)  # where 1 - p is 0 in floating point
    assert measured(task, "margin").row_losses(sure, labels[:1]) == pytest.approx(-400 + 0.6931471805599453)


def test_margin_of_coins_and_of_tokens():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4, 3)).double()
    got = measured(TASKS["multi_label"]({}), "margin").row_losses(logits, labels)
    torch.testing.assert_close(got, -((2 * labels - 1) * logits).sum(dim=1))  # log p / (1 - p) of a coin is its logit
    logits, labels = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    labels[0, :3] = -100
    p = logits[:, :-1].softmax(dim=-1).gather(-1, labels[:, 1:, None].clamp_min(0)).squeeze(-1)
    want = torch.where(labels[:, 1:] == -100, 0, -(p.log() - (1 - p).log())).sum(dim=1)
    torch.testing.assert_close(measured(CausalLMTask(), Margin()).row_losses(logits, labels), want)
    task = CausalLMTask(label_smoothing=0.1)
    plain = CausalLMTask().row_losses(logits, labels)
    torch.testing.assert_close(measured(task, LogProbability()).row_losses(logits, labels), plain)
    torch.testing.assert_close(measured(task, "loss").row_losses(logits, labels), plain)


def test_absolute_error():
    outputs, labels = torch.randn(5, 1).double(), torch.randn(5).double()
    got = measured(TASKS["regression"]({}), "absolute-error").row_losses(outputs, labels)
    torch.testing.assert_close(got, (outputs[:, 0] - labels).abs())


@pytest.mark.parametrize(
    ("kind", "measurement", "said"),
    [
        ("regression", "margin", "Margin is a measurement of classes"),
        ("classification", AbsoluteError(), "AbsoluteError is a measurement of numbers"),
        ("classification", "marginal", "'marginal' is unknown: choose one of loss, log-probability"),
        ("classification", Margin, "is unknown"),
        ("classification", 3, "is unknown"),
    ],
)
def test_measurements_that_mean_nothing_are_refused(kind, measurement, said):
    with pytest.raises(ConfigError, match=said):
        measured(TASKS[kind]({}), measurement)


def test_an_answer_that_does_not_exist_is_refused():
    task = measured(TASKS["classification"]({}), LogitDifference(answer=3))
    with pytest.raises(DataError, match="asks about answer 3, but the model tells 3 apart"):
        task.row_losses(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))


def test_smoothed_classes():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    task = TASKS["classification"]({"label_smoothing": 0.2})
    want = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(task.row_losses(logits, labels), want)
    assert task.unsmoothed().label_smoothing == 0


def test_measurements_are_told_apart_where_results_are_kept():
    task = TASKS["classification"]({})
    given = ["margin", "log-probability", LogitDifference(), LogitDifference(answer=1), LogitDifference(other=1)]
    assert len({str(describe(measured(task, measurement))) for measurement in given}) == len(given)
    assert describe(measured(task, Margin())) == describe(measured(task, "margin"))


def test_a_drawn_sequence_follows_the_probability_of_ctc():
    """40,000 draws against `p` of every sequence of up to two tokens in three frames; errors are binomial."""
    logits = torch.randn(1, 3, 3, dtype=torch.float64)
    outputs = torch.cat([logits, torch.ones(1, 3, 1).double()], dim=-1)
    task = TASKS["ctc"]({})
    many = outputs.expand(40_000, -1, -1)
    drawn = task.sample_labels(many, torch.ones(40_000, 2, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert (drawn[:, -1] == -1).all()
    for sequence in ([], [1], [2], [1, 2], [2, 1], [1, 1]):
        padded = sequence + [-100] * (3 - len(sequence))
        p = float(torch.exp(-task.row_losses(outputs, torch.tensor([[*padded, 1]]))))
        found = float((drawn[:, :-1] == torch.tensor(padded)).all(dim=1).double().mean())
        assert found == pytest.approx(p, abs=4 * (p * (1 - p) / 40_000) ** 0.5 + 1e-9)


def test_the_fisher_of_ctc_is_that_of_the_mean():
    """Drawn gradients have mean 0, and their square is `1 / n` of the undivided one's, `n` the row's own length."""
    logits = torch.randn(1, 4, 3, dtype=torch.float64)
    outputs = torch.cat([logits, torch.ones(1, 4, 1).double()], dim=-1).expand(20_000, -1, -1)
    squares = {}
    for reduction, last in (("sum", 1), ("mean", 2)):
        task = TASKS["ctc"]({"reduction": reduction})
        labels = torch.tensor([[1, 2, last]]).expand(20_000, -1)
        drawn = task.sample_labels(outputs, labels, torch.Generator().manual_seed(0))
        leaf = outputs.clone().requires_grad_(True)
        (grads,) = torch.autograd.grad(task.row_losses(leaf, drawn).sum(), leaf)
        assert grads.mean(dim=0).abs().max() < 0.03
        squares[reduction] = grads.flatten(1).square().mean(dim=0)
    torch.testing.assert_close(squares["mean"], squares["sum"] / 2)


def test_the_fisher_of_ctc_is_that_of_every_sequence():
    """Drawn gradients against the sum over all sequences of three frames, `sum of p g g^T`: the mean Hessian, too."""
    logits = torch.randn(1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    outputs = torch.cat([logits, torch.ones(1, 3, 1).double()], dim=-1)
    task = TASKS["ctc"]({})
    fisher, hessian, mass = torch.zeros(9, 9).double(), torch.zeros(9, 9).double(), 0.0
    frames = lambda z: torch.cat([z.view(1, 3, 3), outputs[..., 3:]], dim=-1)  # noqa: E731
    for sequence in [list(p) for length in range(4) for p in itertools.product((1, 2), repeat=length)]:
        labels = torch.tensor([[*sequence, *[-100] * (3 - len(sequence)), 1]])
        leaf = logits.flatten().clone().requires_grad_(True)
        loss = task.row_losses(frames(leaf), labels).sum()
        if not torch.isfinite(loss) or loss > 100:  # twice the same token needs a frame between
            continue
        (own,) = torch.autograd.grad(loss, leaf)
        p = float(torch.exp(-loss))
        fisher, mass = fisher + p * torch.outer(own, own), mass + p
        step = 1e-4  # the second derivative of CTC is not in autograd
        for i in range(9):
            moved = (leaf.detach() + step * torch.eye(9)[i].double()).requires_grad_(True)
            (ahead,) = torch.autograd.grad(task.row_losses(frames(moved), labels).sum(), moved)
            hessian[i] += p * (ahead - own) / step
    assert mass == pytest.approx(1)
    torch.testing.assert_close(fisher, hessian, rtol=1e-2, atol=1e-4)
    many = outputs.expand(40_000, -1, -1).clone().requires_grad_(True)
    drawn = task.sample_labels(many.detach(), torch.ones(40_000, 4).long(), torch.Generator().manual_seed(0))
    (grads,) = torch.autograd.grad(task.row_losses(many, drawn).sum(), many)
    grads = grads[..., :3].flatten(1)
    assert (grads.T @ grads / 40_000 - fisher).norm() < 0.03 * fisher.norm()
