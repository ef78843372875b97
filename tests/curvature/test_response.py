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
"""Responses: the transpose of every curvature's `propagate`."""

import numpy as np
import oracles
import pytest
import torch

from hf_source.curvature import CURVATURES, FisherSample, JointCurvature, make_curvature, make_response


# As of `propagate` itself, see `test_joint.py`.
TOLERANCE = 1e-9

CASES = [("sgd", "none"), ("adam", "equal"), ("adam+frozen", "by parameter"), ("adam+frozen", "elementwise")]


def entering(made, count: int = 3) -> tuple[dict, dict]:
    """Gradients of rows, of trained parameters, and displacements of all."""
    own = oracles.queries_for(made.model, made.names, count, seed=31)
    arrived = oracles.queries_for(made.model, made.names, count, seed=32)
    return {name: own[name] for name in made.trained}, arrived


def dots(first: dict, second: dict) -> torch.Tensor:
    return sum(q.flatten(1) @ second[name].flatten(1).T for name, q in first.items())


@pytest.mark.parametrize("preconditioner, decay", CASES[:3])
@pytest.mark.parametrize("kind", ["gpt2", "odd"])
def test_joint_response_equals_the_dense_flow(segment, kind, preconditioner, decay):
    """Without a tail, and with decay that is not split off, nothing is approximated but `H` by `S^T S`."""
    made = segment(kind, preconditioner, decay)
    own, arrived = entering(made)
    got = make_response(JointCurvature(tail=False), made.flow, made.sample)(own, arrived)
    response, flow = oracles.dense_flow(made.S.T @ made.S, made.flat_P, made.flat_Lambda, made.length)
    full = {name: own.get(name, torch.zeros_like(y)) for name, y in arrived.items()}
    expected = oracles.flat(full, made.names) @ response.T + oracles.flat(arrived, made.names) @ flow.T
    assert oracles.worst_error(got, expected, made.model, made.names) < TOLERANCE


@pytest.mark.parametrize("preconditioner, decay", CASES)
@pytest.mark.parametrize("name", sorted(CURVATURES))
def test_a_response_is_the_transpose_of_propagate(segment, name, preconditioner, decay):
    made = segment("gpt2", preconditioner, decay)
    curvature = make_curvature(name, memory_budget=2**30, damping=0.1)
    own, arrived = entering(made)
    scoring, carried = curvature.propagate(made.q, made.flow, made.sample)
    response = make_response(curvature, made.flow, made.sample)
    expected = (dots({n: scoring[n] for n in own}, own) + dots(carried, arrived)).numpy()
    for _ in range(2):  # what was fitted on the first call serves the second
        got = dots(made.q, response(own, arrived)).numpy()
        assert oracles.relative_error(got, expected) < TOLERANCE
    assert oracles.relative_error(dots(made.q, arrived).numpy(), expected) > 0.01  # the segment does something


@pytest.mark.parametrize("tail", [False, True])
def test_memory_in_groups_changes_nothing(segment, tail):
    made = segment("gpt2", "adam+frozen", "by parameter")
    own, arrived = entering(made)
    whole = make_response(JointCurvature(tail), made.flow, made.sample)(own, arrived)
    sample = FisherSample(made.gradients, made.batches, seed=1)
    parts = make_response(JointCurvature(tail, memory_budget=1), made.flow, sample)(own, arrived)
    assert sample.num_passes > 2
    for name, y in whole.items():
        np.testing.assert_allclose(parts[name], y, rtol=1e-9, atol=1e-12 * float(y.abs().max()))
