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
"""What two-stage search will cost: a filter over all rows, and Source on what it proposes (see `filtered.py`)."""

import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

from ..recording import StageRecord
from . import filtered
from .filtered import check_filter, proposer
from .methods import METHODS
from .methods.text import comparer, row_texts, texts_of
from .plan import Plan, StagePlan, estimate, measure
from .queries import Queries


if TYPE_CHECKING:
    from .attributor import SourceAttributor


_TEXTS = 256
"""Rows whose texts are compared to tell the time of all."""


def text_plan(attributor: "SourceAttributor", queries: Queries, stages: list[StageRecord]) -> Plan:
    """Of a method that compares texts, from some of the rows; no model is built."""
    compare, asked = comparer(attributor), texts_of(queries)
    seconds, held, plans = 0.0, 0, []
    for stage in reversed(stages):
        start = time.perf_counter()
        texts = row_texts(attributor, stage, _TEXTS)
        compare(texts, asked)
        spent = time.perf_counter() - start
        tracemalloc.start()  # apart, for it takes time
        try:
            compare(texts, asked)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        count = len(attributor.rows(stage).trained_rows)
        share = count / max(1, len(texts))
        seconds += spent * share
        held = max(held, int(share * (peak + sum(len(text.encode()) for text in texts))))
        plans.append(StagePlan(stage.name, count, 0, 0, 0, 0))
    return Plan(attributor.method, attributor.curvature_name, len(queries), 0, plans, seconds, {"texts": held})


def filtered_plan(
    attributor: "SourceAttributor",
    queries: Queries,
    stages: list[StageRecord],
    filter: "str | Path | SourceAttributor",
    candidates: int,
) -> Plan:
    """Of `top(filter=, candidates=)`.

    Queries are taken to have no candidates in common, so that no more rows are scored than this says.

    Args:
        attributor, queries, filter, candidates: see `SourceAttributor.top`.
        stages: whose rows are wanted.

    Raises:
        UnsupportedError, ConfigError: as `top` does.
    """
    check_filter(attributor)
    proposing, name = proposer(attributor, filter)
    first = min(stages, key=lambda stage: stage.index)
    measured = measure(attributor, queries, first)
    plan = estimate(attributor, measured)
    for part in plan.stages:
        stage = attributor.record.stage(part.name)
        total = len(attributor.rows(stage).trained_rows)
        wanted = len(queries) * candidates + filtered.NUM_DRAWN
        part.num_rows = min(total, wanted) if stage in stages else 0
        tokens = int(part.score_tokens * part.num_rows / max(1, total))
        plan.seconds += (tokens - part.score_tokens) * measured.calibration.score_seconds
        part.score_tokens = tokens
    if METHODS[proposing.method].reads_text:
        own = text_plan(proposing, queries, stages)
    else:
        own = estimate(proposing, measure(proposing, queries, first))
    plan.filter = (name, own)
    plan.seconds += own.seconds
    plan.disk += own.disk
    plan.written += own.written
    return plan
