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
"""`ekfac` blocks against their definition: covariances, eigenvectors, corrected eigenvalues, and the paper's formulas.

Eigenvectors are compared through the operator that they make, which signs and null spaces do not change.
"""

import numpy as np
import oracles
import pytest
import scipy.linalg
import torch

from hf_source.curvature import EKFACCurvature, Flow, fit_block


# Eigenvectors of nearby small eigenvalues mix, but where they do the corrected eigenvalues are small as well.
# Measured: 2e-14.
TOLERANCE = 1e-9


def reference(made) -> tuple[np.ndarray, np.ndarray]:
    """Every block on its own: `A = (L x R) diag(mu) (L x R)^T` in whitened coordinates, decay beside it."""
    columns = oracles.split(made.S, made.model, made.names)
    scoring = {name: np.zeros_like(q) for name, q in oracles.split(made.flat_q, made.model, made.names).items()}
    carried = {}
    for name, q in oracles.split(made.flat_q, made.model, made.names).items():
        shape = oracles.as_matrix_shape(made.shape(name))
        P = np.broadcast_to(made.P[name].numpy(), made.shape(name)).reshape(shape)
        decay = np.broadcast_to(made.Lambda[name].numpy(), made.shape(name)).ravel()
        length = made.length
        if name not in made.trained:
            carried[name] = q * np.exp(-length * decay)
            continue
        whitened = columns[name].reshape(made.size, *shape) * np.sqrt(P)
        left, right = made.bases(name, whitened, P)
        eigenvalues = oracles.corrected_eigenvalues(whitened, left, right)
        on = P.ravel() > 0
        if made.Lambda[name].dim():  # decay that differs between entries is split off
            safe = np.where(decay > 0, decay, 1.0)
            mean = np.where(decay > 0, (1 - np.exp(-length * safe)) / (length * safe), 1.0)
            integral, exponential = oracles.block_flow(left, right, eigenvalues, length)
            scoring[name] = oracles.through_block(integral, exponential, P.ravel(), q * mean)[0] * P.ravel()
            carried[name] = oracles.through_block(integral, exponential, P.ravel(), q * np.exp(-length * decay))[1]
        else:
            integral, exponential = oracles.block_flow(left, right, eigenvalues + decay[0], length)
            scoring[name] = oracles.through_block(integral, exponential, P.ravel(), q)[0] * P.ravel()
            carried[name] = oracles.through_block(integral, exponential, P.ravel(), q)[1]
            # Entries that the segment does not move have no curvature in the block, but they do decay.
            carried[name][:, ~on] = q[:, ~on] * np.exp(-length * decay[~on])
    return tuple(np.concatenate([vectors[name] for name in made.names], axis=1) for vectors in (scoring, carried))


@pytest.mark.parametrize("decay", ["none", "by parameter", "elementwise"])
@pytest.mark.parametrize("preconditioner", ["sgd", "adam", "adam+frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora-gpt2", "odd"])
def test_blocks_equal_their_definition(segment, kind, preconditioner, decay):
    made = segment(kind, preconditioner, decay)
    got = EKFACCurvature().propagate(made.q, made.flow, made.sample)
    expected = reference(made)
    assert max(made.errors(got, expected)) < TOLERANCE
    assert oracles.relative_error(made.flat_q, expected[1]) > 0.02  # the segment does something


def test_every_kind_of_factor_is_among_the_cases(segment):
    """Or the cases above would prove less than they seem to."""
    made = {kind: segment(kind) for kind in ("gpt2", "llama", "lora-gpt2", "odd")}
    kfac = {kind: {name for name in one.names if one.is_kronecker(name)} for kind, one in made.items()}
    assert "transformer.h.0.attn.c_attn.weight" in kfac["gpt2"] and "transformer.wte.weight" not in kfac["gpt2"]
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= kfac["llama"]
    assert sum("lora_" in name for name in kfac["lora-gpt2"]) == 8 and len(kfac["lora-gpt2"]) == 12
    assert kfac["odd"] == {"twice.weight", "idle.weight", "head.weight", "convolution.weight"}


@pytest.mark.parametrize(
    "kind, name", [("gpt2", "transformer.h.0.mlp.c_fc.weight"), ("llama", "model.layers.0.mlp.up_proj.weight")]
)
def test_sgd_gives_the_formulas_of_the_paper(segment, kind, name):
    """With `P = 1`: `F_r = (I - exp(-s H)) H^{-1}` and `F_S = exp(-s H)` (Bae et al. 2024, section 3.3)."""
    made = segment(kind, "sgd", length=2.0, size=30)
    made.P[name] = torch.tensor(1.0, dtype=torch.float64)
    made.flow = Flow(made.length, made.P, made.Lambda)
    columns = oracles.split(made.S, made.model, made.names)[name]
    whitened = columns.reshape(made.size, *made.shape(name))
    left, right = made.bases(name, whitened, np.ones(made.shape(name)))
    basis = np.kron(left, right)
    H = basis @ np.diag(oracles.corrected_eigenvalues(whitened, left, right).ravel()) @ basis.T
    assert np.linalg.cond(H) < 1e8  # or the formula's inverse has no meaning
    F_S = scipy.linalg.expm(-made.length * H)
    F_r = (np.eye(len(H)) - F_S) @ np.linalg.inv(H)
    q = {name: made.q[name]}
    scoring, carried = EKFACCurvature().propagate(q, made.flow, made.sample)
    flat_q = oracles.flat(q, [name])
    # The inverse in the paper's form costs the digits of the condition number.
    assert oracles.relative_error(oracles.flat(scoring, [name]), flat_q @ F_r) < 1e-7
    assert oracles.relative_error(oracles.flat(carried, [name]), flat_q @ F_S) < TOLERANCE


def test_corrected_eigenvalues_keep_the_trace(segment):
    """A basis may be a poor one, but no curvature is lost: `tr A = tr P^{1/2} S^T S P^{1/2}` in each block."""
    made = segment("lora-gpt2")
    columns = oracles.split(made.S, made.model, made.names)
    for basis in ("kfac", "gradient"):
        blocks = EKFACCurvature(basis=basis).fit(made.names, made.flow, made.sample)
        for name, block in blocks.items():
            whitened = columns[name] * np.sqrt(made.P[name].numpy().ravel())
            assert float(block.eigenvalues.sum()) == pytest.approx(np.square(whitened).sum(), rel=1e-9, abs=1e-15)


def test_the_gradient_basis_is_that_of_the_tail(segment):
    """Exact for vectors: their block is the whole second moment of their gradient."""
    made = segment("gpt2", "adam")
    columns = made.sample.matrices(made.names)
    diagonal = oracles.embedding_names(made.model, made.names)
    blocks = EKFACCurvature(basis="gradient").fit(made.names, made.flow, made.sample)
    for name in made.names:
        alone = fit_block(columns[name], made.P[name], name in diagonal)
        halved = [block.apply(made.q[name], lambda mu: torch.exp(-mu)) for block in (blocks[name], alone)]
        torch.testing.assert_close(*halved, rtol=1e-9, atol=1e-9)
        if len(made.shape(name)) == 1:
            S = columns[name].numpy() * np.sqrt(made.P[name].numpy())
            root = np.sqrt(made.P[name].numpy())
            on = root > 0
            dense = (made.q[name].numpy() * root) @ scipy.linalg.expm(-S.T @ S)
            np.testing.assert_allclose(halved[1][:, on].numpy(), dense[:, on] / root[on], rtol=1e-8, atol=1e-10)


def test_queries_are_left_unchanged(segment):
    made = segment("gpt2", "adam+frozen", "by parameter")
    before = {name: vector.clone() for name, vector in made.q.items()}
    for vectors in EKFACCurvature().propagate(made.q, made.flow, made.sample):
        for vector in vectors.values():
            vector.add_(1.0)  # results are the caller's own: no view of the queries among them
    assert all(torch.equal(before[name], made.q[name]) for name in made.names)
