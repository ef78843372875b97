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
"""Records on the Hub, against a stand-in for it (`fake_hub.py`)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from cases import distance, random_rows, tiny_gpt2, train
from fake_hub import TOKEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.errors import ConfigError, RecordError
from hf_source.outputs.cards import BEGIN, END


V1 = Path(__file__).parents[1] / "data" / "record_v1"


@pytest.fixture()
def folder(tmp_path):
    """The two-stage record of version 1: published, it is of the present version."""
    return Path(shutil.copytree(V1, tmp_path / "record"))


def scores(path):
    attributor = SourceAttributor.from_record(path, curvature="identity", progress=False)
    queries = Queries.from_text(["Peru:"], [" Lima"])
    return {stage: attributor.attribute(None, queries, stage, return_scores=True) for stage in ("pretrain", "sft")}


def test_push_then_load_then_attribute(hub, folder, tmp_path, caplog, capfd):
    (folder / ".writer.lock").write_text("{}")
    (folder / "stages" / "0-pretrain" / ".final.1.tmp").write_text("torn")
    record = TrainingRecord.load(folder)
    with caplog.at_level("DEBUG"):
        url = record.push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN)
    assert url.startswith(f"{hub.url}/me/capitals/commit/")
    listed = {name for files in record._file_lists() for name in files}
    assert set(hub.files("me/capitals")) == listed | {"record.json", "README.md", ".gitattributes"}
    assert json.loads(hub.files("me/capitals")["record.json"])["schema_version"] == 2
    assert sum(request.startswith("POST /api/models/me/capitals/commit") for request in hub.requests) == 1

    pulled = TrainingRecord.load("me/capitals")
    assert pulled.path != folder and pulled.verify(replay=100) == []
    for name, expected in scores(folder).items():
        np.testing.assert_array_equal(scores("me/capitals")[name], expected)
    assert TOKEN not in caplog.text + "".join(capfd.readouterr()) and f"Bearer {TOKEN}" in hub.tokens


def test_pull_into_a_folder(hub, folder, tmp_path):
    TrainingRecord.load(folder).push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN)
    record = TrainingRecord.pull("me/capitals", tmp_path / "here")
    assert record.path == tmp_path / "here" and record.verify() == []
    with pytest.raises(RecordError, match="here holds a record already"):
        TrainingRecord.pull("me/capitals", tmp_path / "here")


def test_rows_are_published_only_when_that_is_said(hub, folder, tmp_path):
    record = TrainingRecord.load(folder)
    with pytest.raises(
        ConfigError, match="training rows of pretrain, sft, .* include_rows=True .* include_rows=False"
    ):
        record.push_to_hub("me/capitals", token=TOKEN)
    assert hub.requests == []  # refused before anything was made
    record.push_to_hub("me/capitals", include_rows=False, private=False, token=TOKEN)
    assert not any("rows.parquet" in name for name in hub.files("me/capitals"))
    assert b"Lima" not in b"".join(hub.files("me/capitals").values())
    pulled = TrainingRecord.load("me/capitals")
    assert pulled.verify() == [] and pulled.stage("sft").rows() is None
    assert record.stage("sft").rows() is not None  # the record itself is as it was


def test_a_record_without_rows_needs_no_decision(hub, tmp_path):
    _, record = train(tmp_path, tiny_gpt2(), record_rows=False)
    record.push_to_hub("me/bare", private=False, token=TOKEN)
    assert TrainingRecord.load("me/bare").verify() == []


def test_pushing_again_replaces_the_record_and_nothing_else(hub, folder, tmp_path):
    TrainingRecord.load(folder).push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN)
    hub.files("me/capitals")["notes.md"] = b"mine"
    _, record = train(tmp_path / "other", tiny_gpt2(), record_rows=False)
    record.push_to_hub("me/capitals", private=False, token=TOKEN)
    files = set(hub.files("me/capitals"))
    assert files == {*record.stage().data["files"], "record.json", "README.md", ".gitattributes", "notes.md"}


def test_branches(hub, folder):
    record = TrainingRecord.load(folder)
    record.push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN, revision="v2")
    assert "record.json" not in hub.files("me/capitals") and "record.json" in hub.files("me/capitals", "v2")
    assert TrainingRecord.load("me/capitals", revision="v2").verify() == []
    with pytest.raises(RecordError, match="could not be read"):
        TrainingRecord.load("me/capitals", revision="v3")


def test_private_repositories(hub, folder):
    record = TrainingRecord.load(folder)
    record.push_to_hub("me/secret", include_rows=True, token=TOKEN, private=True)
    assert hub.repositories["me/secret"]["private"]
    with pytest.raises(RecordError, match="no training record 'me/secret'.*hf auth login"):
        TrainingRecord.load("me/secret", token=False)
    assert TrainingRecord.load("me/secret", token=TOKEN).verify() == []
    record.push_to_hub("me/open", include_rows=False, private=False, token=TOKEN)
    with pytest.raises(ConfigError, match="me/open exists and is public, so private=True would not hold"):
        record.push_to_hub("me/open", include_rows=True, token=TOKEN, private=True)
    assert not any("rows" in name for name in hub.files("me/open"))


def test_without_a_token(hub, folder):
    with pytest.raises(RecordError, match=r"could not be pushed to me/capitals[\s\S]*hf auth login") as error:
        TrainingRecord.load(folder).push_to_hub("me/capitals", include_rows=True, token=False)
    assert TOKEN not in str(error.value)


def test_nothing_broken_is_published(hub, folder):
    file = folder / "stages" / "1-sft" / "final.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordError, match="A damaged record is not published.*final.safetensors is damaged"):
        TrainingRecord.load(folder).push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN)
    data = json.loads((folder / "record.json").read_text())
    data["stages"][1]["status"] = "running"
    (folder / "record.json").write_text(json.dumps(data))
    with pytest.raises(RecordError, match="Stage 'sft' .* is not complete"):
        TrainingRecord.load(folder).push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN)
    assert hub.requests == []


def test_the_card_says_what_is_in_it(hub, folder):
    record = TrainingRecord.load(folder)
    record.push_to_hub("me/capitals", include_rows=True, private=False, token=TOKEN)
    card = hub.files("me/capitals")["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "unknown" and "training-record" in yaml.safe_load(header)["tags"]
    assert "| pretrain | GPT2LMHeadModel | 1,472 | AdamW | 12 | 2 | 8 | yes |" in text
    assert "| sft | GPT2LMHeadModel | 1,472 | SGD | 6 | 1 | 4 | yes |" in text
    assert 'SourceAttributor.from_record("me/capitals")' in text and "rows of every stage are in this" in text
    assert f"transformers {record.data['library_versions']['transformers']}" in text
    assert "assumed" not in text
    record.push_to_hub("me/capitals", include_rows=False, private=False, token=TOKEN)
    text = hub.files("me/capitals")["README.md"].decode()
    assert "| 8 | no |" in text and "Rows of `pretrain`, `sft` are not in this repository" in text


def public(hub, name, **settings):
    hub.repositories[name] = {"private": False, "branches": {"main": "0"}, "commits": {"0": {}}, **settings}


def named(folder, sources, base):
    """The record as if its rows and first model had come from the Hub."""
    data = json.loads((folder / "record.json").read_text())
    for stage, source in zip(data["stages"], sources, strict=True):
        stage["dataset"]["source"] = source
        stage["model"]["base"] = base
    (folder / "record.json").write_text(json.dumps(data))
    return TrainingRecord.load(folder)


@pytest.mark.parametrize(
    ("sources", "base", "private"),
    [
        (("me/rows", "me/rows"), "me/open", False),
        (("me/rows", "me/rows"), "", False),  # from scratch
        (("me/rows", None), "", True),
        (("me/rows", "me/hidden"), "", True),
        (("me/rows", "me/gated"), "", True),
        (("me/rows", "me/nothing"), "", True),
        (("me/rows", "me/rows"), "me/closed", True),
        (("me/rows", "me/rows"), "tests", True),  # a folder of this machine
    ],
)
def test_private_unless_all_that_it_comes_from_is_open(hub, folder, sources, base, private):
    public(hub, "datasets/me/rows")
    public(hub, "datasets/me/hidden", private=True)
    public(hub, "datasets/me/gated", gated="auto")
    public(hub, "me/open")
    public(hub, "me/closed", private=True)
    record = named(folder, sources, base)
    record.push_to_hub("me/r", include_rows=False, token=TOKEN)
    record.push_model_to_hub("me/m", token=TOKEN)
    assert hub.repositories["me/r"]["private"] is hub.repositories["me/m"]["private"] is private
    if private:  # nor does it go to a public repository unless that is said
        public(hub, "me/there")
        with pytest.raises(ConfigError, match="me/there exists and is public"):
            record.push_to_hub("me/there", include_rows=False, token=TOKEN)


def test_a_dataset_of_the_hub_is_named_in_the_record(tmp_path):
    rows = random_rows()
    rows.info.download_checksums = {"hf://datasets/me/rows@0123/train.parquet": {}}
    assert train(tmp_path, tiny_gpt2(), rows)[1].stage().dataset["source"] == "me/rows"
    assert train(tmp_path / "other", tiny_gpt2())[1].stage().dataset["source"] is None


def test_the_card_of_its_owner_is_kept(hub, folder):
    record = TrainingRecord.load(folder)
    record.push_to_hub("me/r", include_rows=False, token=TOKEN)
    files = hub.files("me/r")
    card = files["README.md"].decode()
    files["README.md"] = (card.replace("license: unknown", "license: mit") + "\nBye.\n").encode()
    record.push_to_hub("me/r", include_rows=True, token=TOKEN)
    card = hub.files("me/r")["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit" and card.endswith("\nBye.\n")
    assert "rows of every stage are in this" in card and "are not in this repository" not in card
    assert card.count(BEGIN) == card.count(END) == 1


def test_hostile_column_names(hub, tmp_path):
    hostile = "<img src=x onerror=alert(1)> `](http://a) | {{ 7*7 }}"
    _, record = train(tmp_path, tiny_gpt2(), random_rows().add_column(hostile, ["x"] * 22))
    record.push_to_hub("me/r", include_rows=True, token=TOKEN)
    card = hub.files("me/r")["README.md"].decode()
    assert "&lt;img" in card and "<img" not in card and "](http://a" not in card and "{{ 7" not in card


def test_a_model_is_published_and_loaded(hub, folder, monkeypatch):
    record = TrainingRecord.load(folder)
    url = record.push_model_to_hub("me/model", record_id="me/capitals", token=TOKEN)
    assert url.startswith(f"{hub.url}/me/model/commit/") and hub.repositories["me/model"]["private"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found, own = AutoModelForCausalLM.from_pretrained("me/model"), record.stage("sft").build_model()
    assert distance(dict(found.named_parameters()), dict(own.named_parameters())) == 0
    assert AutoTokenizer.from_pretrained("me/model")("ab")["input_ids"] == record.processing_class()("ab")["input_ids"]
    card = hub.files("me/model")["README.md"].decode()
    assert "Trained in the stages pretrain, sft, with" in card and 'from_record("me/capitals")' in card
    assert 'GPT2LMHeadModel.from_pretrained("me/model")' in card
    record.push_model_to_hub("me/first", "pretrain", token=TOKEN)
    card = hub.files("me/first")["README.md"].decode()
    assert "Trained in stage pretrain, with" in card and "record was not published with the model" in card
    with pytest.raises(RecordError, match="has no stage 'sauce'"):
        record.push_model_to_hub("me/first", "sauce", token=TOKEN)
    with pytest.raises(ConfigError, match="cannot name a repository"):
        record.push_model_to_hub("me/a/b", token=TOKEN)
    with pytest.raises(RecordError, match="The model could not be pushed to me/other"):
        record.push_model_to_hub("me/other", private=False, token=False)
