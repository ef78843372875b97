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
"""Whatever decides which rows an optimizer step sees: the record says what an independent spy saw, and replays."""

import numpy as np
import pytest
import torch
from cases import config, distance, random_rows, tiny_llama
from spy import Spy, recorded
from transformers import TrainerCallback

from hf_source.errors import RecordError, UnsupportedError
from hf_source.evaluation.retraining import retrain
from hf_source.recording import SourceTrainer, TrainingRecord, replay


class Killed(Exception):
    """Stands for a process that is killed."""


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def new_trainer(folder, rows=None, callbacks=(), cls=SourceTrainer, **settings):
    model = tiny_llama(dtype=torch.float64)
    rows = random_rows() if rows is None else rows
    return cls(model, config(folder, **settings), train_dataset=rows, callbacks=list(callbacks))


def stage_of(folder, name=None):
    record = TrainingRecord.load(folder / "record")
    assert record.verify() == []
    return record.stage(name)


def assert_true(stage, spy, model, rows=None, seen=None):
    """The record is what the spy saw (or `seen` of it), and its replay ends at the weights of training."""
    assert recorded(stage) == (spy.steps if seen is None else seen)
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, random_rows() if rows is None else rows).named_parameters())
    assert distance(again, final) <= 1e-9 * distance(stage.weights("initial"), final)


ORDERS = {
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "rebalanced": {"train_sampling_strategy": "batch_rebalance"},
    "two workers": {"dataloader_num_workers": 2, "num_train_epochs": 2},
    "last batch dropped": {"dataloader_drop_last": True, "gradient_accumulation_steps": 3},
    "stopped in mid-epoch": {"max_steps": 5},
    "not seedable": {"accelerator_config": {"use_seedable_sampler": False}},
    "columns kept": {"remove_unused_columns": False},
}


@pytest.mark.parametrize("settings", ORDERS.values(), ids=ORDERS)
def test_every_order_is_recorded_as_it_happened(tmp_path, settings):
    trainer = new_trainer(tmp_path, **settings)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    assert_true(stage_of(tmp_path), spy, trainer.model)


RESUMED = {name: ORDERS[name] for name in ("grouped", "rebalanced", "two workers", "last batch dropped")}
RESUMED |= {
    "not seedable": ORDERS["not seedable"],
    "data not skipped": {"ignore_data_skip": True},
    "grouped and not skipped": {"ignore_data_skip": True, **ORDERS["grouped"]},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_recorded_as_it_happened(tmp_path, caplog, settings):
    """Several of these draw another order after resuming: rows twice, or never. The record says so."""
    every_step = {"save_strategy": "steps", "save_steps": 1}
    first = new_trainer(tmp_path, callbacks=[KillAfter(3)], **settings | every_step)
    with Spy(first.model, random_rows()["input_ids"]) as before, pytest.raises(Killed):
        first.train()
    second = new_trainer(tmp_path, **settings | every_step)
    with Spy(second.model, random_rows()["input_ids"]) as after, caplog.at_level("WARNING"):
        # The third step's own checkpoint was not written any more.
        second.train(resume_from_checkpoint=True)
    order_changes = settings.keys() & {"ignore_data_skip", "accelerator_config"} or settings == ORDERS["grouped"]
    assert ("some rows train twice and others never" in caplog.text) == bool(order_changes)
    assert len(before.steps) == 3 and len(after.steps) > 2
    assert_true(stage_of(tmp_path), None, second.model, seen=before.steps[:2] + after.steps)


def test_a_grouped_order_really_changes_on_resuming(tmp_path):
    """The trap is there: otherwise the test above would show nothing."""
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1} | ORDERS["grouped"]
    first = new_trainer(tmp_path, callbacks=[KillAfter(2)], **settings)
    with Spy(first.model, random_rows()["input_ids"]) as before, pytest.raises(Killed):
        first.train()
    second = new_trainer(tmp_path, **settings)
    torch.manual_seed(99)  # another process
    with Spy(second.model, random_rows()["input_ids"]):
        second.train(resume_from_checkpoint=True)
    visits = sum(segment.num_visits() for segment in stage_of(tmp_path).segments)
    assert sum(visits) <= 22 and len(before.steps) == 2
    assert max(visits) == 2 and min(visits) == 0


# ---- train() twice ----

OPTIMIZERS = {"adamw": {}, "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_twice_with_one_trainer_records_two_stages(tmp_path, settings):
    """The Trainer keeps its optimizer, so the second stage starts with the moments of the first."""
    trainer = new_trainer(tmp_path, stage="one", max_steps=4, **settings)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
        between = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        with pytest.raises(RecordError, match="choose another `stage=`"):
            trainer.train()
        trainer.args.stage = "two"
        trainer.train()
    one, two = stage_of(tmp_path, "one"), stage_of(tmp_path, "two")
    assert len(spy.steps) == 8 and two.continues_parent and two.parent == "one"
    assert distance(one.weights("final"), between) == distance(two.weights("initial"), between) == 0
    assert recorded(one) == spy.steps[:4]
    assert_true(two, None, trainer.model, seen=spy.steps[4:])
    # The stored moments matter: a fresh optimizer ends elsewhere.
    two.data["optimizer_start"] = None
    final = dict(trainer.model.named_parameters())
    assert distance(dict(replay(two, random_rows()).named_parameters()), final) > 0.01 * distance(final, between)


def test_adams_bias_correction_is_over_when_a_stage_starts_warm(tmp_path):
    trainer = new_trainer(tmp_path, stage="one", max_steps=6, lr_scheduler_type="constant", num_segments=1)
    trainer.train()
    trainer.args.stage = "two"
    trainer.train()
    one, two = (stage_of(tmp_path, name) for name in ("one", "two"))
    # Adam's first gradients of a fresh run weigh up to (1 - beta1^6) / (1 - beta1) as much as those of a warm one.
    shares = [
        stage.segments[0].applied_weights().sum() / stage.segments[0].row_weights().sum() for stage in (one, two)
    ]
    made = np.arange(7, 13)
    by_hand = sum((0.1 * 0.9 ** (j - made[made <= j])).sum() / (1 - 0.9**j) for j in made) / 6
    assert shares[1] == pytest.approx(by_hand, rel=0.05)  # clip factors differ from step to step
    assert shares[1] < 0.75 * shares[0]


def test_what_starts_an_optimizer_afresh_refuses_a_stage_that_starts_warm(tmp_path):
    trainer = new_trainer(tmp_path, stage="one", max_steps=3)
    trainer.train()
    trainer.args.stage = "two"
    trainer.train()
    stages = TrainingRecord.load(tmp_path / "record").stages
    with pytest.raises(UnsupportedError, match="Stage 'two' began with moments.*a trainer of its own"):
        retrain(stages[1], random_rows(), np.ones((1, 22), dtype=bool))


def test_a_warm_stage_that_was_killed_resumes(tmp_path):
    settings = {"stage": "one", "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = new_trainer(tmp_path, **settings)
    trainer.train()
    trainer.args.stage, trainer.args.output_dir = "two", str(tmp_path / "out2")
    trainer.add_callback(KillAfter(3))
    with Spy(trainer.model, random_rows()["input_ids"]) as before, pytest.raises(Killed):
        trainer.train()
    second = new_trainer(tmp_path, **settings | {"stage": "two", "output_dir": str(tmp_path / "out2")})
    with Spy(second.model, random_rows()["input_ids"]) as after:
        second.train(resume_from_checkpoint=True)
    assert_true(stage_of(tmp_path, "two"), None, second.model, seen=before.steps[:2] + after.steps)


def test_moments_that_the_record_does_not_explain_are_warned_about(tmp_path, caplog):
    model = tiny_llama(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    trainer = SourceTrainer(model, config(tmp_path), train_dataset=random_rows(), optimizers=(optimizer, None))
    with Spy(model, random_rows()["input_ids"]) as spy, caplog.at_level("WARNING"):
        trainer.train()
    assert "carries moments of training that the record does not hold" in caplog.text
    assert_true(stage_of(tmp_path), spy, model)


# ---- auto_find_batch_size ----


class OutOfMemory(SourceTrainer):
    """Runs out of memory in some calls of `training_step`, after the backward pass, or in an optimizer step."""

    failing = ()
    calls = 0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.calls += 1
        if self.calls in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


def out_of_memory(*calls):
    return type("OutOfMemory", (OutOfMemory,), {"failing": calls})


@pytest.mark.parametrize("calls", [(1,), (2,), (2, 3)], ids=str)
def test_memory_that_runs_out_in_the_first_step(tmp_path, calls):
    trainer = new_trainer(tmp_path, cls=out_of_memory(*calls), auto_find_batch_size=True)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy:
        trainer.train()
    stage = stage_of(tmp_path)
    size = 4 - len(calls)  # each time nine tenths, rounded down
    assert stage.training["per_device_train_batch_size"] == size == len(spy.steps[0][0][0])
    assert stage.num_steps == stage.training["max_steps"] and stage.num_steps > 9
    assert_true(stage, spy, trainer.model)


@pytest.mark.parametrize("call", [5, 12], ids=["first segment", "second segment"])
def test_memory_that_runs_out_later(tmp_path, caplog, call):
    """The Trainer goes on from the weights it has, with another batch size and from the first row."""
    settings = {"auto_find_batch_size": True, "segment_boundaries": [4, 7]}
    trainer = new_trainer(tmp_path, cls=out_of_memory(call), **settings)
    with Spy(trainer.model, random_rows()["input_ids"]) as spy, caplog.at_level("WARNING"):
        trainer.train()
    stage = stage_of(tmp_path)
    made = (call - 1) // 2
    assert f"Memory ran out in optimizer step {made}" in caplog.text and "batches of 3 rows" in caplog.text
    assert [len(step[0][0]) for step in spy.steps[: made + 1]] == [4] * made + [3]
    assert stage.num_steps == made + stage.training["max_steps"]
    starts = [0, 4] if made > 4 else [0]
    assert [segment.first_step for segment in stage.segments] == [*starts, made + 4, made + 7]
    assert_true(stage, spy, trainer.model)


def test_memory_that_runs_out_again_after_a_restart_and_a_resumed_run(tmp_path):
    settings = {"auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 1}
    first = new_trainer(tmp_path, cls=out_of_memory(5, 8), callbacks=[KillAfter(3)], **settings)
    with Spy(first.model, random_rows()["input_ids"]) as before, pytest.raises(Killed):
        first.train()
    assert len(before.steps) == 2 + 1 + 3
    with pytest.raises(RecordError, match="was started with 18 steps and now has 33"):
        new_trainer(tmp_path, cls=out_of_memory(1), **settings).train(resume_from_checkpoint=True)
    second = new_trainer(tmp_path, **settings)
    with Spy(second.model, random_rows()["input_ids"]) as after:
        second.train(resume_from_checkpoint=True)
    assert_true(stage_of(tmp_path), None, second.model, seen=before.steps[:-1] + after.steps)


def test_memory_that_runs_out_where_weights_and_moments_part(tmp_path):
    settings = {"auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        new_trainer(tmp_path, callbacks=[KillAfter(3)], **settings).train()
    with pytest.raises(UnsupportedError, match="Memory ran out after resuming.*auto_find_batch_size=False"):
        new_trainer(tmp_path, cls=out_of_memory(4), **settings).train(resume_from_checkpoint=True)

    class InUpdate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer = new_trainer(tmp_path / "b", auto_find_batch_size=True)
    trainer.callback_handler.callbacks.insert(0, InUpdate())
    with pytest.raises(UnsupportedError, match="Memory ran out in an update"):
        trainer.train()
