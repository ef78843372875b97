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
"""Parts of a model whose training is random, or mixes rows: said once, allowed where harmless, refused where not."""

import numpy as np
import pytest
import torch
from cases import VOCABULARY, distance, random_rows, tiny_gpt2, tiny_llama, train
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.recording import replay
from hf_source.recording.checks import has_dropout


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Normed(type(tiny_llama())):
    """A Llama whose last norm is another one."""

    def __init__(self, config, norm):
        super().__init__(config)
        self.model.norm = norm


class TokenBatchNorm(torch.nn.BatchNorm1d):
    """Over tokens in `[rows, tokens, features]`."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Frozen(TokenBatchNorm):
    """Keeps its statistics, as models that are finetuned with small batches do."""

    def train(self, mode=True):
        return super().train(False)


def normed(norm):
    torch.manual_seed(0)
    return Normed(tiny_llama().config, norm).double()


def test_batch_norm_with_frozen_statistics_is_recorded(tmp_path):
    """It does to a row what it would do to it alone."""
    model = normed(Frozen(16))
    _, record = train(tmp_path, model)
    stage = record.stage()
    final = stage.weights("final")
    assert "model.norm.weight" in stage.trainable and "model.norm.running_mean" in stage.tensors("frozen.safetensors")
    again = dict(replay(stage, random_rows(), model=normed(Frozen(16))).named_parameters())
    assert distance(again, final) <= 1e-9 * distance(stage.weights("initial"), final)


@pytest.mark.parametrize("norm", [TokenBatchNorm(16), Frozen(16, track_running_stats=False)], ids=["training", "none"])
def test_batch_norm_of_the_batch_is_refused(tmp_path, norm):
    model = normed(norm).eval()
    with pytest.raises(UnsupportedError, match="`model.norm` is a .*LayerNorm or GroupNorm, or freeze its statistics"):
        train(tmp_path, model)
    assert not model.training and not (tmp_path / "record").exists()


def mixtral(**settings):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes | heads | experts | {"bos_token_id": 0} | settings))


def test_a_router_loss_is_said_replayed_and_left_out_of_scores(tmp_path, caplog):
    model = mixtral(output_router_logits=True, router_aux_loss_coef=0.2)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model, num_segments=1)
    assert caplog.text.count("router loss over the whole batch") == 1
    assert "output_router_logits=False for exact attribution" in caplog.text
    stage = record.stage()
    final = stage.weights("final")
    again = dict(replay(stage, random_rows()).named_parameters())
    assert distance(again, final) <= 1e-3 * distance(stage.weights("initial"), final)  # float32
    queries = Queries.from_dataset(random_rows(2, seed=9))
    scores = SourceAttributor(record, num_samples=8, progress=False).scores(None, queries)
    assert np.isfinite(scores).all() and np.abs(scores).max() > 1e-3


def test_without_a_router_loss_nothing_is_said(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        train(tmp_path, mixtral(), max_steps=3)
    assert "router" not in caplog.text and "dropout" not in caplog.text


def opt(layerdrop):
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.0, layerdrop=layerdrop))


def with_drop_path(probability):
    class BeitDropPath(torch.nn.Module):
        drop_prob = probability

    return BeitDropPath()


def prompted(dropout):
    config = {"num_virtual_tokens": 2, "encoder_hidden_size": 4, "encoder_num_layers": 2, "task_type": "CAUSAL_LM"}
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": dropout}
    return get_peft_model(tiny_llama(), PromptEncoderConfig(**config | lstm))


def lora(dropout):
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: tiny_gpt2(embd_pdrop=p),
        lambda p: tiny_llama(attention_dropout=p),
        lora,
        prompted,
        opt,
        with_drop_path,
    ],
    ids=["module", "attention", "lora", "prompt encoder", "layers", "paths"],
)
def test_every_kind_of_dropout_is_seen(make):
    assert has_dropout(make(0.1)) and not has_dropout(make(0.0))


def test_lora_dropout_is_said(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, lora(0.1), max_steps=3)
    assert caplog.text.count("The model trains with dropout") == 1 and record.stage().training["dropout"]
