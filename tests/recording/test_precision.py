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
"""Ways to run the same training: checkpointed, compiled, in half precision, with tied weights, dropout and noise."""

import numpy as np
import pytest
import torch
from cases import distance, random_rows, tiny_gpt2, tiny_llama, train

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.recording import replay


def build_error(stage, model) -> float:
    """Largest difference between the logits of the rebuilt model and of the trained one."""
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        return float((model.eval()(ids).logits.float() - stage.build_model()(ids).logits.float()).abs().max())


def replay_error(stage, **options) -> tuple[float, float]:
    """Distance of a replay from the recorded final weights, and how far training moved them."""
    final = stage.weights("final")
    again = {n: p for n, p in replay(stage, random_rows(), **options).named_parameters() if n in final}
    return distance(again, final), distance(stage.weights("initial"), final)


def scores(record, **settings) -> np.ndarray:
    settings = {"num_samples": 16, "progress": False, "dtype": torch.float64} | settings
    queries = Queries.from_dataset(random_rows(2, seed=9))
    return SourceAttributor(record, **settings).scores(None, queries)


def visited(record) -> list:
    return [[(batch.rows, batch.items) for batch in step] for step in record.stage().steps().micro_batches]


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (tiny_gpt2, "checkpointed"),
        (tiny_llama, "checkpointed"),
        (tiny_llama, "checkpointed, reentrant"),
        (tiny_llama, "compiled"),
    ],
)
def test_the_same_run_by_another_way_leaves_the_same_record(tmp_path, make, way):
    """Rows are noted once though the forward pass runs twice; compiled modules keep the names of plain ones."""
    settings = {
        "checkpointed": {"activation_checkpointing": True},
        "checkpointed, reentrant": {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    }[way]
    _, plain = train(tmp_path / "plain", make(dtype=torch.float64))
    model = make(dtype=torch.float64)
    _, record = train(tmp_path / "other", model, **settings)
    assert visited(record) == visited(plain)
    stage = record.stage()
    assert stage.trainable == plain.stage().trainable
    start = plain.stage().weights("initial")
    assert distance(stage.weights("final"), plain.stage().weights("final")) <= 1e-9 * distance(
        start, plain.stage().weights("final")
    )
    assert build_error(stage, model) == 0
    error, moved = replay_error(stage)
    assert error <= 1e-9 * moved
    np.testing.assert_allclose(scores(record), scores(plain), rtol=1e-5, atol=1e-9)


def test_a_model_compiled_beforehand_is_refused(tmp_path):
    """Trainer reads the wrapper's signature, and would drop every column."""
    with pytest.raises(UnsupportedError, match="Pass the plain model, and set torch_compile=True"):
        train(tmp_path, torch.compile(tiny_llama(), backend="eager"))
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_pure_bfloat16(tmp_path, make, optim):
    """Weights, averages and final weights: the record holds what training held, and sums in float32."""
    model = make(dtype=torch.bfloat16)
    _, record = train(tmp_path, model, learning_rate=0.02, optim=optim)
    stage = record.stage()
    assert {tensor.dtype for tensor in stage.weights("final").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in stage.segments[0].parameters().values()} == {torch.float32}
    assert build_error(stage, model) == 0
    error, moved = replay_error(stage)
    assert moved > 0.01 and error == 0  # the same operations in the same order, rounded alike
    if optim != "adamw_torch_fused":
        return
    found = scores(record, dtype=torch.float32)
    assert np.isfinite(found).all() and np.abs(found).max() > 1e-3


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_bfloat16_autocast(tmp_path, make):
    model = make()
    _, record = train(tmp_path, model, bf16=True)
    stage = record.stage()
    assert stage.training["bf16"] and {t.dtype for t in stage.weights("final").values()} == {torch.float32}
    again = stage.build_model()
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    error, moved = replay_error(stage)
    assert error <= 1e-4 * moved
    without, _ = replay_error(stage, dtype=torch.float64)
    assert without > 10 * error  # rounding to bfloat16 is part of the run, and replay repeats it
    assert np.isfinite(scores(record)).all()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_tied_weights_are_one_parameter_with_two_uses(tmp_path, make):
    tied = {} if make is tiny_gpt2 else {"tie_word_embeddings": True}
    model = make(dtype=torch.float64, **tied)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    _, record = train(tmp_path, model)
    stage = record.stage()
    assert not any("lm_head" in name for name in stage.trainable)
    again = stage.build_model()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert build_error(stage, model) == 0
    error, moved = replay_error(stage)
    assert error <= 1e-9 * moved


def test_dropout_is_said_once_and_the_record_stays_true(tmp_path, caplog):
    model = tiny_gpt2(resid_pdrop=0.3, dtype=torch.float64)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model)
    assert caplog.text.count("trains with dropout") == 1
    stage = record.stage()
    assert stage.training["dropout"] and build_error(stage, model) == 0
    _, without = train(tmp_path / "off", tiny_gpt2())
    assert visited(record) == visited(without)
    error, moved = replay_error(stage)
    assert error > 1e-3 * moved  # other masks


def test_noise_on_embeddings_leaves_with_training(tmp_path, caplog):
    model = tiny_llama(dtype=torch.float64)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model, neftune_noise_alpha=5.0)
    assert caplog.text.count("neftune_noise_alpha adds noise") == 1
    stage = record.stage()
    assert stage.training["neftune_noise_alpha"] == 5.0
    assert not model.get_input_embeddings()._forward_hooks
    assert build_error(stage, model) == 0
    error, moved = replay_error(stage)
    assert error > 1e-3 * moved
