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
"""Which rows are duplicates? Sets of rows with the same text, nearly the same text, or nearly the same gradient.

Text: letter case and spaces aside, rows are compared by the share of character 5-grams that they have in common
(Jaccard similarity). Candidates are found by MinHash (Broder 1997) in bands, so that not every pair is looked at; then
the exact similarity decides. Gradient: the cosine of the rows' gradients at the final weights, pair by pair, which
shows rows that do the same to the model in other words; for a few thousand rows at most.

Duplicates share what one of them would be worth alone: each has a small score, together they have a large one.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..attribution.attributor import SourceAttributor
from ..attribution.queries import Queries
from ..attribution.rows import row_text
from ..errors import ConfigError, UnsupportedError
from ..outputs.attribution_files import Attribution
from .answer import Answer, answer
from .scored import Scored, Source


MOST = 3000
"""Rows whose gradients are compared pair by pair."""

_HASHES, _PER_BAND, _GRAM = 64, 4, 5
_PRIME = (1 << 31) - 1


def duplicates(
    source: Source | Dataset,
    *,
    by: str = "text",
    threshold: float = 0.8,
    stage: str | None = None,
) -> Answer:
    """Sets of rows that repeat one another.

    Args:
        source: an attributor or an attribution (texts of all stages are compared with one another), or a dataset.
        by: `"text"` or `"gradient"` (an attributor's rows of its last stage).
        threshold: similarity from which on rows belong together, above 0 up to 1; 1 takes the same text only. Of
            gradients .95 or more is sensible.
        stage: whose rows; all by default.

    Returns:
        An answer whose table has a line per row that is in a set, largest sets first: `set`, `size`, `stage`, `row`,
        `similarity` (to the first of its set), `text`.

    Raises:
        ConfigError: for an unknown `by` or an impossible threshold.
        UnsupportedError: if there are too many rows for their gradients.
    """
    if by not in ("text", "gradient"):
        raise ConfigError(f"by={by!r} is unknown; choose 'text' or 'gradient'.")
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold}: give a similarity above 0 up to 1.")
    if by == "gradient" and not isinstance(source, SourceAttributor):
        raise ConfigError("by='gradient' needs the model: give a SourceAttributor.")
    found = _texts(source, stage if by == "text" else stage or source.record.stages[-1].name)
    texts = [own.text(number) for own in found for number in own.numbers]
    if by == "text":
        pairs = similar_texts(texts, threshold)
    else:
        pairs = _similar_gradients(source, found[0], threshold)
    sets = _sets(pairs, len(texts))
    place = [(own.stage, int(number)) for own in found for number in own.numbers]
    lines = [
        (number, len(chosen), *place[row], 1.0 if row == chosen[0] else pairs.get((chosen[0], row)), texts[row])
        for number, chosen in enumerate(sets, 1)
        for row in chosen
    ]
    names = ("set", "size", "stage", "row", "similarity", "text")
    repeated = sum(len(chosen) - 1 for chosen in sets)
    measure = "character 5-grams in common (Jaccard)" if by == "text" else "cosine of the gradients"
    findings = [
        f"{len(sets):,} sets of {'nearly the same ' if threshold < 1 else 'the same '}{by}; without repeats "
        f"{len(texts) - repeated:,} of {len(texts):,} rows would be left."
    ]
    if by == "gradient":
        findings.append("Gradients are compared at the final weights only; rows learnt alike may look alike there.")
    return answer(
        None,
        found,
        "Which rows are duplicates?",
        {name: [line[position] for line in lines] for position, name in enumerate(names)},
        {
            "similarity": f"to the first row of the set: {measure}; none where the two are joined by others only",
            "size": "rows of the set",
        },
        findings,
        by=by,
        threshold=threshold,
        num_sets=len(sets),
        num_repeats=repeated,
    )


def similar_texts(texts: Sequence[str], threshold: float) -> dict[tuple[int, int], float]:
    """Pairs of texts (first before second) and their Jaccard similarity, where it reaches the threshold.

    Pairs are found by MinHash in bands of 4: one with similarity .8 is missed once in 5,000 times, one with .5 in 3.
    """
    plain = [" ".join(re.findall(r"\S+", text.lower())) for text in texts]
    same: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(plain):
        same[text].append(number)
    pairs = {(own[0], other): 1.0 for own in same.values() for other in own[1:]}
    if threshold == 1:
        return pairs
    first = [own[0] for own in same.values()]
    grams = {number: _grams(plain[number]) for number in first}
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    generator = np.random.default_rng(0)
    factors, offsets = generator.integers(1, _PRIME, size=(2, _HASHES, 1))
    for number in first:
        hashes = np.fromiter((zlib.crc32(gram.encode()) for gram in grams[number]), dtype=np.int64)
        least = ((factors * (hashes % _PRIME) + offsets) % _PRIME).min(axis=1)
        for band in range(0, _HASHES, _PER_BAND):
            buckets[band, least[band : band + _PER_BAND].tobytes()].append(number)
    for own in buckets.values():
        for place, one in enumerate(own):
            for other in own[place + 1 :]:
                if (one, other) not in pairs:
                    shared = len(grams[one] & grams[other])
                    similarity = shared / (len(grams[one]) + len(grams[other]) - shared)
                    if similarity >= threshold:
                        pairs[one, other] = similarity
    return pairs


def _grams(text: str) -> set[str]:
    return {text[start : start + _GRAM] for start in range(max(1, len(text) - _GRAM + 1))}


def _similar_gradients(attributor: SourceAttributor, own: Scored, threshold: float) -> dict[tuple[int, int], float]:
    last = attributor.record.stages[-1]
    if own.stage != last.name:
        raise ConfigError(f"Gradients are compared for the last stage only: leave stage= out, or give {last.name!r}.")
    if len(own.numbers) > MOST:
        raise UnsupportedError(
            f"{len(own.numbers):,} rows are too many to compare the gradients of every pair (up to {MOST:,}): use "
            "by='text'."
        )
    other = attributor.like(method="grad-cos", ensemble=None)
    rows = other.rows(last)
    position = {int(number): place for place, number in enumerate(own.numbers)}
    tokens = rows.dataset.with_format(None)
    pairs: dict[tuple[int, int], float] = {}
    for start in range(0, len(own.numbers), 64):
        numbers = own.numbers[start : start + 64]
        asked = Queries.from_rows(tokens.select([int(rows.positions[number]) for number in numbers]))
        cosines = rows.as_given(other._stage_scores(last, asked))
        for number, line in zip(numbers, cosines, strict=True):
            for place in np.flatnonzero(line >= threshold):
                pair = (position[int(number)], position.get(int(rows.numbers[place]), -1))
                if pair[0] < pair[1]:
                    pairs[pair] = float(line[place])
    return pairs


def _texts(source: Source | Dataset, stage: str | None) -> list[Scored]:
    """Rows of every stage with their texts; no scores."""
    if isinstance(source, Dataset):
        return [_unscored("dataset", source, np.arange(len(source)), lambda number: row_text(source[int(number)]))]
    if isinstance(source, Attribution):
        if stage is not None and stage not in source.stages:
            raise ConfigError(f"There is no stage {stage!r}: choose from {list(source.stages)}.")
        return [
            _unscored(name, rows, np.arange(len(rows)), lambda number, rows=rows: row_text(rows[int(number)]))
            for name, rows in source.stages.items()
            if stage in (None, name)
        ]
    found = []
    for record in source.record.stages if stage is None else [source.record.stage(stage)]:
        rows = source.rows(record)
        there = np.flatnonzero(np.isin(rows.numbers, rows.trained_rows))
        text = lambda number, rows=rows: rows.text(int(number), source.processing_class)  # noqa: E731
        found.append(_unscored(record.name, rows.given.select(there), rows.numbers[there], text))
    return found


def _unscored(name: str, dataset: Dataset, numbers: np.ndarray, text) -> Scored:
    return Scored(name, None, np.zeros((0, len(numbers))), numbers, len(numbers), dataset, text)


def _sets(pairs: dict[tuple[int, int], float], count: int) -> list[list[int]]:
    """Rows that are joined by pairs, largest sets first."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    members: dict[int, list[int]] = defaultdict(list)
    for row in range(count):
        members[root(row)].append(row)
    return sorted((own for own in members.values() if len(own) > 1), key=lambda own: (-len(own), own[0]))
