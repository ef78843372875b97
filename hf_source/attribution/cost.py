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
"""Arithmetic and memory of `joint` curvature, beside the passes over its sample: what `plan()` adds to them.

Counted in floating-point operations, two for a multiplication and an addition. A forward and backward pass that gives
per-row gradients takes `6 p` for each token, with `p` parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..curvature.block import FEW_COLUMNS, LARGE_SIDE, LEADING_SHARES, MAX_FULL_SIDE
from ..curvature.factored import FACTORED_SIZE, multiplications
from ..curvature.joint import GRAM_BLOCK


_EIGEN = 15
"""Operations of a symmetric eigenproblem over the cube of its side, in the time that matrix products take for them."""

_THIN = 2
"""How many times as long products with few vectors, or of single rows' factors, take as those of large matrices."""

_MOVE = 40
"""Operations of matrix products in the time that one number takes to be read or written."""


_NARROW = 3
"""How many times faster than others products of a narrow type are, of gradients' factors."""

_MOVING = 0.1
"""Share of a side's directions along which vectors of a narrow type move."""

_LEADING = 0.5
"""Time that the directions of a side take that are no more than a third of all, over that of all."""

_FEW = 0.05
"""The same where they are no more than a twenty-fourth."""


@dataclass(frozen=True)
class JointCost:
    """Operations of one segment.

    Attributes:
        samples: `n`.
        tokens: of one sample.
        vectors: query vectors that go through, twice the queries where they are carried on.
        tail: whether there is one.
        narrow: whether vectors and columns are held in a narrower type than gradients.
    """

    samples: int
    tokens: float
    vectors: int
    tail: bool = True
    narrow: bool = False

    def of(self, shape: Sequence[int], factored: bool, diagonal_left: bool = False) -> float:
        """Of one parameter, whose columns are held factored or as they are."""
        m, k = _sides(shape)
        size, n = m * k, self.samples
        # Half of the Gram matrix, in blocks; products with vectors, and sums of them.
        found = n * (n + min(n, GRAM_BLOCK)) * size + _THIN * 4 * n * self.vectors * size
        found += _MOVE * 8 * n * size
        if factored:
            again = _THIN * 2 * 2 * self.tokens * n * size  # gradients made again, for both
            found += again / _NARROW if self.narrow else again
        if not self.tail:
            return found
        left = 0 if diagonal_left or m > MAX_FULL_SIDE or m == 1 else m
        right = 0 if k > MAX_FULL_SIDE or k == 1 else k
        whole = 4 * size * (left + right)  # moments and rotation of one dense gradient
        if factored and size > FACTORED_SIZE:
            whole = min(whole, 2 * multiplications(int(self.tokens), m, k, left))
        turned = self.vectors * 4 * size * (left + right) * (_MOVING if self.narrow else 1)
        eigen = self._directions(left, n * k, factored) + self._directions(right, n * m, factored)
        return found + n * whole + turned + _MOVE * 6 * self.vectors * size + eigen

    def _directions(self, side: int, rank: int, factored: bool) -> float:
        """Operations that find the directions of a side, on which gradients have so many rows in all."""
        if not factored and rank <= FEW_COLUMNS * side:
            return _EIGEN * rank**3 + 4 * rank**2 * side
        return _EIGEN * side**3 * self._share(side, rank)

    def _share(self, side: int, rank: int) -> float:
        """Time that a side's directions take, over that of all: there are no more than gradients have rows on it."""
        few, some = (int(share * side) for share in LEADING_SHARES)
        if side < LARGE_SIDE:
            return 1.0
        if rank <= few:
            return _FEW
        return _LEADING if self.narrow or rank <= some else 1.0

    def of_all(self, shapes: Sequence[tuple[Sequence[int], bool, bool]]) -> float:
        """Of parameters given as `(shape, factored, diagonal_left)`, and of the sample space's eigenproblem."""
        return sum(self.of(*each) for each in shapes) + _EIGEN * self.samples**3


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """`[m, k]` that a parameter is seen as."""
    m, k = (shape[0] if shape else 1), 1
    for side in shape[1:]:
        k *= side
    return m, k
