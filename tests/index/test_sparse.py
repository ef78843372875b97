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
"""Rows of mostly zeros in few bytes."""

import numpy as np
import pytest
import torch

from hf_source.index.sparse import SparseRows


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


@pytest.mark.parametrize("size, count", [(40, 40), (300, 7), (3000, 20), (5000, 3), (70000, 2), (200000, 1), (9, 50)])
def test_the_largest_numbers_come_back(size, count):
    """Sizes around which distances need one byte, two, and bridges."""
    dense = rows(6, size)
    dense[2] = 0  # a row without influence
    dense[3, :-1] = 0
    kept = SparseRows.largest(dense, count, "full")
    threshold = dense.abs().topk(min(count, size), dim=1).values[:, -1:]
    expected = torch.where(dense.abs() >= threshold, dense, torch.zeros_like(dense))
    np.testing.assert_array_equal(kept.matrix(size).toarray(), expected.numpy())
    assert kept.gaps.dtype == (np.uint8 if size <= 64 * min(count, size) else np.uint16)
    queries = rows(4, size, seed=1).numpy()
    np.testing.assert_allclose(kept.times(queries), queries @ expected.numpy().T, rtol=1e-12)


def test_a_byte_each_is_off_by_half_a_step_at_most():
    dense = rows(5, 400)
    kept = SparseRows.largest(dense, 30)
    assert kept.values.dtype == np.int8 and kept.values.nbytes + kept.gaps.nbytes <= 2 * 5 * 31
    found = kept.matrix(400).toarray() * kept.scales[:, None]
    full = SparseRows.largest(dense, 30, "full").matrix(400).toarray()
    step = np.abs(dense.numpy()).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - full) <= 0.5 * step * (1 + 1e-6)).all()
    assert np.abs(found - full).max() > 0


def test_no_rows():
    assert SparseRows.largest(torch.zeros(0, 10), 3).times(np.ones((2, 10))).shape == (2, 0)
