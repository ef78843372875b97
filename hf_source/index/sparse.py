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
"""Rows of mostly zeros, as few bytes: a byte for each number kept, and one or two for its distance to the last."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array


PRECISIONS = ("int8", "full")
"""How numbers are kept: a byte each with a scale per row, or as they are."""


@dataclass
class SparseRows:
    """Kept numbers of some rows.

    Attributes:
        values: int8 or float `[numbers]`, of one row after the other, in the order of their columns.
        gaps: uint8 or uint16 `[numbers]`, columns since the number before it in the row; a gap that is too long is
            bridged by zeros.
        starts: int64 `[rows + 1]`, where each row begins.
        scales: float32 `[rows]`, what values of a row are multiplied with.
    """

    values: np.ndarray
    gaps: np.ndarray
    starts: np.ndarray
    scales: np.ndarray

    @classmethod
    def largest(cls, dense: torch.Tensor, count: int, precision: str = "int8") -> "SparseRows":
        """Keep the `count` numbers of each row of `[rows, size]` with the largest magnitude."""
        size = dense.shape[1]
        count = min(count, size)
        columns = dense.abs().topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        values = dense.gather(1, columns)
        scales = torch.ones(len(dense), dtype=values.dtype, device=dense.device)
        if precision == "int8":
            scales = values.abs().amax(dim=1) / 127
            values = (values / torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]).round()
        longest = 255 if size <= 64 * count else 65535
        kept = values.cpu().numpy()
        kept = kept.astype(np.int8) if precision == "int8" else kept
        return cls._packed(kept, columns.cpu().numpy(), scales.cpu().numpy(), longest)

    @classmethod
    def _packed(cls, values: np.ndarray, columns: np.ndarray, scales: np.ndarray, longest: int) -> "SparseRows":
        used = values != 0
        values, columns = values[used], columns[used]
        lengths = used.sum(axis=1)
        first = np.cumsum(lengths) - lengths
        gaps = np.diff(columns, prepend=0)
        gaps[first[lengths > 0]] = columns[first[lengths > 0]]
        bridges = np.maximum(gaps - 1, 0) // longest  # zeros put in before a number, each `longest` on
        row = np.repeat(np.arange(len(lengths)), lengths)
        place = np.cumsum(bridges + 1) - 1
        total = int(place[-1]) + 1 if len(place) else 0
        long_values, long_gaps = np.zeros(total, dtype=values.dtype), np.full(total, longest, dtype=np.int64)
        long_values[place], long_gaps[place] = values, gaps - bridges * longest
        lengths = np.bincount(row, weights=bridges + 1, minlength=len(lengths)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        small = np.uint8 if longest == 255 else np.uint16
        return cls(long_values, long_gaps.astype(small), starts, scales.astype(np.float32))

    def matrix(self, size: int) -> csr_array:
        """The rows as a sparse float matrix `[rows, size]`, without their scales."""
        columns = np.cumsum(self.gaps, dtype=np.int64)
        lengths = np.diff(self.starts)
        before = np.concatenate([[0], columns])[self.starts[:-1]]
        columns -= np.repeat(before, lengths)
        values = self.values if self.values.dtype.kind == "f" else self.values.astype(np.float32)
        return csr_array((values, columns, self.starts), shape=(len(lengths), size))

    def times(self, queries: np.ndarray) -> np.ndarray:
        """Products with queries `[queries, size]`: `[queries, rows]`."""
        return (self.matrix(queries.shape[1]) @ queries.T).T * self.scales

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written."""
        return {"values": self.values, "gaps": self.gaps, "starts": self.starts, "scales": self.scales}
