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
"""LoRA stages after full ones: small records that rebuild whole models."""

import pytest
import torch
from cases import distance, random_rows, tiny_gpt2, tiny_llama, train
from peft import LoraConfig, get_peft_model

from hf_source.errors import RecordError
from hf_source.recording import TrainingRecord, canonical_name, replay


# peft 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = {
    tiny_gpt2: {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    tiny_llama: {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}


def two_stages(folder, make=tiny_gpt2, dtype=torch.float64, lora=None, **settings):
    model = make(dtype=dtype)
    train(folder, model, stage="pretrain")
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **LORA[make] | (lora or {})))
    if dtype == torch.float64:
        model = model.double()
    _, record = train(folder, model, random_rows(18, seed=2), stage="sft", **settings)
    return model, record


@pytest.mark.parametrize("make", LORA)
def test_adapters_train_and_the_base_is_the_parents(tmp_path, make):
    model, record = two_stages(tmp_path, make)
    stage = record.stage("sft")
    assert stage.parent == "pretrain" and stage.continues_parent
    assert stage.trainable and all("lora_" in name for name in stage.trainable)
    assert stage.data["frozen"] == "parent" and not (stage.path / "frozen.safetensors").exists()
    assert stage.model["peft"] and stage.model["class"] == type(make()).__name__
    assert {p.suffix for p in record.path.rglob("*") if p.is_file()} == {".json", ".safetensors", ".parquet"}
    base = set(record.stage("pretrain").trainable)
    assert {canonical_name(name) for name in stage.frozen} == base

    again = stage.build_model()
    assert type(again) is type(model) and not again.training
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(stage.trainable)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again(ids).logits)
        assert not torch.equal(again(ids).logits, record.stage("pretrain").build_model()(ids).logits)


@pytest.mark.parametrize("make", LORA)
def test_a_lora_stage_replays(tmp_path, make):
    _, record = two_stages(tmp_path, make)
    stage = record.stage("sft")
    replayed = {n: p for n, p in replay(stage, random_rows(18, seed=2)).named_parameters() if n in stage.trainable}
    final = stage.weights("final")
    moved = distance(final, stage.weights("initial"))
    assert moved > 0.01 and distance(replayed, final) <= 1e-9 * moved


def test_weights_of_the_full_stage_fit_into_the_lora_model(tmp_path):
    """The walk through stages carries one model: earlier weights are put under the adapters."""
    model, record = two_stages(tmp_path)
    again = record.stage("sft").build_model()
    record.stage("pretrain").load_weights(again, "initial")
    start = record.stage("pretrain").weights("initial")
    inside = {canonical_name(name): p for name, p in again.named_parameters()}
    assert all(torch.equal(inside[name], tensor) for name, tensor in start.items())


def test_a_changed_base_is_stored(tmp_path, caplog):
    torch.manual_seed(0)
    train(tmp_path, tiny_gpt2(), stage="pretrain")
    other = tiny_gpt2(seed=7)
    model = get_peft_model(other, LoraConfig(r=2, **LORA[tiny_gpt2]))
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model, stage="sft")
    stage = record.stage("sft")
    assert stage.data["frozen"] == "stored" and not stage.continues_parent
    assert "does not start from the weights" in caplog.text
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, stage.build_model()(ids).logits)


def test_a_lone_lora_stage_without_its_frozen_weights(tmp_path):
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, **LORA[tiny_gpt2]))
    _, record = train(tmp_path, model, record_frozen_weights=False)
    stage = record.stage()
    assert stage.data["frozen"] == "omitted" and not (stage.path / "frozen.safetensors").exists()
    with pytest.raises(RecordError, match="record_frozen_weights=False.*Pass `model=`"):
        stage.build_model()
    again = replay(stage, random_rows(), model=model)
    assert distance({n: p for n, p in again.named_parameters() if "lora" in n}, stage.weights("final")) < 1e-3


def test_a_trained_copy_of_the_head(tmp_path):
    """modules_to_save trains a copy; it stands where the head of the stage before stood."""
    model, record = two_stages(tmp_path, tiny_llama, lora={"modules_to_save": ["lm_head"]})
    stage = record.stage("sft")
    assert "lm_head.weight" in {canonical_name(name) for name in stage.trainable}
    assert stage.data["frozen"] == "parent" and stage.continues_parent
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, stage.build_model()(ids).logits)


def test_a_third_stage_on_merged_weights_is_not_a_continuation(tmp_path):
    model, record = two_stages(tmp_path)
    merged = model.merge_and_unload().requires_grad_(True)
    train(tmp_path, merged, stage="third")
    assert not TrainingRecord.load(tmp_path / "record").stage("third").continues_parent


def test_several_adapters_are_refused(tmp_path):
    from hf_source.errors import UnsupportedError

    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, **LORA[tiny_gpt2]))
    model.add_adapter("second", LoraConfig(r=2, **LORA[tiny_gpt2]))
    with pytest.raises(UnsupportedError, match=r"\['default', 'second'\]"):
        train(tmp_path, model)
