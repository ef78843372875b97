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
"""What the trainer accepts, refuses, and does with rows on their way to the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, config, distance, random_rows, tiny_gpt2, tiny_llama, train
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, Trainer, TrainingArguments

from hf_source.data import ROW, CausalLMCollator
from hf_source.errors import DataError, UnsupportedError
from hf_source.recording import RecordingMixin, SourceConfig, SourceTrainer, TrainingRecord, replay
from hf_source.recording.checks import refuse_unsupported
from hf_source.recording.deepspeed import refuse_deepspeed
from hf_source.recording.rows.numbering import RowDataset, with_row_numbers


class Strict(type(tiny_llama())):
    """A model that does not swallow unknown inputs, and notes the rows it was given."""

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append((self.training, input_ids.tolist()))
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, num_items_in_batch=num_items_in_batch
        )


def strict_model():
    torch.manual_seed(0)
    return Strict(tiny_llama().config)


def trained_rows(record):
    return [b.rows for step in record.stage().steps().micro_batches for b in step]


def seen_rows(model, dataset):
    """Which rows the model was really trained on, recognised by their tokens."""
    by_tokens = {tuple(ids): row for row, ids in enumerate(dataset["input_ids"])}
    assert len(by_tokens) == len(dataset)
    batches = [batch for training, batch in model.seen if training]
    return [[by_tokens[tuple(t for t in row if t)] for row in batch] for batch in batches]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"remove_unused_columns": False},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1, "num_train_epochs": 1},
        {"accelerator_config": {"use_seedable_sampler": False}},
    ],
    ids=str,
)
def test_recorded_rows_are_the_rows_that_reached_the_model(tmp_path, settings):
    model, dataset = strict_model(), random_rows()
    _, record = train(tmp_path, model, dataset, **settings)
    assert trained_rows(record) == seen_rows(model, dataset)
    assert record.verify() == []


def test_rows_of_any_map_style_dataset(tmp_path):
    dataset = random_rows()

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            return dict(dataset[index])

    for number, rows in enumerate((Rows(), [dict(row) for row in dataset], dataset.with_format("torch"))):
        model = strict_model()
        _, record = train(tmp_path / str(number), model, rows)
        assert trained_rows(record) == seen_rows(model, dataset)
        assert record.stage().num_rows == 22


def test_formatted_columns_keep_the_row_number(tmp_path):
    model, dataset = strict_model(), random_rows()
    _, record = train(tmp_path, model, dataset.with_format("numpy", columns=["input_ids", "labels"]))
    assert trained_rows(record) == seen_rows(model, dataset)


def test_own_row_numbers_are_kept(tmp_path):
    numbers = np.random.default_rng(0).permutation(22)
    dataset = random_rows().add_column(ROW, numbers)
    model = strict_model()
    _, record = train(tmp_path, model, dataset)
    assert trained_rows(record) == [[int(numbers[row]) for row in batch] for batch in seen_rows(model, dataset)]
    stage = record.stage()
    assert stage.dataset["row_numbers"] == "column"
    other = strict_model()
    again = replay(stage, dataset, model=other)
    final, start = stage.weights("final"), stage.weights("initial")
    assert distance(dict(again.named_parameters()), final) < 0.01 * distance(start, final)
    with pytest.raises(DataError, match=f"numbered its rows by the column `{ROW}`"):
        replay(stage, dataset.remove_columns(ROW), model=other)


@pytest.mark.parametrize("numbers", [[0, 1, 1], [0, 1, 1 << 31], [-1, 0, 1], [0.0, 1.0, 2.0]])
def test_impossible_row_numbers_are_refused(numbers):
    dataset = Dataset.from_dict({"input_ids": [[1, 2]] * 3, ROW: numbers})
    with pytest.raises(DataError, match=r"different whole number in \[0, 2147483648\).*remove_columns"):
        with_row_numbers(dataset)


def test_rows_that_are_not_dictionaries_are_refused():
    with pytest.raises(DataError, match="not a dictionary"):
        RowDataset([[1, 2]])[0]


def test_evaluation_never_sees_row_numbers(tmp_path):
    model = strict_model()
    dataset = random_rows()
    evaluated = dataset.add_column(ROW, np.arange(22))
    run = SourceTrainer(
        model,
        config(tmp_path, eval_strategy="epoch", remove_unused_columns=False),
        train_dataset=dataset,
        eval_dataset={"with": evaluated, "without": dataset},
    )
    run.train()
    assert run.evaluate()["eval_with_loss"] == run.evaluate()["eval_without_loss"]
    assert run.predict(evaluated).metrics["test_loss"] > 0


def test_a_batch_that_lost_its_rows_stops_training(tmp_path):
    class Packing(SourceTrainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            loader.collate_fn = CausalLMCollator()
            loader.dataset = loader.dataset
            return loader

        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs.pop(ROW)
            return super().training_step(model, inputs, num_items_in_batch)

    run = Packing(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    with pytest.raises(UnsupportedError, match="without its row numbers"):
        run.train()


# ---- Other trainers ----


class FilteringTrainer(Trainer):
    """Prepares its rows as TRL's trainers do: drops some, keeps other columns, and replaces the signature."""

    def __init__(self, model, args, processing_class=None, *, train_dataset=None, **kwargs):
        keep = train_dataset.filter(lambda row: len(row["input_ids"]) > 7)
        super().__init__(model, args, train_dataset=keep.shuffle(seed=3), data_collator=CausalLMCollator(), **kwargs)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "labels"]


class RecordedFilteringTrainer(RecordingMixin, FilteringTrainer):
    pass


def test_the_mixin_numbers_rows_before_the_trainer_moves_them(tmp_path):
    model, dataset = strict_model(), random_rows()
    RecordedFilteringTrainer(model, config(tmp_path), train_dataset=dataset, processing_class=None).train()
    record = TrainingRecord.load(tmp_path / "record")
    assert record.stage().num_rows == 22
    assert trained_rows(record) == seen_rows(model, dataset)
    kept = {row for row, ids in enumerate(dataset["input_ids"]) if len(ids) > 7}
    assert {row for batch in trained_rows(record) for row in batch} == kept


def test_plain_training_arguments(tmp_path):
    class Recorded(RecordingMixin, Trainer):
        pass

    arguments = {"output_dir": str(tmp_path), "max_steps": 3, "use_cpu": True, "save_strategy": "no"}
    trainers = [
        Recorded(tiny_llama(), TrainingArguments(**arguments), CausalLMCollator(), random_rows()),
        SourceTrainer(tiny_llama(), SourceConfig(**arguments, stage="b"), train_dataset=random_rows()),
    ]
    for trainer in trainers:
        trainer.train()
    record = TrainingRecord.load(tmp_path / "record")
    assert [stage.name for stage in record.stages] == ["train", "b"]


def test_a_training_set_that_is_replaced_later(tmp_path, caplog):
    model, dataset = strict_model(), random_rows(30, seed=4)
    run = SourceTrainer(model, config(tmp_path), train_dataset=random_rows())
    run.train_dataset = dataset
    with caplog.at_level("WARNING"):
        run.train()
    record = TrainingRecord.load(tmp_path / "record")
    assert record.stage().num_rows == 30 and trained_rows(record) == seen_rows(model, dataset)
    assert "not the one the trainer was given" in caplog.text


def test_prompt_and_completion_rows(tmp_path):
    rows = Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+4="] * 4, "completion": ["2", "4", "7"] * 4})
    model = tiny_gpt2(vocab_size=257)
    _, record = train(tmp_path, model, rows, trainer={"processing_class": byte_tokenizer(), "eval_dataset": rows})
    stage = record.stage()
    assert stage.dataset["kind"] == "prompt_completion"
    assert {b.items for step in stage.steps().micro_batches for b in step} == {4 * 2}  # a digit and the end, each
    assert record.processing_class().eos_token_id == 0


def test_model_and_rows_by_path(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_gpt2(vocab_size=257, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    Dataset.from_dict({"text": ["one", "two", "three"]}).to_json(tmp_path / "rows" / "train.jsonl")
    run, record = train(tmp_path, str(tmp_path / "model"), str(tmp_path / "rows"), num_segments=1)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert (
        record.stage().num_rows == 3
        and record.processing_class()("one")["input_ids"] == byte_tokenizer()("one").input_ids
    )


def test_unreadable_columns(tmp_path):
    rows = Dataset.from_dict({"question": ["a"]})
    with pytest.raises(DataError, match="none of which hf_source can read"):
        SourceTrainer(tiny_gpt2(), config(tmp_path), train_dataset=rows)


class ThreeTimes(GPT2ForSequenceClassification):
    """A loss that no rule of the library gives."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        outputs.loss = outputs.loss and 3 * outputs.loss
        return outputs


@pytest.mark.parametrize("kind", [GPT2ForSequenceClassification, ThreeTimes])
def test_a_classifier_is_recorded_with_a_warning_if_its_loss_is_its_own(tmp_path, caplog, kind):
    settings = tiny_gpt2().config
    settings.num_labels, settings.pad_token_id = 3, 0
    torch.manual_seed(0)
    rows = random_rows().remove_columns("labels").add_column("labels", np.arange(22) % 3)

    def collate(features):
        inputs = CausalLMCollator()([{"input_ids": feature["input_ids"]} for feature in features])
        return inputs | {"labels": torch.tensor([feature["labels"] for feature in features])}

    model = kind(settings)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model, rows, trainer={"data_collator": collate})
    assert ("loss of a row is not known (ThreeTimes computes" in caplog.text) == (kind is ThreeTimes)
    stage = record.stage()
    assert stage.collator["class"].endswith("collate")
    assert all(b.items == len(b.rows) for step in stage.steps().micro_batches for b in step)
    # GPT-2's classifier takes `num_items_in_batch` as it takes any keyword, and averages over the micro-batch; the
    # Trainer believes it was used, so nothing divides by the number of micro-batches.
    assert all(b.normalizer == len(b.rows) for step in stage.steps().micro_batches for b in step)
    if kind is ThreeTimes:
        return  # nothing knows what to replay
    again = replay(stage, rows, data_collator=collate)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, stage.weights("final")[name], rtol=1e-4, atol=1e-6)


# ---- Refusals and warnings ----


def with_batch_norm():
    model = tiny_llama()
    model.model.norm = torch.nn.BatchNorm1d(16)
    return model


@pytest.mark.parametrize(
    ("make", "settings", "trainer", "message"),
    [
        (with_batch_norm, {}, {}, "`model.norm` is a BatchNorm1d.*LayerNorm"),
    ],
)
def test_refused_at_the_start(tmp_path, make, settings, trainer, message):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=message):
        train(tmp_path, model, trainer=trainer, **settings)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("n_gpu", 2, "accelerate launch.*CUDA_VISIBLE_DEVICES=0"),
    ],
)
def test_settings_that_this_machine_cannot_make_are_refused(tmp_path, monkeypatch, attribute, value, message):
    run = SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    monkeypatch.setattr(type(run.args), attribute, value)
    run.args.__dict__.pop(attribute, None)
    with pytest.raises(UnsupportedError, match=message):
        run.train()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("is_distributed_loading_by_transformers", "may see the same rows.*Use data parallelism only"),
    ],
)
def test_sharded_training_is_refused(tmp_path, backend, message):
    run = SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    setattr(run, backend, True)
    with pytest.raises(UnsupportedError, match=message):
        run.train()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0 cannot be recorded. Set `stage`"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer`.*to 'none'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights`.*Leave it out"),
        ({"bf16": {"enabled": True}}, "`bf16` of the DeepSpeed config.*Train in float32"),
        ({"optimizer": {"type": "AdamW"}}, "`optimizer` of the DeepSpeed config.*Leave it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` of the DeepSpeed config.*set lr_scheduler_type"),
        ({"pipeline": {"stages": 2}}, "`pipeline` of the DeepSpeed config.*Leave it out, or train with FSDP2"),
    ],
)
def test_what_deepspeed_may_do_beside_zero_is_refused(tmp_path, more, message):
    """Training itself is tested in `tests/distributed/test_deepspeed.py`, where DeepSpeed is installed."""
    run = SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    fine = {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}, "fp16": {"enabled": False}}
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=fine))
    run.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    refuse_deepspeed(run)
    plugin.hf_ds_config.config = fine | more
    with pytest.raises(UnsupportedError, match=message):
        refuse_deepspeed(run)
    plugin.hf_ds_config.config = fine
    run.args.auto_find_batch_size = True
    with pytest.raises(UnsupportedError, match="does not work with DeepSpeed. Set auto_find_batch_size=False"):
        refuse_deepspeed(run)


@pytest.mark.parametrize(
    ("plugin", "parallel", "message"),
    [
        ({"fsdp_version": 1}, {}, "Use FSDP2: fsdp_config={'version': 2}"),
        ({"fsdp_version": 2}, {"dp_replicate_size": 2}, "Shard over all processes"),
    ],
)
def test_other_ways_to_shard_are_refused(tmp_path, plugin, parallel, message):
    run = SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    run.is_fsdp_enabled = True
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
    run.accelerator = SimpleNamespace(state=state, parallelism_config=SimpleNamespace(**parallel))
    with pytest.raises(UnsupportedError, match=message):
        refuse_unsupported(run)


def test_compiled_shards_are_refused(tmp_path):
    run = SourceTrainer(tiny_llama(), config(tmp_path, torch_compile=True), train_dataset=random_rows())
    run.is_fsdp_enabled = True
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))
    run.accelerator = SimpleNamespace(state=state, parallelism_config=None)
    with pytest.raises(UnsupportedError, match="FSDP with torch_compile.*Set torch_compile=False"):
        refuse_unsupported(run)


@pytest.mark.parametrize("size", ["get_tp_size", "get_cp_size", "get_sp_size"])
def test_processes_that_see_the_same_rows_are_refused(tmp_path, size):
    run = SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    setattr(run, size, lambda: 2)
    with pytest.raises(UnsupportedError, match="may see the same rows.*Use data parallelism only"):
        run.train()


def test_dropout_and_noise_are_warned_about(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, tiny_gpt2(attn_pdrop=0.1), neftune_noise_alpha=1.0, max_steps=3)
    assert "trains with dropout" in caplog.text and "neftune_noise_alpha" in caplog.text
    assert record.stage().training["dropout"] is True
    caplog.clear()
    with caplog.at_level("WARNING"):
        train(tmp_path, tiny_llama(attention_dropout=0.1), max_steps=3, stage="b")
    assert "trains with dropout" in caplog.text


def test_gradients_that_are_not_numbers_stop_training(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(UnsupportedError, match="optimizer step 0 has norm nan"):
        train(tmp_path, model)


def test_constants_that_change_during_training_stop_it(tmp_path):
    from transformers import TrainerCallback

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 3:
                optimizer.param_groups[0]["weight_decay"] = 0.5

    with pytest.raises(UnsupportedError, match="changed during training, before step 3"):
        train(tmp_path, tiny_llama(), trainer={"callbacks": [Change()]})


@pytest.mark.parametrize("chained", [False, True])
def test_a_schedule_that_moves_the_momentum_is_refused_before_anything_is_made(tmp_path, chained):
    from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR

    def scheduler(optimizer, **settings):
        cycle = OneCycleLR(optimizer, max_lr=0.01, total_steps=20, **settings)
        return ChainedScheduler([cycle]) if chained else cycle

    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        UnsupportedError, match=r"OneCycleLR changes the momentum .* OneCycleLR\(cycle_momentum=False\)"
    ):
        train(tmp_path, model, trainer={"optimizers": (optimizer, scheduler(optimizer))})
    assert not (tmp_path / "record").exists()
    optimizer = torch.optim.AdamW(model.parameters())
    _, record = train(tmp_path, model, trainer={"optimizers": (optimizer, scheduler(optimizer, cycle_momentum=False))})
    assert record.stage().status == "complete"


def test_no_trainable_parameter(tmp_path):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises((UnsupportedError, ValueError)):
        train(tmp_path, model)


def test_bfloat16_autocast_is_replayed(tmp_path):
    model = tiny_llama()
    _, record = train(tmp_path, model, bf16=True)
    stage = record.stage()
    assert stage.training["bf16"] and stage.weights("final")["lm_head.weight"].dtype == torch.float32
    again = dict(replay(stage, random_rows()).named_parameters())
    final, start = stage.weights("final"), stage.weights("initial")
    assert distance(again, final) <= 0.01 * distance(start, final)
