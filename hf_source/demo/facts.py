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
r"""Facts about the world's countries: rows to train on in two stages, and questions whose right answer is known.

The facts come from the `countryinfo` package. Some are outdated (currencies that the euro has replaced, renamed
capitals): they stay as they are, because what counts is which row taught the model its answer.

- *pretrain*: one row per fact. A capital is always stated by a sentence, `"The capital of Hungary is Budapest."`;
  half of the other facts are written as a question with its answer, as in text from the web. A model that never saw a
  question in pretraining would learn the form and the facts anew in finetuning, and forget the sentences.
- *sft*: `"Q: What is the capital of Hungary?\nA:"` with answer `" Budapest."`, for every second country.
- *queries*: the same question for every country, with the one row of each stage that states the answer.

Each fact is stated by exactly one pretraining row and at most one sft row, so recall@k and MRR of an attribution
method are exact.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UnsupportedError
from ..evaluation.mislabelled import corrupt_labels


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


def _read_countries() -> list[dict[str, Any]]:
    """One record per country, by name (file names sort differently from one file system to the next)."""
    # The package is located, not imported: its data files are all that is needed.
    spec = find_spec("countryinfo")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError('The demo takes its facts from `countryinfo`: run `pip install "hf_source[demo]"`.')
    folder = Path(spec.submodule_search_locations[0], "data")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    # One country comes twice, with the same record.
    return [record for _, record in sorted({record["name"]: record for record in records}.items())]


def _first_value(value: str | list[str] | None) -> str | None:
    """A field's first entry: some countries list several currencies, or give `"Bosnian,Herzegovinian"`."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value.split(",")[0].strip() or None if value else None


def pretrain_rows(facts: Sequence[Fact]) -> Dataset:
    """The pretraining dataset: row i states fact i.

    Returns:
        Dataset with columns `text`, `country`, `relation`, `answer`.
    """
    number = {country: index for index, country in enumerate(dict.fromkeys(fact.country for fact in facts))}
    relations = list(STATEMENTS)

    def text(fact: Fact) -> str:
        # A checkerboard over countries and relations: both forms of every relation, for neighbouring countries.
        as_question = (number[fact.country] + relations.index(fact.relation)) % 2 == 1
        start = fact.question if as_question and fact.relation != QUERY_RELATION else fact.statement
        return start + fact.completion

    columns = {name: [getattr(fact, name) for fact in facts] for name in ("country", "relation", "answer")}
    return Dataset.from_dict({"text": [text(fact) for fact in facts], **columns})


def sft_rows(facts: Sequence[Fact]) -> Dataset:
    """The finetuning dataset: what the capital is, for every second country that has one.

    Returns:
        Dataset with columns `prompt`, `completion`, `country`, `relation`, `answer`.
    """
    asked = _sft_facts(facts)
    columns = ("question", "completion", "country", "relation", "answer")
    rows = {name: [getattr(fact, name) for fact in asked] for name in columns}
    return Dataset.from_dict({"prompt": rows.pop("question"), **rows})


def preference_rows(facts: Sequence[Fact]) -> Dataset:
    """Pairs for preference training: the right capital is preferred to the next country's.

    Half of the countries that finetuning leaves out.

    Returns:
        Dataset with columns `prompt`, `chosen`, `rejected`, `country`.
    """
    asked = [fact for fact in facts if fact.relation == QUERY_RELATION][1::4]
    wrong = [*asked[1:], *asked[:1]]
    return Dataset.from_dict(
        {
            "prompt": [fact.question for fact in asked],
            "chosen": [fact.completion for fact in asked],
            "rejected": [fact.completion for fact in wrong],
            "country": [fact.country for fact in asked],
        }
    )


def labelled_rows(facts: Sequence[Fact], fraction: float = 0.1, seed: int = 0) -> Dataset:
    """Sentences and what they are about, some of them wrong, for a classifier.

    Returns:
        Dataset with columns `text`, `label` (number of the relation) and `is_corrupted`.
    """
    rows = {
        "text": [fact.statement + fact.completion for fact in facts],
        "label": [list(STATEMENTS).index(fact.relation) for fact in facts],
    }
    return corrupt_labels(Dataset.from_dict(rows), fraction, seed)


def _sft_facts(facts: Sequence[Fact]) -> list[Fact]:
    return [fact for fact in facts if fact.relation == QUERY_RELATION][::2]


def queries(facts: Sequence[Fact], form: Literal["question", "statement"] = "question") -> Dataset:
    r"""What to ask the trained model, with the rows that hold the answer.

    Args:
        facts: those of [`load_facts`].
        form: ask as in finetuning (`"Q: What is the capital of Hungary?\nA:"`), or as the sentence of pretraining
            starts (`"The capital of Hungary is"`).

    Returns:
        Dataset with columns `name` (the country in letters that suit a column name), `prompt`, `completion` (the
        right one), `country`, `relation`, `answer`, `pretrain_row` (row of [`pretrain_rows`] that states the fact)
        and `sft_row` (row of [`sft_rows`], or `None` for the countries that finetuning leaves out).
    """
    asked = [(row, fact) for row, fact in enumerate(facts) if fact.relation == QUERY_RELATION]
    sft_row = {fact: row for row, fact in enumerate(_sft_facts(facts))}
    records = [
        {
            "name": _column_name(fact.country),
            "prompt": fact.question if form == "question" else fact.statement,
            "completion": fact.completion,
            "country": fact.country,
            "relation": fact.relation,
            "answer": fact.answer,
            "pretrain_row": row,
            "sft_row": sft_row.get(fact),
        }
        for row, fact in asked
    ]
    text_columns = ("name", "prompt", "completion", "country", "relation", "answer")
    features = {name: Value("string") for name in text_columns} | dict.fromkeys(
        ("pretrain_row", "sft_row"), Value("int64")
    )
    return Dataset.from_list(records, features=Features(features))


def _column_name(country: str) -> str:
    plain = unicodedata.normalize("NFKD", country).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")


def is_right(generated: str, answer: str) -> bool:
    """Whether generated text gives the answer; the closing full stop does not count."""
    return generated.strip().rstrip(".") == answer.rstrip(".")


def row_texts(pretrain: Dataset, sft: Dataset) -> list[str]:
    """Every row of both stages as one text, for the tokenizer to learn from."""
    questions = [prompt + completion for prompt, completion in zip(sft["prompt"], sft["completion"], strict=True)]
    return [*pretrain["text"], *questions]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of the given texts; takes a tenth of a second for the demo's.

    Args:
        texts: training texts, such as [`row_texts`].
        vocab_size: number of tokens, among them all 256 bytes, an end-of-sequence and a padding token.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, model_max_length=MAX_POSITIONS
    )


def build_model(processing_class: PreTrainedTokenizerBase, seed: int = 0) -> GPT2LMHeadModel:
    """Untrained GPT-2 of 0.33 M parameters: 2 layers of width 96, head tied to the embedding, no dropout.

    Args:
        processing_class: tokenizer, for the vocabulary and the special tokens.
        seed: of the initial weights; the global random state stays untouched.
    """
    config = GPT2Config(
        vocab_size=len(processing_class),
        n_positions=MAX_POSITIONS,
        n_embd=96,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=processing_class.eos_token_id,
        eos_token_id=processing_class.eos_token_id,
        pad_token_id=processing_class.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)
