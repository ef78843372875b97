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
"""`joint` against dense Source with `H = S^T S`, and its tail against blocks built densely from the same `S`."""

import numpy as np
import oracles
import pytest
import torch

from hf_source.curvature import FisherSample, Flow, JointCurvature, SampleSpace
from hf_source.curvature.block import fit_block, rotate, unrotate
from hf_source.curvature.columns import column_bytes
from hf_source.curvature.joint import add_gram, grouped, orthonormal_span


# Small eigenvalues of `S P S^T` are known to the rounding of the large ones, and are divided by: some of 16 digits may
# be lost, by how much depends on the samples. Measured: 1e-14.
TOLERANCE = 1e-9

CASES = [
    (preconditioner, decay)
    for preconditioner in ("sgd", "adam", "adam+frozen")
    for decay in ("none", "equal", "by parameter", "elementwise")
]


def split_off_elementwise(made, q_scoring: dict, q_carried: dict) -> np.ndarray:
    """Apply decay that differs between entries of a parameter first, in place; gives the decay that is left, `[p]`."""
    left = []
    for name in made.names:
        rates = made.Lambda[name].numpy().ravel() if made.Lambda[name].dim() else None
        size = int(np.prod(made.shape(name)))
        if rates is None:
            left.append(np.full(size, float(made.Lambda[name])))
            continue
        safe = np.where(rates > 0, rates, 1.0)
        mean = np.where(rates > 0, (1 - np.exp(-made.length * safe)) / (made.length * safe), 1.0)
        q_scoring[name] = q_scoring[name] * mean
        q_carried[name] = q_carried[name] * np.exp(-made.length * rates)
        left.append(np.zeros(size))
    return np.concatenate(left)


def reference(made, tail: bool) -> tuple[np.ndarray, np.ndarray]:
    """The definition: elementwise decay, each trained parameter's block, then all parameters with `H = S^T S`."""
    q_scoring = oracles.split(made.flat_q, made.model, made.names)
    q_carried = dict(q_scoring)
    decay = split_off_elementwise(made, q_scoring, q_carried)
    columns = oracles.split(made.S, made.model, made.names)
    diagonal = oracles.embedding_names(made.model, made.names)
    for name in made.trained if tail else []:
        P = np.broadcast_to(made.P[name].numpy(), made.shape(name)).ravel()
        whitened = (columns[name] * np.sqrt(P)).reshape(made.size, *oracles.as_matrix_shape(made.shape(name)))
        left, right = oracles.gradient_bases(whitened, name in diagonal)
        eigenvalues = oracles.corrected_eigenvalues(whitened, left, right)
        integral, exponential = oracles.block_flow(left, right, eigenvalues, made.length)
        q_scoring[name] = oracles.through_block(integral / made.length, exponential, P, q_scoring[name])[0]
        q_carried[name] = oracles.through_block(integral / made.length, exponential, P, q_carried[name])[1]
    response, flow = oracles.dense_flow(made.S.T @ made.S, made.flat_P, decay, made.length)
    together = [np.concatenate([q[name] for name in made.names], axis=1) for q in (q_scoring, q_carried)]
    return together[0] @ response, together[1] @ flow


@pytest.mark.parametrize("tail", [False, True], ids=["joint", "tail then joint"])
@pytest.mark.parametrize("preconditioner, decay", CASES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2", "odd"])
def test_joint_equals_the_dense_definition(segment, kind, preconditioner, decay, tail):
    made = segment(kind, preconditioner, decay)
    got = JointCurvature(tail=tail).propagate(made.q, made.flow, made.sample)
    expected = reference(made, tail)
    assert max(made.errors(got, expected)) < TOLERANCE
    assert oracles.relative_error(made.flat_q, expected[1]) > 0.02  # the segment does something


@pytest.mark.parametrize("decay", ["equal", "by parameter"])
def test_without_tail_joint_is_the_full_matrix_exponential(segment, decay):
    """No splitting at all: weight-decay rates that differ between parameters are exact."""
    made = segment("gpt2", "adam+frozen", decay)
    got = JointCurvature(tail=False).propagate(made.q, made.flow, made.sample)
    assert max(made.errors(got, made.dense(made.S.T @ made.S))) < TOLERANCE


def test_nearly_equal_decay_rates_may_be_merged(segment):
    """Rates whose effects over the segment differ by less than a thousandth cost less than that to treat as one."""
    made = segment("gpt2", "adam+frozen", "by parameter")
    for spread in (0.9e-3, 1.1e-3):
        scale = spread / (0.5 * made.length)  # the largest rate here is 0.5, the smallest 0
        made.Lambda = {name: rate * scale for name, rate in oracles.decay_by_parameter(made.model, made.names).items()}
        flow = Flow(made.length, made.P, made.Lambda)
        got = JointCurvature(tail=False).propagate(made.q, flow, made.sample)
        assert max(made.errors(got, made.dense(made.S.T @ made.S))) < 0.2 * spread


def test_a_wrong_scale_of_one_percent_would_be_seen(segment):
    """The tolerance is far below what an error in the scale of `S` would do."""
    made = segment("gpt2")
    got = JointCurvature(tail=False).propagate(made.q, made.flow, made.sample)
    assert min(made.errors(got, made.dense(1.01 * made.S.T @ made.S))) > 100 * TOLERANCE


@pytest.mark.parametrize("tail", [False, True], ids=["joint", "tail then joint"])
@pytest.mark.parametrize(
    "kind, preconditioner", [("gpt2", "adam+frozen"), ("lora-gpt2", "adam+frozen"), ("odd", "adam")]
)
def test_groups_under_a_memory_budget_change_nothing(segment, kind, preconditioner, tail):
    made = segment(kind, preconditioner, "by parameter")
    whole = made.size * sum(parameter.numel() * 8 for parameter in made.gradients.parameters.values())
    expected = reference(made, tail)
    passes = []
    for budget in (whole, whole // 3, 1):
        sample = FisherSample(made.gradients, made.batches, seed=1)
        got = JointCurvature(tail=tail, memory_budget=budget).propagate(made.q, made.flow, sample)
        assert max(made.errors(got, expected)) < TOLERANCE
        sizes = {
            name: column_bytes(parameter, made.size, sample.num_tokens, made.gradients.rules(name))
            for name, parameter in made.gradients.parameters.items()
        }
        groups = grouped(budget, sizes)
        still = sum(not any(map(made.flow.trains, group)) for group in groups)  # groups that need no pass
        assert sample.num_passes == JointCurvature(memory_budget=budget).num_passes(list(sizes.values())) - still
        passes.append(sample.num_passes)
    assert passes[0] == 1 and 3 <= passes[1] <= 6 and passes[2] == sum(map(made.flow.trains, made.names)) + 1


def test_more_samples_than_parameters(segment):
    """Then `S P S^T` is singular, and its null space must not matter."""
    made = segment("gpt2", "adam", "by parameter", size=30)
    few = [name for name in made.names if "ln_" in name and "weight" in name]
    constants = {name: made.P[name] for name in few}, {name: made.Lambda[name] + 0.1 for name in few}
    q = {name: made.q[name] for name in few}
    got = JointCurvature(tail=False).propagate(q, Flow(made.length, *constants), made.sample)
    S = np.concatenate([oracles.split(made.S, made.model, made.names)[name] for name in few], axis=1)
    assert S.shape[1] < made.size
    flat = [oracles.flat_constant(constant, made.model, few) for constant in constants]
    expected = oracles.dense_source(S.T @ S, *flat, made.length, oracles.flat(q, few))
    assert oracles.relative_error(oracles.flat(got[0], few), expected[0]) < TOLERANCE
    assert oracles.relative_error(oracles.flat(got[1], few), expected[1]) < TOLERANCE


def test_float32_is_close_to_float64(segment):
    made = segment("gpt2", "adam", "by parameter")
    expected = reference(made, tail=True)
    made.model.float()
    sample = FisherSample(made.gradients, made.batches, seed=1)
    single = [{name: tensor.float() for name, tensor in d.items()} for d in (made.q, made.P, made.Lambda)]
    got = JointCurvature().propagate(single[0], Flow(made.length, *single[1:]), sample)
    assert got[0]["transformer.wte.weight"].dtype == torch.float32
    # Gradients carry errors of 1e-6; the flow does not amplify them, as all its functions are bounded.
    assert max(made.errors(got, expected)) < 1e-4


def test_frozen_base_weights_are_driven_by_adapters(segment):
    made = segment("lora-gpt2", "adam+frozen")
    scoring, carried = JointCurvature().propagate(made.q, made.flow, made.sample)
    assert set(scoring) == {name for name in made.names if "lora_" in name}
    change = sum(float((carried[name] - made.q[name]).square().sum()) for name in made.frozen) ** 0.5
    assert change > 0.05 * sum(float(made.q[name].square().sum()) for name in made.frozen) ** 0.5


@pytest.mark.parametrize("tail", [False, True], ids=["joint", "tail then joint"])
@pytest.mark.parametrize("budget", [2**30, 1])
def test_queries_are_left_unchanged(segment, tail, budget):
    made = segment("gpt2", "adam+frozen", "by parameter")
    before = {name: vector.clone() for name, vector in made.q.items()}
    got = JointCurvature(tail=tail, memory_budget=budget).propagate(made.q, made.flow, made.sample)
    for vectors in got:
        for vector in vectors.values():
            vector.add_(1.0)  # results are the caller's own: no view of the queries among them
    assert all(torch.equal(before[name], made.q[name]) for name in made.names)


def test_sample_space_is_the_formula_of_the_design():
    """`exp(-s P H)^T q = q - S^T U f(e) U^T S P q` and `F_r^T q = P (s q + S^T U (f(e) - s) / e U^T S P q)`."""
    rng = np.random.default_rng(0)
    S, P, q, length = rng.normal(size=(5, 9)), rng.uniform(0.1, 3, size=9), rng.normal(size=9), 0.4
    K, b = S * P @ S.T, S @ (P * q)
    e, U = np.linalg.eigh(K)
    f = (1 - np.exp(-length * e)) / e
    as_tensors = [{0.0: torch.from_numpy(array)} for array in (K, b[:, None])]
    space = SampleSpace(*as_tensors, length)
    # Two routes through the same small eigenproblem: rounding only.
    np.testing.assert_allclose(space.propagated(0.0)[:, 0].numpy(), -U @ (f * (U.T @ b)), rtol=1e-10)
    np.testing.assert_allclose(space.scoring(0.0)[:, 0].numpy(), U @ ((f - length) / e * (U.T @ b)), rtol=1e-10)


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_samples_and_vectors_keep_their_products_in_an_orthonormal_span(rank):
    generator = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    samples = draw(7, rank) @ draw(rank, 12)
    vectors = draw(4, 12)
    basis, start = orthonormal_span(samples @ samples.T, samples @ vectors.T)
    assert basis.shape == (7, rank) and start.shape == (rank, 4)
    torch.testing.assert_close(basis @ basis.T, samples @ samples.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(basis @ start, samples @ vectors.T, rtol=0, atol=1e-10)
    projected = vectors @ torch.linalg.pinv(samples) @ samples
    torch.testing.assert_close(start.T @ start, projected @ projected.T, rtol=0, atol=1e-10)


def test_samples_that_are_not_finite_are_no_span():
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        orthonormal_span(torch.full((2, 2), torch.nan, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 256, 600])
def test_the_lower_half_of_a_gram_matrix_is_added_in_blocks(size):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((size, 7), generator=generator, dtype=torch.float64)
    total = torch.ones((size, size), dtype=torch.float64)
    add_gram([rows], total)
    torch.testing.assert_close(total.tril(), (rows @ rows.T + 1).tril())


@pytest.mark.parametrize("diagonal_left", [False, True])
def test_directions_that_nothing_moves_are_left_out_of_a_block(diagonal_left):
    """Samples of low rank: most directions of both bases have no eigenvalue that differs from 0."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    samples = torch.einsum("nrm,nrk->nmk", normal(2, 1, 9), normal(2, 1, 7))
    block = fit_block(samples, torch.rand((9, 7), generator=generator, dtype=torch.float64) + 0.1, diagonal_left)
    vectors = normal(3, 9, 7)
    functions = [lambda mu: torch.exp(-mu), lambda mu: 1 / (1 + mu)]
    for function, got in zip(functions, block.apply_all(vectors, functions), strict=True):
        turned = rotate(block.preconditioner.root(vectors), block.left, block.right)
        back = unrotate(function(block.eigenvalues) * turned, block.left, block.right)
        torch.testing.assert_close(got, block.preconditioner.inverse_root(back), rtol=1e-9, atol=1e-11)
    unmoved = block.apply(vectors, lambda mu: torch.ones_like(mu))
    assert torch.equal(unmoved, vectors) and unmoved is not vectors
