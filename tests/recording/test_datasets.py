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
"""Training sets of every make: the record names the rows of the dataset that the user passed."""

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, config, distance, random_rows, tiny_gpt2, tiny_llama
from datasets import Dataset, concatenate_datasets
from spy import Spy, recorded
from transformers import Trainer, TrainingArguments

from hf_source import number_rows
from hf_source.data import ROW, CausalLMCollator, prepare_rows
from hf_source.errors import DataError
from hf_source.recording import RecordingMixin, SourceTrainer, TrainingRecord, replay


def train(folder, rows, cls=SourceTrainer, model=None, collator=None, **settings):
    model = tiny_llama(dtype=torch.float64) if model is None else model
    trainer = cls(model, config(folder, num_train_epochs=2, **settings), collator, train_dataset=rows)
    with Spy(model, random_rows()["input_ids"]) as spy:
        trainer.train()
    record = TrainingRecord.load(folder / "record")
    assert record.verify() == []
    return record.stage(), spy, model


def assert_replays(stage, model, rows=None):
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, rows).named_parameters())
    assert distance(again, final) <= 1e-9 * distance(stage.weights("initial"), final)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        return {name: torch.tensor(value) for name, value in random_rows()[index].items()}


def halves():
    rows = random_rows()
    return concatenate_datasets([rows.select(range(9)), rows.select(range(9, 22)).shuffle(seed=1)])


def transformed():
    """Tokens are made when a row is asked for, and the transform drops every other column."""
    coded = Dataset.from_dict({"code": [" ".join(map(str, ids)) for ids in random_rows()["input_ids"]]})
    return coded.with_transform(lambda batch: {"input_ids": [[int(t) for t in c.split()] for c in batch["code"]]})


ORDER = np.random.default_rng(0).permutation(22)

# name: the dataset, and the row of `random_rows` that its row n is
DATASETS = {
    "list": (lambda: [dict(row) for row in random_rows()], range(22)),
    "torch": (Rows, range(22)),
    "torch format": (lambda: random_rows().with_format("torch"), range(22)),
    "transform": (transformed, range(22)),
    "transform with numbers": (
        lambda: (
            transformed()
            .with_format(None)
            .add_column(ROW, ORDER)
            .with_transform(lambda batch: {"input_ids": [[int(t) for t in c.split()] for c in batch["code"]]})
        ),
        np.argsort(ORDER),
    ),
    "shuffled before": (lambda: random_rows().shuffle(seed=3), None),
    "selected and filtered before": (
        lambda: random_rows().select(range(20, 0, -1)).filter(lambda row: len(row["input_ids"]) > 6),
        None,
    ),
    "concatenated": (halves, None),
    "numbered, then filtered": (
        lambda: number_rows(random_rows()).filter(lambda row: len(row["input_ids"]) > 6).shuffle(seed=1),
        range(22),
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_those_of_the_dataset_that_was_passed(tmp_path, name):
    make, meaning = DATASETS[name]
    rows = make()
    if meaning is None:
        place = {tuple(ids): row for row, ids in enumerate(random_rows()["input_ids"])}
        meaning = [place[tuple(ids)] for ids in rows["input_ids"]]
    transform = "transform" in name
    stage, spy, model = train(tmp_path, rows, remove_unused_columns=not transform)
    named = [[([int(meaning[row]) for row in b], n) for b, n in step] for step in recorded(stage)]
    assert named == spy.steps and len(spy.steps) >= 4
    assert_replays(stage, model)  # from the rows in the record
    assert_replays(stage, model, make())


class InLoader(Trainer):
    """Drops and changes rows where the dataloader is made."""

    def get_train_dataloader(self):
        kept = self.train_dataset.filter(lambda row: len(row["input_ids"]) > 6)
        self.train_dataset, whole = (
            kept.map(lambda row: {"labels": row["input_ids"]}).shuffle(seed=5),
            self.train_dataset,
        )
        loader = super().get_train_dataloader()
        self.train_dataset = whole
        return loader


class RecordedInLoader(RecordingMixin, InLoader):
    pass


def test_a_trainer_that_changes_rows_where_the_dataloader_is_made(tmp_path):
    """Identity holds; the rows in the record are those of the training set, so a replay is given the changed ones."""
    rows = random_rows()
    stage, spy, model = train(tmp_path, rows, RecordedInLoader, collator=CausalLMCollator())
    assert recorded(stage) == spy.steps
    assert set(spy.rows) == {row for row, ids in enumerate(rows["input_ids"]) if len(ids) > 6}


def test_a_shuffled_dataset_is_not_copied_to_be_numbered(monkeypatch):
    """Adding a column to a list of indices into a table copies the rows, one by one."""
    monkeypatch.setattr(Dataset, "flatten_indices", lambda *args, **kwargs: pytest.fail("the rows are copied"))
    for rows in (
        random_rows().shuffle(seed=0),
        random_rows().select([7, 3, 12]),
        random_rows().with_format("torch").shuffle(seed=1),
    ):
        numbered = number_rows(rows)
        assert numbered.with_format(None)[ROW][:] == list(range(len(rows)))
        assert numbered.with_format(None)["input_ids"][:] == rows.with_format(None)["input_ids"][:]
    monkeypatch.undo()
    twice = number_rows(random_rows().select([7, 3, 7]))
    assert twice[ROW][:] == [0, 1, 2] and twice["input_ids"][0] == twice["input_ids"][2]


@pytest.mark.parametrize("remove", [True, False])
def test_evaluation_while_training(tmp_path, remove):
    """The collator is shared with evaluation, whose rows may be numbered too; what it saw is not recorded."""
    model = tiny_llama(dtype=torch.float64)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "remove_unused_columns": remove, "eval_on_start": True}
    held_out = random_rows(6, seed=9)
    for name, rows in {"numbered": number_rows(held_out), "plain": held_out, "list": list(held_out)}.items():
        model = tiny_llama(dtype=torch.float64)
        args = config(tmp_path / name, **settings)
        trainer = SourceTrainer(model, args, train_dataset=random_rows(), eval_dataset=rows)
        with Spy(model, random_rows()["input_ids"]) as spy:
            trainer.train()
        assert recorded(TrainingRecord.load(tmp_path / name / "record").stage()) == spy.steps
        assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == 6


def test_numbers_that_several_rows_share_are_refused(tmp_path):
    rows = random_rows().add_column(ROW, [0, *range(21)])
    with pytest.raises(DataError, match="`source_row` must hold a different whole number.*remove_columns"):
        SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=rows)
    coded = transformed().with_format(None).add_column(ROW, [0, *range(21)]).with_transform(lambda batch: batch)
    with pytest.raises(DataError, match="different whole number"):
        SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=coded)


def test_plain_arguments_and_a_trainer_without_rows(tmp_path):
    """A trainer may be made for evaluation alone."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = SourceTrainer(tiny_llama(), args, eval_dataset=random_rows())
    assert trainer.evaluate()["eval_loss"] > 0


def test_text_of_lists_is_recorded(tmp_path):
    rows = prepare_rows(Dataset.from_dict({"text": ["one", "two", "three", "four"]}), byte_tokenizer())
    model = tiny_gpt2(vocab_size=260)
    args = config(tmp_path, num_segments=1)
    SourceTrainer(model, args, train_dataset=[dict(row) for row in rows], processing_class=byte_tokenizer()).train()
    kept = TrainingRecord.load(tmp_path / "record").stage().rows()
    assert kept["text"] == rows["text"] and kept["input_ids"] == rows["input_ids"] and kept[ROW] == [0, 1, 2, 3]
