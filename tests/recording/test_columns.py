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
"""What is known of rows besides what trains is kept beside them, and found again by number."""

import json

import numpy as np
import pytest
from cases import byte_tokenizer, config, random_rows, tiny_gpt2, train
from datasets import ClassLabel, Dataset, Features, Value
from fake_hub import TOKEN
from transformers import Trainer

from hf_source import Queries, SourceAttributor, SourceTrainer, TrainingRecord, number_rows, questions
from hf_source.data import ROW, CausalLMCollator
from hf_source.errors import ConfigError, DataError, RecordError
from hf_source.recording import RecordingMixin, replay
from hf_source.recording.rows.columns import COLUMNS_FILE


TEXTS = [f"row {index} says {index * 7}" for index in range(8)]


def rows() -> Dataset:
    """Texts with what their owner knows of them."""
    columns = {
        "text": TEXTS,
        "source": ["web", "book"] * 4,
        "label": [0, 1, 1, 0, 0, 1, 1, 0],
        "weight": [0.5 * index for index in range(8)],
        "good": [True, False] * 4,
        "page": ["x" * 600] * 8,
        "tags": [["a"]] * 8,
        "source_q0": [1.0] * 8,
    }
    kinds = {"label": ClassLabel(names=["no", "yes"]), "tags": [Value("string")]}
    plain = {"weight": Value("float64"), "source_q0": Value("float32"), "good": Value("bool")}
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns} | kinds | plain))


def recorded(folder, dataset, **settings):
    """A raw-text run, opened again."""
    model = tiny_gpt2(vocab_size=260)
    return train(folder, model, dataset, trainer={"processing_class": byte_tokenizer()}, max_steps=3, **settings)[1]


def given(record, **settings):
    """The rows that scores are shown with, without their dataset."""
    return SourceAttributor(record, method="bm25", progress=False, **settings).rows(record.stage()).given


def test_labels_and_sources_come_back_without_the_dataset(tmp_path):
    record = recorded(tmp_path, rows())
    found, expected = given(record), rows()
    assert record.verify(replay=2) == []
    assert set(found.column_names) == {ROW, "text", "input_ids", "labels", "source", "label", "weight", "good"}
    for name in ("text", "source", "label", "weight", "good"):
        assert found[name][:] == expected[name][:]
    assert found.features["label"] == expected.features["label"]
    assert set(record.stage().rows().column_names) == {ROW, "text", "input_ids", "labels"}  # what trains stays so


def test_groups_credit_and_shares_of_a_record_alone(tmp_path):
    record = recorded(tmp_path, rows())
    attributor = SourceAttributor(record, method="bm25", progress=False)
    queries = Queries.from_text(["row 3 says"], [" 21"])
    scores = attributor.scores(None, queries)[0]
    table = questions.groups(attributor, queries, by="source").table
    totals = {line["group"]: line["total"] for line in table}
    assert totals["web"] == pytest.approx(scores[::2].sum()) and totals["book"] == pytest.approx(scores[1::2].sum())
    assert {line["contributor"] for line in questions.credit(attributor, queries, by="source").table} == {
        "web",
        "book",
    }
    page = attributor.report(tmp_path / "r.html", queries).read_text()
    assert "influence by <b>source</b>" in page and "influence by <b>label</b>" in page and "yes" in page
    scored = attributor.attribute(None, queries)
    assert scored["source_q0"][:] == scores.tolist() and scored["source"][:] == rows()["source"][:]


def test_rows_are_matched_by_number(tmp_path):
    """Rows that were shuffled, and some filtered out, before they trained."""
    chosen = number_rows(rows()).filter(lambda row: row["label"] == 1).shuffle(seed=1)
    found = given(recorded(tmp_path, chosen))
    assert sorted(found[ROW][:]) == [1, 2, 5, 6]
    for row in found:
        assert row["text"] == TEXTS[row[ROW]] and row["source"] == rows()[row[ROW]]["source"]


class Dropping(Trainer):
    """Leaves out columns and rows, and turns the order round, as preparing trainers may."""

    def __init__(self, *args, train_dataset, **kwargs):
        kept = train_dataset.select_columns([ROW, "input_ids"]).select([5, 3, 0])
        super().__init__(*args, train_dataset=kept, **kwargs)


class RecordedDropping(RecordingMixin, Dropping):
    pass


def test_a_trainer_that_drops_columns_and_rows(tmp_path):
    dataset = random_rows(6).add_column("source", list("abcdef"))
    args = config(tmp_path, max_steps=3)
    RecordedDropping(tiny_gpt2(), args, CausalLMCollator(), train_dataset=dataset).train()
    found = given(TrainingRecord.load(tmp_path / "record"))
    assert found[ROW][:] == [5, 3, 0] and found["source"][:] == ["f", "d", "a"]


def test_rows_in_a_list_and_of_a_transform(tmp_path):
    listed = [dict(row) | {"source": "ab"[place % 2]} for place, row in enumerate(random_rows(6))]
    assert given(train(tmp_path / "list", tiny_gpt2(), listed, max_steps=3)[1])["source"][:] == list("ababab")
    coded = Dataset.from_dict({"code": ["1 2 3", "4 5"] * 3, "source": list("abcdef")})
    made = coded.with_transform(lambda rows: {"input_ids": [[int(t) for t in code.split()] for code in rows["code"]]})
    record = train(tmp_path / "made", tiny_gpt2(), made, max_steps=3, remove_unused_columns=False)[1]
    found = given(record)
    assert found["source"][:] == list("abcdef") and found["code"][:] == coded["code"][:]


def test_rows_without_other_columns_add_no_file(tmp_path):
    record = recorded(tmp_path / "bare", rows().select_columns("text"))
    assert not any(COLUMNS_FILE in name for name in record.stage().data["files"])
    record = recorded(tmp_path / "off", rows(), record_columns=[])
    assert not any(COLUMNS_FILE in name for name in record.stage().data["files"])
    record = recorded(tmp_path / "private", rows(), record_rows=False)
    assert not any(COLUMNS_FILE in name or "rows" in name for name in record.stage().data["files"])


def test_named_columns(tmp_path):
    found = given(recorded(tmp_path, rows(), record_columns=["page"]))
    assert found["page"][:] == rows()["page"][:] and "source" not in found.column_names


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"record_columns": ["sauce"]}, DataError, r"record_columns names 'sauce', .* those are \['text', 'source'"),
        ({"record_columns": ["tags"]}, DataError, "record_columns names 'tags', which is no column of texts, numbers"),
        ({"record_columns": "source"}, ConfigError, "record_columns='source' must be a list of column names"),
        ({"record_columns": ["source"], "record_rows": False}, ConfigError, "kept beside the rows"),
    ],
)
def test_what_is_refused_before_training(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        recorded(tmp_path, rows(), **settings)
    assert not (tmp_path / "record" / "record.json").exists()


def test_lists_can_name_columns(tmp_path):
    listed = [dict(row) | {"source": "a", "note": "b"} for row in random_rows(6)]
    found = given(train(tmp_path, tiny_gpt2(), listed, max_steps=3, record_columns=["note"])[1])
    assert found["note"][:] == ["b"] * 6 and "source" not in found.column_names
    with pytest.raises(DataError, match="record_columns names 'other'"):
        train(tmp_path / "other", tiny_gpt2(), listed, max_steps=3, record_columns=["other"])


def test_a_torn_file_is_refused(tmp_path):
    record = recorded(tmp_path, rows())
    file = record.stage().path / COLUMNS_FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordError, match="columns.parquet is damaged: its content differs"):
        given(TrainingRecord.load(record.path))


def test_columns_are_published_with_the_rows_only(hub, tmp_path):
    record = recorded(tmp_path, rows())
    with pytest.raises(ConfigError, match="training rows of train"):
        record.push_to_hub("me/r", token=TOKEN)
    record.push_to_hub("me/r", include_rows=False, token=TOKEN)
    assert not any(COLUMNS_FILE in name for name in hub.files("me/r"))
    record.push_to_hub("me/r", include_rows=True, token=TOKEN)
    assert "what is known of them: source, label, weight, good." in hub.files("me/r")["README.md"].decode()
    assert given(TrainingRecord.load("me/r", token=TOKEN))["source"][:] == rows()["source"][:]


def test_the_rows_of_a_stream_are_published_only_when_that_is_said(hub, tmp_path):
    """They are in files of their own, of which the numbers and hashes stay: they say which rows trained."""
    record = recorded(tmp_path, rows().select_columns("text").to_iterable_dataset(), num_train_epochs=1)
    with pytest.raises(ConfigError, match="training rows of train"):
        record.push_to_hub("me/s", token=TOKEN)
    record.push_to_hub("me/s", include_rows=False, token=TOKEN)
    pulled = TrainingRecord.load("me/s", token=TOKEN)
    assert pulled.verify() == [] and pulled.stage().rows() is None
    tokens = json.dumps(byte_tokenizer()(TEXTS[0])["input_ids"])[1:-1]
    assert tokens in json.dumps(record.stage().rows()["input_ids"][:])
    again = replay(pulled.stage(), rows().select_columns("text"))
    for name, weights in again.named_parameters():
        np.testing.assert_allclose(weights.detach(), pulled.stage().weights("final")[name], atol=1e-6)
    record.push_to_hub("me/s", include_rows=True, token=TOKEN)
    assert TrainingRecord.load("me/s", token=TOKEN).stage().rows() is not None


def test_a_checkpoint_record_keeps_columns_too(tmp_path):
    dataset = random_rows().add_column("source", ["a", "b"] * 11)
    args = config(tmp_path, save_strategy="steps", save_steps=3)
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "start")
    SourceTrainer(model, args, train_dataset=dataset).train()
    found = [str(path) for path in sorted((tmp_path / "out").glob("checkpoint-*"))]
    common = {"dataset": dataset, "args": args, "model": str(tmp_path / "start")}
    record = TrainingRecord.from_checkpoints(found, record_dir=tmp_path / "two", **common)
    assert given(record)["source"][:] == dataset["source"][:]
    common |= {"record_columns": ["nothing"]}
    with pytest.raises(DataError, match="record_columns names 'nothing'"):
        TrainingRecord.from_checkpoints(found, record_dir=tmp_path / "three", **common)
