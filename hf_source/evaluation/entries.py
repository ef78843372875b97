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
"""What evaluations found, as figures of a `Report`."""

from collections.abc import Mapping, Sequence
from typing import Any

from .agreement import Agreement
from .estimate import Estimate
from .leave_one_out import LeaveOneOut
from .mislabelled import Mislabelled
from .removal import CONTROL, MATCHED, Removal
from .report import Entry
from .retrieval import Retrieval
from .tail_patch import TailPatch


Seconds = Mapping[str, float]
NOTHING: Seconds = {}


def removal_entries(
    found: Sequence[Removal], names: Sequence[str], stage: str = "", seconds: Seconds = NOTHING
) -> list:
    """Entries of `subset_removal`; `seconds` is what each method's scores took, the retrainings' are in the settings.

    Lowest rows and rows of the same classes have a line of their own under the method's name.
    """
    entries = []
    for one in found:
        settings = {**one.settings, "k": one.k, "retraining_seconds": round(one.seconds, 1)}
        given = (names, stage, settings, seconds.get(one.method))
        label = {"bottom": f"{one.method}, lowest rows", MATCHED: f"{one.method}, rows of the same classes"}
        label = label.get(one.direction, one.method)
        entries.append(_entry("subset removal", label, f"loss rise without {one.k} rows (nats)", one.rise, *given))
        if one.direction == "top":
            measure = f"rise without {one.k} rows / |effect of random rows|"
            entries.append(_entry("subset removal", label, measure, one.ratio, *given))
    return entries


def leave_one_out_entries(
    found: Sequence[LeaveOneOut],
    names: Sequence[str],
    stage: str = "",
    seconds: Seconds = NOTHING,
    nats: Sequence[str] = (),
) -> list[Entry]:
    """Entries of `leave_one_out`; the error in size only for methods in `nats`."""
    entries = []
    for one in found:
        settings = {**one.settings, "groups": one.groups, "retraining_seconds": round(one.seconds, 1)}
        figures = {"Spearman": one.spearman, "Pearson": one.pearson}
        if one.method in nats:
            figures["relative error"] = one.relative_error
        for measure, estimate in figures.items():
            given = (measure, estimate, names, stage, settings, seconds.get(one.method))
            entries.append(_entry("leave one out", one.method, *given))
    return entries


def tail_patch_entries(
    found: Sequence[TailPatch], names: Sequence[str], stage: str = "", seconds: Seconds = NOTHING
) -> list[Entry]:
    """Entries of `tail_patch`; what the steps took is in the settings."""
    entries = []
    for one in found:
        settings = {**one.settings, "k": one.k, "patch_seconds": round(one.seconds, 1)}
        given = (names, stage, settings, seconds.get(one.method))
        entries.append(_entry("tail patch", one.method, f"gain of {one.k} rows (nats)", one.gain, *given))
        if one.method != CONTROL:
            measure = f"gain of {one.k} rows beyond random ones (nats)"
            entries.append(_entry("tail patch", one.method, measure, one.excess, *given))
    return entries


def agreement_entries(
    found: Mapping[str, Agreement],
    names: Sequence[str],
    stage: str = "",
    seconds: Seconds = NOTHING,
    nats: Sequence[str] = (),
) -> list[Entry]:
    """Entries of `agreement` of several methods; the error in size only for methods in `nats`."""
    entries = []
    for method, one in found.items():
        figures = {"Spearman": one.spearman}
        figures |= {f"overlap of the top {k}": estimate for k, estimate in one.overlap.items()}
        if method in nats:
            figures["relative error"] = one.relative_error
        for measure, estimate in figures.items():
            given = (measure, estimate, names, stage, {}, seconds.get(method))
            entries.append(_entry("agreement with unrolled", method, *given))
    return entries


def mislabelled_entries(found: Mapping[str, Mislabelled], stage: str = "", seconds: Seconds = NOTHING) -> list[Entry]:
    """Entries of `find_mislabelled` of several lists of rows."""
    entries = []
    for method, one in found.items():
        figures = {"AUROC": one.auroc}
        figures |= {f"precision at {k}": estimate for k, estimate in one.precision.items()}
        figures |= {f"found after {share:.3g} of the rows": estimate for share, estimate in one.found.items()}
        settings = {"num_wrong": one.num_wrong, "num_rows": one.num_rows}
        for measure, estimate in figures.items():
            given = (measure, estimate, (), stage, settings, seconds.get(method))
            entries.append(_entry("mislabelled rows", method, *given))
    return entries


def retrieval_entries(
    found: Mapping[str, Retrieval], names: Sequence[str] = (), stage: str = "", seconds: Seconds = NOTHING
) -> list[Entry]:
    """Entries of `retrieval` of several methods; `names` of the queries that have a right row."""
    return [
        _entry("fact retrieval", method, measure, estimate, names, stage, {}, seconds.get(method))
        for method, one in found.items()
        for measure, estimate in one.estimates().items()
    ]


def _entry(
    evaluation: str,
    method: str,
    measure: str,
    estimate: Estimate,
    names: Sequence[str],
    stage: str,
    settings: Mapping[str, Any],
    seconds: float | None,
) -> Entry:
    known = estimate.low == estimate.low  # NaN where one query says nothing of the others
    low, high = (estimate.low, estimate.high) if known else (None, None)
    each = len(estimate.per_query) == len(names)
    per_query = dict(zip(names, map(float, estimate.per_query), strict=True)) if each else {}
    return Entry(evaluation, method, estimate.value, low, high, seconds, settings, per_query, measure, stage)
