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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from ..queries import Queries
from .base import Scores


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


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
    encode = _encoder(attributor.options.encoder)
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
