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
"""How scores are distributed, as bars of an inline SVG."""

from dataclasses import dataclass
from typing import Any

import numpy as np


WIDTH, HEIGHT, BINS = 560, 96, 41


@dataclass(frozen=True)
class Histogram:
    """Counts of scores in bins that are symmetric around 0; heights are logarithmic, or only the middle would show.

    Attributes:
        largest: the largest absolute score, at both ends of the axis.
        counts: int64 `[BINS]`.
        supporting, opposing: rows with a positive and a negative score.
        half: the fewest supporting rows that together make half of the support.
    """

    largest: float
    counts: np.ndarray
    supporting: int
    opposing: int
    half: int

    @property
    def bars(self) -> list[dict[str, Any]]:
        """`x`, `y`, `width`, `height` and sign of each bar that is not empty."""
        top, width = np.log1p(self.counts.max(initial=1)), WIDTH / BINS
        bars = []
        for place, count in enumerate(self.counts):
            if count:
                height = float(max(2.0, HEIGHT * np.log1p(count) / top))
                kind = "zero" if place == BINS // 2 else "up" if place > BINS // 2 else "down"
                bars.append(
                    {
                        "x": f"{place * width + 0.5:.1f}",
                        "y": f"{HEIGHT - height:.1f}",
                        "width": f"{width - 1:.1f}",
                        "height": f"{height:.1f}",
                        "kind": kind,
                        "count": int(count),
                    }
                )
        return bars


def histogram(scores: np.ndarray) -> Histogram:
    """The distribution of a stage's scores for one query, `[rows]`."""
    scores = scores.astype(np.float64)
    largest = float(np.abs(scores).max(initial=0.0))
    counts, _ = np.histogram(scores, BINS, (-(largest or 1.0), largest or 1.0))
    support = np.sort(scores[scores > 0])[::-1]
    half = int(np.searchsorted(support.cumsum(), support.sum() / 2) + 1) if len(support) else 0
    return Histogram(largest, counts, len(support), int((scores < 0).sum()), half)
