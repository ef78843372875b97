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
"""Limits in which Source is something known: influence functions, gradient dot products, exact unrolling."""

import numpy as np
import oracles
import pytest
import torch

from hf_source.curvature import (
    DiagonalCurvature,
    EKFACCurvature,
    ExactCurvature,
    Flow,
    IdentityCurvature,
    JointCurvature,
)


CURVATURES = {
    "joint": JointCurvature(tail=False),
    "tail then joint": JointCurvature(),
    "ekfac": EKFACCurvature(),
    "diagonal": DiagonalCurvature(),
    "exact": ExactCurvature(),
    "identity": IdentityCurvature(),
}


def flow_of(made, length: float) -> Flow:
    return Flow(length, made.P, made.Lambda)


def rows_with_items(made) -> np.ndarray:
    """`S` without rows that have no loss item, so that `S P S^T` has an inverse."""
    return made.S[np.linalg.norm(made.S, axis=1) > 0]


def test_a_long_segment_gives_the_influence_function(segment):
    """`s -> infinity`: `F_r = H^{-1}` whatever the preconditioner, and nothing is left for earlier segments."""
    made = segment("gpt2", "adam")
    made.P = {name: P + 0.1 for name, P in made.P.items()}  # no parameter stands still
    damped = made.H + 0.1 * np.eye(len(made.H))
    exact = ExactCurvature(hessian=lambda sample, names: torch.from_numpy(damped))
    # The slowest mode decays at 0.1 x 0.1 at least, so exp(-s e) < exp(-50).
    scoring, carried = exact.propagate(made.q, flow_of(made, 5000.0), made.sample)
    expected = np.linalg.solve(damped, made.flat_q.T).T
    assert oracles.relative_error(oracles.flat(scoring, made.names), expected) < 1e-8  # as `exact` elsewhere
    assert np.linalg.norm(oracles.flat(carried, made.names)) < 1e-12 * np.linalg.norm(made.flat_q)


def test_a_long_segment_gives_the_influence_function_on_the_span_of_the_samples(segment):
    """`H = S^T S` has rank n: with `P = 1` the pseudo-inverse on the span; off it, dot products go on growing."""
    made = segment("gpt2")
    made.P = {name: torch.tensor(1.0, dtype=torch.float64) for name in made.names}
    S = rows_with_items(made)
    length = 1e4 / np.linalg.eigvalsh(S @ S.T)[0]
    scoring, carried = CURVATURES["joint"].propagate(made.q, flow_of(made, length), made.sample)
    project = np.linalg.pinv(S) @ S
    expected = made.flat_q @ np.linalg.pinv(S.T @ S, rcond=1e-10)
    x = oracles.flat(scoring, made.names)
    # The part off the span is 1e4 times larger and is projected away, which costs four digits of 1e-10.
    assert oracles.relative_error(x @ project, expected) < 1e-6
    off = made.flat_q - made.flat_q @ project
    assert oracles.relative_error(x - x @ project, length * off) < 1e-9
    assert oracles.relative_error(oracles.flat(carried, made.names), off) < 1e-9


@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "adam+frozen"])
def test_a_long_segment_has_learnt_the_samples_whatever_the_preconditioner(segment, preconditioner):
    """`H F_r^T q = (I - exp(-s H P)) q`, whose limit in sample space is `S x = (S P S^T)^{-1} S P q`."""
    made = segment("gpt2", preconditioner)
    S = rows_with_items(made)
    K = (S * made.flat_P) @ S.T
    length = 100 / np.linalg.eigvalsh(K)[0]
    scoring, carried = CURVATURES["joint"].propagate(made.q, flow_of(made, length), made.sample)
    x = np.zeros_like(made.flat_q)
    parts = oracles.split(x, made.model, made.names)
    for name, vector in scoring.items():
        parts[name][:] = vector.reshape(2, -1).numpy()
    b = S @ (made.flat_P * made.flat_q).T
    # Cancellation of the growing part off the span (length x P q) costs digits.
    assert oracles.relative_error(S @ x.T, np.linalg.solve(K, b)) < 1e-5
    left = S @ (made.flat_P * oracles.flat(carried, made.names)).T
    assert np.linalg.norm(left) < 1e-8 * np.linalg.norm(b)


@pytest.mark.parametrize("method", CURVATURES)
def test_a_short_segment_gives_preconditioned_dot_products(segment, method):
    """`s H P -> 0`: `x / s -> P q` and `q' -> q`, with an error in proportion to `s` (none for `identity`)."""
    made = segment("gpt2", "adam+frozen", "by parameter")
    curvature = CURVATURES[method]
    errors = []
    for length in (2e-6, 1e-6):
        scoring, carried = curvature.propagate(made.q, flow_of(made, length), made.sample)
        x = oracles.flat(scoring, made.trained) / length
        Pq = oracles.flat({name: made.P[name] * made.q[name] for name in made.trained}, made.trained)
        errors.append([
            oracles.relative_error(x, Pq), oracles.relative_error(oracles.flat(carried, made.names), made.flat_q)
        ])  # fmt: skip
    errors = np.array(errors)
    assert (errors[1] < 1e-4).all() and (errors[1] > 0).all()  # s times the largest eigenvalue of P H is about 1e-4
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, rtol=1e-3)  # first order; the next is 1e-4 below


def test_splitting_off_elementwise_decay_vanishes_with_the_segment(segment):
    """Decay proportional to `P` is split off, at a cost of second order in `s`: relatively half as much at `s / 2`."""
    made = segment("gpt2", "adam", "elementwise")
    errors = []
    for length in (4e-4, 2e-4, 1e-4):
        made.length = length
        expected = made.dense(made.S.T @ made.S)
        scoring, carried = CURVATURES["joint"].propagate(made.q, flow_of(made, length), made.sample)
        change = np.linalg.norm(expected[1] - made.flat_q)
        errors.append([
            oracles.relative_error(oracles.flat(scoring, made.names), expected[0]) / length,
            np.linalg.norm(oracles.flat(carried, made.names) - expected[1]) / change,
        ])  # fmt: skip
    errors = np.array(errors)
    assert (errors[:, 1] > 1e-6).all()
    np.testing.assert_allclose(errors[:-1, 1] / errors[1:, 1], 2.0, rtol=0.1)
    assert (np.diff(errors[:, 0]) < 0).all()  # scoring: better than first order


def test_one_segment_per_step_converges_to_exact_unrolling():
    """`J_k = prod (I - eta P_k' H_k' - eta Lambda)` step by step, curvature and preconditioner changing on the way.

    Each segment is wrong by order `eta^2`, so their sum by order `eta`: errors halve when steps do.
    """
    rng = np.random.default_rng(0)
    size, total = 7, 0.8
    ends = [a @ a.T for a in rng.normal(size=(2, size, size)) / np.sqrt(size)]
    scales = rng.uniform(0.2, 3.0, size=(2, size))
    scales[:, 0] = 0.0  # a frozen parameter
    decay = np.where(np.arange(size) < 4, 0.5, 0.0)
    gradients = rng.normal(size=(2, size))
    q = rng.normal(size=size)
    names = [f"w{index}" for index in range(size)]

    def at(pair: np.ndarray, time: float) -> np.ndarray:
        return pair[0] + time * (pair[1] - pair[0])

    def vectors(array: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([[value]]) for name, value in zip(names, array, strict=True)}

    def scalars(array: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(value) for name, value in zip(names, array, strict=True)}

    def difference(steps: int) -> float:
        """Of the score summed over all steps, and of what is left of q at the start."""
        eta = total / steps
        unrolled, carried = q.copy(), vectors(q)
        exact_score = source_score = 0.0
        for k in reversed(range(steps)):
            P, H, g = (at(pair, k / steps) for pair in (scales, ends, gradients))
            exact_score += eta * unrolled @ (P * g)
            unrolled = (np.eye(size) - eta * P[:, None] * H - eta * np.diag(decay)).T @ unrolled
            curvature = ExactCurvature(hessian=lambda sample, names, H=H: torch.from_numpy(H))
            scoring, carried = curvature.propagate(carried, Flow(eta, scalars(P), scalars(decay)), None)
            source_score += sum(float(scoring[name]) * g[index] for index, name in enumerate(names) if name in scoring)
        left = np.array([float(carried[name]) for name in names])
        return abs(source_score - exact_score) / abs(exact_score) + oracles.relative_error(left, unrolled)

    errors = [difference(steps) for steps in (50, 100, 200, 400)]
    assert errors[-1] < 5e-3
    ratios = np.divide(errors[:-1], errors[1:])
    assert (abs(ratios - 2) < 0.1).all() and abs(ratios[-1] - 2) < 0.02
