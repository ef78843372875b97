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
"""The methods behind `method=`: each takes queries and yields the scores of one stage after another, last to first.

`source` is the library's own; the others are what it is compared with.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..curvature import CURVATURES, ekfac_inverse, joint_inverse
from ..errors import ConfigError
from ..gradients import DPOTask, RowGradients
from ..recording import StageRecord
from ..source import ExactProducts, SampledProducts, draw_sample, score_rows, unroll, walk
from .queries import Queries


if TYPE_CHECKING:
    from .attributor import SourceAttributor
    from .rows import StageRows


Scores = Iterator[tuple[StageRecord, np.ndarray]]
Vectors = dict[str, torch.Tensor]


def source(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Source (Bae et al. 2024, arXiv 2405.12186) with the attributor's curvature; nats."""
    return walk(
        attributor.record.stages,
        attributor.all_rows(),
        lambda gradients: attributor.query_gradients(gradients, queries),
        attributor.walk_settings(),
        attributor.build_model,
    )


def unrolled(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Exact derivative of the recorded training (see `source/unrolled.py`); nats. For few queries on short runs."""
    return _unroll(attributor, queries, ExactProducts())


def stepwise(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Source with a segment for every step and the optimizer's real moments; nats, for any number of queries.

    Exact unrolling, but for the curvature of a step's batch, which is the Gauss-Newton matrix of labels drawn from the
    model (`source/products.py`).
    """
    return _unroll(attributor, queries, SampledProducts(attributor.draws))


def _unroll(attributor: "SourceAttributor", queries: Queries, products: ExactProducts | SampledProducts) -> Scores:
    return unroll(
        attributor.record.stages,
        attributor.all_rows(),
        lambda gradients: attributor.query_gradients(gradients, queries),
        attributor.walk_settings(),
        attributor.build_model,
        products,
    )


def influence(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Influence functions at the final weights: `grad f_q^T (H + lambda)^{-1} grad l_m / N`; nats.

    Koh & Liang 2017 (arXiv 1703.04730, equation 2), with the curvature of each stage's own rows: `"ekfac"` is that of
    Grosse et al. 2023 (arXiv 2308.03296), `"joint"` takes all layers at once; damping .1 of the mean eigenvalue. `N`
    counts the stage's loss items. Training is taken to have converged, which is what Source does without.

    Raises:
        ConfigError: for another curvature.
    """
    if attributor.curvature_name not in ("ekfac", "joint"):
        raise ConfigError(
            f"method='influence' inverts a curvature that curvature={attributor.curvature_name!r} is not: set it to "
            "'ekfac' or 'joint'."
        )

    def solved(rows: "StageRows", gradients: RowGradients, vectors: Vectors) -> Vectors:
        weights = np.zeros(len(rows.row))
        weights[rows.trained] = 1.0
        sample = draw_sample(rows, weights, gradients, attributor.walk_settings(), attributor.seed)
        if attributor.curvature_name == "ekfac":
            found = ekfac_inverse(vectors, sample)
        else:
            found = joint_inverse(vectors, sample, memory_budget=attributor.memory_budget)
        items = int(rows.items[rows.trained].sum())
        return {name: vector / items for name, vector in found.items()}

    return _final_gradients(attributor, queries, transform=solved)


def tracin(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """TracInCP (Pruthi et al. 2020, arXiv 2002.08484, equation 2) over the recorded segments.

    `sum over segments of w_m <grad f_q(theta_l), grad l_m(theta_l)>`, `w_m` the summed learning rate of the row's real
    visits. No preconditioner, as in the paper, so the unit is nats for SGD only.
    """
    for stage in reversed(attributor.record.stages):
        model, rows = attributor.build_model(stage), attributor.rows(stage)
        gradients = RowGradients(model, rows.task, stage.trainable)
        rows.prepare(gradients)
        gradients.check(rows.collated(rows.shortest(2), attributor.device))
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        for segment in stage.segments:
            stage.load_weights(model, segment.index)
            vectors = attributor.query_gradients(gradients, queries)
            weights = segment.row_weights()[rows.example]
            title = f"scoring {stage.name}, segment {segment.index + 1}"
            for pieces in attributor.progress(attributor.share(rows.batches(np.flatnonzero(weights))), title):
                dots = score_rows(gradients, rows.collated(pieces, attributor.device), vectors)
                np.add.at(scores, (slice(None), rows.row[pieces]), dots.numpy() * weights[pieces])
        yield stage, scores


def grad_dot(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Dot product of query and row gradients at the final weights (Charpiat et al. 2019): unitless."""
    return _final_gradients(attributor, queries)


def grad_cos(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Cosine of query and row gradients at the final weights: unitless, between -1 and 1."""
    return _final_gradients(attributor, queries, cosine=True)


def _final_gradients(
    attributor: "SourceAttributor",
    queries: Queries,
    transform: Callable[["StageRows", RowGradients, Vectors], Vectors] | None = None,
    cosine: bool = False,
) -> Scores:
    last = attributor.record.stages[-1]
    model = attributor.build_model(last)
    last.load_weights(model, "final")
    names = {last.canonical_name(name): name for name, _ in model.named_parameters()}
    for stage in reversed(attributor.record.stages):
        own = [stage.canonical_name(name) for name in stage.trainable]
        trained = [names[name] for name in own if name in names]
        rows = attributor.rows(stage)
        gradients = RowGradients(model, rows.task, trained)
        if stage is last:
            rows.prepare(gradients)
            last.load_weights(model, "final")
        elif isinstance(rows.task, DPOTask):
            rows.task.prepare(attributor.build_model(stage), rows)
        gradients.check(rows.collated(rows.shortest(2), attributor.device))
        vectors = attributor.query_gradients(gradients, queries)
        if transform is not None:
            vectors = transform(rows, gradients, vectors)
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        for pieces in attributor.progress(attributor.share(rows.batches(rows.trained)), f"scoring {stage.name}"):
            batch = rows.collated(pieces, attributor.device)
            dots = score_rows(gradients, batch, vectors)
            dots = dots / _row_norms(gradients, batch) if cosine else dots
            np.add.at(scores, (slice(None), rows.row[pieces]), dots.float().numpy())
        if cosine:
            squares = torch.stack([vector.flatten(1).square().sum(dim=1) for vector in vectors.values()])
            scores /= squares.sum(dim=0).sqrt().cpu().clamp_min(1e-30).numpy()[:, None]
        yield stage, scores


def _row_norms(gradients: RowGradients, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    done = gradients.run(batch)
    total = torch.zeros(done.num_rows)
    for _, rows, grads in gradients.blocks(done):
        total[rows] += grads.flatten(1).square().sum(dim=1).cpu()
    return total.sqrt().clamp_min(1e-30)


def bm25(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """BM25 (Robertson & Zaragoza 2009) of each row's text against the query's prompt and completion: no model at all.

    Raises:
        ConfigError: if rank_bm25 is not installed.
    """
    try:
        from rank_bm25 import BM25Okapi
    except ImportError as error:
        raise ConfigError("method='bm25' needs the package rank_bm25: pip install rank_bm25.") from error
    for stage in reversed(attributor.record.stages):
        rows = attributor.rows(stage)
        index = BM25Okapi([_words(rows.text(row, attributor.processing_class)) for row in rows.trained_rows])
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        for position, (_, prompt, completion) in attributor.share(list(enumerate(queries))):
            scores[position, rows.trained_rows] = index.get_scores(_words(prompt + completion))
        yield stage, scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [""]


def embedding(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Cosine of sentence embeddings of each row's text and the query's prompt and completion; unitless.

    The encoder is `encoder=` of the attributor: a model of sentence-transformers, its path or Hub id, or anything with
    `encode(texts)`.

    Raises:
        ConfigError: if there is no encoder.
    """
    encode = _encoder(attributor.encoder)
    asked = encode([prompt + completion for _, prompt, completion in queries])
    for stage in reversed(attributor.record.stages):
        rows = attributor.rows(stage)
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        mine = attributor.share(list(rows.trained_rows))
        scores[:, mine] = asked @ encode([rows.text(row, attributor.processing_class) for row in mine]).T
        yield stage, scores


def _encoder(given: Any) -> Callable[[list[str]], np.ndarray]:
    if isinstance(given, str) and not given:
        raise ConfigError(
            "method='embedding' needs an encoder: pass `encoder=` a sentence-transformers model, its path or Hub id."
        )
    if isinstance(given, str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(f"encoder={given!r} needs a package: pip install sentence-transformers.") from error
        given = SentenceTransformer(given)

    def encode(texts: list[str]) -> np.ndarray:
        found = np.asarray(given.encode(texts), dtype=np.float64)
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-30)

    return encode


METHODS: dict[str, Callable[["SourceAttributor", Queries], Scores]] = {
    "source": source,
    "stepwise": stepwise,
    "unrolled": unrolled,
    "influence": influence,
    "tracin": tracin,
    "grad-dot": grad_dot,
    "grad-cos": grad_cos,
    "bm25": bm25,
    "embedding": embedding,
}
"""`method=` of `SourceAttributor`."""

NEED_NO_TASK = {"bm25", "embedding"}
"""Methods that compare texts, so that any record will do."""

SCORES_ARE_NATS = {"source", "stepwise", "unrolled", "influence"}
"""Methods whose scores are predicted changes of the query's loss, in nats; the others' are unitless."""


def make_curvature(name: str, **options: object) -> object:
    """The curvature called `name`, with those of `options` that it has.

    Raises:
        ConfigError: if there is no such curvature.
    """
    if name not in CURVATURES:
        raise ConfigError(f"curvature={name!r} is unknown; choose one of {', '.join(sorted(CURVATURES))}.")
    kind = CURVATURES[name]
    fields = getattr(kind, "__dataclass_fields__", {})
    return kind(**{key: value for key, value in options.items() if key in fields})
