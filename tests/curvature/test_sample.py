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
"""The sample matrix: labels drawn from the model, one scale, and rows drawn by weight.

Scale is part of correctness: Source, unlike influence functions, does not ignore a constant factor of the curvature.
"""

import numpy as np
import oracles
import pytest
import scipy.stats
import torch

from hf_source.curvature import FisherSample, systematic_sample
from hf_source.gradients import CausalLMTask, RowGradients


# ------------------------------------------------------------------------------------------------------------- labels


def draw(logits: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """`count` rows of labels, all from the same `logits [tokens, vocabulary]`."""
    labels = torch.zeros(count, len(logits), dtype=torch.int64)
    outputs = logits.expand(count, *logits.shape)
    return CausalLMTask().sample_labels(outputs, labels, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_labels_have_the_models_distribution(sharpness):
    """Pearson's test at each position: the label there follows the logits of the position before."""
    torch.manual_seed(0)
    logits = sharpness * torch.randn(4, 6, dtype=torch.float64)
    count = 5000
    labels = draw(logits, count)
    for t in range(1, 4):
        counts = np.bincount(labels[:, t].numpy(), minlength=6)
        expected = count * logits[t - 1].softmax(dim=0).numpy()
        # Fixed seed, so no flakiness; a true null goes below 1e-4 once in 10,000 seeds, a wrong distribution always.
        assert scipy.stats.chisquare(counts, expected).pvalue > 1e-4
    if sharpness:  # and the test tells positions apart
        shifted = count * logits[1].softmax(dim=0).numpy()
        assert scipy.stats.chisquare(np.bincount(labels[:, 1].numpy(), minlength=6), shifted).pvalue < 1e-10


def test_labels_are_independent_between_positions_and_rows():
    """Dependent draws would leave cross terms in `S^T S`."""
    torch.manual_seed(1)
    labels = draw(torch.randn(3, 4, dtype=torch.float64), 6000).numpy()
    for first, second in ((labels[:, 1], labels[:, 2]), (labels[:-1, 1], labels[1:, 1])):
        table = np.histogram2d(first, second, bins=[np.arange(5) - 0.5] * 2)[0]
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_what_is_not_asked_stays():
    """Padding, masked prompts, and the first token, which no logits predict."""
    model = oracles.gpt2()
    batch = oracles.make_batch((3, 6, 5))
    batch["labels"][:, 0] = 7
    outputs = CausalLMTask().forward(model, batch).detach()
    before = batch["labels"].clone()
    sampled = CausalLMTask().sample_labels(outputs, batch["labels"], torch.Generator().manual_seed(0))
    assert torch.equal(before, batch["labels"])
    assert torch.equal(sampled == oracles.IGNORE, before == oracles.IGNORE)
    assert (sampled[:, 0] == 7).all()
    asked = before[:, 1:] != oracles.IGNORE
    assert (sampled[:, 1:][asked] != before[:, 1:][asked]).any()
    assert sampled.max() < oracles.VOCAB


def test_a_certain_model_draws_its_own_token():
    logits = torch.full((1, 3, 5), -1e4)
    logits[0, 0, 4] = logits[0, 1, 0] = 0.0  # the last and the first entry: the ends of the distribution function
    labels = torch.zeros(1, 3, dtype=torch.int64)
    for seed in range(50):
        drawn = CausalLMTask().sample_labels(logits, labels, torch.Generator().manual_seed(seed))
        assert drawn[0].tolist() == [0, 4, 0]


# ------------------------------------------------------------------------------------------------------------- matrix


@pytest.mark.parametrize("kind", oracles.SMALL_MODELS)
def test_matrix_and_its_transpose_product(segment, kind):
    """Against autograd on one row at a time with the labels that were drawn, over `sqrt(items)`."""
    made = segment(kind)
    S = oracles.split(made.S, made.model, made.names)
    columns = made.sample.matrices(made.names)
    rng = np.random.default_rng(0)
    coefficients = {name: rng.normal(size=(made.size, 3)) for name in made.names}
    combined = made.sample.combine({name: torch.from_numpy(c) for name, c in coefficients.items()})
    floor = np.linalg.norm(made.S) * 1e-3
    for name in made.names:
        assert columns[name].shape == (made.size, *made.shape(name))
        assert combined[name].shape == (3, *made.shape(name))
        # Float64 rounding; Llama's norm rounds to float32 on the way, alike in both.
        assert np.linalg.norm(columns[name].reshape(made.size, -1).numpy() - S[name]) < 1e-9 * floor * 1e3
        expected = coefficients[name].T @ S[name]
        assert np.linalg.norm(combined[name].reshape(3, -1).numpy() - expected) < 1e-9 * floor * 1e3


def test_every_pass_sees_the_same_labels(segment):
    made = segment("gpt2")
    first = made.sample.matrices(made.names)
    assert made.sample.num_passes == 1
    some = made.sample.matrices(made.names[5:7])
    assert made.sample.num_passes == 2
    assert all(torch.equal(some[name], first[name]) for name in some)
    again = FisherSample(made.gradients, made.batches, seed=1).matrices(made.names)
    other = FisherSample(made.gradients, made.batches, seed=2).matrices(made.names)
    assert all(torch.equal(again[name], first[name]) for name in made.names)
    assert not torch.equal(other["transformer.wte.weight"], first["transformer.wte.weight"])


def test_mean_over_seeds_is_the_gauss_newton_matrix_of_the_mean_over_items():
    """`E[S^T S] = H`: entries in the basis of the leading eigenvectors, within their own sampling error.

    A missing factor of tokens or rows, or a square root dropped, moves the diagonal by a factor of two or more.
    """
    model = oracles.gpt2(4)
    names = oracles.all_names(model)
    batches = [oracles.make_batch((5, 8, 3)), oracles.make_batch((6, 4), seed=1)]
    items = [oracles.num_items(batch) for batch in batches]
    parts = [oracles.gauss_newton(oracles.trainable(model), names, batch) for batch in batches]
    hessian = sum(part * count for part, count in zip(parts, items, strict=True)) / sum(items)
    gradients = RowGradients(model, CausalLMTask(), names)
    basis = np.linalg.eigh(hessian)[1][:, -8:]
    draws = []
    for seed in range(400):
        S = oracles.flat(FisherSample(gradients, batches, seed).matrices(names), names)
        draws.append(np.append(((S @ basis).T @ (S @ basis)).ravel(), np.square(S).sum()))
    expected = np.append((basis.T @ hessian @ basis).ravel(), np.trace(hessian))
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    # 64 entries, fixed seeds: 4.5 standard errors is exceeded by chance once in 2,000 choices of seeds.
    assert (abs(np.mean(draws, axis=0) - expected) < 4.5 * error).all()
    # The bound is sharp: a factor of 1.25 would be seen on the trace, and so would one of 1.5 on every eigenvalue.
    assert 4.5 * error[-1] < 0.25 * expected[-1]
    assert (4.5 * error[:-1].reshape(8, 8).diagonal() < 0.5 * expected[:-1].reshape(8, 8).diagonal()).all()


# ---------------------------------------------------------------------------------------------------------- row draws


def test_as_many_draws_as_rows_hold_each_row_once():
    for seed in range(20):
        assert systematic_sample(np.full(37, 0.3), 37, seed).tolist() == list(range(37))


def test_counts_that_are_whole_numbers_are_exact():
    weights = np.array([1.0, 3.0, 0.0, 2.0, 0.0]) * 0.01
    for seed in range(20):
        assert np.bincount(systematic_sample(weights, 12, seed), minlength=5).tolist() == [2, 6, 0, 4, 0]


def test_counts_are_the_expected_ones_rounded_up_or_down():
    weights = np.random.default_rng(0).gamma(0.5, size=50)
    expected = 30 * weights / weights.sum()
    total = np.zeros(50)
    for seed in range(2000):
        drawn = systematic_sample(weights, 30, seed)
        assert drawn.shape == (30,) and drawn.dtype == np.int64 and (np.diff(drawn) >= 0).all()
        counts = np.bincount(drawn, minlength=50)
        assert (counts >= np.floor(expected - 1e-9)).all() and (counts <= np.ceil(expected + 1e-9)).all()
        total += counts
    # A count varies by less than 1, so its mean over 2,000 seeds by a standard error of at most 0.5 / sqrt(2000).
    assert (abs(total / 2000 - expected) < 4.5 * 0.5 / np.sqrt(2000)).all()
    # With few rows a random order alone would not be enough: the middle of the larger one would always be hit.
    drawn = [int(systematic_sample(np.array([0.3, 0.7]), 1, seed)[0]) for seed in range(2000)]
    assert abs(np.mean(drawn) - 0.7) < 4.5 * 0.5 / np.sqrt(2000)


def test_any_two_rows_may_be_drawn_together():
    """Drawing in row order would never put neighbours of small weight into one sample."""
    together = np.zeros((10, 10), dtype=bool)
    for seed in range(300):
        drawn = np.unique(systematic_sample(np.ones(10), 3, seed))
        together[np.ix_(drawn, drawn)] = True
    assert together.all()


def test_tokens_of_a_sample_are_known_for_every_row_of_one_sequence(segment):
    """What is held factored is counted from them."""
    sample = segment("gpt2").sample
    assert sample.num_tokens == sum(batch["input_ids"].numel() for batch in sample.batches)
    sample.gradients = sample.gradients.with_task(PairTask(CausalLMTask()))
    assert sample.num_tokens is None


class PairTask:
    """A task whose rows are two sequences each."""

    sequences_per_row = 2

    def __init__(self, task):
        self.task = task
