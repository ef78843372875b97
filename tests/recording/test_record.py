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
"""Reading a record: what is there, and what is said when something is not."""

import json
import re
import shutil

import pytest
import torch
from cases import byte_tokenizer, distance, random_rows, tiny_gpt2, tiny_llama, train

import hf_source
from hf_source.data import ROW, content_fingerprint
from hf_source.errors import RecordError, UnsupportedError
from hf_source.recording import TrainingRecord, canonical_name, replay


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A record of two stages of one GPT-2, with a tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    model = tiny_gpt2(vocab_size=257)
    tokenizer = {"processing_class": byte_tokenizer()}
    train(folder, model, stage="pretrain", trainer=tokenizer)
    train(folder, model, random_rows(seed=1), stage="sft", num_segments=1, trainer=tokenizer)
    return folder / "record", {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture()
def folder(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "record")
    return tmp_path / "record"


def test_what_a_record_holds(original):
    record = hf_source.TrainingRecord.load(str(original[0]))
    assert record.path == original[0] and [stage.name for stage in record.stages] == ["pretrain", "sft"]
    first, second = record.stages
    assert (first.index, first.parent, second.index, second.parent) == (0, None, 1, "pretrain")
    assert second.continues_parent and second.status == "complete"
    assert record.stage("sft") is second
    assert first.num_rows == 22 and first.num_steps == 9 and len(first.segments) == 3 and len(second.segments) == 1
    assert first.trainable == list(original[1])  # tied weights once
    assert first.loss["kind"] == "causal_lm" and first.loss["normalization"] == "tokens"
    assert first.optimizer["name"] == "AdamW" and first.dataset["kind"] == "tokenized"
    assert first.dataset["fingerprint"] != second.dataset["fingerprint"]
    assert record.processing_class()("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert record.verify() == []
    assert first.training["gradient_accumulation_steps"] == 2 and first.training["dropout"] is False


def test_no_pickle_and_no_temporary_files(original):
    suffixes = {path.suffix for path in original[0].rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".parquet"}
    modes = {oct(path.stat().st_mode)[-3:] for path in original[0].rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors alone would make files that only the owner can read


def test_the_model_comes_back(original):
    record = TrainingRecord.load(original[0])
    rng = torch.get_rng_state()
    model = record.stage("sft").build_model()
    assert torch.equal(rng, torch.get_rng_state())  # attribution may rebuild without moving anyone's random numbers
    assert not model.training and model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, original[1][name])
    assert all(p.dtype == torch.float64 for p in record.stage("sft").build_model(torch.float64).parameters())
    assert model.generation_config.eos_token_id == 0


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rebuilt_model_computes_the_same(tmp_path, make, dtype):
    model = make(dtype=dtype)
    _, record = train(tmp_path, model)
    again = record.stage().build_model()
    assert [b.dtype for b in again.buffers()] == [b.dtype for b in model.buffers()]
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again(ids).logits)
    precise = torch.float32 if dtype == torch.bfloat16 else dtype
    assert all(t.dtype == precise for t in record.stage().segments[0].parameters().values())


def test_weights_by_moment(original):
    record = TrainingRecord.load(original[0])
    stage = record.stage("sft")
    model = stage.build_model()
    for which, expected in [
        ("initial", record.stage("pretrain").weights("final")),
        (0, stage.segments[0].parameters()),
        ("final", original[1]),
    ]:
        stage.load_weights(model, which)
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    for which in ("best", 1, -1):
        with pytest.raises(RecordError, match="has no weights .* from 0 to 0"):
            stage.load_weights(model, which)
    with pytest.raises(
        RecordError, match=r"of shape \(257, 16\), the given GPT2LMHeadModel has one of shape \(48, 16\)"
    ):
        stage.load_weights(tiny_gpt2(), "final")
    with pytest.raises(RecordError, match="no such parameter"):
        stage.load_weights(tiny_llama(), "final")


def test_choosing_a_stage(original):
    record = TrainingRecord.load(original[0])
    with pytest.raises(RecordError, match=r"several stages: choose `stage=` from \['pretrain', 'sft'\]"):
        record.stage()
    with pytest.raises(RecordError, match=r"no stage 'rl': choose `stage=` from \['pretrain', 'sft'\]"):
        record.stage("rl")


def test_the_rows_come_back(original, tmp_path):
    stage = TrainingRecord.load(original[0]).stage("sft")
    rows = stage.rows()
    assert rows["input_ids"][:] == random_rows(seed=1)["input_ids"][:] and rows[ROW][:] == list(range(22))
    assert content_fingerprint(rows) == stage.dataset["fingerprint"] == content_fingerprint(random_rows(seed=1))
    shuffled = rows.shuffle(seed=0)
    again = replay(stage, shuffled)
    assert distance(dict(again.named_parameters()), original[1]) < 0.01
    _, record = train(tmp_path, tiny_gpt2(), record_rows=False)
    assert record.stage().rows() is None and record.verify() == []


# ---- Damage ----


def test_missing_record(tmp_path):
    with pytest.raises(RecordError, match="record.json does not exist. Pass the `record_dir`"):
        TrainingRecord.load(tmp_path)
    with pytest.raises(RecordError, match="record.json does not exist"):
        TrainingRecord.load(tmp_path / "nowhere" / "else")


def test_every_missing_or_torn_file_is_named(folder):
    listed = [name for stage in TrainingRecord.load(folder).stages for name in stage.data["files"]]
    listed += [f"tokenizer/{path.name}" for path in (folder / "tokenizer").iterdir()]
    assert len(listed) > 20
    for name in listed:
        file, content = folder / name, (folder / name).read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(RecordError, match=f"{name} is damaged: it has .* bytes instead of .*Restore it"):
            TrainingRecord.load(folder).require_complete()
        file.unlink()
        with pytest.raises(RecordError, match=f"{name} is damaged: it is missing"):
            TrainingRecord.load(folder).require_complete()
        file.write_bytes(content)
    assert TrainingRecord.load(folder).verify() == []


def test_stages_before_a_torn_one_can_be_used(folder, caplog):
    """What is torn is named when the record is opened, asked for, and verified."""
    file = folder / "stages" / "1-sft" / "final.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    record = TrainingRecord.load(folder)
    assert [stage.name for stage in record.stages] == ["pretrain"] and list(record.left_out) == ["sft"]
    said = r"1-sft/final.safetensors is damaged: it has .* bytes instead of"
    assert re.search(said + ".* Stages before it can be used: pretrain.", caplog.text)
    with pytest.raises(RecordError, match=said):
        record.stage("sft")
    assert len(record.verify()) == 1 and re.search(said, record.verify()[0])
    assert record.stage("pretrain").build_model() is not None and record.usable().require_complete() is None
    (folder / "stages" / "0-pretrain" / "final.safetensors").unlink()
    with pytest.raises(RecordError, match="0-pretrain/final.safetensors is damaged: it is missing"):
        TrainingRecord.load(folder)


def test_changed_content_is_found_by_verify_and_by_reading_steps(folder):
    for pattern in ("final.safetensors", "segments/0/preconditioner.safetensors", "steps/*.parquet"):
        file = next((folder / "stages" / "0-pretrain").glob(pattern))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    record = TrainingRecord.load(folder)
    problems = record.verify()
    assert len(problems) == 3 and all("its content differs" in problem for problem in problems)
    with pytest.raises(RecordError, match="parquet is damaged: its content differs"):
        record.stage("pretrain").steps()


def test_missing_steps_are_noticed(folder):
    data = json.loads((folder / "record.json").read_text())
    files = data["stages"][0]["files"]
    del files[next(name for name in files if "/steps/" in name)]
    (folder / "record.json").write_text(json.dumps(data))
    record = TrainingRecord.load(folder)
    with pytest.raises(RecordError, match="are not 0 to 8"):
        record.stage("pretrain").steps()
    assert any("are not 0 to 8" in problem for problem in record.verify())


def test_torn_or_foreign_record_json(folder):
    file = folder / "record.json"
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    with pytest.raises(RecordError, match="record.json is damaged"):
        TrainingRecord.load(folder)
    file.write_text("[]")
    with pytest.raises(RecordError, match="record.json is damaged"):
        TrainingRecord.load(folder)
    file.write_text(content.replace('"schema_version": 2', '"schema_version": 99'))
    with pytest.raises(RecordError, match="schema version 99, .* reads versions 1 to 2. Install the hf_source"):
        TrainingRecord.load(folder)


# ---- The Hub ----


def test_a_record_on_the_hub(original, monkeypatch):
    asked = []

    def download(repo_id, repo_type):
        asked.append((repo_id, repo_type))
        return str(original[0])

    monkeypatch.setattr("hf_source.hub.snapshot_download", download)
    assert len(TrainingRecord.load("me/capitals").stages) == 2
    assert asked == [("me/capitals", "model")]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(repo_id, repo_type):
        raise ConnectionError("no network")

    monkeypatch.setattr("hf_source.hub.snapshot_download", download)
    with pytest.raises(RecordError, match="no folder 'me/capitals'.*no network"):
        TrainingRecord.load("me/capitals")


# ---- Overwriting ----


def test_a_stage_is_not_overwritten_by_accident(folder):
    before = (folder / "record.json").read_text()
    with pytest.raises(
        RecordError, match=r"has a stage 'pretrain' already .*choose another `stage=`.*overwrite_stage"
    ):
        train(folder.parent, tiny_gpt2(), stage="pretrain")
    assert (folder / "record.json").read_text() == before


def test_overwriting_removes_the_stages_after_it(folder):
    train(folder.parent, tiny_gpt2(), stage="pretrain", overwrite_stage=True)
    record = TrainingRecord.load(folder)
    assert [stage.name for stage in record.stages] == ["pretrain"] and record.verify() == []
    assert [path.name for path in (folder / "stages").iterdir()] == ["0-pretrain"]


def test_leftovers_of_a_run_that_died_at_its_start_are_removed(folder):
    shutil.copytree(folder / "stages" / "1-sft", folder / "stages" / "2-dead")
    train(folder.parent, tiny_gpt2(), stage="third")
    assert sorted(path.name for path in (folder / "stages").iterdir()) == ["0-pretrain", "1-sft", "2-third"]


def test_a_stage_that_starts_elsewhere_says_so(folder, caplog):
    with caplog.at_level("WARNING"):
        _, record = train(folder.parent, tiny_gpt2(vocab_size=257, seed=5), stage="third")
    assert "does not start from the weights that stage 'sft' ended with" in caplog.text
    assert not record.stage("third").continues_parent


# ---- Models that are not transformers' ----


class Bigram(torch.nn.Module):
    """Next-token model without a config."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(48, 48)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.table(input_ids)
        if labels is None:
            return {"logits": logits}
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_a_model_that_transformers_cannot_build(tmp_path):
    from hf_source.data import CausalLMCollator

    model = Bigram()
    _, record = train(tmp_path, model, trainer={"data_collator": CausalLMCollator()})
    stage = record.stage()
    with pytest.raises(UnsupportedError, match="Bigram, which transformers cannot build.*`model=`"):
        stage.build_model()
    other = Bigram()
    stage.load_weights(other, "final")
    assert torch.equal(other.table.weight, model.table.weight)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("transformer.wte.weight", "transformer.wte.weight"),
        ("module.transformer.wte.weight", "transformer.wte.weight"),
        ("_orig_mod.transformer.wte.weight", "transformer.wte.weight"),
        ("module._orig_mod.lm_head.weight", "lm_head.weight"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.h.0.c_attn.lora_A.default.weight", "h.0.c_attn.lora_A.default.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
    ],
)
def test_canonical_names(wrapped, plain):
    assert canonical_name(wrapped) == plain == canonical_name(plain)
