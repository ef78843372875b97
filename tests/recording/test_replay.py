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
"""A recorded run, replayed from its record alone, ends at the same weights."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, distance, random_rows, tiny_gpt2, tiny_llama, train
from datasets import Dataset

from hf_source.errors import DataError, UnsupportedError
from hf_source.recording import replay


SETTINGS = {
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "nesterov": {"optim": "sgd", "optim_args": "momentum=0.8,nesterov=True", "learning_rate": 0.05},
    "adamw": {"optim": "adamw_torch"},
    "adamw fused": {"optim": "adamw_torch_fused"},
    "no clipping, no decay": {"max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "linear"},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "accumulation with a remainder": {"gradient_accumulation_steps": 4},
    "sequential": {"train_sampling_strategy": "sequential", "dataloader_drop_last": True},
}


def replay_error(record, trained, dataset, **options):
    """Distance between a replay's weights and the real ones; and how far training moved them."""
    stage = record.stage()
    final = {name: p.detach() for name, p in trained.named_parameters()}
    again = dict(replay(stage, dataset, **options).named_parameters())
    return distance(again, final), distance(stage.weights("initial"), final), final


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replay_reaches_the_final_weights(tmp_path, make, settings):
    model = make(dtype=torch.float64)
    _, record = train(tmp_path, model, **settings)
    error, moved, final = replay_error(record, model, random_rows())
    assert moved > 0.1
    assert error <= 1e-9 * distance(final, {n: torch.zeros_like(p) for n, p in final.items()})


@pytest.mark.parametrize("wrong", ["one row less", "learning rate", "clip factor", "normalizer", "row order"])
def test_a_record_that_lies_does_not_replay(tmp_path, wrong):
    """The bounds above mean something: the smallest untruth is far outside them."""
    model = tiny_llama(dtype=torch.float64)
    _, record = train(tmp_path, model)
    table = record.stage().steps()
    mask = np.ones(22, dtype=bool)
    if wrong == "one row less":
        mask[3] = False
    elif wrong == "learning rate":
        table.learning_rate = table.learning_rate * 1.01
    elif wrong == "clip factor":
        table.clip_factor = np.ones(9)
    elif wrong == "normalizer":
        batch = table.micro_batches[4][1]
        table.micro_batches[4][1] = dataclasses.replace(batch, normalizer=batch.normalizer + 1)
    else:
        first, second = table.micro_batches[2][0], table.micro_batches[3][0]
        table.micro_batches[2][0], table.micro_batches[3][0] = second, first
    error, moved, _ = replay_error(record, model, random_rows(), row_mask=mask)
    assert error > 1e-4 * moved


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_replay_in_float32(tmp_path, make, optim):
    model = make()
    _, record = train(tmp_path, model, **SETTINGS[optim])
    error, moved, _ = replay_error(record, model, random_rows())
    assert error <= 0.01 * moved


def test_replay_of_coupled_decay_and_groups_with_their_own_learning_rates(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    head, rest = [model.lm_head.weight], [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    groups = [{"params": head, "lr": 0.02, "weight_decay": 0.3}, {"params": rest, "lr": 0.005}]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.9), eps=1e-6)
    _, record = train(tmp_path, model, trainer={"optimizers": (optimizer, None)})
    assert record.stage().steps().learning_rate.shape == (9, 2)
    error, moved, _ = replay_error(record, model, random_rows())
    assert error <= 1e-9 * moved


class MeanLossLlama(type(tiny_llama())):
    """Returns the mean over the micro-batch, as models did before the Trainer passed the number of items."""

    accepts_loss_kwargs = False


def test_replay_of_a_model_that_averages_over_the_micro_batch(tmp_path):
    config = tiny_llama().config
    torch.manual_seed(0)
    model = MeanLossLlama(config).double()
    _, record = train(tmp_path, model)
    stage = record.stage()
    assert stage.loss["normalization"] == "micro_batch_mean"
    assert all(b.normalizer == 2 * b.items for b in stage.steps().micro_batches[0])
    assert all(b.normalizer == b.items * len(step) for step in stage.steps().micro_batches for b in step)
    torch.manual_seed(1)
    error, moved, _ = replay_error(record, model, random_rows(), model=MeanLossLlama(config).double())
    assert error <= 1e-9 * moved


def test_raw_text_is_tokenised_as_in_training(tmp_path):
    rows = Dataset.from_dict({"text": [f"row {index} says {index * 7}" for index in range(12)]})
    model = tiny_gpt2(vocab_size=257, dtype=torch.float64)
    _, record = train(tmp_path, model, rows, trainer={"processing_class": byte_tokenizer()}, max_length=10)
    stage = record.stage()
    assert stage.dataset["kind"] == "text" and stage.dataset["max_length"] == 10
    assert stage.steps().micro_batches[0][0].items == 4 * 9
    error, moved, _ = replay_error(record, model, rows)
    assert error <= 1e-9 * moved


def test_rows_left_out_are_gone_and_everything_else_stays(tmp_path):
    """Leaving out every row but one: its gradients alone, with the normalizers, rates and clip factors of the run."""
    rows = random_rows(6)
    settings = {"optim": "sgd", "weight_decay": 0.0, "gradient_accumulation_steps": 1, "num_train_epochs": 2}
    _, record = train(tmp_path, tiny_llama(dtype=torch.float64), rows, **settings, per_device_train_batch_size=3)
    stage = record.stage()
    mask = np.zeros(6, dtype=bool)
    mask[2] = True
    kept = replay(stage, rows, row_mask=mask)

    model = stage.build_model()
    stage.load_weights(model, "initial")
    table = stage.steps()
    for step, batches in enumerate(table.micro_batches):
        model.zero_grad()
        if any(2 in batch.rows for batch in batches):
            ids, labels = torch.tensor([rows[2]["input_ids"]]), torch.tensor([rows[2]["labels"]])
            logits = model(ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss * table.clip_factor[step] / batches[0].normalizer).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= table.reference_learning_rate[step] * parameter.grad
    assert distance(dict(kept.named_parameters()), dict(model.named_parameters())) < 1e-6 * distance(
        dict(model.named_parameters()), stage.weights("initial")
    )


def test_a_step_without_rows_still_decays_and_keeps_momentum(tmp_path):
    _, record = train(tmp_path, tiny_llama(dtype=torch.float64), weight_decay=0.5)
    stage = record.stage()
    final = dict(replay(stage, random_rows(), row_mask=np.zeros(22, dtype=bool)).named_parameters())
    start = stage.weights("initial")
    left = np.prod(1 - 0.5 * stage.steps().learning_rate[:, 0])
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(final[name].detach(), start[name] * left, rtol=1e-9, atol=0)


def test_callback_sees_every_step(tmp_path):
    model = tiny_llama()
    _, record = train(tmp_path, model)
    seen = []
    replay(record.stage(), random_rows(), callback=lambda step, model, optimizer: seen.append((step, type(optimizer))))
    assert seen == [(step, torch.optim.AdamW) for step in range(9)]


def test_dtype_of_the_replay(tmp_path):
    model = tiny_llama()
    _, record = train(tmp_path, model)
    again = replay(record.stage(), random_rows(), dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in again.parameters())
    final = record.stage().weights("final")
    moved = distance(final, record.stage().weights("initial"))
    assert distance(dict(again.named_parameters()), final) < 0.01 * moved


def test_other_rows_are_refused(tmp_path):
    _, record = train(tmp_path, tiny_llama())
    for rows in (random_rows(seed=1), random_rows().select(range(21)), random_rows().select(range(21, -1, -1))):
        with pytest.raises(DataError, match="not the one that stage 'train' trained on"):
            replay(record.stage(), rows)
    for mask in (np.ones(21, dtype=bool), np.ones(22)):
        with pytest.raises(DataError, match=r"row_mask must be a bool array of shape \(22,\)"):
            replay(record.stage(), random_rows(), row_mask=mask)


def test_an_own_collator_has_to_be_given_again(tmp_path):
    from hf_source.data import CausalLMCollator

    class LeftPadded(CausalLMCollator):
        pass

    model = tiny_llama(dtype=torch.float64)
    _, record = train(tmp_path, model, trainer={"data_collator": LeftPadded()})
    with pytest.raises(DataError, match="LeftPadded.*data_collator="):
        replay(record.stage(), random_rows())
    error, moved, _ = replay_error(record, model, random_rows(), data_collator=LeftPadded())
    assert error <= 1e-9 * moved


def test_an_own_loss_function_cannot_be_replayed(tmp_path):
    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    _, record = train(tmp_path, tiny_llama(), trainer={"compute_loss_func": loss})
    assert record.stage().loss["custom_function"]
    with pytest.raises(UnsupportedError, match="compute_loss_func"):
        replay(record.stage(), random_rows())
