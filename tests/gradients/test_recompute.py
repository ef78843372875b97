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
"""Modules without a rule are run again by themselves: attention in one matrix, stacked experts, bare parameters."""

import logging
from types import SimpleNamespace

import oracles
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_source.gradients import ClassificationTask, RowGradients

from ..heads import tiny_vit
from .compared import engine, worst_error


class InOneMatrix(nn.Module):
    """Causal attention of torch, whose three projections are one parameter."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(oracles.VOCAB, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, oracles.VOCAB)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.tokens(input_ids)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        tokens = input_ids.shape[1]
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=later)[0]
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        return SimpleNamespace(logits=self.head(x))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 6, "vocab_size": oracles.VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "initializer_range": 0.5}
    model = MixtralForCausalLM(MixtralConfig(**sizes | heads | experts | {"bos_token_id": 0}))
    model.set_experts_implementation("eager")  # the others have no float64
    return model


ATTENTION = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


def test_attention_in_one_matrix(caplog):
    """Its output projection is used without being called, and belongs to the same module."""
    gradients = engine(InOneMatrix())
    gradients.check(oracles.make_batch((4, 6)))
    assert not gradients.fallback
    assert gradients.around == {f"attention.{name}": "attention" for name in ATTENTION}
    assert worst_error(gradients, oracles.make_batch(oracles.LENGTHS)) < 1e-10
    assert worst_error(gradients, oracles.make_batch((8, 2, 3, 5))) < 1e-10  # a mask of 4 x 2 by 8
    gradients.max_block_bytes = 1
    assert worst_error(gradients, oracles.make_batch((3, 3, 3))) < 1e-10  # rows look like tokens
    assert not caplog.text


def test_attention_with_rows_on_the_second_axis_is_taken_row_by_row():
    """`[tokens, rows, features]`: with as many rows as tokens nothing but the gradients can tell."""
    gradients = engine(InOneMatrix(batch_first=False))
    gradients.check(oracles.make_batch((3, 3, 3)))
    assert gradients.fallback == {f"attention.{name}" for name in ATTENTION}
    assert worst_error(gradients, oracles.make_batch(oracles.LENGTHS)) < 1e-10


def test_experts_stacked_into_one_tensor():
    gradients = engine(mixtral())
    batch = oracles.make_batch(oracles.LENGTHS, masked=False)
    gradients.check({key: value[:2] for key, value in batch.items()})
    assert not gradients.fallback
    experts = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    assert experts <= set(gradients.around)
    # transformers routes in float32, whose rounding the gradients of the router inherit.
    assert worst_error(gradients, batch) < 1e-5


def test_bare_parameters_of_a_vision_transformer():
    """Its class token and positions: the patches alone are made again, not the whole model for each row."""
    model = tiny_vit(torch.float64).eval()
    gradients = RowGradients(model, ClassificationTask(), [name for name, _ in model.named_parameters()])
    pixels = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 1])}
    gradients.check(batch)
    assert not gradients.fallback
    assert set(gradients.around) == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert set(gradients.around.values()) == {"vit.embeddings"}
    found = {name: grads for name, _, grads in gradients.blocks(gradients.run(batch))}
    for row in range(4):
        truth = gradients._autograd_row(batch, batch["labels"], row, list(gradients.around))
        for name, grad in truth.items():
            torch.testing.assert_close(found[name][row], grad, rtol=1e-9, atol=1e-12)


class Shifted(nn.Module):
    """Adds a bare parameter, and something that depends on how many rows there are, but for an even number."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.shift + (0.0 if len(x) in (1, 2) else 0.1)


def test_another_output_for_a_row_alone_is_found_where_it_happens(caplog):
    """The check saw two rows, where the module was what it should be; no gradient of it is believed with three."""
    model = InOneMatrix()
    model.attention = nn.Identity()
    model.forward = lambda input_ids, **_: SimpleNamespace(logits=model.head(model.between(model.tokens(input_ids))))
    model.between = Shifted()
    gradients = engine(model)
    gradients.check(oracles.make_batch((4, 6)))
    assert gradients.around == {"between.shift": "between"}
    with caplog.at_level(logging.WARNING, logger="hf_source"):
        assert list(gradients.blocks(gradients.run(oracles.make_batch((4, 6, 5)))))
    assert "Shifted gives another output for a row alone; using one backward pass per row" in caplog.text
