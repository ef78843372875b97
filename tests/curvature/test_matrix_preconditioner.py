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
"""A preconditioner that is a matrix on one side of a weight (Muon's), against dense matrices."""

import numpy as np
import oracles
import pytest
import scipy.linalg
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_source.curvature import (
    Diagonal,
    EKFACCurvature,
    ExactCurvature,
    Flow,
    IdentityCurvature,
    JointCurvature,
    OneSided,
)


# Square roots by an eigendecomposition, and an exponential by scaling and squaring. Measured: 1e-13.
TOLERANCE = 1e-9


def is_matrix(made, name):
    """A weight of a layer, as Muon takes them; on both sides where shapes differ."""
    return len(made.shape(name)) == 2 and name not in oracles.embedding_names(made.model, made.names)


def with_matrices(made):
    """Put matrices in the place of the diagonal preconditioners of layers."""
    generator = torch.Generator().manual_seed(3)
    mixed = {}
    for name in made.names:
        if name in made.frozen or not is_matrix(made, name):
            mixed[name] = made.P[name]
            continue
        rows, columns = made.shape(name)
        side, short = ("left", rows) if rows <= columns else ("right", columns)
        basis = torch.linalg.qr(torch.randn(short, short, generator=generator, dtype=torch.float64)).Q
        spread = 10 ** (1.5 * torch.rand(short, generator=generator, dtype=torch.float64) - 0.5)
        mixed[name] = OneSided((basis * spread) @ basis.T, side)
    made.mixed = mixed
    made.flow = Flow(made.length, mixed, made.Lambda)
    sides = {p.side for p in mixed.values() if isinstance(p, OneSided)}
    assert sides == {"left", "right"} or (sides and made.frozen)
    return made


def dense(made, name):
    """`P` of one parameter as a matrix on its flattened gradient."""
    value, shape = made.mixed[name], made.shape(name)
    if not isinstance(value, OneSided):
        return np.diag(value.expand(shape).flatten().double().numpy())
    matrix = value.matrix.numpy()
    return np.kron(matrix, np.eye(shape[1])) if value.side == "left" else np.kron(np.eye(shape[0]), matrix.T)


def dense_P(made):
    return scipy.linalg.block_diag(*(dense(made, name) for name in made.names))


@pytest.mark.parametrize(
    ("kind", "decay", "preconditioner"),
    [("gpt2", "none", "adam"), ("gpt2", "by parameter", "adam+frozen"), ("odd", "by parameter", "adam")],
)
def test_exact_joint_and_identity_equal_dense_source(segment, kind, decay, preconditioner):
    made = with_matrices(segment(kind, preconditioner, decay))
    zero = np.zeros((len(made.flat_Lambda),) * 2)
    cases = [
        (ExactCurvature(), made.H),
        (JointCurvature(tail=False), made.S.T @ made.S),
        (JointCurvature(tail=False, memory_budget=1), made.S.T @ made.S),
        (IdentityCurvature(), zero),
    ]
    for curvature, hessian in cases:
        got = curvature.propagate(made.q, made.flow, made.sample)
        expected = oracles.dense_source(hessian, dense_P(made), made.flat_Lambda, made.length, made.flat_q)
        assert max(made.errors(got, expected)) < TOLERANCE, curvature


def bases(made, name, columns, root):
    """The bases that `ekfac` takes for a weight: covariances of its two sides, whitened."""
    traffic = [
        oracles.layer_traffic(oracles.trainable(made.model), made.owner(name), batch, labels)
        for batch, labels in zip(made.batches, made.labels, strict=True)
    ]
    inputs, grads = (np.concatenate(side) for side in zip(*traffic, strict=True))
    left, right = (inputs, grads) if isinstance(made.owner(name), Conv1D) else (grads, inputs)
    value = made.mixed[name]
    half = scipy.linalg.sqrtm(value.matrix.numpy()).real
    left, right = (left @ half, right) if value.side == "left" else (left, right @ half)
    return oracles.eigenbasis(left.T @ left), oracles.eigenbasis(right.T @ right)


@pytest.mark.parametrize("basis", ["kfac", "gradient"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_blocks_equal_their_definition(segment, kind, basis):
    """`A = P^{1/2} S^T S P^{1/2}` of one weight, diagonal in its basis, with `P` dense."""
    made = with_matrices(segment(kind, "adam", "by parameter"))
    scoring, carried = EKFACCurvature(basis=basis).propagate(made.q, made.flow, made.sample)
    columns = oracles.split(made.S, made.model, made.names)
    names = [n for n in made.names if isinstance(made.mixed[n], OneSided) and isinstance(made.owner(n), nn.Module)]
    assert len(names) >= 4
    for name in names:
        P = dense(made, name)
        root = scipy.linalg.sqrtm(P).real
        whitened = (columns[name] @ root).reshape(made.size, *made.shape(name))
        left, right = bases(made, name, columns, root) if basis == "kfac" else oracles.gradient_bases(whitened, False)
        eigenvalues = oracles.corrected_eigenvalues(whitened, left, right)
        decay = float(made.Lambda[name])
        integral, exponential = oracles.block_flow(left, right, eigenvalues + decay, made.length)
        q = oracles.split(made.flat_q, made.model, made.names)[name]
        inverse = np.linalg.inv(root)
        expected = q @ root @ integral @ root, q @ root @ exponential @ inverse
        for got, want in zip((scoring, carried), expected, strict=True):
            assert oracles.relative_error(got[name].reshape(want.shape).numpy(), want) < 1e-7, name


def test_a_multiple_of_the_identity_is_a_number(segment):
    """Curvature by every method is the same whether `P = c` is said as a number or as a matrix."""
    made = segment("gpt2", "adam", "by parameter")
    as_numbers, as_matrices = dict(made.P), dict(made.P)
    for name in made.names:
        if is_matrix(made, name):
            as_numbers[name] = torch.tensor(1.7, dtype=torch.float64)
            side = "left" if made.shape(name)[0] <= made.shape(name)[1] else "right"
            as_matrices[name] = OneSided(1.7 * torch.eye(min(made.shape(name)), dtype=torch.float64), side)
    curvatures = (JointCurvature(), EKFACCurvature(), EKFACCurvature(basis="gradient"), ExactCurvature())
    for curvature in curvatures:
        first, second = (
            curvature.propagate(made.q, Flow(made.length, P, made.Lambda), made.sample)
            for P in (as_numbers, as_matrices)
        )
        for one, other in zip(first, second, strict=True):
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right"])
def test_roots_of_a_matrix_that_does_not_move_everything(side):
    """Singular: what it does not move passes through a block unchanged."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    value = OneSided(half @ half.T, side)
    vectors = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(value.root(value.root(vectors)), value.apply(vectors))
    moved = value.root(value.inverse_root(vectors))
    torch.testing.assert_close(value.root(value.inverse_root(moved)), moved)
    torch.testing.assert_close(value.apply(moved), value.apply(vectors))
    assert not value.is_zero and OneSided(torch.zeros(2, 2), side).is_zero and Diagonal(torch.zeros(())).is_zero
