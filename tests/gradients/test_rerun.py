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
"""Layers that are run again on the way back give the same gradients, and hold less in between."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_source import Queries, SourceAttributor
from hf_source.attribution import calibration
from hf_source.curvature import FisherSample
from hf_source.errors import UnsupportedError
from hf_source.gradients import CausalLMTask, ClassificationTask, RowGradients, Seq2SeqTask
from hf_source.gradients.rerun import enable, layers_of, region
from hf_source.source import score_rows

from ..oracles import Odd, make_batch, with_adapters


SMALL = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 10, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
BERT = {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}


def llama(layers: int = 3):
    sizes = SMALL | {"num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def gpt2():
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=16, n_embd=8, n_layer=2, n_head=2, **ends, **QUIET))


def of_text():
    return make_batch((6, 5, 4), seed=1, vocabulary=12)


def pairs():
    """What an encoder reads, and what a decoder says."""
    ids = torch.tensor([[3, 4, 5, 1], [6, 7, 1, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([[8, 9, 1], [5, 1, -100]])}


def classes():
    ids = torch.tensor([[3, 4, 5, 1], [6, 7, 1, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([2, 0])}


KINDS = {
    "llama": (llama, CausalLMTask, of_text),
    "gpt2": (gpt2, CausalLMTask, of_text),
    "lora": (lambda: with_adapters(gpt2().double()), CausalLMTask, of_text),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)), Seq2SeqTask, pairs),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL, **BERT)), ClassificationTask, classes),
}


def engine(kind: str) -> tuple[RowGradients, dict]:
    make, task, batch = KINDS[kind]
    torch.manual_seed(0)
    model, batch = make().double(), batch()
    gradients = RowGradients(model, task(), [name for name, _ in model.named_parameters()])
    gradients.check(batch)
    return gradients, batch


def vectors_of(gradients: RowGradients) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in gradients.parameters.items()}


@pytest.fixture()
def runs(monkeypatch):
    """Counts how often each layer is run."""

    def count(model):
        counts = {layer: 0 for layer in layers_of(model)}

        def counted(layer, forward):
            def call(*args, **kwargs):
                counts[layer] += 1
                return forward(*args, **kwargs)

            return call

        for layer in counts:
            layer.forward = counted(layer, layer.forward)
        return counts

    return count


def all_and_some(names):
    """All parameters; those of the last half, so that a graph begins in a layer; the first; one in the middle."""
    return [names, names[len(names) // 2 :], names[:1], [names[len(names) // 2]]]


@pytest.mark.parametrize("kind", list(KINDS))
def test_products_are_the_same_and_layers_run_twice(kind, runs):
    gradients, batch = engine(kind)
    vectors = vectors_of(gradients)
    expected = {}
    for names in all_and_some(list(vectors)):
        own = gradients.only(names)
        expected[tuple(names)] = score_rows(own, batch, {name: vectors[name] for name in names})
    enable(gradients.model)
    counts = runs(gradients.model)
    score_rows(gradients, batch, vectors)
    assert set(counts.values()) == ({4} if kind == "t5" else {2})  # T5's biases of positions have no rule
    for names, true in expected.items():
        found = score_rows(gradients.only(names), batch, {name: vectors[name] for name in names})
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-14)
        assert true.abs().max() > 0


@pytest.mark.parametrize("around", ["model.layers.1.mlp", "model.layers.1", "model.layers.1.mlp.up_proj", None])
def test_parameters_without_a_rule(around):
    """Told from running a module in a layer, or the layer itself, again; or by one backward pass a row."""
    gradients, batch = engine("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    gradients._leave_rules(name, around)
    vectors = vectors_of(gradients)
    expected = score_rows(gradients, batch, vectors)
    enable(gradients.model)
    torch.testing.assert_close(score_rows(gradients, batch, vectors), expected, rtol=1e-12, atol=1e-14)
    alone = gradients.only([name])
    found = score_rows(alone, batch, {name: vectors[name]})
    for layer in layers_of(gradients.model):
        layer.gradient_checkpointing = False
    torch.testing.assert_close(found, score_rows(alone, batch, {name: vectors[name]}), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rerun", [False, True])
def test_gradients_that_begin_where_nobody_recorded_a_call(rerun):
    """`enable_input_require_grads` asks for those of the embedding's output; without it all of them began in LoRA."""
    gradients, batch = engine("lora")
    adapters = gradients.only([name for name in gradients.parameters if "lora" in name])
    vectors = {name: vector for name, vector in vectors_of(gradients).items() if "lora" in name}
    expected = score_rows(adapters, batch, vectors)
    assert expected.abs().max() > 0
    gradients.model.enable_input_require_grads()
    if rerun:
        enable(gradients.model)
    torch.testing.assert_close(score_rows(adapters, batch, vectors), expected, rtol=1e-12, atol=1e-14)
    whole = vectors_of(gradients)
    gradients.model.disable_input_require_grads()
    true = score_rows(gradients.with_task(gradients.task), batch, whole)
    gradients.model.enable_input_require_grads()
    torch.testing.assert_close(score_rows(gradients, batch, whole), true, rtol=1e-12, atol=1e-14)


def test_the_sample_has_the_same_labels_and_columns():
    def columns(rerun):
        gradients, batch = engine("gpt2")
        if rerun:
            enable(gradients.model)
        sample = FisherSample(gradients, [batch, batch], seed=3)
        return {name: own.whole() for name, own in sample.columns(list(gradients.parameters)).items()}

    expected, found = columns(False), columns(True)
    for name, own in found.items():
        torch.testing.assert_close(own, expected[name], rtol=1e-12, atol=1e-14)


def test_layers_are_as_they_were_afterwards_and_after_an_error():
    gradients, batch = engine("llama")
    enable(gradients.model)
    before = [vars(layer).get("forward") for layer in layers_of(gradients.model)]
    vectors = vectors_of(gradients)
    score_rows(gradients, batch, vectors)

    def broken(*args):
        raise ValueError("while a layer is gone back through" if region() else "outside")

    with pytest.raises(ValueError, match="while a layer"):
        own = [name for name in vectors if "layers.1" in name]
        gradients.stream(batch, own, broken, broken)
    assert [vars(layer).get("forward") for layer in layers_of(gradients.model)] == before == [None] * 3
    assert region() == 0
    assert score_rows(gradients, batch, vectors).isfinite().all()


def test_a_batch_holds_one_layer_at_a_time():
    class Rows:
        lengths = np.full(4, 6)

        def collated(self, numbers, device):
            return make_batch((6,) * len(numbers), vocabulary=12)

    def held(layers, rerun):
        model = llama(layers).double()
        gradients = RowGradients(model, CausalLMTask(), [name for name, _ in model.named_parameters()])
        if rerun:
            enable(model)
        return calibration._bytes_per_token(gradients, Rows(), [0, 1, 2, 3], torch.device("cpu"))

    (two, columns), (eight, more) = held(2, False), held(8, False)
    layer = (eight - two) / 6
    (few, same), (many, as_many) = held(2, True), held(8, True)
    assert many - few < 0.15 * 6 * layer  # what goes in, of each
    assert many < 0.5 * eight
    assert (same, as_many) == (columns, more)  # which the sample holds either way


@pytest.mark.parametrize("settings", [{}, {"curvature": "ekfac"}, {"method": "influence"}, {"method": "tracin"}])
def test_scores_are_the_same(story, settings):
    queries = Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"])
    given = {"num_samples": 8, "progress": False, "dtype": torch.float64, **settings}
    expected = SourceAttributor(story, **given).scores(None, queries, "sft")
    walker = SourceAttributor(story, gradient_checkpointing=True, **given)
    found = walker.scores(None, queries, "sft")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert walker.like(num_samples=4).gradient_checkpointing


def test_a_model_that_was_enabled_is_run_again_without_a_setting(story, runs):
    plain = SourceAttributor(story, num_samples=8, progress=False)
    counts = []

    def model(stage):
        made = stage.build_model(torch.float32)
        getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()
        counts.append(runs(made))
        return made

    queries = Queries.from_text(["Peru:"], [" Lima"])
    own = SourceAttributor(story, num_samples=8, progress=False, model=model)
    found, expected = (each.scores(None, queries, "sft") for each in (own, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert counts and all(count % 2 == 0 or count > 4 for each in counts for count in each.values())


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UnsupportedError, match="Odd has none: leave it out"):
        enable(Odd())
