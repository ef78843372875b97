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
"""Errors of the library. Every message says what is wrong and what to change."""
"""Facts about the world's countries: rows to train on in two stages, and questions whose right answer is known.

The facts come from the `countryinfo` package. Some are outdated (currencies that the euro has replaced, renamed
capitals): they stay as they are, because what counts is which row taught the model its answer.

- *pretrain*: one row per fact. A capital is always stated by a sentence, `"The capital of Hungary is Budapest."`;
  half of the other facts are written as a question with its answer, as in text from the web. A model that never saw a
  question in pretraining would learn the form and the facts anew in finetuning, and forget the sentences.
- *sft*: `"Q: What is the capital of Hungary?\\nA:"` with answer `" Budapest."`, for every second country.
- *queries*: the same question for every country, with the one row of each stage that states the answer.

Each fact is stated by exactly one pretraining row and at most one sft row, so recall@k and MRR of an attribution
method are exact.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UnsupportedError


EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
MAX_POSITIONS = 64

QUERY_RELATION = "capital"
"""The relation that the sft rows and the queries ask for."""

STATEMENTS = {
    "capital": "The capital of {country} is",
    "subregion": "{country} is a part of",
    "currency": "The currency of {country} is",
    "demonym": "A person from {country} is called",
}
"""Start of the sentence that states a fact, per relation."""

QUESTIONS = {
    "capital": "Q: What is the capital of {country}?\nA:",
    "subregion": "Q: What is {country} a part of?\nA:",
    "currency": "Q: What is the currency of {country}?\nA:",
    "demonym": "Q: What is a person from {country} called?\nA:",
}
"""Question that asks for a fact, per relation."""

_SOURCE_KEYS = {"capital": "capital", "subregion": "subregion", "currency": "currencies", "demonym": "demonym"}


@dataclass(frozen=True)
class Fact:
    """One fact: the `relation` of `country` is `answer`."""

    country: str
    relation: str
    answer: str

    @property
    def statement(self) -> str:
        """Start of the sentence that states the fact."""
        return STATEMENTS[self.relation].format(country=self.country)

    @property
    def question(self) -> str:
        """Question that asks for the fact."""
        return QUESTIONS[self.relation].format(country=self.country)

    @property
    def completion(self) -> str:
        """What follows the sentence's start or the question: the answer with its full stop."""
        return f" {self.answer}" if self.answer.endswith(".") else f" {self.answer}."


def load_facts() -> list[Fact]:
    """Every fact, country by country, in an order that depends on nothing but the package's version.

    Raises:
        UnsupportedError: if `countryinfo` is not installed.
    """
    facts = []
    for country in _read_countries():
        for relation, key in _SOURCE_KEYS.items():
            answer = _first_value(country.get(key))
            if answer:
                facts.append(Fact(country["name"], relation, answer))
    return facts


def _read_countries() -> Iterator[dict[str, Any]]:
    """The package's records by file name; a second record of the same country (it holds less) is left out."""
    # Only located, not imported: its own loader reads files in the order of the file system.
    spec = find_spec("countryinfo")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError('The demo takes its facts from `countryinfo`: run `pip install "hf_source[demo]"`.')
    folder = Path(spec.submodule_search_locations[0], "data")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    fullest: dict[str, dict[str, Any]] = {}
    for record in records:
        if len(record) > len(fullest.get(record["name"], {})):
            fullest[record["name"]] = record
    yield from fullest.values()


def _first_value(value: str | list[str] | None) -> str | None:
    """A field's first entry: some countries list several currencies, or give `"Bosnian,Herzegovinian"`."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value.split(",")[0].strip() or None if value else None
