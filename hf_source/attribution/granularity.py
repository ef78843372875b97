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
"""Queries about parts of answers: each token of an answer, or each part of it that is marked, as a query of its own.

What is asked of a language model is a sum over tokens, so the scores of the parts add up to those of the whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ..data import IGNORE_INDEX
from ..errors import ConfigError, DataError
from .queries import Queries


QueryGranularity = Literal["sequence", "token", "span"]
Granularity = Literal["row", "token"]

Span = str | tuple[int, int]
"""A part of a completion: its text, or where it begins and ends (in letters)."""


def check_choice(what: str, given: Any, choices: Sequence[str]) -> None:
    """Raise `ConfigError` for a setting that is none of its choices."""
    if given not in choices:
        raise ConfigError(f"{what}={given!r} should be one of {', '.join(map(repr, choices))}.")


def split_queries(queries: Queries, granularity: QueryGranularity, processing_class: Any, first: int) -> Queries:
    """A query for each asked token, or for each run of neighbouring asked tokens.

    Args:
        queries: encoded, of a decoder.
        granularity: `"sequence"` leaves them as they are; `"token"` makes `<name>_t0`, `<name>_t1`, ...; `"span"`
            makes `<name>_s0`, ... of what is asked without a gap: the parts that `mark_spans` chose, or the labels
            that `Queries.from_dataset` was given.
        processing_class: decodes the parts for display.
        first: position of the first label that the model predicts.

    Raises:
        ConfigError: for another granularity.
        DataError: if the queries are rows, which are asked about as a whole.
    """
    check_choice("query_granularity", granularity, ("sequence", "token", "span"))
    if granularity == "sequence":
        return queries
    _refuse_rows(queries)
    decode = (lambda tokens: "") if processing_class is None else processing_class.decode
    names, prompts, completions, rows = [], [], [], []
    for name, row in zip(queries.names, queries.rows, strict=True):
        asked = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX and place >= first]
        parts = [[place] for place in asked] if granularity == "token" else list(_runs(asked))
        for number, part in enumerate(parts):
            names.append(f"{name}_{granularity[0]}{number}")
            prompts.append(decode(row["input_ids"][: part[0]]))
            completions.append(decode([row["labels"][place] for place in part]))
            rows.append({**row, "labels": _labels(row, part)})
    return Queries(names, prompts, completions, rows)


def mark_spans(queries: Queries, spans: Mapping[str, Span | Iterable[Span]], processing_class: Any) -> Queries:
    """Queries that ask about parts of their completions only: about every token that a part touches.

    Args:
        queries: encoded, of a decoder.
        spans: query -> a part, or several; queries that are not named stay whole.
        processing_class: tokenizer.

    Raises:
        DataError: if there is no such query, a part is not found or holds no token, or the queries are rows.
    """
    _refuse_rows(queries)
    unknown = sorted(set(spans) - set(queries.names))
    if unknown:
        raise DataError(f"There is no query {unknown[0]!r} to mark a part of; there are {', '.join(queries.names)}.")
    rows = []
    for (name, prompt, completion), row in zip(queries, queries.rows, strict=True):
        if name not in spans:
            rows.append(row)
            continue
        given = spans[name]
        several = [given] if isinstance(given, str) or _is_pair(given) else list(given)
        letters = _letters(row, processing_class, prompt, completion)
        kept = [place for span in several for place in _touched(letters, _found(span, completion, name))]
        rows.append({**row, "labels": _labels(row, kept)})
    return Queries(queries.names, queries.prompts, queries.completions, rows)


def _refuse_rows(queries: Queries) -> None:
    if queries.are_rows:
        raise DataError("These queries are rows, asked about as a whole: leave query_granularity and spans out.")


def _runs(places: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring places together."""
    run: list[int] = []
    for place in places:
        if run and place != run[-1] + 1:
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _labels(row: Mapping[str, Any], places: Iterable[int]) -> list[int]:
    kept = set(places)
    return [label if place in kept else IGNORE_INDEX for place, label in enumerate(row["labels"])]


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(end, int) for end in given)


def _found(span: Span, completion: str, name: str) -> tuple[int, int]:
    """Where a part begins and ends."""
    if isinstance(span, str):
        start = completion.find(span) if span else -1
        if start < 0:
            raise DataError(f"The answer of query {name!r} does not hold {span!r}; it is {completion!r}.")
        return start, start + len(span)
    if not _is_pair(span) or not 0 <= span[0] < span[1] <= len(completion):
        raise DataError(
            f"{span!r} is no part of the answer of query {name!r}: give its text, or (first, end) within "
            f"{len(completion)} letters."
        )
    return span


def _letters(
    row: Mapping[str, Any], processing_class: Any, prompt: str, completion: str
) -> dict[int, tuple[int, int]]:
    """Label position -> where its token begins and ends in the completion."""
    ids, asked = row["input_ids"], [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
    if processing_class.is_fast:
        encoded = processing_class(prompt + completion, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == ids[: len(encoded["input_ids"])]:
            begin, places = len(prompt), encoded["offset_mapping"]
            return {p: (places[p][0] - begin, places[p][1] - begin) for p in asked if p < len(places)}
    # Generated tokens need not be those that the tokenizer makes of the text.
    end_of = lambda count: len(processing_class.decode(ids[:count], skip_special_tokens=True))  # noqa: E731
    begin = end_of(len(ids)) - len(completion)
    return {place: (end_of(place) - begin, end_of(place + 1) - begin) for place in asked}


def _touched(letters: Mapping[int, tuple[int, int]], span: tuple[int, int]) -> list[int]:
    found = [place for place, (first, end) in letters.items() if first < span[1] and end > span[0]]
    if not found:
        raise DataError(f"No token of the answer lies between its letters {span[0]} and {span[1]}: mark more of it.")
    return found
