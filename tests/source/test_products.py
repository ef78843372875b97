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
    passes, draws = [], gradients.draws

    def spied(*args):
        for done in draws(*args):
            passes.append(done)
            yield done

    monkeypatch.setattr(gradients, "draws", spied)
    return passes


def dense_columns(model, names, done, draws):
    """`S [rows x draws, p]` of the labels that a pass drew."""
    columns = oracles.row_gradients(model, names, done.batch, done.labels)
    return columns / np.sqrt(NORMALIZER * draws)


@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "none"])
@pytest.mark.parametrize(("draws", "cache_bytes"), [(1, 2**28), (3, 2**28), (3, 0)])
def test_sampled_products_are_the_flows_of_their_own_samples(monkeypatch, preconditioner, draws, cache_bytes):
    """`eta P (H h) = (1 - exp(-eta P S^T S) ... ) h` by matrix exponentials, and `S^T S h` where nothing moves."""
    model, names, gradients = engine()
    batch, forces = make_batch(LENGTHS), queries_for(model, names)
    sizes = {"sgd": oracles.sgd_like, "adam": oracles.adam_like, "none": lambda *_: {}}[preconditioner](model, names)
    passes = sampled(gradients, monkeypatch)
    found = SampledProducts(draws, cache_bytes)(gradients, batch, forces, NORMALIZER, sizes, seed=3)
    columns = [dense_columns(model, names, done, draws) for done in passes]
    assert len(columns) == draws and all(len(own) == len(LENGTHS) for own in columns)
    vectors = flat(forces, names)
    if not sizes:
        assert relative_error(flat(found, names), sum(vectors @ own.T @ own for own in columns)) < 1e-10
        return
    size, carried = flat_constant(sizes, model, names), vectors
    for own in columns:
        assert np.linalg.eigvalsh(own * size @ own.T).max() > 0.3  # or the flow would be the plain product
        carried = carried @ scipy.linalg.expm(-size[:, None] * (own.T @ own)).T
    assert relative_error(flat(found, names) * size, vectors - carried) < 1e-8


@pytest.mark.parametrize("probes", ["labels", "signs"])
def test_sampled_products_are_gauss_newton_products_on_average(probes):
    model, names, gradients = engine()
    batch, forces = make_batch((4, 3)), queries_for(model, names)
    often = {name: value.repeat(20, 1) for name, value in batch.items()}  # 20 copies of each row, a draw for each
    found = SampledProducts(draws=150, probes=probes)(gradients, often, forces, 20 * NORMALIZER)
    oracles.trainable(model)
    dense = oracles.gauss_newton(model, names, batch) * oracles.num_items(batch) / NORMALIZER
    expected = flat(forces, names) @ dense
    # The error of a mean of 3,000 draws, whose own spread is a few times their mean.
    assert relative_error(flat(found, names), expected) < 0.1


def test_stepwise_comes_closer_to_exact_unrolling_than_source(tmp_path):
    """A run long enough that curvature matters: rank correlation over all rows, averaged over queries."""
    dataset = random_rows(32)
    train(tmp_path, tiny_gpt2(), dataset, max_steps=16, num_segments=2, learning_rate=5e-3)
    queries = Queries.from_dataset(random_rows(3, seed=5))

    def scores(**settings):
        return SourceAttributor.from_record(tmp_path / "record", progress=False, **settings).scores(dataset, queries)

    exact = scores(method="unrolled")
    agreement = {
        name: np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(found, exact, strict=True)])
        for name, found in {"stepwise": scores(method="stepwise"), "source": scores()}.items()
    }
    assert agreement["stepwise"] > max(0.5, agreement["source"]), agreement
    assert not np.array_equal(scores(method="stepwise", draws=2), scores(method="stepwise", draws=2, seed=1))
