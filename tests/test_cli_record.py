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
"""`hf-source record show | verify | push | pull | from-checkpoints`."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from hf_source.cli import app

from .cases import byte_tokenizer, config, tiny_gpt2
from .fake_hub import TOKEN


V1 = Path(__file__).parent / "data" / "record_v1"


def call(*words, code=0):
    """Run a command; what it printed."""
    result = CliRunner().invoke(app, ["record", *(str(word) for word in words)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert code == 0 or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.fixture()
def folder(tmp_path):
    return Path(shutil.copytree(V1, tmp_path / "record"))


@pytest.mark.parametrize("command", ["show", "verify", "push", "push-model", "pull", "from-checkpoints"])
def test_help(command):
    assert f"record {command}" in call(command, "--help")


def test_show(folder):
    out = call("show", folder)
    assert "2 stages" in out and "with tokenizer" in out and "transformers 5.23.0" in out
    assert "pretrain complete recorded 12 8 yes 1,472 none" in out
    assert "sft complete recorded 6 4 yes 1,472 none" in out
    assert "sft: SGD (momentum 0.5" in out and "weight decay 0.1 and 0, schedule cosine" in out
    assert "initial weights from stage pretrain" in out
    data = json.loads((folder / "record.json").read_text())
    for number, segment in enumerate(data["stages"][0]["segments"]):
        assert f"pretrain {number} {segment['first_step']}-{segment['end_step'] - 1} " in out
        assert f"{segment['learning_rate_sum']:.6g}" in out


def test_show_a_stage_that_is_not_complete(folder):
    data = json.loads((folder / "record.json").read_text())
    data["stages"][1] |= {"status": "running", "attempts": [{"id": "a", "first_step": 4}]}
    (folder / "record.json").write_text(json.dumps(data))
    out = call("show", folder)
    assert "sft running" in out and "sft: resumed from step 4" in out


def test_verify_a_whole_record(folder):
    out = call("verify", folder, "--replay", 100)
    assert "stage pretrain: a replay of 12 steps agrees with 3 recorded states of the weights" in out
    assert "21 files and 18 steps are as recorded" in out
    assert "not compared with a replay, 4 steps reach nothing" in call("verify", folder)
    assert "replay" not in call("verify", folder, "--replay", 0)


def test_verify_a_damaged_record(folder):
    for name in ("0-pretrain/final.safetensors", "1-sft/rows.parquet"):
        file = folder / "stages" / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    out = call("verify", folder, code=1)
    assert out.count("problem:") == 2 and "final.safetensors is damaged" in out and "are as recorded" not in out


def test_show_and_verify_a_torn_stage(folder):
    (folder / "stages" / "1-sft" / "final.safetensors").unlink()
    out = call("show", folder)
    assert "sft is left out" in out and "final.safetensors is damaged: it is missing" in out and "pretrain" in out
    assert call("verify", folder, code=1).count("problem:") == 1


def test_verify_finds_what_hashes_do_not(folder):
    data = json.loads((folder / "record.json").read_text())
    data["stages"][0]["optimizer"]["groups"][0]["betas"] = [0.5, 0.999]
    (folder / "record.json").write_text(json.dumps(data))
    assert "problem: The replay of stage 'pretrain' leaves the record" in call(
        "verify", folder, "-" * 2 + "replay", 99, code=1
    )


def test_push_and_pull(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: TOKEN)
    assert "include_rows=True" in call("push", folder, "me/capitals", code=1)
    out = call("push", folder, "me/capitals", "--include-rows", "--private")
    assert f"Pushed to {hub.url}/me/capitals/commit/" in out and TOKEN not in out
    assert hub.repositories["me/capitals"]["private"]
    call("push", folder, "me/open", "--no-include-rows", "--public")
    assert not hub.repositories["me/open"]["private"]
    out = call("push-model", folder, "me/model", "--stage", "pretrain", "--record-id", "me/capitals")
    assert f"Pushed to {hub.url}/me/model/commit/" in out and hub.repositories["me/model"]["private"]
    out = call("pull", "me/capitals", tmp_path / "here")
    assert "Pulled pretrain, sft" in out
    assert "as recorded" in call("verify", tmp_path / "here")
    assert "holds a record already" in call("pull", "me/capitals", tmp_path / "here", code=1)


def test_no_record(tmp_path):
    assert "record.json does not exist" in call("show", tmp_path, code=1)


def test_from_checkpoints(tmp_path):
    """From the recipe that trained the run, and the checkpoints that it left."""
    start = tiny_gpt2(vocab_size=257)
    start.save_pretrained(tmp_path / "start")
    byte_tokenizer().save_pretrained(tmp_path / "start")
    Dataset.from_dict({"text": ["Peru: Lima.", "Cuba: Havana.", "Fiji: Suva.", "Oman: Muscat."]}).to_json(
        str(tmp_path / "rows.jsonl")
    )
    settings = config(tmp_path).to_dict()
    keys = ("per_device_train_batch_size", "learning_rate", "use_cpu", "disable_tqdm")
    training = {key: settings[key] for key in keys} | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    training |= {"output_dir": str(tmp_path / "out"), "record_dir": str(tmp_path / "record"), "stage": "pretrain"}
    recipe = {"model": str(tmp_path / "start"), "dataset": str(tmp_path / "rows.jsonl"), "training": training}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")]).exit_code == 0
    folders = [tmp_path / "out" / f"checkpoint-{step}" for step in (2, 4, 6)]
    other = f"training.record_dir={tmp_path / 'rebuilt'}"
    out = call("from-checkpoints", *folders, "--recipe", tmp_path / "recipe.yaml", "--set", other)
    assert "Rebuilt StageRecord('pretrain', 6 steps, 2 segments, complete, visits assumed uniform)" in out
    out = call("show", tmp_path / "rebuilt")
    assert "pretrain complete assumed uniform 6 4" in out
    assert "visits are assumed uniform, not recorded. Assumed: - every row was trained on equally often" in out
    assert "not compared with a replay, its visits are assumed uniform" in call("verify", tmp_path / "rebuilt")
    asked = [str(tmp_path / "rebuilt"), "--prompt", "Peru:", "--completion", " Lima", "--method", "grad-dot"]
    result = CliRunner().invoke(app, ["attribute", *asked, "--out", str(tmp_path / "scored.parquet")])
    assert "Visits are assumed uniform" in " ".join(result.stdout.split())
    assert "Visits are assumed uniform" in " ".join(CliRunner().invoke(app, ["top", *asked]).stdout.split())
    again = call("from-checkpoints", *folders, "--recipe", tmp_path / "recipe.yaml", code=1)
    assert "has a stage 'pretrain' already" in again
