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
"""`diagonal` and `ekfac-hybrid` against dense matrices, per kind of module, and in their limits."""

import numpy as np
import oracles
import pytest
import torch

from hf_source.curvature import (
    DiagonalCurvature,
    EKFACCurvature,
    EKFACHybridCurvature,
    Flow,
    OneSided,
    ekfac_inverse,
)


# Elementwise functions against a matrix exponential. Measured: 1e-14.
TOLERANCE = 1e-9


@pytest.mark.parametrize("decay", ["none", "by parameter", "elementwise"])
@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "adam+frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2", "odd"])
def test_the_diagonal_is_the_flow_of_a_diagonal_matrix(segment, kind, preconditioner, decay):
    """Weight decay included, whatever its shape: nothing is split."""
    made = segment(kind, preconditioner, decay)
    got = DiagonalCurvature().propagate(made.q, made.flow, made.sample)
    expected = made.dense(np.diag(np.square(made.S).sum(axis=0)))
    assert max(made.errors(got, expected)) < TOLERANCE
    assert oracles.relative_error(made.flat_q, expected[1]) > 0.02  # the segment does something


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_diagonal_under_a_matrix_is_that_of_whitened_gradients(segment, side):
    made, name = segment("gpt2"), "transformer.h.0.mlp.c_fc.weight"
    rows, columns = made.shape(name)
    size = rows if side == "left" else columns
    half = torch.randn(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matrix = half @ half.T + torch.eye(size, dtype=torch.float64)
    flow = Flow(made.length, {name: OneSided(matrix, side)}, {name: torch.tensor(0.7, dtype=torch.float64)})
    scoring, carried = DiagonalCurvature().propagate({name: made.q[name]}, flow, made.sample)
    values, vectors = np.linalg.eigh(matrix.numpy())
    root = (vectors * np.sqrt(values)) @ vectors.T
    root = np.kron(root, np.eye(columns)) if side == "left" else np.kron(np.eye(rows), root)
    whitened = oracles.split(made.S, made.model, made.names)[name] @ root
    rates = np.square(whitened).sum(axis=0) + 0.7
    q = oracles.flat(made.q, [name]) @ root
    expected = (q * (1 - np.exp(-made.length * rates)) / rates) @ root
    assert oracles.relative_error(oracles.flat(scoring, [name]), expected) < TOLERANCE
    expected = (q * np.exp(-made.length * rates)) @ np.linalg.inv(root)
    assert oracles.relative_error(oracles.flat(carried, [name]), expected) < TOLERANCE


@pytest.mark.parametrize("decay", ["none", "by parameter", "elementwise"])
@pytest.mark.parametrize("preconditioner", ["adam", "adam+frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2", "odd"])
def test_the_hybrid_equals_its_definition(segment, kind, preconditioner, decay):
    """`x = (H_ekfac + damping)^{-1} P D f(P D + Lambda) q` with every matrix dense, `q'` that of the diagonal."""
    made = segment(kind, preconditioner, decay)
    scoring, carried = EKFACHybridCurvature(damping=0.3).propagate(made.q, made.flow, made.sample)
    PD = made.flat_P * np.square(made.S).sum(axis=0)
    rates = PD + made.flat_Lambda
    safe = np.where(rates > 0, rates, 1.0)
    learnt = made.flat_q * PD * np.where(rates > 0, (1 - np.exp(-made.length * rates)) / safe, made.length)
    assert oracles.relative_error(oracles.flat(carried, made.names), made.flat_q * np.exp(-made.length * rates)) < (
        TOLERANCE
    )
    learnt = oracles.split(learnt, made.model, made.names)
    columns = oracles.split(made.S, made.model, made.names)
    moved = oracles.split((made.flat_P > 0) * np.ones_like(made.flat_q), made.model, made.names)
    expected = {}
    for name in made.trained:
        shape = oracles.as_matrix_shape(made.shape(name))
        matrices = columns[name].reshape(made.size, *shape)
        left, right = made.bases(name, matrices, np.ones(shape))
        eigenvalues = oracles.corrected_eigenvalues(matrices, left, right).ravel()
        if not eigenvalues.any():
            expected[name] = np.zeros_like(learnt[name])
            continue
        if not made.shape(name):  # its P is a number: no damping is needed
            expected[name] = learnt[name] / eigenvalues
            continue
        basis = np.kron(left, right)
        H = (basis * eigenvalues) @ basis.T
        inverse = np.linalg.inv(H + 0.3 * eigenvalues.mean() * np.eye(len(H)))
        expected[name] = learnt[name] @ inverse * moved[name]
    assert set(scoring) == set(made.trained)
    got, want = oracles.flat(scoring, made.trained), np.concatenate([expected[n] for n in made.trained], axis=1)
    assert oracles.relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("decay", ["none", "elementwise"])
def test_the_hybrid_is_ekfac_where_the_preconditioner_is_a_number(segment, decay):
    made = segment("gpt2", "sgd", decay)
    made.P = {name: torch.tensor(1.3, dtype=torch.float64) for name in made.names}
    flow = Flow(made.length, made.P, made.Lambda)
    for one, other in zip(
        EKFACHybridCurvature().propagate(made.q, flow, made.sample),
        EKFACCurvature().propagate(made.q, flow, made.sample),
        strict=True,
    ):
        for name in made.names:
            torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-12)


def test_a_long_hybrid_segment_is_the_influence_function(segment):
    """`s -> infinity`: the damped inverse of what has any curvature; and nothing of that is left."""
    made = segment("gpt2", "adam")
    made.P = {name: P + 0.1 for name, P in made.P.items()}
    scoring, carried = EKFACHybridCurvature().propagate(made.q, Flow(1e12, made.P, made.Lambda), made.sample)
    curved = {
        name: columns.square().sum(dim=0) > 1e-9 * columns.square().sum(dim=0).max()
        for name, columns in made.sample.matrices(made.names).items()
    }
    inverse = ekfac_inverse({name: made.q[name] * on for name, on in curved.items()}, made.sample)
    assert oracles.relative_error(oracles.flat(scoring, made.names), oracles.flat(inverse, made.names)) < 1e-8
    left = {name: carried[name] * on for name, on in curved.items()}
    assert np.linalg.norm(oracles.flat(left, made.names)) < 1e-12 * np.linalg.norm(made.flat_q)


def test_a_short_hybrid_segment_is_not_a_dot_product(segment):
    """`s -> 0`: `x / s -> (H_ekfac + damping)^{-1} P D q`, which the module says, and not `P q`."""
    made = segment("gpt2", "adam")
    length = 1e-8
    scoring, carried = EKFACHybridCurvature().propagate(made.q, Flow(length, made.P, made.Lambda), made.sample)
    D = {name: columns.square().sum(dim=0) for name, columns in made.sample.matrices(made.names).items()}
    expected = ekfac_inverse({name: made.P[name] * D[name] * q for name, q in made.q.items()}, made.sample)
    x = oracles.flat(scoring, made.names) / length
    expected = oracles.flat(expected, made.names) * (made.flat_P > 0)  # nothing is scored where nothing moves
    assert oracles.relative_error(x, expected) < 1e-5  # s times the largest rate
    assert oracles.relative_error(x, oracles.flat({n: made.P[n] * made.q[n] for n in made.names}, made.names)) > 0.1
    assert oracles.relative_error(oracles.flat(carried, made.names), made.flat_q) < 1e-6
