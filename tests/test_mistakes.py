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
"""Mistakes of a first day: each is refused before work is spent, and the error names the way out."""

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    default_data_collator,
)

from hf_source import Queries, SourceAttributor, SourceIndex, SourceTrainer, TrainingRecord, load_attribution
from hf_source.errors import ConfigError, DataError, RecordError, UnsupportedError
from hf_source.evaluation import evaluate

from .cases import byte_tokenizer, config, tiny_gpt2, train
from .story import chats, facts


TEXTS = ["one row", "another row", "a third row"]


def trainer(folder, rows, vocab_size=260, **settings) -> SourceTrainer:
    model = tiny_gpt2(vocab_size=vocab_size)
    args = config(folder, max_steps=2, num_segments=1, **settings)
    return SourceTrainer(model, args, train_dataset=rows, processing_class=byte_tokenizer())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            DatasetDict(train=facts(), test=chats()),
            r"several sets \(train, test\): .*dataset\['train'\]",
        ),
        ([{"text": text} for text in TEXTS], r"of this list have \['text'\].*Dataset.from_list"),
        (Dataset.from_dict({"text": [*TEXTS, None]}), "Row 3 has None as its `text`.*dataset.filter"),
        (Dataset.from_dict({"prompt": ["a"], "completion": [None]}), "Row 0 has None as its `completion`"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        trainer(tmp_path, rows)


def test_a_tokenizer_of_another_model(tmp_path):
    rows = Dataset.from_dict({"text": ["abc", "\u00e9t\u00e9"]})
    largest = max(max(row) for row in byte_tokenizer()(rows["text"][:])["input_ids"])
    with pytest.raises(DataError, match=f"Row 1 has the token {largest}, .* of {largest} tokens.*resize_token"):
        trainer(tmp_path, rows, vocab_size=largest)
    trainer(tmp_path, rows, vocab_size=largest + 1)


def test_an_empty_training_set(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        trainer(tmp_path, facts().filter(lambda row: False)).train()
    assert not (tmp_path / "record").exists()


def test_a_record_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot be written to .*choose another record_dir"):
        trainer(tmp_path, facts(), record_dir=str(tmp_path / "file")).train()


def test_a_folder_beside_the_record(story):
    with pytest.raises(RecordError, match=f"There is one at {story.path}[.]"):
        TrainingRecord.load(story.path / "pretrain")
    with pytest.raises(RecordError, match=f"There is one at {story.path}[.]"):
        TrainingRecord.load(story.path.parent)
    with pytest.raises(RecordError, match="by default `<output_dir>/record`[^ ]*[)][.]$"):
        TrainingRecord.load(story.path.parent.parent)


def attributor(story, **settings) -> SourceAttributor:
    return SourceAttributor(story, num_samples=8, progress=False, **settings)


ASKED = Queries.from_text(["Peru:"], [" Lima"])


def test_one_text_for_a_list_of_texts(story):
    with pytest.raises(DataError, match=r"write prompts=\['Peru:'\]"):
        Queries.from_text("Peru:", [" Lima"])
    with pytest.raises(DataError, match=r"write completions=\[' Lima'\]"):
        Queries.from_text(["Peru:"], " Lima")
    with pytest.raises(DataError, match=r"write prompts=\['Peru:'\]"):
        attributor(story).generate("Peru:")


@pytest.mark.parametrize("ask", ["scores", "attribute", "plan"])
@pytest.mark.parametrize("given", ["Peru: Lima", ["Peru: Lima"]])
def test_text_where_queries_are_asked_for(story, ask, given):
    with pytest.raises(DataError, match=r"queries is a (str|list).*Queries.from_text"):
        getattr(attributor(story), ask)(None, given, "sft")
    with pytest.raises(DataError, match=r"queries is a (str|list).*Queries.from_text"):
        attributor(story).top(given)


@pytest.mark.parametrize("given", ["facts.jsonl", DatasetDict(train=facts()), ASKED])
def test_something_else_where_a_dataset_is_asked_for(story, given):
    with pytest.raises(DataError, match="not a dataset: .*None for the rows in the record"):
        attributor(story).scores(given, ASKED, "pretrain")


def test_raw_rows_as_queries(story):
    with pytest.raises(DataError, match=r"have \['label_of_mine', 'text'\], not `input_ids`.*Queries.from_text"):
        attributor(story).scores(None, Queries.from_rows(facts()), "sft")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float32"}, "dtype='float32'.*torch.float32"),
        ({"dtype": torch.float16}, "dtype=torch.float16.*torch.float32"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"checkpoints": "segments"}, "checkpoints='segments': .*True or False"),
        ({"model": tiny_gpt2()}, "model= takes a function"),
        ({"datasets": facts()}, "datasets={'train': dataset}"),
    ],
)
def test_settings_that_cannot_be(story, settings, said):
    with pytest.raises(ConfigError, match=said):
        attributor(story, **settings)


@pytest.mark.parametrize("num_samples", [0, "8", 1.5])
def test_samples_that_cannot_be(story, num_samples):
    with pytest.raises(ConfigError, match="num_samples="):
        SourceAttributor(story, num_samples=num_samples)


def test_a_path_for_a_record(story):
    with pytest.raises(ConfigError, match="from_record"):
        SourceAttributor(story.path)


def test_labels_that_queries_lack(tmp_path):
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 48}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2))
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]] * 4, "label": [0, 1] * 4})
    record = train(tmp_path, model, rows)[1]
    with pytest.raises(DataError, match=r"have \['input_ids'\], and no label"):
        attributor(record).scores(None, Queries.from_rows(rows.remove_columns("label")))


@pytest.mark.parametrize(
    ("given", "said"), [({"methods": "sauce"}, "method='sauce'"), ({"protocols": "thirds"}, "protocol='thirds'")]
)
def test_one_method_needs_no_list(story, given, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(attributor(story), ASKED, **given)


def test_numbers_that_cannot_be(story):
    with pytest.raises(ConfigError, match="k=0"):
        attributor(story).top(ASKED, k=0)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        attributor(story).generate(["Peru:"], max_new_tokens=0)


def test_one_stage_needs_no_list(story, tmp_path):
    asked = attributor(story, method="grad-dot")
    assert set(asked.top(ASKED, k=1, stages="sft")["stage"]) == {"sft"}
    asked.save(tmp_path / "shared", ASKED, "sft")
    names = {path.name.split("-")[0] for path in (tmp_path / "shared").rglob("*.parquet")}
    assert "sft" in names and "pretrain" not in names


def test_a_curvature_of_numbers_beyond_any_solver(tmp_path, monkeypatch):
    """As of weights that a training left at a million; which ones a solver fails on is up to the machine."""
    train(tmp_path, tiny_gpt2())
    attributor = SourceAttributor.from_record(tmp_path / "record", num_samples=8, progress=False)
    queries = Queries.from_dataset(Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]]}))

    def fail(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(UnsupportedError, match="failed to converge.*training diverged: look at its loss"):
        attributor.scores(None, queries)


# ---- what a Trainer is given ---------------------------------------------------------------------------------------


def classifier() -> GPT2ForSequenceClassification:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 260}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0, num_labels=2))


TOKENS = {"input_ids": [[1, 2], [3, 4, 5]]}


@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False),
        DataCollatorWithPadding(byte_tokenizer()),
        default_data_collator,
    ],
    ids=["language modeling", "padding", "default"],
)
def test_a_collator_that_cannot_pad_labels(tmp_path, collator):
    """Raw text is given labels of its own; without raw text the collator does its work."""
    given = {"model": tiny_gpt2(vocab_size=260), "args": config(tmp_path, max_steps=2, num_segments=1)}
    given |= {"processing_class": byte_tokenizer(), "data_collator": collator}
    with pytest.raises(DataError, match="cannot pad rows .* raw text.*: leave data_collator= out"):
        SourceTrainer(**given, train_dataset=Dataset.from_dict({"text": TEXTS}))
    if isinstance(collator, DataCollatorForLanguageModeling):
        SourceTrainer(**given, train_dataset=Dataset.from_dict(TOKENS)).train()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"text": TEXTS, "label": [0, 1, 0]},
            r"none of which GPT2ForSeq.*tokenizer\(rows\['text'\], truncation=True\)",
        ),
        ({"sentence": TEXTS, "label": [0, 1, 0]}, r"tokenizer\(rows\['sentence'\]"),
        ({"age": [1, 2, 3], "label": [0, 1, 0]}, r"\['age', 'label'\], none .* give them columns that .*input_ids"),
        (TOKENS, r"and no `label` for GPT2ForSequenceClassification.*rename_column"),
        (TOKENS | {"label": ["a", "b"]}, r"'label' holds texts.*class_encode_column\('label'\)"),
    ],
)
def test_rows_that_a_classifier_cannot_take(tmp_path, columns, said):
    args = config(tmp_path, max_steps=2, num_segments=1)
    with pytest.raises(DataError, match=said):
        SourceTrainer(classifier(), args, train_dataset=Dataset.from_dict(columns), processing_class=byte_tokenizer())


def test_rows_that_a_classifier_takes(tmp_path):
    args = config(tmp_path, max_steps=2, num_segments=1)
    rows = Dataset.from_dict(TOKENS | {"label": [0, 1]})
    SourceTrainer(classifier(), args, train_dataset=rows, processing_class=byte_tokenizer()).train()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (TEXTS, r"list of texts.*Dataset.from_dict\({'text': texts}\)"),
        ({"text": TEXTS}, r"dictionary of columns.*Dataset.from_dict\(rows\)"),
        (pd.DataFrame({"text": TEXTS}), r"DataFrame.*Dataset.from_pandas\(frame\)"),
        (Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]}), "Conversations .*RecordingMixin"),
        ("nowhere/rows.jsonl", r"'nowhere/rows.jsonl' could not be loaded.*load_dataset\('json'"),
    ],
)
def test_rows_that_are_no_dataset(tmp_path, monkeypatch, rows, said):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=said):
        trainer(tmp_path, rows)


def test_arguments_of_a_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for args in ({"output_dir": "out"}, "out", facts()):
        with pytest.raises(ConfigError, match=r"args is a (dict|str|Dataset).*SourceConfig\(output_dir="):
            SourceTrainer(tiny_gpt2(), args, train_dataset=facts())
    with pytest.raises(ConfigError, match="tokenizer= is called processing_class="):
        SourceTrainer(tiny_gpt2(), config(tmp_path), train_dataset=facts(), tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match=r"model='nowhere/model' could not be loaded[\s\S]*save_pretrained"):
        SourceTrainer("nowhere/model", config(tmp_path), train_dataset=facts())


# ---- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 3, {}])
def test_what_is_no_path(story, given):
    for use in (TrainingRecord.load, SourceAttributor.from_record, load_attribution, SourceIndex.load):
        with pytest.raises(ConfigError, match="needs a path, not (None|a int|a dict): pass"):
            use(given)
    for use in (attributor(story).save, attributor(story).report):
        with pytest.raises(ConfigError, match="needs a path, not (None|a int|a dict): pass"):
            use(given, ASKED)
    with pytest.raises(ConfigError, match="is no TrainingRecord: use SourceAttributor.from_record"):
        SourceAttributor(given)


def test_an_open_record_where_a_path_is_asked_for(story):
    with pytest.raises(ConfigError, match=r"it is open already, SourceAttributor\(record\)"):
        SourceAttributor.from_record(story)


def test_scores_and_records_taken_for_each_other(story, tmp_path):
    attributor(story, method="bm25").save(tmp_path / "scores", ASKED)
    with pytest.raises(RecordError, match="These are scores: open them with load_attribution"):
        SourceAttributor.from_record(tmp_path / "scores")
    with pytest.raises(DataError, match="It is a training record: open it with SourceAttributor.from_record"):
        load_attribution(story.path)


def test_a_report_is_html(story, tmp_path):
    with pytest.raises(ConfigError, match="r.pdf': a report is HTML"):
        attributor(story).report(tmp_path / "r.pdf", ASKED)


def test_texts_and_numbers_of_another_type(story):
    with pytest.raises(DataError, match=r"prompts=None is no list of texts: write prompts=\['...'\]"):
        Queries.from_text(None, [" Lima"])
    with pytest.raises(ConfigError, match="k='5'"):
        attributor(story, method="bm25").top(ASKED, k="5")
