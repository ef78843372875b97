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
"""Exact unrolling against finite differences of real retraining: rows weighted a little more and a little less."""

import numpy as np
import pytest
import torch
from cases import random_rows, tiny_gpt2, tiny_llama, train

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.evaluation import losses_of, retrain


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "adam, coupled decay": {"made": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)},
    "sgd": {"optim": "sgd", "learning_rate": 0.05},
    "nesterov": {"optim": "sgd", "optim_args": "momentum=0.8,nesterov=True", "learning_rate": 0.05},
    "nadam": {"made": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1)},
    "radam": {"made": lambda p: torch.optim.RAdam(p, lr=1e-2, betas=(0.9, 0.9))},
    "rmsprop": {"made": lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.9)},
    "adagrad": {"made": lambda p: torch.optim.Adagrad(p, lr=3e-2, initial_accumulator_value=0.01)},
    "amsgrad": {"made": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True)},
    "no clipping": {"optim": "adamw_torch", "max_grad_norm": 0.0},
}


def attributor_of(folder, **settings):
    return SourceAttributor.from_record(folder / "record", method="unrolled", progress=False, **settings)


def finite_differences(stage, dataset, rows, queries, step=1e-3):
    """`-d loss / d weight` of each row by central differences of retraining in float64: `[queries, rows]`."""
    weights = np.ones((2 * len(rows), stage.num_rows))
    for position, row in enumerate(rows):
        weights[2 * position, row] += step
        weights[2 * position + 1, row] -= step
    copies = None
    for later in stage.record.stages[stage.index :]:
        keep = weights if later is stage else np.ones((len(weights), later.num_rows))
        data = dataset if later is stage else later.rows()
        model, copies = retrain(later, data, keep, dtype=torch.float64, start=copies)
    losses = losses_of(model, copies, queries.rows)
    return -(losses[0::2] - losses[1::2]).T / (2 * step)


# Llama's norms and softmax compute in float32, which blurs differences of the more curved optimizers.
ON_LLAMA = ("adamw", "sgd", "no clipping")
CASES = [(tiny_gpt2, name) for name in OPTIMIZERS] + [(tiny_llama, name) for name in ON_LLAMA]


@pytest.mark.parametrize(("make", "optimizer"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_unrolled_is_the_derivative_of_retraining(tmp_path, make, optimizer):
    """Row by row; the width of the differences balances rounding against curvature, which Adam makes large."""
    settings = dict(OPTIMIZERS[optimizer])
    model = make(dtype=torch.float64)
    trainer = {}
    if made := settings.pop("made", None):
        trainer["optimizers"] = (made(model.parameters()), None)
    dataset = random_rows()
    _, record = train(tmp_path, model, dataset, trainer=trainer, **settings)
    queries = Queries.from_dataset(random_rows(2, seed=5))
    found = attributor_of(tmp_path, dtype=torch.float64).scores(dataset, queries)
    rows = [0, 3, 7, 21]
    width = 1e-2 if settings.get("optim") == "sgd" else 1e-3
    expected = finite_differences(record.stage(), dataset, rows, queries, width)
    tolerance = 1e-3 if make is tiny_llama else 1e-4
    assert np.abs(found[:, rows] - expected).max() < tolerance * np.abs(expected).max()
    single = attributor_of(tmp_path).scores(dataset, queries)
    assert np.abs(single - found).max() < 0.01 * np.abs(found).max()  # float32


def two_stages(folder, second):
    """A full stage, then one made by `second(model)`, on other rows."""
    model = tiny_gpt2(dtype=torch.float64)
    train(folder, model, random_rows(12), stage="first", max_steps=4)
    _, record = train(folder, second(model), random_rows(10, seed=3), stage="second", max_steps=5)
    return record


def with_frozen_embeddings(model):
    model.transformer.wte.weight.requires_grad_(False)
    return model


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    with torch.no_grad():  # B starts at 0: its gradients would hide those of A
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("second", [lambda model: model, with_frozen_embeddings, with_lora])
def test_rows_of_an_earlier_stage_are_followed_through_the_later_one(tmp_path, second):
    record = two_stages(tmp_path, second)
    queries = Queries.from_dataset(random_rows(2, seed=5))
    attributor = attributor_of(tmp_path, dtype=torch.float64)
    for name, dataset in (("first", random_rows(12)), ("second", random_rows(10, seed=3))):
        found = attributor.scores(dataset, queries, stage=name)
        expected = finite_differences(record.stage(name), dataset, [1, 4, 9], queries, step=2e-4)
        assert np.abs(found[:, [1, 4, 9]] - expected).max() < 1e-4 * np.abs(expected).max()


def test_what_cannot_be_repeated_or_differentiated_is_refused(tmp_path):
    train(tmp_path / "dropout", tiny_gpt2(resid_pdrop=0.1), max_steps=2, num_segments=1)
    queries = Queries.from_dataset(random_rows(1))
    with pytest.raises(UnsupportedError, match="trained with dropout.*method='source'"):
        attributor_of(tmp_path / "dropout").scores(random_rows(), queries)
    _, noisy = train(tmp_path / "noise", tiny_gpt2(), neftune_noise_alpha=20.0, num_segments=1)
    with pytest.raises(UnsupportedError, match="trained with NEFTune, whose noise.*Use method='source'"):
        attributor_of(tmp_path / "noise").scores(random_rows(), queries)
    # As of a kind of noise that nobody told of.
    noisy.stage().training["neftune_noise_alpha"] = noisy.stage().loss["first_micro_batch"] = None
    with pytest.raises(UnsupportedError, match="of the distance trained away.*Use method='source'"):
        SourceAttributor(noisy, method="unrolled", progress=False).scores(random_rows(), queries)
    _, record = train(tmp_path / "other", tiny_gpt2(), max_steps=2, num_segments=1)
    record.stage().optimizer["groups"][0]["rule"] = "Muon"
    with pytest.raises(UnsupportedError, match="Muon, which cannot be differentiated.*one of SGD, Adam, AdamW"):
        SourceAttributor(record, method="unrolled", progress=False).scores(random_rows(), queries)


@pytest.mark.parametrize("method", ["unrolled", "stepwise"])
def test_states_that_are_made_again_and_micro_batches_give_the_same_scores(tmp_path, monkeypatch, method):
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    dataset = random_rows()
    train(tmp_path, tiny_gpt2(dtype=torch.float64), dataset, **settings)
    queries = Queries.from_dataset(random_rows(2, seed=5))
    attributor = attributor_of(tmp_path, dtype=torch.float64).like(method=method)
    kept = attributor.scores(dataset, queries)
    monkeypatch.setattr("hf_source.source.unrolled._FEW_BYTES", 0)
    made_again = attributor_of(tmp_path, dtype=torch.float64).like(method=method).scores(dataset, queries)
    np.testing.assert_array_equal(kept, made_again)
