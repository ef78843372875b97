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
"""Eigendecompositions that do not fail on finite matrices."""

from contextlib import suppress

import torch


_RAMPS = (0.0, 1e-14, 1e-12)  # of the largest entry: far below what rounding has done to the matrix already


def eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix `[n, n]`.

    LAPACK's solvers give up on some finite matrices, most of whose rows are 0 or whose eigenvalues are the same. It is
    then divided by its largest entry, and, if that does not do, its diagonal gets a ramp of about rounding errors.

    Raises:
        torch.linalg.LinAlgError: if the matrix is not finite, or no solver finds its eigenvectors.
    """
    try:
        return _finite(symmetric)
    except torch.linalg.LinAlgError:
        size = symmetric.abs().max()
        if not torch.isfinite(size) or size == 0:
            raise
        ramp = torch.linspace(0, 1, len(symmetric), dtype=symmetric.dtype, device=symmetric.device).diag()
        for share in _RAMPS:
            with suppress(torch.linalg.LinAlgError):
                values, vectors = _finite(symmetric / size + share * ramp)
                return values * size, vectors
        raise


def _finite(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    if not (torch.isfinite(vectors).all() and torch.isfinite(values).all()):
        raise torch.linalg.LinAlgError("the eigenvectors are not finite: is the matrix?")
    return values, vectors
