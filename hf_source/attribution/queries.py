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
"""Queries: the texts whose origin is asked for, with the tokens that are asked about."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import IGNORE_INDEX, ROW, encode_completion
from ..errors import DataError


@dataclass
class Queries:
    """Prompts and the completions to explain.

    Attributes:
        names: one per query; the score column is `source_<name>`.
        prompts: what comes before the completion; it is not asked about.
        completions: the text to explain.
        rows: token rows (`input_ids`, `labels` with -100 where nothing is asked); `None` until a tokenizer is known.
        are_rows: the rows are of the kind that the last stage trained on, and what is asked is their loss.
    """

    names: list[str]
    prompts: list[str]
    completions: list[str]
    rows: list[dict[str, Any]] | None = None
    are_rows: bool = False

    def __post_init__(self) -> None:
        if len({len(self.names), len(self.prompts), len(self.completions)}) != 1:
            raise DataError(
                f"There are {len(self.prompts)} prompts, {len(self.completions)} completions and {len(self.names)} "
                "names: give one of each per query."
            )
        if not self.names:
            raise DataError("There is no query: give at least one prompt and its completion.")
        for name in self.names:
            if not isinstance(name, str) or not name:
                raise DataError(f"Query name {name!r} is not a non-empty string: it becomes part of a column name.")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise DataError(f"Query name {twice[0]!r} is used twice: every query needs a column of its own.")

    @classmethod
    def from_text(
        cls, prompts: Sequence[str], completions: Sequence[str], names: Sequence[str] | None = None
    ) -> "Queries":
        """Queries from text. They are tokenised as one text each, exactly as a training row would be.

        Args:
            prompts: may be empty strings (the whole completion but its first token is then asked about).
            completions: the texts to explain, including a leading space where there is one.
            names: by default `q0`, `q1`, ...

        Raises:
            DataError: if a completion is empty, or the lists differ in length, or a name repeats.
        """
        for what, given in (("prompts", prompts), ("completions", completions)):
            refuse_one_text(what, given)
        prompts, completions = list(prompts), list(completions)
        queries = cls(_names(names, len(prompts)), prompts, completions)
        for name, completion in zip(queries.names, completions, strict=True):
            if not completion:
                raise DataError(f"Query {name!r} has an empty completion: give the text whose origin is asked for.")
        return queries

    @classmethod
    def from_dataset(cls, dataset: Dataset, processing_class: PreTrainedTokenizerBase | None = None) -> "Queries":
        """Queries from tokenised rows: `input_ids`, `labels` (-100 = not asked), optional `attention_mask` and `name`.

        Args:
            dataset: the rows. Padding (`attention_mask` 0) is removed.
            processing_class: decodes tokens for display; without it the texts are left empty.

        Raises:
            DataError: if a column is missing or a row asks about nothing.
        """
        missing = {"input_ids", "labels"} - set(dataset.column_names)
        if missing:
            raise DataError(
                f"The queries have no column {sorted(missing)[0]!r}; from_dataset needs `input_ids` and `labels` "
                "(-100 where a token is not asked about). For plain text use Queries.from_text."
            )
        rows = [_unpadded(row) for row in dataset]
        names = _names(dataset["name"] if "name" in dataset.column_names else None, len(rows))
        prompts, completions = zip(*(_texts(row, processing_class) for row in rows), strict=True) if rows else ((), ())
        queries = cls(names, list(prompts), list(completions), rows)
        queries._refuse_empty()
        return queries

    @classmethod
    def from_rows(cls, dataset: Dataset, names: Sequence[str] | None = None) -> "Queries":
        """Queries that are rows of the kind which the last stage trained on, prepared as its collator reads them.

        What is asked is their loss as in training: of preference pairs, of labelled texts, of a task of your own.

        Args:
            dataset: the rows; a column `name` names them.
            names: by default the column `name`, or `q0`, `q1`, ...
        """
        names = dataset["name"] if names is None and "name" in dataset.column_names else names
        rows = [{key: value for key, value in row.items() if key not in ("name", ROW)} for row in dataset]
        return cls(_names(names, len(rows)), [""] * len(rows), [""] * len(rows), rows, are_rows=True)

    def part(self, chosen: slice) -> "Queries":
        """Some of the queries."""
        rows = None if self.rows is None else self.rows[chosen]
        return Queries(self.names[chosen], self.prompts[chosen], self.completions[chosen], rows, self.are_rows)

    def encode(
        self,
        processing_class: PreTrainedTokenizerBase | None,
        max_length: int | None = None,
        encoder_decoder: bool = False,
    ) -> "Queries":
        """The same queries with token rows.

        Args:
            processing_class: tokenizer, for queries that are text.
            max_length: tokens that the model's context holds.
            encoder_decoder: the prompt goes to an encoder, and the completion (with its end) to a decoder.

        Raises:
            DataError: if there is no tokenizer, a completion has no token, or a query is longer than `max_length`.
        """
        if self.are_rows:
            return self
        rows = self.rows
        if rows is None:
            if processing_class is None:
                raise DataError(
                    "Text queries need a tokenizer: pass `processing_class=`, or use Queries.from_dataset."
                )
            if encoder_decoder:
                inputs = processing_class(self.prompts)["input_ids"]
                encoded = list(zip(inputs, processing_class(text_target=self.completions)["input_ids"], strict=True))
            else:
                encoded = [
                    encode_completion(processing_class, prompt, completion)
                    for prompt, completion in zip(self.prompts, self.completions, strict=True)
                ]
            rows = [{"input_ids": ids, "labels": labels} for ids, labels in encoded]
        queries = Queries(self.names, self.prompts, self.completions, rows)
        queries._refuse_empty(0 if encoder_decoder else 1)
        for name, row in zip(self.names, rows, strict=True):
            if max_length is not None and len(row["input_ids"]) > max_length:
                raise DataError(
                    f"Query {name!r} has {len(row['input_ids'])} tokens, the model's context holds {max_length}: "
                    "shorten its prompt or its completion."
                )
        return queries

    def _refuse_empty(self, first: int = 1) -> None:
        for name, row in zip(self.names, self.rows, strict=True):
            if all(label == IGNORE_INDEX for label in row["labels"][first:]):
                raise DataError(
                    f"Query {name!r} asks about no token: its completion is empty, or only its first token is asked, "
                    "which nothing predicts. Give a completion after a prompt, or a longer one."
                )

    def to_dataset(self) -> Dataset:
        """One row per query: `name`, `prompt`, `completion`, and the token rows where known."""
        columns: dict[str, Any] = {"name": self.names, "prompt": self.prompts, "completion": self.completions}
        if self.rows is not None:
            columns |= {key: [row[key] for row in self.rows] for key in self.rows[0]}
        return Dataset.from_dict(columns)

    def select(self, indices: Sequence[int]) -> "Queries":
        """The queries at the given positions."""
        rows = None if self.rows is None else [self.rows[i] for i in indices]
        pick = lambda values: [values[i] for i in indices]  # noqa: E731
        return Queries(pick(self.names), pick(self.prompts), pick(self.completions), rows, self.are_rows)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        """Name, prompt, completion of each query."""
        return iter(zip(self.names, self.prompts, self.completions, strict=True))


def same_queries(one: Queries, other: Queries) -> bool:
    """Whether queries ask the same, by the same names."""
    rows = one.rows is None or other.rows is None or one.rows == other.rows
    return list(one) == list(other) and one.are_rows == other.are_rows and rows


def refuse_other_than_queries(given: Any) -> None:
    """Raise `DataError` for anything but `Queries`."""
    if not isinstance(given, Queries):
        raise DataError(
            f"queries is a {type(given).__name__}: make queries with `attributor.generate([prompt])`, or "
            "`Queries.from_text([prompt], [completion])` for a text of your own."
        )


def refuse_one_text(what: str, given: Any) -> None:
    """Raise `DataError` for a text where a list of texts is asked for: its letters would be the texts."""
    if isinstance(given, str):
        raise DataError(f"{what}={given!r} is one text, not a list of them: write {what}=[{given!r}].")
    try:
        list(given)
    except TypeError as error:
        raise DataError(f"{what}={given!r} is no list of texts: write {what}=['...'].") from error


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    return [f"q{i}" for i in range(count)] if names is None else list(names)


def _unpadded(row: Mapping[str, Any]) -> dict[str, list[int]]:
    keep = row.get("attention_mask") or [1] * len(row["input_ids"])
    if len(row["input_ids"]) != len(row["labels"]):
        raise DataError("A query's `input_ids` and `labels` differ in length: align them token by token.")
    return {
        key: [int(value) for value, on in zip(row[key], keep, strict=True) if on] for key in ("input_ids", "labels")
    }


def _texts(row: Mapping[str, list[int]], processing_class: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    if processing_class is None:
        return "", ""
    asked = [label != IGNORE_INDEX for label in row["labels"]]
    first = asked.index(True) if any(asked) else len(asked)
    return processing_class.decode(row["input_ids"][:first]), processing_class.decode(row["input_ids"][first:])
