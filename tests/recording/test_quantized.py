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
"""Adapters on a base in 4 or 8 bits, on a CPU: stored with its quantisation state, rebuilt to the bit."""

import shutil

import numpy as np
import pytest
import torch
from cases import distance, random_rows, tiny_gpt2, tiny_llama, train
from peft import LoraConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_source import Queries, SourceAttributor
from hf_source.errors import RecordError, UnsupportedError
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.recording import replay
from hf_source.recording.quantized import keep_differentiable


pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]

QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, statistics compressed": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "8 bits": {"load_in_8bit": True},
}
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


WIDE = {"hidden_size": 64, "intermediate_size": 64}


def quantized(folder, kind, base=None):
    """A base from files that are gone when it comes back."""
    (base or tiny_llama(**WIDE)).save_pretrained(folder / "base")
    settings = BitsAndBytesConfig(**QUANTIZED[kind])
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    shutil.rmtree(folder / "base")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def adapted(folder, kind, base=None):
    torch.manual_seed(1)
    return get_peft_model(quantized(folder, kind, base=base), LoraConfig(**LORA))


def assert_same(model, again):
    """To the bit, as in training: in evaluation mode bitsandbytes may compute in another way."""
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, again.train()(ids).logits)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantised_base_is_rebuilt_replayed_and_attributed(tmp_path, kind):
    model = adapted(tmp_path, kind)
    _, record = train(tmp_path, model, learning_rate=0.02, num_segments=1)
    stage = record.stage()
    assert record.verify() == []
    assert all("lora_" in name for name in stage.trainable) and stage.data["frozen"] == "stored"
    assert len(stage.model["quantized"]) == 14  # of two layers, not the head
    stored = stage.tensors("frozen.safetensors")
    state = "SCB" if kind == "8 bits" else "weight.absmax"
    assert sum(name.endswith(f"base_layer.{state}") for name in stored) == 4
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("q_proj.base_layer.weight")} == {
        torch.int8 if kind == "8 bits" else torch.uint8
    }

    again = stage.build_model()
    assert_same(model, again)
    assert type(again.base_model.model.model.layers[0].self_attn.q_proj) is type(
        model.base_model.model.model.layers[0].self_attn.q_proj
    )
    final = stage.weights("final")
    replayed = {n: p for n, p in replay(stage, random_rows()).named_parameters() if n in final}
    moved = distance(stage.weights("initial"), final)
    assert moved > 0.05 and distance(replayed, final) <= 1e-4 * moved

    if kind != "8 bits":  # whose activations are rounded row by row, so that gradients of a row alone differ
        check_row_gradients(again, stage.trainable)
    attributor = SourceAttributor(record, num_samples=16, progress=False)
    scores = attributor.scores(None, Queries.from_dataset(random_rows(2, seed=9)))
    assert np.isfinite(scores).all() and (np.abs(scores).max(axis=1) > 1e-4).all()


def check_row_gradients(model, names):
    gradients = RowGradients(model, CausalLMTask(), names)
    row = random_rows()[1]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    gradients.check({"input_ids": ids.expand(2, -1), "labels": labels.expand(2, -1)})
    found = {n: block[0] for n, _, block in gradients.blocks(gradients.run({"input_ids": ids, "labels": labels}))}
    parameters = [gradients.parameters[name] for name in names]
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=1)["loss"]
    for name, truth in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(found[name], truth, rtol=1e-3, atol=2e-3 * float(truth.abs().max()) + 1e-6)


def test_gradients_pass_through_four_bits_after_inference(tmp_path):
    """On CPUs that know bfloat16, bitsandbytes packs weights in evaluation mode, and gradients stop there."""
    _, record = train(tmp_path, adapted(tmp_path, "nf4"), max_steps=3)
    model = record.stage().build_model()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        model(ids)
    check_row_gradients(model, record.stage().trainable)
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    keep_differentiable(model)
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_second_stage_shares_the_base(tmp_path):
    model = adapted(tmp_path, "nf4")
    train(tmp_path, model, stage="first", num_segments=1)
    _, record = train(tmp_path, model, random_rows(18, seed=2), stage="second", num_segments=1)
    stage = record.stage("second")
    assert stage.continues_parent and stage.data["frozen"] == "parent"
    assert_same(model, stage.build_model())
    queries = Queries.from_dataset(random_rows(2, seed=9))
    scores = SourceAttributor(record, num_samples=8, progress=False).scores(None, queries, "first")
    assert np.isfinite(scores).all() and np.abs(scores).max() > 1e-4


def test_gpt2_and_a_learned_prompt_on_four_bits(tmp_path):
    torch.manual_seed(1)
    base = quantized(tmp_path, "nf4", tiny_gpt2(n_embd=64))
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    _, record = train(tmp_path, model, num_segments=1)
    stage = record.stage()
    assert "transformer.h.0.attn.c_attn" in stage.model["quantized"]
    assert_same(model, stage.build_model())


def test_without_the_base_the_message_names_it(tmp_path):
    _, record = train(tmp_path, adapted(tmp_path, "nf4"), record_frozen_weights=False, max_steps=3)
    assert not (record.stage().path / "frozen.safetensors").exists()
    with pytest.raises(RecordError, match=r"its base was loaded from '.*/base'\)\. Pass `model=`"):
        record.stage().build_model()


def test_rounding_to_four_bits_does_not_continue_the_float_stage(tmp_path, caplog):
    """The rounded weights are others than those that the stage before ended with."""
    model = tiny_llama(**WIDE)
    train(tmp_path, model, stage="pretrain", num_segments=1)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, adapted(tmp_path, "nf4", model), stage="sft", num_segments=1)
    assert "does not start from the weights" in caplog.text and not record.stage("sft").continues_parent
    attributor = SourceAttributor(record, num_samples=8, progress=False)
    with pytest.raises(UnsupportedError, match="does not start from the weights"):
        attributor.scores(None, Queries.from_dataset(random_rows(2, seed=9)), "pretrain")


def test_bitsandbytes_is_asked_for(tmp_path, monkeypatch):
    _, record = train(tmp_path, adapted(tmp_path, "nf4"), max_steps=3)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match="needs bitsandbytes to be rebuilt: `pip install bitsandbytes`"):
        record.stage().build_model()
