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
"""Figures with their confidence intervals as a picture (matplotlib, of the extra `plot`)."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..outputs.tables import shown


if TYPE_CHECKING:
    from .report import Entry


def draw(title: str, sections: Mapping[tuple[str, str, str], Sequence["Entry"]], kind: str) -> bytes:
    """One panel per section, one line per method: the figure and its 95 % interval.

    Args:
        title: heading.
        sections: entries by evaluation, stage and measure.
        kind: `"svg"`, `"png"` or `"pdf"`.

    Raises:
        ConfigError: if matplotlib is not installed, or there is no entry.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Plots need matplotlib: pip install hf_source[plot].") from error
    if not sections:
        raise ConfigError("The report has no entry yet, so there is nothing to plot.")
    heights = [max(1, len(entries)) + 1.5 for entries in sections.values()]
    # Without pyplot there is no global state, and no window.
    picture = Figure(figsize=(7, 0.32 * sum(heights) + 0.5), layout="constrained")
    panels = picture.subplots(len(sections), 1, squeeze=False, height_ratios=heights)[:, 0]
    picture.suptitle(shown(title), parse_math=False)
    for panel, ((evaluation, stage, measure), entries) in zip(panels, sections.items(), strict=True):
        for place, entry in enumerate(entries):
            _interval(panel, place, entry)
        panel.set_yticks(range(len(entries)), [shown(entry.method) for entry in entries], parse_math=False)
        panel.set_ylim(len(entries) - 0.5, -0.5)
        panel.set_xlabel(shown(measure), parse_math=False)
        panel.set_title(shown(f"{evaluation}, stage {stage}" if stage else evaluation), parse_math=False)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.grid(axis="x", alpha=0.3)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_source"}):  # the same report gives the same file
        picture.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def _interval(panel, place: int, entry: "Entry") -> None:
    panel.plot([entry.value], [place], "o", color="C0")
    if entry.low is not None and entry.high is not None:
        panel.plot([entry.low, entry.high], [place, place], color="C0", linewidth=2)
