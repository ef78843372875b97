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
"""Functions of `A^T A` against the dense matrix."""

import numpy as np
import pytest
import torch

from hf_source.curvature.gram import GramSpectrum, pseudo_inverse, pseudo_inverse_root


@pytest.fixture(params=[(5, 12), (12, 5), (8, 8)], ids=str)
def factors(request):
    return torch.randn(*request.param, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inverse_and_root(factors, damping):
    vectors = torch.randn(4, factors.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spectrum = GramSpectrum(factors)
    matrix = (factors.T @ factors).numpy() + damping * np.eye(factors.shape[1])
    inverse = np.linalg.pinv(matrix, rcond=1e-10)
    values, basis = np.linalg.eigh(inverse)
    root = basis @ np.diag(np.sqrt(values.clip(0))) @ basis.T
    np.testing.assert_allclose(spectrum.apply(vectors, pseudo_inverse(damping)), vectors.numpy() @ inverse, atol=1e-8)
    np.testing.assert_allclose(
        spectrum.apply(vectors, pseudo_inverse_root(damping)), vectors.numpy() @ root, atol=1e-8
    )
    assert spectrum.mean == pytest.approx(float(np.trace(factors.T @ factors)) / factors.shape[1])


def test_nothing_has_no_inverse():
    for shape in ((3, 5), (5, 3)):
        spectrum = GramSpectrum(torch.zeros(shape))
        ones = torch.ones(2, shape[1])
        assert not spectrum.apply(ones, pseudo_inverse()).any()
