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
"""Damped inverses against dense matrices in float64."""

import numpy as np
import oracles
import pytest
from oracles import flat, make_batch, queries_for, relative_error

from hf_source.curvature import FisherSample, ekfac_inverse, joint_inverse
from hf_source.gradients import CausalLMTask, RowGradients


@pytest.fixture(params=["gpt2", "llama"])
def setting(request):
    model = oracles.SMALL_MODELS[request.param]()
    names = oracles.all_names(model)
    gradients = RowGradients(model, CausalLMTask(), names)
    gradients.check(make_batch((8, 7)))
    sample = FisherSample(gradients, [make_batch((5, 8, 3)), make_batch((6, 4), seed=1)], seed=2)
    return model, names, sample, queries_for(model, names)


@pytest.mark.parametrize("memory_budget", [2**30, 1000])
@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_joint_inverse(setting, damping, memory_budget):
    """`(S^T S + lambda)^{-1} q` by a dense solve over all parameters."""
    _, names, sample, vectors = setting
    found = joint_inverse(vectors, sample, damping, memory_budget)
    columns = flat(sample.matrices(names), names)  # (samples, p)
    strength = damping * (columns**2).sum() / len(columns)
    dense = columns.T @ columns + strength * np.eye(columns.shape[1])
    assert relative_error(flat(found, names), np.linalg.solve(dense, flat(vectors, names).T).T) < 1e-9


def test_ekfac_inverse(setting):
    """Block by block: eigenbases of the two second moments of gradient matrices, corrected eigenvalues, damping."""
    model, names, sample, vectors = setting
    found = ekfac_inverse(vectors, sample, damping=0.1, basis="gradient")
    vocabulary = oracles.embedding_names(model, names)
    for name, columns in sample.matrices(names).items():
        shape = oracles.as_matrix_shape(columns.shape[1:])
        matrices = columns.reshape(len(columns), *shape).numpy()
        left, right = oracles.gradient_bases(matrices, name in vocabulary)
        eigenvalues = oracles.corrected_eigenvalues(matrices, left, right)
        rotated = left.T @ vectors[name].reshape(-1, *shape).numpy() @ right
        expected = left @ (rotated / (eigenvalues + 0.1 * eigenvalues.mean())) @ right.T
        assert relative_error(found[name].reshape(-1, *shape).numpy(), expected) < 1e-6, name
