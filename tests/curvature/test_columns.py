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
"""Columns of `S` held factored, and what is taken from them, against the same columns as they are."""

import oracles
import pytest
import torch

from hf_source.curvature import FisherSample, JointCurvature, factored
from hf_source.curvature import block as block_module
from hf_source.curvature import columns as columns_module
from hf_source.curvature.block import fit_block, fit_block_in_parts, leading_eigenvectors, rotate, unrotate
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.gradients.contraction import add_combined, add_dots, pieces, products


EXACT = 1e-10  # float64 sums in another order
NARROW = 2**-7  # 4 roundings of bfloat16: of both factors of a product, of itself, and one more for what cancels


@pytest.fixture
def always(monkeypatch):
    """Hold every call factored that can be, however small, and take every block from factors that can be."""
    monkeypatch.setattr(columns_module, "_num_bytes", lambda call, dtype: 0)
    monkeypatch.setattr(factored, "FACTORED_SIZE", 0)
    monkeypatch.setattr(factored, "multiplications", lambda *sizes: 0)


@pytest.mark.parametrize("piece_bytes", [1, 2**20])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2", "odd"])
def test_factored_columns_are_those_of_the_matrices(segment, always, kind, piece_bytes):
    made = segment(kind)
    expected = made.sample.matrices(made.names)
    found = made.sample.columns(made.names, piece_bytes)
    assert any(columns.parts for columns in found.values())
    for name, columns in found.items():
        error = lambda got, name=name: (got - expected[name]).abs().max() / (1 + expected[name].abs().max())  # noqa: E731
        assert error(columns.whole()) < EXACT
        assert error(torch.cat([part for _, part in columns.samples()])) < EXACT
        if columns.like.dim():
            assert error(torch.cat([part for _, part in columns.slices()], dim=1)) < EXACT


@pytest.mark.parametrize("decay", ["none", "elementwise"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2"])
def test_the_flow_from_factored_columns_is_that_of_dense_ones(segment, always, monkeypatch, kind, decay):
    """For SGD the tail from factors is exact, a tied head and embedding included."""
    made = segment(kind, "sgd", decay)
    got = JointCurvature(memory_budget=4096).propagate(made.q, made.flow, made.sample)
    monkeypatch.undo()
    expected = JointCurvature().propagate(made.q, made.flow, made.sample)
    for one, other in zip(got, expected, strict=True):
        assert set(one) == set(other)
        scale = max(float(vectors.abs().max()) for vectors in other.values())
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-7 * scale


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_block_from_factors_is_that_of_samples_whitened_by_rank_one(segment, always, kind):
    made = segment(kind, "adam")
    dense, checked = made.sample.matrices(made.names), 0
    for name, columns in made.sample.columns(made.names).items():
        preconditioner, diagonal = made.flow.preconditioner[name], name in made.gradients.vocabulary
        if not factored.is_cheaper(columns, preconditioner):
            continue
        by_left, by_right = preconditioner.roots_of_sides(columns.like)
        whitened = dense[name] * by_left[:, None] * by_right
        expected = fit_block(whitened, torch.tensor(1.0, dtype=torch.float64), diagonal)
        got = factored.fit_factored(columns, preconditioner, diagonal)
        # Bases are known up to signs, and within equal eigenvalues up to rotations: compare what the block does.
        expected.preconditioner = preconditioner
        for function in (lambda mu: torch.exp(-30 * mu), lambda mu: 1 / (0.01 + mu)):
            one, other = got.apply(made.q[name], function), expected.apply(made.q[name], function)
            assert (one - other).abs().max() < 1e-6 * other.abs().max()
        checked += 1
    assert checked >= 3


def test_nothing_is_carried_on_where_nobody_asks(segment):
    made = segment("gpt2", "adam+frozen", "by parameter")
    scoring, carried = JointCurvature().propagate(made.q, made.flow, made.sample)
    before = {name: vectors.clone() for name, vectors in made.q.items()}
    for budget in (2**30, 1):
        own = {name: vectors.clone() for name, vectors in made.q.items()}
        alone, nothing = JointCurvature(memory_budget=budget).propagate(
            own, made.flow, made.sample, carry=False, consume=True
        )
        assert nothing == {} and own == {} and set(alone) == set(scoring)
        for name, vectors in alone.items():
            torch.testing.assert_close(vectors, scoring[name], rtol=1e-8, atol=1e-12)
    assert carried and all(torch.equal(before[name], vectors) for name, vectors in made.q.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_columns_are_held_in_a_narrower_type(segment, always, kind):
    made = segment(kind)
    narrow = FisherSample(made.gradients, made.batches, seed=1, dtype=torch.bfloat16)
    expected, found = made.sample.columns(made.names), narrow.columns(made.names)
    rounded = 0
    for name, columns in found.items():
        own, other = columns.whole(), expected[name].whole()
        assert own.dtype == other.dtype == torch.float64
        assert (own - other).norm() < NARROW * other.norm()
        held = [tensor for part in columns.parts for tensor in (part.call.input, part.call.grad)]
        assert all(tensor.dtype == torch.bfloat16 for tensor in held if tensor.is_floating_point())
        rounded += not torch.equal(own, other)
    assert rounded >= 3
    if kind == "llama":  # queries, keys and values read the same input, which is held once
        inputs = [found[f"model.layers.0.self_attn.{part}_proj.weight"].parts[0].call.input for part in "qkv"]
        assert len({tensor.data_ptr() for tensor in inputs}) == 1


@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("decay", ["equal", "elementwise"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_flow_in_a_narrower_type_is_that_of_float64(segment, always, kind, decay, budget):
    made = segment(kind, "adam", decay)
    expected = JointCurvature(memory_budget=budget).propagate(made.q, made.flow, made.sample)
    narrow = FisherSample(made.gradients, made.batches, seed=1, dtype=torch.bfloat16)
    q = {name: vectors.bfloat16() for name, vectors in made.q.items()}
    got = JointCurvature(memory_budget=budget).propagate(q, made.flow, narrow)
    for one, other in zip(got, expected, strict=True):
        assert all(vectors.dtype == torch.bfloat16 for vectors in one.values())
        flat, wanted = (torch.cat([own[name].double().flatten(1) for name in made.names], 1) for own in (one, other))
        # A handful of roundings in a row; directions that decay hundreds of times over amplify none of them.
        assert ((flat - wanted).norm(dim=1) < 8 * NARROW * wanted.norm(dim=1)).all()


def test_products_with_vectors_of_a_narrower_type(segment):
    made = segment("llama")
    generator = torch.Generator().manual_seed(0)
    done = made.gradients.run(made.batches[0])
    for name, _, block in made.gradients.blocks(done):
        vectors = torch.randn((3, *block.shape[1:]), generator=generator, dtype=torch.float64)
        dots, narrow = vectors.new_zeros((3, len(block))), vectors.new_zeros((3, len(block)))
        for rule, call in made.gradients.calls(name, done):
            add_dots(rule, call, len(block), vectors, dots)
            add_dots(rule, call, len(block), vectors.bfloat16(), narrow)
        lengths = vectors.flatten(1).norm(dim=1)[:, None] * block.flatten(1).norm(dim=1)
        assert ((dots - narrow).abs() <= NARROW * lengths).all()


@pytest.mark.parametrize("lengths", [oracles.LENGTHS, (1, 1, 1)], ids=["rows", "one token"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_products_and_sums_of_calls_are_those_of_gradients(kind, count, lengths, monkeypatch):
    monkeypatch.setattr("hf_source.gradients.contraction.PIECE_BYTES", 64)
    model = oracles.SMALL_MODELS[kind]()
    names = oracles.all_names(model)
    gradients = RowGradients(model, CausalLMTask(), names)
    batch = oracles.make_batch(tuple(max(2, length) for length in lengths))
    done = gradients.run(batch)
    generator = torch.Generator().manual_seed(0)
    for name, _, block in gradients.blocks(done):
        vectors = torch.randn((count, *block.shape[1:]), generator=generator, dtype=torch.float64)
        coefficients = torch.randn((len(block), count), generator=generator, dtype=torch.float64)
        dots, sums = vectors.new_zeros((count, len(block))), torch.zeros_like(vectors)
        for rule, call in gradients.calls(name, done):
            add_dots(rule, call, len(block), vectors, dots)
            add_combined(rule, call, len(block), coefficients, sums)
        torch.testing.assert_close(dots, vectors.flatten(1) @ block.flatten(1).T, rtol=1e-9, atol=1e-9)
        expected = (coefficients.T @ block.flatten(1)).view_as(sums)
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)
        parts = [part for rule, call in gradients.calls(name, done)[:1] for _, part in pieces(rule, call, len(block))]
        if block.dim() > 2:
            assert len(parts) > 1  # the pieces are small enough to be several


@pytest.mark.parametrize("rows, size", [(24, 2**16), (8, 3 * 2**16), (3, 100)])
def test_products_of_narrow_numbers(rows, size):
    """In float32, of parts that are each rounded; the first two sizes at once end a process of torch 2.13."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn((number, size), generator=generator).bfloat16() for number in (rows, 4))
    found, expected = products(one, other), one.double() @ other.double().T
    assert found.dtype == torch.float32
    lengths = one.double().norm(dim=1)[:, None] * other.double().norm(dim=1)
    assert ((found - expected).abs() <= 2**-8 * lengths).all()
    wide = one.double(), other.double()
    assert torch.equal(products(*wide), wide[0] @ wide[1].T)


@pytest.mark.parametrize("number", [0, 5, 40, 90, 300])
def test_leading_eigenvectors_of_a_large_side(number, monkeypatch):
    """So many eigenvalues lie above the threshold: none, fewer than are looked for, more, and too many for it."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn((512, 512), generator=generator, dtype=torch.float64)).Q
    values = torch.full((512,), 1e-4, dtype=torch.float64)
    values[:number] = torch.linspace(10, 1, number, dtype=torch.float64)
    moment = (basis * values @ basis.T).float()
    calls, full = [], block_module.eigenvectors
    monkeypatch.setattr(block_module, "eigenvectors", lambda moment: calls.append(1) or full(moment))
    found = leading_eigenvectors(moment, 0.1).double()
    assert found.shape == (512, number) and len(calls) == (number > 512 // 3)
    torch.testing.assert_close(found.T @ found, torch.eye(number, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(found @ found.T, basis[:, :number] @ basis[:, :number].T, rtol=0, atol=1e-4)
    assert leading_eigenvectors(moment, 1e9).shape == (512, 0)


@pytest.mark.parametrize("shape", [(700, 8), (8, 700), (40, 3), (600, 300)], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_long_side_that_few_samples_span(shape, parts, monkeypatch):
    """Adapters: the eigenproblem is that of the samples' columns, and the block is the one of all directions."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn((8, *shape), generator=generator, dtype=torch.float64)
    preconditioner = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    vectors = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    sizes, full = [], block_module.eigh
    monkeypatch.setattr(block_module, "eigh", lambda matrix: sizes.append(len(matrix)) or full(matrix))
    some = fit_block_in_parts(lambda: samples.split(8 // parts), samples.shape[1:], preconditioner, least=1e-9)
    long, short = max(shape), min(shape)
    if 8 * short <= long / 2:
        assert max(sizes) == 8 * short and {side.shape[1] for side in (some.left, some.right)} == {8 * short, short}
    sizes.clear()
    whole = fit_block(samples, preconditioner)
    assert max(sizes) == long
    function = lambda mu: torch.exp(-mu)  # noqa: E731
    expected = whole.apply(vectors, function)
    assert (expected - vectors).abs().max() > 0.1
    torch.testing.assert_close(some.apply(vectors, function), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("columns", [1, 2, 8, 64, 65, 200])
def test_products_from_the_left(columns):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn((5, 30, columns), generator=generator, dtype=torch.float64)
    left = torch.randn((30, 7), generator=generator, dtype=torch.float64)
    right = torch.randn((columns, 4), generator=generator, dtype=torch.float64)
    turned = rotate(matrices, left, right)
    torch.testing.assert_close(turned, torch.einsum("am,nak,kb->nmb", left, matrices, right), rtol=1e-12, atol=1e-12)
    back = unrotate(turned, left, right)
    torch.testing.assert_close(back, torch.einsum("am,nmb,kb->nak", left, turned, right), rtol=1e-12, atol=1e-12)
    assert torch.equal(rotate(matrices, None, None), matrices) and torch.equal(
        unrotate(matrices, None, None), matrices
    )


@pytest.mark.parametrize("shape", [(30,), (12, 9)], ids=str)
def test_directions_that_hardly_move_are_left_out(shape):
    """A vector with fewer samples than entries, whose block is that of their products, and a matrix."""
    generator, few, size = torch.Generator().manual_seed(0), 6, torch.Size(shape).numel()
    sizes = torch.logspace(0, -9, few, dtype=torch.float64)[:, None]
    samples = (torch.randn((few, size), generator=generator, dtype=torch.float64) * sizes).view(few, *shape)
    preconditioner = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    if len(shape) == 2:  # of rank one, so that a side has small eigenvalues
        samples, preconditioner = samples[:, :, :1] * samples[:1, :1, :], preconditioner[0, 0]
    vectors = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    least, parts = 1e-10, lambda: samples.split(2)
    whole = fit_block(samples, preconditioner)
    some = fit_block_in_parts(parts, samples.shape[1:], preconditioner, least=least)
    assert 0 < some.left.shape[1] < whole.left.shape[1]
    function = lambda mu: torch.exp(-mu)  # noqa: E731
    expected, got = whole.apply(vectors, function), some.apply(vectors, function)
    assert (expected - vectors).abs().max() > 0.1
    # Each of the directions left out would have moved by `least` at most; P^{1/2} and P^{-1/2} add a factor below 4.
    assert (got - expected).abs().max() < 10 * least
