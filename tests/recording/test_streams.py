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
"""Streams: rows without an index, in several epochs, with workers and shuffling; recorded as a spy saw them."""

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, config, distance, random_rows, tiny_gpt2, tiny_llama
from datasets import Dataset
from resuming import KillAfter, Killed
from spy import Spy, recorded
from transformers import Trainer, TrainerCallback

from hf_source import number_rows
from hf_source.data import ROW, CausalLMCollator
from hf_source.errors import DataError, UnsupportedError
from hf_source.recording import RecordingMixin, SourceTrainer, TrainingRecord, replay
from hf_source.recording.rows.streamed import batch_tokens, row_hash


class TorchStream(torch.utils.data.IterableDataset):
    """A stream of torch; `length` may be known."""

    def __init__(self, rows, numbered=False):
        self.rows, self.numbered = [dict(row) for row in rows], numbered

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for number, row in enumerate(self.rows):
            if worker is None or number % worker.num_workers == worker.id:
                yield row | ({ROW: number} if self.numbered else {})


class SizedStream(TorchStream):
    def __len__(self):
        return len(self.rows)


def sharded(num_shards, **columns):
    return random_rows().to_iterable_dataset(num_shards=num_shards)


def new_trainer(folder, rows, callbacks=(), cls=SourceTrainer, **settings):
    model = tiny_llama(dtype=torch.float64)
    return cls(model, config(folder, **{"max_steps": 8} | settings), train_dataset=rows, callbacks=list(callbacks))


def stage_of(folder):
    record = TrainingRecord.load(folder / "record")
    assert record.verify() == []
    return record.stage()


def assert_true(stage, model, seen, rows=None):
    assert recorded(stage) == seen
    final = {name: p.detach() for name, p in model.named_parameters()}
    for given in (None, rows):
        if given is None and rows is not None:
            continue
        again = dict(replay(stage, given).named_parameters())
        assert distance(again, final) <= 1e-9 * distance(stage.weights("initial"), final)


STREAMS = {
    "one shard": lambda: sharded(1),
    "three shards": lambda: sharded(3),
    "mapped, so columns are unknown": lambda: sharded(2).map(lambda row: {"x": 1}),
    "numbered, then shuffled": lambda: number_rows(sharded(3)).shuffle(seed=3, buffer_size=7),
    "own numbers in shards, shuffled": lambda: (
        random_rows().add_column(ROW, np.arange(22)).to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=5)
    ),
    "torch format": lambda: sharded(1).with_format("torch"),
    "torch": lambda: TorchStream(random_rows()),
    "torch with a length": lambda: SizedStream(random_rows()),
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_recorded_as_they_came(tmp_path, make, workers):
    """22 rows in micro-batches of 4, two to a step: with unknown length every epoch leaves none or one over."""
    rows = make()
    if workers and isinstance(rows, TorchStream):
        rows.numbered = True
    settings = {"dataloader_num_workers": workers, "per_device_train_batch_size": 5}
    trainer = new_trainer(tmp_path, rows, **settings)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    stage = stage_of(tmp_path)
    assert_true(stage, trainer.model, spy.steps)
    visited = sorted(set(spy.rows))
    assert len(visited) >= 21 and len(spy.rows) > 44  # workers cut a stream of known length short
    assert stage.dataset["num_visited"] == len(visited) and stage.num_rows == visited[-1] + 1
    kept = stage.rows()
    assert kept[ROW] == visited
    assert [dict(row) for row in kept.remove_columns(ROW)] == [dict(row) for row in random_rows().select(visited)]


def test_a_micro_batch_left_over_counts_in_the_next_epochs_first_step(tmp_path):
    """5 micro-batches an epoch, two to a step: the fifth joins the next epoch's first two, with its own normalizer."""
    trainer = new_trainer(tmp_path, sharded(1), per_device_train_batch_size=5, max_steps=5)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    assert [[rows for rows, _ in step] for step in spy.steps][2] == [[20, 21], [*range(5)], [*range(5, 10)]]
    last, first, second = (normalizer for _, normalizer in spy.steps[2])
    assert last < first == second
    assert_true(stage_of(tmp_path), trainer.model, spy.steps)


def test_the_shards_of_a_stream_are_read_in_order(tmp_path, caplog):
    """Hugging Face streams change the order of their shards from epoch to epoch, which would move every position."""
    plain = sharded(3)
    plain.set_epoch(2)
    assert [row["input_ids"] for row in plain] != random_rows()["input_ids"]
    numbered = number_rows(plain)
    assert "3 shards are read in their order" in caplog.text
    for epoch in range(4):
        numbered.set_epoch(epoch)
        assert [row[ROW] for row in numbered] == list(range(22))


def test_number_rows_takes_every_dataset():
    rows = random_rows(5)
    assert number_rows(rows)[ROW] == [0, 1, 2, 3, 4]
    assert number_rows(number_rows(rows).select([3, 1]))[ROW] == [3, 1]
    assert number_rows([dict(row) for row in rows])[3][ROW] == 3
    stream = number_rows(number_rows(rows.to_iterable_dataset()).filter(lambda row: row[ROW] != 2))
    assert [row[ROW] for row in stream] == [0, 1, 3, 4]
    once = number_rows(TorchStream(rows))
    assert number_rows(once) is once and [row[ROW] for row in once] == [0, 1, 2, 3, 4]
    with pytest.raises(UnsupportedError, match="neither a length nor the interface of a stream"):
        number_rows(iter(rows))


@pytest.mark.parametrize("make", [lambda rows: rows.shuffle(seed=0), lambda rows: rows.shuffle(seed=0).map(dict)])
def test_a_stream_that_was_shuffled_before_numbering_is_refused_at_the_start(tmp_path, make):
    with pytest.raises(UnsupportedError, match=r"shuffled before its rows were numbered.*number_rows\(dataset\)"):
        new_trainer(tmp_path, make(sharded(2)))


class Reshuffled(TorchStream):
    """Draws another order in every epoch, as a stream of one's own may."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.rows))
        for place in order:
            yield self.rows[place]


def test_a_number_that_means_another_row_in_another_epoch_stops_training(tmp_path):
    trainer = new_trainer(tmp_path, Reshuffled(random_rows()), gradient_accumulation_steps=1, max_steps=9)
    with pytest.raises(UnsupportedError, match="In optimizer step 6 another row came under number .*number_rows"):
        trainer.train()
    stage = stage_of(tmp_path)
    assert stage.status == "running"
    new_trainer(tmp_path / "b", Reshuffled(random_rows()), gradient_accumulation_steps=1, max_steps=6).train()
    assert stage_of(tmp_path / "b").num_rows == 22


def test_numbers_that_several_rows_share(tmp_path):
    rows = random_rows().add_column(ROW, [0, *range(21)]).to_iterable_dataset()
    with pytest.raises(UnsupportedError, match="step 0 another row came under number 0"):
        new_trainer(tmp_path, rows).train()
    rows = random_rows().add_column(ROW, [1 << 40, *range(21)]).to_iterable_dataset()
    with pytest.raises(DataError, match="numbers a row 1099511627776.*remove_columns"):
        new_trainer(tmp_path / "b", rows).train()


def test_workers_that_would_number_rows_alike_are_refused(tmp_path):
    trainer = new_trainer(tmp_path, TorchStream(random_rows()), dataloader_num_workers=2)
    with pytest.raises(UnsupportedError, match="2 dataloader workers read the stream.*`source_row`"):
        trainer.train()
    assert stage_of(tmp_path).num_steps == 0


def test_rows_that_are_no_dictionaries(tmp_path):
    with pytest.raises(DataError, match="yields a list, not a dictionary"):
        list(number_rows(type("Lists", (TorchStream,), {"__iter__": lambda self: iter([[1, 2]])})([])))


# ---- Crashes ----


@pytest.mark.parametrize("killed_after", [3, 5, 7])
@pytest.mark.parametrize("tokens", [1 << 22, 60], ids=["one file", "small files"])
def test_a_killed_run_resumes_to_the_same_rows(tmp_path, monkeypatch, killed_after, tokens):
    """In the first epoch, where the Trainer can go on with the next row."""
    monkeypatch.setattr("hf_source.recording.rows.streamed._TOKENS_PER_SHARD", tokens)
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "max_steps": 9}
    new_trainer(tmp_path / "whole", sharded(2), **settings).train()
    with pytest.raises(Killed):
        new_trainer(tmp_path, sharded(2), callbacks=[KillAfter(killed_after)], **settings).train()
    saved = killed_after - 1
    with pytest.raises(Killed):  # at once: the record is that of the checkpoint
        again = new_trainer(tmp_path, sharded(2), callbacks=[KillAfter(saved, "on_step_begin")], **settings)
        again.train(resume_from_checkpoint=True)
    stage = stage_of(tmp_path)
    assert stage.num_rows == stage.dataset["num_visited"] == 2 * saved and stage.rows()[ROW] == list(range(2 * saved))
    trainer = new_trainer(tmp_path, sharded(2), **settings)
    trainer.train(resume_from_checkpoint=True)
    whole, stage = stage_of(tmp_path / "whole"), stage_of(tmp_path)
    assert stage.dataset == whole.dataset and stage.num_rows == 18
    assert stage.rows().to_dict() == whole.rows().to_dict()
    assert_true(stage, trainer.model, recorded(whole))
    listed = set(stage.data["files"])
    on_disk = {p.relative_to(stage.record.path).as_posix() for p in (stage.record.path / "stages").rglob("*.parquet")}
    assert on_disk == {name for name in listed if name.endswith(".parquet")}


def test_resuming_in_a_later_epoch_records_what_really_happens(tmp_path, caplog):
    """The Trainer then starts the stream from its beginning; the gradient of a left-over micro-batch is lost."""
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 5}
    first = new_trainer(tmp_path, sharded(1), callbacks=[KillAfter(5)], **settings)
    with Spy(first.model, random_rows()["input_ids"]) as before, pytest.raises(Killed):
        first.train()
    second = new_trainer(tmp_path, sharded(1), **settings)
    with Spy(second.model, random_rows()["input_ids"]) as after, caplog.at_level("WARNING"):
        second.train(resume_from_checkpoint=True)
    assert "the Trainer starts the stream again" in caplog.text
    assert_true(stage_of(tmp_path), second.model, before.steps[:4] + after.steps)


def test_a_stream_that_changed_is_noticed_when_its_rows_come_again(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Killed):
        new_trainer(tmp_path, sharded(1), callbacks=[KillAfter(3)], **settings).train()
    other = random_rows(seed=5).to_iterable_dataset()
    with pytest.raises(UnsupportedError, match="another row came under number"):
        new_trainer(tmp_path, other, **settings).train(resume_from_checkpoint=True)


def test_memory_that_runs_out_drops_the_rows_of_the_attempt(tmp_path):
    class OutOfMemory(SourceTrainer):
        calls = 0

        def training_step(self, *args, **kwargs):
            self.calls += 1
            loss = super().training_step(*args, **kwargs)
            if self.calls == 6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss

    trainer = new_trainer(tmp_path, sharded(1), cls=OutOfMemory, auto_find_batch_size=True, num_segments=1)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    assert_true(stage_of(tmp_path), trainer.model, spy.steps)


# ---- What is stored ----


def test_rows_need_not_be_stored(tmp_path):
    trainer = new_trainer(tmp_path, sharded(1), record_rows=False)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    stage = stage_of(tmp_path)
    assert stage.rows() is None and stage.num_rows == 22
    with pytest.raises(DataError, match="the record does not hold them.*`dataset` to replay"):
        replay(stage)
    assert_true(stage, trainer.model, spy.steps, rows=random_rows())
    assert_true(stage, trainer.model, spy.steps, rows=sharded(1))
    rows = [dict(row) for row in random_rows()]
    rows[3]["input_ids"] = rows[3]["input_ids"][::-1]
    for other in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(DataError, match="row 3 is not the one that stage 'train' trained on"):
            replay(stage, other)
    with pytest.raises(DataError, match="lacks row 21"):
        replay(stage, random_rows().select(range(21)))


def test_raw_text_streams(tmp_path):
    rows = Dataset.from_dict({"text": [f"row {index} says {index * 7}" for index in range(12)]})
    model = tiny_gpt2(vocab_size=257, dtype=torch.float64)
    args = config(tmp_path, max_steps=5, max_length=10)
    stream = rows.to_iterable_dataset(num_shards=2)
    trainer = SourceTrainer(model, args, train_dataset=stream, eval_dataset=stream, processing_class=byte_tokenizer())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    stage = stage_of(tmp_path)
    assert stage.dataset["kind"] == "text" and stage.dataset["max_length"] == 10
    final = {name: p.detach() for name, p in model.named_parameters()}
    for given in (None, rows, stream):
        assert distance(dict(replay(stage, given).named_parameters()), final) < 1e-9


class PreparingTrainer(Trainer):
    """Filters and shuffles its stream, as TRL's trainers may."""

    def __init__(self, model, args, *, train_dataset, **kwargs):
        rows = train_dataset.filter(lambda row: len(row["input_ids"]) > 7).shuffle(seed=2, buffer_size=4)
        super().__init__(model, args, train_dataset=rows, data_collator=CausalLMCollator(), **kwargs)


class RecordedPreparingTrainer(RecordingMixin, PreparingTrainer):
    pass


def test_a_trainer_that_filters_and_shuffles_its_stream(tmp_path):
    trainer = new_trainer(tmp_path, sharded(2), cls=RecordedPreparingTrainer)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    stage = stage_of(tmp_path)
    long = [row for row, ids in enumerate(random_rows()["input_ids"]) if len(ids) > 7]
    assert sorted(set(spy.rows)) == stage.rows()[ROW] == long
    assert_true(stage, trainer.model, spy.steps)


def test_padding_is_not_part_of_a_row():
    rows = [dict(row) for row in random_rows(4)]
    batch, alone = CausalLMCollator()(rows), [CausalLMCollator()([row]) for row in rows]
    for place, row in enumerate(batch_tokens(batch, 4)):
        assert (
            row["input_ids"].tolist() == rows[place]["input_ids"] and row["labels"].tolist() == rows[place]["labels"]
        )
        assert row_hash(row) == row_hash(batch_tokens(alone[place], 1)[0])
    assert len({row_hash(row) for row in batch_tokens(batch, 4)}) == 4
    del batch["attention_mask"]  # then the tail without labels goes, but for one token that may be padding
    for place, row in enumerate(batch_tokens(batch, 4)):
        assert row["input_ids"].tolist()[: len(rows[place]["input_ids"])] == rows[place]["input_ids"]
        assert len(row["input_ids"]) <= len(rows[place]["input_ids"]) + 1
    assert batch_tokens({"pixel_values": torch.ones(4, 3)}, 4) is None
    assert batch_tokens(batch, 3) is None


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_on_sigterm_keeps_rows_of_whole_steps_only(tmp_path, event):
    """Even if it is saved by a callback that comes after the recorder's, in the middle of a step."""

    class Save(TrainerCallback):
        trainer = None

        def save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.trainer._save_checkpoint(self.trainer.model, None)
                raise Killed

    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
    whole = new_trainer(tmp_path / "whole", sharded(1), **settings)
    whole.train()
    save = Save()
    setattr(save, event, save.save)
    trainer = new_trainer(tmp_path, sharded(1), callbacks=[], **settings)
    save.trainer = trainer
    trainer.add_callback(save)
    with pytest.raises(Killed):
        trainer.train()
    stage = stage_of(tmp_path)
    assert stage.num_steps == 3 and stage.rows()[ROW] == list(range(6))
    second = new_trainer(tmp_path, sharded(1), **settings)
    second.train(resume_from_checkpoint=True)
    assert stage_of(tmp_path).rows().to_dict() == stage_of(tmp_path / "whole").rows().to_dict()
    assert recorded(stage_of(tmp_path)) == recorded(stage_of(tmp_path / "whole"))
