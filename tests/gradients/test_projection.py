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
"""Projected gradients against explicit matrices on autograd's gradients, in float64."""

import numpy as np
import pytest
import torch

from hf_source.data import CausalLMCollator
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.gradients.projection import (
    DenseProjection,
    SidedProjection,
    matrix_shape,
    random_matrix,
    random_side,
)

from ..cases import byte_tokenizer, random_rows, tiny_gpt2, tiny_llama


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.fixture(params=sorted(MODELS))
def engine(request):
    model = MODELS[request.param](dtype=torch.float64)
    return RowGradients(model, CausalLMTask(), [name for name, _ in model.named_parameters()])


@pytest.fixture(scope="module")
def batch():
    return CausalLMCollator(byte_tokenizer())([dict(row) for row in random_rows(5)])


def explicit(engine, batch):
    """Each row's gradient by autograd: name -> `[rows, *shape]`."""
    return [
        engine._autograd_row(batch, batch["labels"], row, list(engine.parameters))
        for row in range(len(batch["labels"]))
    ]


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_dense_projection_is_the_product_with_its_matrix(engine, batch, kind):
    projection = DenseProjection(32, kind, seed=3)
    projection.step = 100  # several blocks, which begin and end within a row of a weight
    got = projection.project(engine, engine.run(batch))
    rows = explicit(engine, batch)
    expected = torch.zeros(len(rows), 32, dtype=torch.float64)
    for name, parameter in engine.parameters.items():
        starts = range(0, parameter.numel(), 100)
        matrix = torch.cat([projection.matrix(name, s, min(s + 100, parameter.numel())) for s in starts]).double()
        expected += torch.stack([row[name].flatten() for row in rows]) @ matrix / 32**0.5
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_slices_of_rows_change_nothing(engine, batch):
    whole = DenseProjection(8).project(engine, engine.run(batch))
    engine.max_block_bytes = 1  # one row at a time
    engine.fallback = set(list(engine.parameters)[::2])  # and a backward pass for each, too
    torch.testing.assert_close(DenseProjection(8).project(engine, engine.run(batch)), whole, rtol=1e-9, atol=1e-12)


def sides_of(engine, size):
    sides = {}
    for name, parameter in engine.parameters.items():
        rows, columns = matrix_shape(parameter.shape)
        left = random_side(size, rows, "normal", 1, name + "l", parameter)
        sides[name] = (left, random_side(size, columns, "normal", 1, name + "r", parameter))
    return sides


@pytest.mark.parametrize("size", [3, 16])  # 16: the models' width, so that many sides are the identity
@pytest.mark.parametrize("fallback", [False, True])
def test_sided_projection_is_a_kronecker_product(engine, batch, size, fallback):
    """Of tied heads, embeddings, norms and biases too, and where a backward pass per row is made."""
    sides = sides_of(engine, size)
    projection = SidedProjection(engine, sides)
    if fallback:
        engine.fallback = set(engine.parameters)
    got = projection.project(engine, engine.run(batch))
    rows = explicit(engine, batch)
    for name, parameter in engine.parameters.items():
        m, n = matrix_shape(parameter.shape)
        left, right = (
            np.eye(k) if side is None else side.numpy() for side, k in zip(sides[name], (m, n), strict=True)
        )
        both = np.kron(left, right)
        expected = np.stack([both @ row[name].reshape(-1).numpy() for row in rows])
        np.testing.assert_allclose(got[:, projection.parts[name]].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert sum(part.stop - part.start for part in projection.parts.values()) == projection.size == got.shape[1]


def test_gradients_of_modules_need_not_be_formed(engine, batch, monkeypatch):
    """The shortcut through inputs and output gradients is really taken for weights of modules."""
    weights = {name: pair for name, pair in sides_of(engine, 3).items() if engine.parameters[name].dim() > 1}
    formed = []
    before = engine._block
    monkeypatch.setattr(engine, "_block", lambda name, *rest: formed.append(name) or before(name, *rest))
    SidedProjection(engine, weights).project(engine, engine.run(batch))
    engine = engine.only(weights)
    DenseProjection(8).project(engine, engine.run(batch))
    assert not formed and len(weights) > 5


def test_a_scale_comes_before_the_projection(engine, batch):
    class Doubled:
        def apply(self, gradients):
            return 2 * gradients

    sides = sides_of(engine, 3)
    plain = SidedProjection(engine, sides).project(engine, engine.run(batch))
    scaled = SidedProjection(engine, sides, dict.fromkeys(sides, Doubled())).project(engine, engine.run(batch))
    torch.testing.assert_close(scaled, 2 * plain, rtol=1e-9, atol=1e-12)


def test_inner_products_are_kept_on_average(engine, batch):
    """Mean over 40 seeds of 256 dimensions: the standard deviation is below 1 / sqrt(5,000) of the norms."""
    rows = explicit(engine, batch)
    flat = torch.stack([torch.cat([row[name].flatten() for name in engine.parameters]) for row in rows])
    done = engine.run(batch)
    for kind in ("rademacher", "normal"):
        features = [DenseProjection(256, kind, seed).project(engine, done) for seed in range(40)]
        mean = sum(part @ part.T for part in features) / len(features)
        norms = flat.norm(dim=1)
        assert ((mean - flat @ flat.T) / (norms[:, None] * norms)).abs().max() < 0.06


def test_random_matrices_depend_on_seed_and_key_only():
    first = random_matrix(50, 40, "rademacher", 0, "a")
    assert torch.equal(first, random_matrix(50, 40, "rademacher", 0, "a"))
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    for other in (random_matrix(50, 40, "rademacher", 1, "a"), random_matrix(50, 40, "rademacher", 0, "b")):
        assert abs(float((first * other).mean())) < 0.1  # 2,000 signs: 4.5 standard deviations
    normal = random_matrix(200, 100, "normal", 0, "a")
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.var()) - 1) < 0.05
