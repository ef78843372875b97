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
"""Gauss-Newton products against enumerated labels, and conjugate gradient against dense solves."""

import numpy as np
import oracles
import pytest
import torch

from hf_source.curvature import EKFACInverse, GaussNewtonProducts, JointInverse, conjugate_gradient
from hf_source.errors import UnsupportedError
from hf_source.gradients import CausalLMTask


def products_of(made, **settings):
    if hasattr(made.model, "set_attn_implementation"):
        made.model.set_attn_implementation("eager")
    return GaussNewtonProducts(made.gradients, made.batches, **settings)


@pytest.mark.parametrize("memory_budget", [2**30, 1])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2", "odd"])
def test_products_are_those_of_the_dense_matrix(segment, kind, memory_budget):
    made = segment(kind)
    got = products_of(made, memory_budget=memory_budget)(made.q)
    # Llama's eager attention takes its softmax in float32, whatever the model's type.
    tolerance = 1e-6 if kind == "llama" else 1e-10
    assert oracles.relative_error(oracles.flat(got, made.names), made.flat_q @ made.H) < tolerance


def test_products_of_some_parameters_are_those_of_their_block(segment):
    made = segment("gpt2")
    names = made.names[3:6]
    got = products_of(made)({name: made.q[name] for name in names})
    inside = np.concatenate([np.full(made.gradients.parameters[n].numel(), n in names) for n in made.names])
    expected = oracles.flat(made.q, names) @ made.H[np.ix_(inside, inside)]
    assert oracles.relative_error(oracles.flat(got, names), expected) < 1e-10


def test_label_smoothing_has_no_part_in_the_curvature(segment):
    made = segment("gpt2")
    expected = products_of(made)(made.q)
    made.gradients = made.gradients.with_task(CausalLMTask(label_smoothing=0.3))
    for name, part in products_of(made)(made.q).items():
        assert torch.equal(part, expected[name])


def damped(made, inverse):
    """The operator, and the dense matrix that it is."""
    products = products_of(made)

    def operator(vectors):
        moved = products(vectors)
        return {name: moved[name] + inverse.strengths[name] * vector for name, vector in vectors.items()}

    strengths = [np.full(made.gradients.parameters[n].numel(), inverse.strengths[n]) for n in made.names]
    return operator, made.H + np.diag(np.concatenate(strengths))


@pytest.mark.parametrize("kind", ["gpt2", "lora-gpt2"])
@pytest.mark.parametrize("kind_of_inverse", [EKFACInverse, JointInverse])
def test_converged_it_is_the_dense_solution(segment, kind_of_inverse, kind):
    made = segment(kind)
    inverse = kind_of_inverse(made.names, made.sample, 0.1)
    operator, dense = damped(made, inverse)
    found, left = conjugate_gradient(operator, made.q, inverse, 2000, 1e-10)
    assert (left <= 1e-10).all()
    assert oracles.relative_error(oracles.flat(found, made.names), np.linalg.solve(dense, made.flat_q.T).T) < 1e-6
    residual = np.linalg.norm(made.flat_q - oracles.flat(found, made.names) @ dense, axis=1)
    np.testing.assert_array_less(residual, 1.1e-10 * np.linalg.norm(made.flat_q, axis=1))


def test_every_iteration_comes_closer(segment):
    """In the norm of the matrix, which is what conjugate gradient minimises; and it starts from the inverse given."""
    made = segment("gpt2")
    inverse = EKFACInverse(made.names, made.sample, 0.1)
    operator, dense = damped(made, inverse)
    exact = np.linalg.solve(dense, made.flat_q.T).T
    errors = []
    for iterations in range(1, 9):
        found, left = conjugate_gradient(operator, made.q, inverse, iterations, 0.0)
        away = oracles.flat(found, made.names) - exact
        errors.append(np.sqrt(np.einsum("qi,ij,qj->q", away, dense, away)))
        real = np.linalg.norm(made.flat_q - oracles.flat(found, made.names) @ dense, axis=1)
        np.testing.assert_allclose(left.numpy(), real / np.linalg.norm(made.flat_q, axis=1), rtol=1e-8)
        if iterations == 1:
            direction = oracles.flat(inverse(made.q), made.names)
            found = oracles.flat(found, made.names)
            cosine = (
                (direction * found).sum(axis=1) / np.linalg.norm(direction, axis=1) / np.linalg.norm(found, axis=1)
            )
            np.testing.assert_allclose(cosine, 1.0, rtol=1e-10)
    assert (np.diff(errors, axis=0) < 0).all()
    assert (errors[-1] < 0.5 * errors[0]).all()


def test_queries_are_solved_each_for_itself(segment):
    """One stops when it is done; one without a gradient has nothing to solve."""
    made = segment("gpt2")
    inverse = EKFACInverse(made.names, made.sample, 1.0)
    operator, _ = damped(made, inverse)
    counts = []

    def counted(vectors):
        counts.append(len(vectors[made.names[0]]))
        return operator(vectors)

    easy = operator(inverse(inverse({name: q[:1] for name, q in made.q.items()})))
    three = {name: torch.cat([q[:1], 0 * q[:1], easy[name]]) for name, q in made.q.items()}
    before = {name: q.clone() for name, q in three.items()}
    found, left = conjugate_gradient(counted, three, inverse, 1000, 1e-8)
    assert counts[0] == 2 and counts[-1] == 1 and left[1] == 0 and (left <= 1e-8).all()
    for index in (0, 2):
        one = {name: q[index : index + 1] for name, q in three.items()}
        alone, _ = conjugate_gradient(operator, one, inverse, 1000, 1e-8)
        mine = {name: found[name][index : index + 1] for name in made.names}
        # Both stop at their tolerance; rounding is amplified until then, not beyond.
        assert oracles.relative_error(oracles.flat(mine, made.names), oracles.flat(alone, made.names)) < 1e-5
    assert not any(part[1].any() for part in found.values())
    assert all(torch.equal(three[name], before[name]) for name in made.names)


def test_negative_curvature_is_refused():
    vectors = {"a": torch.ones(1, 3, dtype=torch.float64)}
    with pytest.raises(UnsupportedError, match="not convex.*solver='direct', or a larger damping"):
        conjugate_gradient(lambda given: {"a": -given["a"]}, vectors, lambda given: dict(given), 5, 0.0)


def test_a_model_with_one_derivative_is_refused(segment):
    made = segment("gpt2")

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, given):
            return given

    class Task(CausalLMTask):
        def forward(self, model, batch):
            return Once.apply(super().forward(model, batch))

    made.gradients = made.gradients.with_task(Task())
    with pytest.raises(UnsupportedError, match="cannot be differentiated twice.*use solver='direct'"):
        products_of(made)(made.q)
