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
"""`exact`, `identity` and `gauss_newton` against matrix exponentials and enumerated labels."""

import numpy as np
import oracles
import pytest
import torch

from hf_source.curvature import ExactCurvature, IdentityCurvature, gauss_newton
from hf_source.errors import UnsupportedError


# An eigendecomposition against scaling and squaring of a non-normal matrix whose preconditioner spans two decades:
# both may lose a few digits of float64. Measured: 1e-13.
TOLERANCE = 1e-10


@pytest.mark.parametrize("kind", ["gpt2", "lora-gpt2", "odd"])
def test_gauss_newton_equals_enumerated_labels(segment, kind):
    """`J^T (diag(p) - p p^T) J` per item is the mean of `g g^T` over all labels, by another route altogether."""
    made = segment(kind)
    got = gauss_newton(made.sample, made.names).numpy()
    assert oracles.relative_error(got, made.H) < 1e-10  # rounding of sums over a few hundred outer products
    # The mean over items and not over rows, nor the sum.
    assert sum(oracles.num_items(batch) for batch in made.batches) > 2 * made.size


def test_gauss_newton_keeps_the_tiny_rounding_of_float32_norms(segment):
    """Llama's norm computes in float32 whatever the model: rows alone and in a batch agree to that only."""
    made = segment("llama")
    assert oracles.relative_error(gauss_newton(made.sample, made.names).numpy(), made.H) < 1e-6


@pytest.mark.parametrize("decay", ["none", "equal", "by parameter", "elementwise"])
@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "sgd+frozen", "adam+frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "lora-gpt2", "odd"])
def test_exact_is_the_matrix_exponential(segment, kind, preconditioner, decay):
    made = segment(kind, preconditioner, decay)
    got = ExactCurvature().propagate(made.q, made.flow, made.sample)
    expected = made.dense(made.H)
    assert max(made.errors(got, expected)) < TOLERANCE
    # The test means something: the flow does a lot to the vectors.
    assert oracles.relative_error(made.flat_q, expected[1]) > 0.1


def test_exact_takes_any_symmetric_hessian(segment):
    """With negative eigenvalues too, as a true Hessian has."""
    made = segment("gpt2", "adam", "by parameter")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=made.H.shape) * 0.02
    hessian = made.H + (noise + noise.T) / 2
    assert np.linalg.eigvalsh(hessian)[0] < -0.1
    curvature = ExactCurvature(hessian=lambda sample, names: torch.from_numpy(hessian))
    got = curvature.propagate(made.q, made.flow, made.sample)
    assert max(made.errors(got, made.dense(hessian))) < TOLERANCE


def test_frozen_parameters_are_driven_by_trained_ones(segment):
    """Base weights under LoRA: no scoring vector, but what the adapters learnt depends on them."""
    made = segment("lora-gpt2", "adam+frozen")
    scoring, carried = ExactCurvature().propagate(made.q, made.flow, made.sample)
    assert set(scoring) == {name for name in made.names if "lora_" in name}
    change = sum(float((carried[name] - made.q[name]).square().sum()) for name in made.frozen) ** 0.5
    size = sum(float(made.q[name].square().sum()) for name in made.frozen) ** 0.5
    assert change > 0.05 * size


def test_exact_refuses_large_models(segment):
    made = segment("gpt2")
    with pytest.raises(UnsupportedError, match="joint"):
        ExactCurvature(max_parameters=100).propagate(made.q, made.flow, made.sample)


@pytest.mark.parametrize("decay", ["none", "equal", "by parameter", "elementwise"])
@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "adam+frozen"])
def test_identity_is_the_flow_without_curvature(segment, preconditioner, decay):
    made = segment("gpt2", preconditioner, decay)
    got = IdentityCurvature().propagate(made.q, made.flow)
    # Elementwise functions on both sides; the reference still goes through a matrix exponential.
    assert max(made.errors(got, made.dense(np.zeros_like(made.H)))) < 1e-12


@pytest.mark.parametrize("curvature", [ExactCurvature(), IdentityCurvature()], ids=["exact", "identity"])
def test_queries_are_left_unchanged(segment, curvature):
    made = segment("gpt2", "adam+frozen", "by parameter")
    before = {name: vector.clone() for name, vector in made.q.items()}
    scoring, carried = curvature.propagate(made.q, made.flow, made.sample)
    for vectors in (scoring, carried):
        for vector in vectors.values():
            vector.add_(1.0)  # results are the caller's own: no view of the queries among them
    assert all(torch.equal(before[name], made.q[name]) for name in made.names)
