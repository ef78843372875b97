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
"""Rows in groups: by the values of a column, by a function of the row, or by the words they have in common."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .scored import Scored, no_column


By = str | Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Group:
    """Rows of one stage that belong together.

    Attributes:
        name: value of the column, or words.
        own: the stage.
        places: int64, positions of the rows.
    """

    name: str
    own: Scored
    places: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """float64 `[queries, rows of the group]`."""
        return self.own.scores[:, self.places]

    @property
    def totals(self) -> np.ndarray:
        """Sum over the rows, for each query: the predicted change had the group not been trained on."""
        return self.scores.sum(axis=1)

    @property
    def mask(self) -> np.ndarray:
        """Which rows they are: bool `[num_rows]` by number."""
        return self.own.mask(self.places)


def grouped(scored: Sequence[Scored], by: By | None, clusters: int | None, seed: int = 0) -> list[Group]:
    """Groups of every stage that can be grouped so.

    Args:
        scored: the stages.
        by: a column (stages without it are left out), `"stage"`, or a function of a row.
        clusters: instead, so many clusters of each stage's texts by their words.
        seed: of the clusters.

    Raises:
        ConfigError: if neither or both are given.
        DataError: if no stage has the column, or its values are lists.
    """
    if (by is None) == (clusters is None):
        raise ConfigError("Say what makes a group: either a column (`by`), or a number of `clusters`.")
    if clusters is not None:
        return [group for own in scored for group in word_clusters(own, clusters, seed)]
    if isinstance(by, str) and not any(own.has(by) for own in scored):
        if by != "stage":
            raise no_column(by, scored)
        return [Group(own.stage, own, np.arange(len(own.numbers))) for own in scored]
    found = []
    for own in scored:
        if isinstance(by, str) and not own.has(by):
            continue
        values = own.column(by) if isinstance(by, str) else [by(row) for row in own.dataset.with_format(None)]
        found += _by_value(own, values, by)
    return found


def _by_value(own: Scored, values: Sequence[Any], by: By) -> list[Group]:
    places: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise DataError(f"{by!r} holds lists, not one value for each row: give a function that makes a value.")
        places.setdefault("(none)" if value is None else str(value), []).append(place)
    return [Group(name, own, np.asarray(chosen)) for name, chosen in places.items()]


def word_clusters(own: Scored, count: int, seed: int = 0, iterations: int = 25) -> list[Group]:
    """Spherical k-means (Dhillon & Modha 2001) of the rows' words, weighted by how few rows have them.

    A cluster is named by its three heaviest words.

    Args:
        own: the stage.
        count: of the clusters; empty ones are left out.
        seed: of the first centres.
        iterations: at most.

    Raises:
        ConfigError: if there are fewer than 2 clusters, or more than rows.
    """
    if not 2 <= count <= len(own.numbers):
        raise ConfigError(f"clusters={count}: stage {own.stage!r} has {len(own.numbers)} rows; give 2 to that many.")
    vectors, words = word_vectors([own.text(number) for number in own.numbers])
    generator = np.random.default_rng(seed)
    centres = vectors[[generator.integers(len(vectors))]]
    while len(centres) < count:  # k-means++ (Arthur & Vassilvitskii 2007)
        away = np.clip(1 - (vectors @ centres.T).max(axis=1), 0, None).astype(np.float64)
        chances = away / away.sum() if away.sum() > 0 else None
        centres = np.concatenate([centres, vectors[[generator.choice(len(vectors), p=chances)]]])
    label = np.full(len(vectors), -1)
    for _ in range(iterations):
        nearest = (vectors @ centres.T).argmax(axis=1)
        if (nearest == label).all():
            break
        label = nearest
        for number in np.unique(label):
            total = vectors[label == number].sum(axis=0)
            centres[number] = total / max(float(np.linalg.norm(total)), 1e-12)
    names = _unique(", ".join(words[place] for place in np.argsort(-centre)[:3]) for centre in centres)
    return [Group(names[number], own, np.flatnonzero(label == number)) for number in np.unique(label)]


def word_vectors(texts: Sequence[str], most: int = 4096) -> tuple[np.ndarray, list[str]]:
    """Word counts weighted by inverse document frequency, of length 1: float32 `[texts, words]`, and the words."""
    counted = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    spread = Counter(word for own in counted for word in own)
    words = [word for word, _ in spread.most_common(most)] or [""]
    place = {word: position for position, word in enumerate(words)}
    vectors = np.zeros((len(texts), len(words)), dtype=np.float32)
    for row, own in enumerate(counted):
        for word, count in own.items():
            if word in place:
                vectors[row, place[word]] = (1 + np.log(count)) * np.log(1 + len(texts) / spread[word])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12), words


def _unique(names: Any) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(name if name not in found else f"{name} ({len(found)})")
    return found
