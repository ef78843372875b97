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
"""One call from a record and queries to a report: what the scores of each method are worth on this very run."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution.attributor import SourceAttributor
from ..attribution.queries import Queries
from ..outputs.trust import store_evaluation
from ..recording.digest import record_digest
from .cache import RetrainingCache
from .identity import queries_digest
from .lds import linear_datamodelling_score
from .protocol import Retraining
from .protocols import LDSProtocol, make_protocol
from .report import Entry, Report
from .stacked import StackedRetraining
from .trained import TrainerRetraining


Methods = Sequence[str] | Mapping[str, Mapping[str, Any]]


def evaluate(
    attributor: SourceAttributor,
    queries: Queries,
    *,
    protocols: Sequence[str | LDSProtocol] = ("removal",),
    methods: Methods | None = None,
    stage: str | None = None,
    retraining: Retraining | None = None,
    num_subsets: int | None = None,
    fraction: float | None = None,
    num_seeds: int | None = None,
    seed: int | None = None,
    num_bootstrap: int = 1000,
    cache: RetrainingCache | str | Path | None = None,
    store: bool = True,
    progress: bool = True,
) -> Report:
    """Train a stage again without random rows, and say how well each method foresaw what came of it.

    Retrainings are kept, so that another method, or the same evaluation after an interruption, costs its scores only.

    Args:
        attributor: of the record; other methods take its settings.
        queries: what is asked, as for `attribute`; from about ten on the intervals are of use.
        protocols: of `PROTOCOLS`, or `LDSProtocol`s of your own.
        methods: names; or label -> settings of `SourceAttributor`, as in `{"source, n=512": {"num_samples": 512}}`.
            By default the attributor's own.
        stage: whose rows are left out and scored; may be left out if there is only one.
        retraining: how training is done again; by default `StackedRetraining`. A `TrainerRetraining` trains models
            that are too large to be stacked, and packed rows, dropout and half precision as they were.
        num_subsets, fraction, num_seeds, seed: replace the settings of the protocols.
        num_bootstrap: draws for the intervals.
        cache: see `StackedRetraining`.
        store: keep the figures beside the record, so that `attribute` and `top` can say how far to trust the scores.
        progress: show bars.

    Returns:
        A report with one entry per protocol and method; `per_query` has every query's own figure.

    Raises:
        ConfigError: if a protocol, method or setting is unknown, before anything is trained.
    """
    protocols = [protocols] if isinstance(protocols, str) else protocols
    methods = [methods] if isinstance(methods, str) else methods
    chosen = protocols_of(protocols, num_subsets=num_subsets, fraction=fraction, num_seeds=num_seeds, seed=seed)
    labelled = attributors_of(attributor, methods)
    queries = attributor.encode(queries)
    retraining = retraining or stacked_for(attributor, queries, stage=stage, cache=cache, progress=progress)
    report = Report(
        f"Evaluation of {attributor.record.path.name}, stage {retraining.stage.name}",
        {
            "record": str(attributor.record.path),
            "record_digest": record_digest(attributor.record),
            "stage": retraining.stage.name,
            "queries": len(queries),
            "queries_digest": queries_digest(queries),
            "retraining": retraining.settings(),
            "num_bootstrap": num_bootstrap,
        },
    )
    scores: dict[str, tuple[np.ndarray, float]] = {}
    for protocol in chosen:
        started = time.perf_counter()
        losses = protocol.losses(retraining)
        retrained = time.perf_counter() - started
        removed = protocol.removed(retraining.num_rows)
        for label, own in labelled.items():
            if label not in scores:
                scores[label] = timed_scores(own, queries, retraining)
            found, taken = scores[label]
            lds = linear_datamodelling_score(found, removed, losses, num_bootstrap)
            entry = Entry(
                protocol.name,
                label,
                lds.mean,
                lds.low,
                lds.high,
                taken,
                {**protocol.settings(), "attributor": own.settings(), "retraining_seconds": round(retrained, 1)},
                dict(zip(queries.names, map(float, lds.per_query), strict=True)),
                stage=retraining.stage.name,
            )
            report.add(entry)
            if store:
                store_evaluation(attributor.record, entry.to_dict(), own.settings())
    return report


def protocols_of(protocols: Sequence[str | LDSProtocol], **changes: Any) -> list[LDSProtocol]:
    """Protocols, with settings of those given by name replaced.

    Raises:
        ConfigError: if a name or setting is unknown.
    """
    return [p if isinstance(p, LDSProtocol) else make_protocol(p, **changes) for p in protocols]


def stacked_for(attributor: SourceAttributor, queries: Queries, **options: Any) -> StackedRetraining:
    """A `StackedRetraining` with the attributor's own rows, tasks, measurement, collator and model."""
    return StackedRetraining(
        attributor.record,
        queries,
        datasets=attributor.datasets,
        task={own.name: attributor.task_of(own) for own in attributor.record.stages},
        measurement=attributor.measurement(queries),
        data_collator=attributor.data_collator,
        model=attributor.make_model,
        **options,
    )


def trainer_for(attributor: SourceAttributor, queries: Queries, **options: Any) -> TrainerRetraining:
    """A `TrainerRetraining` with the attributor's own rows, measurement and collator."""
    return TrainerRetraining(
        attributor.record,
        queries,
        datasets=attributor.datasets,
        measurement=attributor.measurement(queries),
        data_collator=attributor.data_collator,
        **options,
    )


def attributors_of(attributor: SourceAttributor, methods: Methods | None) -> dict[str, SourceAttributor]:
    """An attributor per label.

    Raises:
        ConfigError: if a method or setting is unknown.
    """
    if methods is None:
        return {attributor.method: attributor}
    if isinstance(methods, Mapping):
        return {label: attributor.like(**settings) for label, settings in methods.items()}
    return {name: attributor if name == attributor.method else attributor.like(method=name) for name in methods}


def timed_scores(attributor: SourceAttributor, queries: Queries, retraining: Retraining) -> tuple[np.ndarray, float]:
    """Scores by row number, `[queries, rows]`, and the seconds they took."""
    started = time.perf_counter()
    given = attributor.scores(None, queries, retraining.stage.name)
    numbers = attributor.rows(retraining.stage).numbers
    scores = np.zeros((len(queries), retraining.num_rows))
    known = numbers < retraining.num_rows
    scores[:, numbers[known]] = given[:, known]
    return scores, time.perf_counter() - started
