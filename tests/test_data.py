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
"""From a dataset as people have it to token rows, their hash, and batches."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

from hf_source import SourceTrainer
from hf_source.data import (
    CausalLMCollator,
    content_fingerprint,
    dataset_kind,
    encode_completion,
    prepare_rows,
    refuse_long_rows,
    take_rows,
)
from hf_source.errors import DataError

from .cases import byte_tokenizer, config, random_rows, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


# ---- token rows ----------------------------------------------------------------------------------------------------


def test_text_rows_train_on_every_token_and_the_end(tokenizer):
    rows = prepare_rows(Dataset.from_dict({"text": ["Peru", "a b"], "mine": [1, 2]}), tokenizer)
    assert rows["input_ids"] == [[*ids(tokenizer, "Peru"), 0], [*ids(tokenizer, "a b"), 0]]
    assert rows["labels"] == rows["input_ids"]
    assert rows["mine"] == [1, 2]
    assert rows["text"] == ["Peru", "a b"]


def test_prompt_rows_train_on_the_completion_and_the_end(tokenizer):
    rows = prepare_rows(Dataset.from_dict({"prompt": ["Q: A"], "completion": [" Lima"]}), tokenizer)
    answer = ids(tokenizer, " Lima")
    assert rows["input_ids"] == [[*ids(tokenizer, "Q: A"), *answer, 0]]
    assert rows["labels"] == [[*[-100] * 4, *answer, 0]]


def test_an_end_that_is_there_is_not_doubled(tokenizer):
    rows = prepare_rows(Dataset.from_dict({"text": ["ab<eos>"]}), tokenizer)
    assert rows[0]["input_ids"] == [*ids(tokenizer, "ab"), 0]
    rows = prepare_rows(Dataset.from_dict({"prompt": ["a"], "completion": ["b<eos>"]}), tokenizer)
    assert rows[0]["labels"] == [-100, *ids(tokenizer, "b"), 0]


def test_tokenised_rows_pass_through():
    rows = random_rows(3)
    assert prepare_rows(rows) is rows
    assert prepare_rows(rows, byte_tokenizer(), max_length=2) is rows


def test_max_length_cuts_ids_and_labels_alike(tokenizer):
    rows = Dataset.from_dict({"prompt": ["abc", "a"], "completion": ["de", "b"]})
    cut = prepare_rows(rows, tokenizer, max_length=4)
    assert [len(row) for row in cut["input_ids"]] == [4, 3]
    assert [len(row) for row in cut["labels"]] == [4, 3]
    assert cut[0]["labels"] == [-100, -100, -100, *ids(tokenizer, "d")]


def test_a_token_across_the_border_is_the_completions():
    """A merged token that holds the prompt's end and the completion's start has to be asked about."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    merged = models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")])
    joining = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(merged))
    assert encode_completion(joining, "ab", "ca") == ([0, 3, 0], [-100, 3, 0])


def test_columns_that_cannot_be_read_are_refused(tokenizer):
    assert dataset_kind(["input_ids", "text"]) == "tokenized"
    assert dataset_kind(["prompt", "completion", "text"]) == "prompt_completion"
    with pytest.raises(DataError, match=r"columns \['prompt', 'question'\], none of which.*`prompt` and `completion`"):
        dataset_kind(["question", "prompt"])
    with pytest.raises(DataError, match="raw `text` rows, which need a tokenizer: pass `processing_class=`"):
        prepare_rows(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataError, match="may not have a `labels` column: rename it"):
        prepare_rows(Dataset.from_dict({"text": ["a"], "labels": [1]}), tokenizer)


def test_take_rows_keeps_the_order_asked_for():
    rows = random_rows(5)
    for dataset in (rows, rows.with_format("torch"), list(rows)):
        assert take_rows(dataset, [3, 0, 3]) == [rows[3], rows[0], rows[3]]


# ---- rows longer than the context ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_long_rows_are_refused_when_the_trainer_is_made(tmp_path, make):
    rows = Dataset.from_dict({"text": ["short", "x" * 40, "y" * 35]})
    model = make(vocab_size=260)  # 32 positions
    message = r"Row 1 has 41 tokens, the model's context holds 32 \(2 of 3 rows are too long\): set `max_length=32`"
    with pytest.raises(DataError, match=message):
        SourceTrainer(model, config(tmp_path), train_dataset=rows, processing_class=byte_tokenizer())
    args = config(tmp_path, max_length=32, max_steps=3)
    run = SourceTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=byte_tokenizer())
    run.train()
    assert max(map(len, run.train_dataset["input_ids"])) == 32


def test_long_evaluation_rows_are_refused(tmp_path):
    rows = random_rows()
    long = Dataset.from_dict({"input_ids": [[1] * 33], "labels": [[1] * 33]})
    with pytest.raises(DataError, match="Row 0 has 33 tokens"):
        SourceTrainer(tiny_gpt2(), config(tmp_path), train_dataset=rows, eval_dataset={"long": long})


def test_a_long_row_is_named_by_its_number():
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2]], "source_row": [2, 0, 1]})
    with pytest.raises(DataError, match="Row 0 has 3 tokens, the model's context holds 2 .1 of 3"):
        refuse_long_rows(rows, 2)
    with pytest.raises(DataError, match="Row 0 has 3 tokens"):
        refuse_long_rows(rows.select([2, 1]), 2)
    refuse_long_rows(rows, 3)
    refuse_long_rows(rows, None)
    refuse_long_rows(rows.select([]), 1)


def test_a_collator_of_ones_own_may_cut_rows(tmp_path):
    long = Dataset.from_dict({"input_ids": [[1] * 40] * 4})

    def cut(rows):
        return CausalLMCollator()([{"input_ids": row["input_ids"][:16]} for row in rows])

    run = SourceTrainer(tiny_gpt2(), config(tmp_path, max_steps=3), train_dataset=long, data_collator=cut)
    run.train()
    assert run.state.global_step == 3


# ---- the hash of what training sees --------------------------------------------------------------------------------


def as_type(rows: Dataset, dtype: str) -> Dataset:
    features = Features({name: Sequence(Value(dtype)) for name in ("input_ids", "labels")})
    return rows.cast(features)


def large_lists(rows: Dataset) -> Dataset:
    return Dataset(pa.table({name: pa.array(rows[name][:], pa.large_list(pa.int64())) for name in rows.column_names}))


SAME = {
    "integer width": lambda rows: as_type(rows, "int32"),
    "large lists": large_lists,
    "chunks": lambda rows: concatenate_datasets([rows.select(range(5)), rows.select(range(5, len(rows)))]),
    "another column": lambda rows: rows.add_column("note", ["x"] * len(rows)),
    "column order": lambda rows: rows.select_columns(["labels", "input_ids"]),
    "format": lambda rows: rows.with_format("torch"),
    "numbered": lambda rows: rows.add_column("source_row", np.arange(len(rows))),
    "numbered and shuffled": lambda rows: rows.add_column("source_row", np.arange(len(rows))).shuffle(seed=1),
    "an index that changes nothing": lambda rows: rows.select(list(range(len(rows)))[::-1]).select(
        list(range(len(rows)))[::-1]
    ),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_fingerprint_does_not_depend_on(change):
    rows = random_rows()
    assert content_fingerprint(change(rows)) == content_fingerprint(rows)


def one_token(rows: Dataset) -> Dataset:
    return edited(rows, "input_ids", lambda row: [*row[:-1], row[-1] + 1])


def one_label(rows: Dataset) -> Dataset:
    return edited(rows, "labels", lambda row: [*row[:-1], -100])


def moved_border(rows: Dataset) -> Dataset:
    """The same tokens in the same order, cut into rows elsewhere."""
    columns = {}
    for name in ("input_ids", "labels"):
        values = rows[name][:]
        values[4], values[5] = values[4] + values[5][:1], values[5][1:]
        columns[name] = values
    return Dataset.from_dict(columns)


def edited(rows: Dataset, column: str, change) -> Dataset:
    values = rows[column][:]
    values[7] = change(values[7])
    return Dataset.from_dict({name: values if name == column else rows[name][:] for name in rows.column_names})


DIFFERENT = {
    "one token": one_token,
    "one label": one_label,
    "a border between rows": moved_border,
    "order": lambda rows: rows.select([1, 0, *range(2, len(rows))]),
    "shuffling rows without numbers": lambda rows: rows.shuffle(seed=1),
    "a row less": lambda rows: rows.select(range(len(rows) - 1)),
    "no labels": lambda rows: rows.remove_columns("labels"),
    "a numbered row less": lambda rows: rows.add_column("source_row", np.arange(len(rows))).select(
        range(1, len(rows))
    ),
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_fingerprint_notices(change):
    rows = random_rows()
    assert content_fingerprint(change(rows)) != content_fingerprint(rows)


def test_fingerprint_of_lists_notices_changes():
    rows = list(random_rows())
    same = [dict(row) for row in rows]
    assert content_fingerprint(same) == content_fingerprint(rows)
    assert content_fingerprint(rows[::-1]) != content_fingerprint(rows)
    unlike = [
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        [{"input_ids": [1]}, {"input_ids": [2, 3]}],  # the same tokens, cut into rows elsewhere
        [{"input_ids": [1], "labels": [2]}, {"input_ids": [3]}],
        [{"input_ids": [1]}, {"input_ids": [2], "labels": [3]}],
    ]
    assert len({content_fingerprint(rows) for rows in unlike}) == len(unlike)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_collator_pads_to_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"  # of no effect
    tokenizer.pad_token = "a"
    pad = tokenizer.pad_token_id
    batch = CausalLMCollator(tokenizer)(rows)
    assert pad != 0
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert "source_row" not in batch


def test_collator_without_labels_or_tokenizer():
    batch = CausalLMCollator()(
        [{"input_ids": torch.tensor([3, 4]), "source_row": 9}, {"input_ids": [5], "source_row": 2}]
    )
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]]
    assert batch["labels"].tolist() == [[3, 4], [5, -100]]
    assert batch["source_row"].tolist() == [9, 2]
