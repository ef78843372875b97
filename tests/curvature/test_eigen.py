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
"""Eigendecompositions where LAPACK gives up."""

import pytest
import torch

from hf_source.curvature.eigen import eigh


def matrix():
    """Of rank 2, and 0 but for a few rows."""
    rows = torch.zeros(2, 40, dtype=torch.float64)
    rows[:, ::7] = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows.T @ rows


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_a_solver_that_gives_up_is_asked_again(monkeypatch, failures):
    solver, asked = torch.linalg.eigh, []

    def sometimes(given):
        asked.append(given)
        if len(asked) <= failures:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return solver(given)

    monkeypatch.setattr("torch.linalg.eigh", sometimes)
    values, vectors = eigh(matrix())
    assert len(asked) == failures + 1
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=torch.float64))
    # A ramp of 1e-12 moves no entry by more.
    torch.testing.assert_close(vectors * values @ vectors.T, matrix(), rtol=0, atol=3e-12 * float(matrix().max()))


def test_what_no_solver_can_do_is_said(monkeypatch):
    def never(given):
        raise torch.linalg.LinAlgError("failed to converge")

    broken = matrix()
    broken[0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(broken)
    monkeypatch.setattr("torch.linalg.eigh", never)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        eigh(matrix())
