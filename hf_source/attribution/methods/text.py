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
"""`bm25` and `embedding`: texts compared, no gradients. The baselines that beat half of the field."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from ...recording import StageRecord
from ..queries import Queries
from .base import Scores


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


Compare = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""`(texts of rows, texts of queries) -> [queries, rows]`."""


@dataclass(frozen=True)
class EmbeddingOptions:
    """Settings of `embedding`.

    Attributes:
        encoder: a model of sentence-transformers, its path or Hub id, or anything with `encode(texts)`.
    """

    encoder: Any = ""


def bm25(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """BM25 (Robertson & Zaragoza 2009) of each row's text against the query's prompt and completion: no model at all.

    Raises:
        ConfigError: if rank_bm25 is not installed.
    """
    compare = _bm25()
    for stage in reversed(attributor.record.stages):
        scores = np.zeros((len(queries), stage.num_rows), dtype=np.float32)
        mine = attributor.share(range(len(queries)))
        asked = texts_of(queries)
        found = compare(row_texts(attributor, stage), [asked[query] for query in mine])
        scores[np.ix_(mine, attributor.rows(stage).trained_rows)] = found
        yield stage, scores


def _bm25() -> Compare:
    try:
        from rank_bm25 import BM25Okapi
    except ImportError as error:
        raise ConfigError("method='bm25' needs the package rank_bm25: pip install rank_bm25.") from error

    def compare(texts: Sequence[str], asked: Sequence[str]) -> np.ndarray:
        index = BM25Okapi([_words(text) for text in texts])
        return np.stack([index.get_scores(_words(text)) for text in asked]) if asked else np.zeros((0, len(texts)))

    return compare


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [""]


def comparer(attributor: "SourceAttributor") -> Compare:
    """What the attributor's method does with texts of rows and of queries."""
    if attributor.method == "bm25":
        return _bm25()
    encode = _encoder(attributor.options.encoder)
    return lambda texts, asked: encode(list(asked)) @ encode(list(texts)).T


def texts_of(queries: Queries) -> list[str]:
    """What rows are compared with."""
    return [prompt + completion for _, prompt, completion in queries]


def row_texts(attributor: "SourceAttributor", stage: StageRecord, most: int | None = None) -> list[str]:
    """Texts of the rows that trained, or of `most` of them from all over the dataset."""
    rows = attributor.rows(stage)
    numbers = rows.trained_rows
    if most is not None and len(numbers) > most:
        numbers = numbers[np.linspace(0, len(numbers) - 1, most).astype(int)]
    return [rows.text(row, attributor.processing_class) for row in numbers]


def embedding(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """Cosine of sentence embeddings of each row's text and the query's prompt and completion; unitless.

    The encoder is `encoder=` of the attributor: a model of sentence-transformers, its path or Hub id, or anything with
    `encode(texts)`.

    Raises:
        ConfigError: if there is no encoder.
    """
    encode = _encoder(attributor.options.encoder)
    asked = encode(texts_of(queries))
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
