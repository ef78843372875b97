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
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_source import Queries
from hf_source.data import encode_completion
from hf_source.errors import DataError

from ..cases import byte_tokenizer


def merging_tokenizer():
    """A tokenizer that merges everything it can, across any boundary but a newline."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(["the answer is yes"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_a_token_across_the_boundary_is_asked_about():
    tokenizer = merging_tokenizer()
    whole = tokenizer("the answer is yes")["input_ids"]
    assert len(whole) == 1  # all of it merged into one token
    ids, labels = encode_completion(tokenizer, "the answer is", " yes", append_eos=True)
    assert ids == [*whole, tokenizer.eos_token_id]
    assert labels == ids


def test_prompt_tokens_are_not_asked_about():
    ids, labels = encode_completion(byte_tokenizer(), "ab", "cd")
    assert labels == [-100, -100, *ids[2:]]
    assert byte_tokenizer().decode(ids) == "abcd"


def test_characters_of_several_bytes():
    tokenizer = byte_tokenizer()
    ids, labels = encode_completion(tokenizer, "é", "ü")
    assert len(ids) == 4
    assert labels == [-100, -100, *ids[2:]]


def test_names_and_lengths():
    with pytest.raises(DataError, match="'a' is used twice"):
        Queries.from_text(["x", "y"], ["1", "2"], names=["a", "a"])
    with pytest.raises(DataError, match="2 prompts, 1 completions"):
        Queries.from_text(["x", "y"], ["1"])
    with pytest.raises(DataError, match="not a non-empty string"):
        Queries.from_text(["x"], ["1"], names=[""])
    with pytest.raises(DataError, match="There is no query"):
        Queries.from_text([], [])


def test_an_empty_completion_is_refused():
    with pytest.raises(DataError, match="'q1' has an empty completion: give the text"):
        Queries.from_text(["x", "y"], ["1", ""])


def test_from_dataset_drops_padding_and_reads_names():
    rows = {
        "input_ids": [[5, 6, 7, 0], [8, 9, 0, 0]],
        "labels": [[-100, 6, 7, -100], [-100, 9, -100, -100]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
        "name": ["one", "two"],
    }
    queries = Queries.from_dataset(Dataset.from_dict(rows), byte_tokenizer())
    assert queries.names == ["one", "two"]
    assert queries.rows == [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    assert queries.completions[0] == byte_tokenizer().decode([6, 7])


def test_from_dataset_refuses_what_asks_nothing():
    with pytest.raises(DataError, match="asks about no token"):
        Queries.from_dataset(Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, -100]]}))
    with pytest.raises(DataError, match="no column 'labels'"):
        Queries.from_dataset(Dataset.from_dict({"input_ids": [[1, 2]]}))
    with pytest.raises(DataError, match="differ in length"):
        Queries.from_dataset(Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1]]}))


def test_encode_without_tokenizer():
    with pytest.raises(DataError, match="need a tokenizer"):
        Queries.from_text(["a"], ["b"]).encode(None)


def test_dataset_round_trip():
    queries = Queries.from_text(["ab"], ["cd"], names=["x"]).encode(byte_tokenizer())
    again = Queries.from_dataset(queries.to_dataset(), byte_tokenizer())
    assert list(again) == list(queries)
    assert again.rows == queries.rows
