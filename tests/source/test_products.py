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
"""Curvature products of one batch against dense matrices, and what they make of a whole run."""

import numpy as np
import oracles
import pytest
import scipy.linalg
import scipy.stats
import torch
from cases import random_rows, tiny_gpt2, train
from oracles import flat, flat_constant, make_batch, queries_for, relative_error

from hf_source import Queries, SourceAttributor
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.source import ExactProducts, SampledProducts


LENGTHS = (5, 8, 3)
NORMALIZER = 11.0


def engine(kind="gpt2"):
    model = oracles.SMALL_MODELS[kind]()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    names = oracles.all_names(model)
    gradients = RowGradients(model, CausalLMTask(), names)
    gradients.check(make_batch((8, 7)))
    return model, names, gradients


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_exact_products_are_those_of_the_dense_hessian(kind):
    model, names, gradients = engine(kind)
    batch, forces = make_batch(LENGTHS), queries_for(model, names)
    found = ExactProducts()(gradients, batch, forces, NORMALIZER)
    oracles.trainable(model)
    parameters = [dict(model.named_parameters())[name] for name in names]
    loss = sum(oracles.row_loss(model, *oracles.row_of(batch, row)) for row in range(len(LENGTHS))) / NORMALIZER
    grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    total = torch.cat([grad.flatten() for grad in grads])
    expected = []
    for vector in torch.as_tensor(flat(forces, names)):
        product = torch.autograd.grad(total @ vector, parameters, retain_graph=True, materialize_grads=True)
        expected.append(torch.cat([part.flatten() for part in product]).numpy())
    # Llama's norms and softmax compute in float32.
    assert relative_error(flat(found, names), np.stack(expected)) < (1e-9 if kind == "gpt2" else 1e-5)


def sampled(gradients, monkeypatch):
    """Every pass made, to learn which labels were drawn."""
    passes, run = [], gradients.run
    monkeypatch.setattr(gradients, "run", lambda *args, **kwargs: passes.append(run(*args, **kwargs)) or passes[-1])
    return passes


def dense_columns(model, names, done, draws):
    """`S [rows x draws, p]` of the labels that a pass drew."""
    columns = oracles.row_gradients(model, names, done.batch, done.labels)
    return columns / np.sqrt(NORMALIZER * draws)


@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "none"])
def test_sampled_products_are_the_flow_of_their_own_samples(monkeypatch, preconditioner):
    """`eta P (H h) = (1 - exp(-eta P S^T S)) h` by the matrix exponential, and `S^T S h` where nothing moves."""
    model, names, gradients = engine()
    batch, forces = make_batch(LENGTHS), queries_for(model, names)
    sizes = {"sgd": oracles.sgd_like, "adam": oracles.adam_like, "none": lambda *_: {}}[preconditioner](model, names)
    passes = sampled(gradients, monkeypatch)
    found = SampledProducts(draws=2)(gradients, batch, forces, NORMALIZER, sizes, seed=3)
    assert len(passes) == 1 and passes[0].num_rows == 2 * len(LENGTHS)
    columns = dense_columns(model, names, passes[0], draws=2)
    curvature, vectors = columns.T @ columns, flat(forces, names)
    if not sizes:
        assert relative_error(flat(found, names), vectors @ curvature) < 1e-10
        return
    size = flat_constant(sizes, model, names)
    assert np.linalg.eigvalsh(columns * size @ columns.T).max() > 1  # or the flow would be the plain product
    carried = vectors @ scipy.linalg.expm(-size[:, None] * curvature).T
    assert relative_error(flat(found, names) * size, vectors - carried) < 1e-8


def test_draws_beyond_the_memory_budget_follow_one_another(monkeypatch):
    """Two chunks: the flow of the first, then that of the second."""
    model, names, gradients = engine()
    batch, forces = make_batch(LENGTHS), queries_for(model, names)
    sizes = oracles.adam_like(model, names)
    passes = sampled(gradients, monkeypatch)
    found = SampledProducts(draws=2, memory_budget=1)(gradients, batch, forces, NORMALIZER, sizes, seed=3)
    assert [done.num_rows for done in passes] == [3, 3]
    size, vectors = flat_constant(sizes, model, names), flat(forces, names)
    carried = vectors
    for done in passes:
        columns = dense_columns(model, names, done, draws=2)
        carried = carried @ scipy.linalg.expm(-size[:, None] * (columns.T @ columns)).T
    assert relative_error(flat(found, names) * size, vectors - carried) < 1e-8


def test_sampled_products_are_gauss_newton_products_on_average():
    model, names, gradients = engine()
    batch, forces = make_batch((4, 3)), queries_for(model, names)
    found = SampledProducts(draws=4000)(gradients, batch, forces, NORMALIZER)
    oracles.trainable(model)
    dense = oracles.gauss_newton(model, names, batch) * oracles.num_items(batch) / NORMALIZER
    expected = flat(forces, names) @ dense
    # The error of a mean of 4,000 draws, whose own spread is a few times their mean.
    assert relative_error(flat(found, names), expected) < 0.1


def test_stepwise_comes_closer_to_exact_unrolling_than_source(tmp_path):
    """A run long enough that curvature matters: rank correlation over all rows, averaged over queries."""
    dataset = random_rows(32)
    train(tmp_path, tiny_gpt2(), dataset, max_steps=24, num_segments=2, learning_rate=5e-3)
    queries = Queries.from_dataset(random_rows(4, seed=5))

    def scores(**settings):
        return SourceAttributor.from_record(tmp_path / "record", progress=False, **settings).scores(dataset, queries)

    exact = scores(method="unrolled")
    agreement = {
        name: np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(found, exact, strict=True)])
        for name, found in {"stepwise": scores(method="stepwise"), "source": scores()}.items()
    }
    assert agreement["stepwise"] > max(0.5, agreement["source"]), agreement
    assert not np.array_equal(scores(method="stepwise", draws=2), scores(method="stepwise", draws=2, seed=1))
