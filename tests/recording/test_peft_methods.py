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
"""Every PEFT method after a full stage: recorded, rebuilt, replayed, attributed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import distance, random_rows, tiny_gpt2, tiny_llama, train
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from hf_source import Queries, SourceAttributor
from hf_source.errors import DataError, UnsupportedError
from hf_source.gradients import RowGradients, task_for
from hf_source.recording import replay
from hf_source.recording.checks import _refuse_adapters


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LLAMA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
GPT2 = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}

METHODS = {
    "rslora": (tiny_llama, LoraConfig(**LLAMA, use_rslora=True)),
    "lora on all linear layers": (tiny_llama, LoraConfig(**LLAMA | {"target_modules": "all-linear"})),
    "lora on the embedding": (tiny_llama, LoraConfig(**LLAMA | {"target_modules": ["embed_tokens"]})),
    "lora and a trained head": (tiny_llama, LoraConfig(**LLAMA, modules_to_save=["lm_head"])),
    "dora": (tiny_llama, LoraConfig(**LLAMA, use_dora=True)),
    "dora, gpt2": (tiny_gpt2, LoraConfig(**GPT2, use_dora=True)),
    "ia3": (
        tiny_llama,
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ),
    "vera": (tiny_llama, VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "prompt tuning": (tiny_llama, PromptTuningConfig(**PROMPT)),
    "prompt tuning, gpt2": (tiny_gpt2, PromptTuningConfig(**PROMPT)),
    "p-tuning": (tiny_llama, PromptEncoderConfig(**PROMPT, encoder_hidden_size=8)),
    "prefix tuning": (tiny_llama, PrefixTuningConfig(**PROMPT)),
}
IN_FRONT = ("prompt tuning", "prompt tuning, gpt2", "p-tuning")


def rows():
    return random_rows(18, seed=2)


def two_stages(folder, method, **settings):
    make, config = METHODS[method]
    model = make(dtype=torch.float64)
    train(folder, model, stage="pretrain", num_segments=1)
    torch.manual_seed(1)
    model = get_peft_model(model, config).double()
    _, record = train(folder, model, rows(), stage="sft", learning_rate=0.02, num_segments=1, **settings)
    return model, record


def row_loss(model, row):
    """The model's own loss of a row, times its items: what PEFT does to the sequence is PEFT's business here."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=1)["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_record_replay_and_scores(tmp_path, method):
    model, record = two_stages(tmp_path, method)
    stage = record.stage("sft")
    # VeRA's random matrices are frozen, and the stage before has none.
    assert stage.continues_parent and stage.data["frozen"] == ("stored" if method == "vera" else "parent")
    first = {stage.canonical_name(name) for name in [*stage.trainable, *stage.frozen]}
    assert set(record.stage("pretrain").trainable) <= first

    again, own = stage.build_model(), model.state_dict()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        # The same weights to the bit; where they lie in memory may round sums in another order.
        assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-12, atol=1e-14)
        assert not torch.equal(again(ids).logits[:, -8:], record.stage("pretrain").build_model()(ids).logits)
    final = stage.weights("final")
    replayed = {n: p for n, p in replay(stage, rows()).named_parameters() if n in final}
    moved = distance(stage.weights("initial"), final)
    assert moved > 0.05 and distance(replayed, final) <= 1e-9 * moved

    first_label = 0 if method in IN_FRONT else 1  # what stands before a row tells its first token
    items = [sum(label != -100 for label in row["labels"][first_label:]) for row in rows()]
    for batch in (batch for step in stage.steps().micro_batches for batch in step):
        assert batch.items == sum(items[row] for row in batch.rows)

    check_row_gradients(stage, again)
    attributor = SourceAttributor(record, num_samples=16, progress=False, dtype=torch.float64)
    queries = Queries.from_dataset(random_rows(2, seed=9))
    for name, count in (("sft", 18), ("pretrain", 22)):
        scores = attributor.scores(None, queries, name)
        assert scores.shape == (2, count) and np.isfinite(scores).all()
        assert (np.abs(scores).max(axis=1) > 1e-4).all()


def check_row_gradients(stage, model):
    """Of adapters and of the base weights under them, against the loss that the model itself computes."""
    base = next(name for name in stage.frozen if "norm" in name or "ln_1" in name)
    names = [*stage.trainable, base]
    chosen = list(rows().select(range(4)))
    gradients = RowGradients(model, task_for(stage), names)
    width = max(len(row["input_ids"]) for row in chosen)

    def padded(key, value):
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in chosen])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in chosen])
    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}
    gradients.check(batch)
    done = gradients.run(batch)
    found = {name: torch.zeros(4, *gradients.parameters[name].shape, dtype=torch.float64) for name in names}
    for name, part, block in gradients.blocks(done):
        found[name][part] = block
    model.requires_grad_(False)
    wanted = [gradients.parameters[name].requires_grad_(True) for name in names]
    for index, row in enumerate(chosen):
        loss = row_loss(model, row)
        assert float(done.losses[index]) == pytest.approx(float(loss.detach()), rel=1e-5)
        truth = torch.autograd.grad(loss, wanted, allow_unused=True)
        truth = [torch.zeros_like(p) if g is None else g for g, p in zip(truth, wanted, strict=True)]
        size = max(float(gradient.norm()) for gradient in truth)
        for name, gradient in zip(names, truth, strict=True):
            # transformers computes the loss in float32
            assert float((found[name][index] - gradient).norm()) <= 1e-5 * size, name


def test_rules_serve_dora(tmp_path):
    """DoRA passes an identity matrix through its adapters to see their weights, with no gradient: it is left out."""
    model, record = two_stages(tmp_path, "dora")
    stage = record.stage("sft")
    gradients = RowGradients(stage.build_model(), task_for(stage), stage.trainable)
    batch = {"input_ids": torch.arange(1, 13).view(2, 6), "labels": torch.arange(1, 13).view(2, 6)}
    gradients.check(batch)
    assert not gradients.fallback
    assert set(gradients.around) == {name for name in stage.trainable if "magnitude" in name}


def test_a_prompt_takes_its_place_in_the_context(tmp_path):
    """Rows must fit beside it, and so must what is generated."""
    model, record = two_stages(tmp_path, "prompt tuning")
    assert record.stage("pretrain").context_length == 32 and record.stage("sft").context_length == 29
    with pytest.raises(DataError, match="has 30 tokens, the model's context holds 29"):
        train(tmp_path, model, random_rows(2, shortest=30, longest=30), stage="third")


def test_a_method_with_a_loss_of_its_own_is_refused(tmp_path):
    config = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=9, tinit=1, tfinal=1)
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(UnsupportedError, match="ADALORA adds.*Use another method, such as LoRA"):
        train(tmp_path, model)


def test_a_prompt_with_a_loss_of_its_own_is_refused(tmp_path):
    model = tiny_llama()
    model.peft_config = {"default": SimpleNamespace(peft_type="CPT")}  # CPT itself wants a tokenizer from the Hub
    with pytest.raises(UnsupportedError, match="CPT weighs the tokens of its prompt.*Use another method"):
        _refuse_adapters(model)


def test_smoothing_with_a_prompt_is_refused(tmp_path):
    """Trainer looks for the model's name one level too deep, and would not shift the labels."""
    model = get_peft_model(tiny_llama(), PromptTuningConfig(**PROMPT))
    with pytest.raises(UnsupportedError, match="does not know LlamaModel as a causal.*prompt tuning"):
        train(tmp_path, model, label_smoothing_factor=0.1)
