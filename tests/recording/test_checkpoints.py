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
"""A run goes on from the newest checkpoint that is complete and part of its past; others are named and left alone."""

import json
import shutil
import zipfile

import pytest
from cases import config, random_rows, tiny_gpt2, train
from resuming import KillAfter, Killed, assert_same_record, run

from hf_source.errors import RecordError
from hf_source.recording import SourceTrainer, TrainingRecord


@pytest.fixture()
def killed(tmp_path):
    """A run with checkpoints 2 and 4, dead after step 5."""
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(5)])
    return tmp_path


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def test_the_structure_of_a_torn_archive_is_seen(killed):
    """What the cheap check rests on: torch's files are zip archives with the directory at their end."""
    file = killed / "out" / "checkpoint-4" / "optimizer.pt"
    assert zipfile.is_zipfile(file)
    cut(file)
    assert not zipfile.is_zipfile(file)


DAMAGE = [
    ("source_recording.json", cut, "source_recording.json is damaged"),
    ("source_recording.json", lambda file: file.unlink(), "holds no recording"),
    ("source_recording.safetensors", cut, "its hash differs"),
    ("trainer_state.json", cut, "trainer_state.json cannot be read .JSONDecodeError"),
    ("trainer_state.json", lambda file: file.unlink(), "trainer_state.json cannot be read .FileNotFoundError"),
    ("model.safetensors", cut, "model.safetensors is torn"),
    ("model.safetensors", lambda file: file.unlink(), "is missing"),
    ("optimizer.pt", cut, "optimizer.pt is torn"),
    ("optimizer.pt", lambda file: file.unlink(), r"optimizer\* is missing"),
    ("scheduler.pt", lambda file: file.unlink(), "scheduler.pt is missing"),
    ("rng_state.pth", lambda file: file.unlink(), r"rng_state\*.pth is missing"),
    ("rng_state.pth", lambda file: file.write_bytes(b""), "rng_state.pth is torn"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE)
def test_a_torn_checkpoint_is_passed_over(killed, whole, caplog, name, damage, said):
    damage(killed / "out" / "checkpoint-4" / name)
    left = sorted(path.name for path in (killed / "out" / "checkpoint-4").iterdir())
    with pytest.raises(RecordError, match=f"checkpoint-4.*{said}"):
        run(killed, resume=str(killed / "out" / "checkpoint-4"))
    assert sorted(path.name for path in (killed / "out" / "checkpoint-4").iterdir()) == left
    with caplog.at_level("WARNING"):
        run(killed, resume=True)
    assert "Resuming from checkpoint-2, since a newer checkpoint is of no use" in caplog.text
    assert_same_record(TrainingRecord.load(killed / "record"), whole)


def test_when_no_checkpoint_is_left_all_reasons_are_given(killed):
    for step in (2, 4):
        cut(killed / "out" / f"checkpoint-{step}" / "optimizer.pt")
    said = r"no checkpoint in .* overwrite_stage=True[\s\S]*checkpoint-4 is not complete[\s\S]*checkpoint-2 is not"
    with pytest.raises(RecordError, match=said):
        run(killed, resume=True)


def test_a_missing_shard_is_seen(killed):
    folder = killed / "out" / "checkpoint-4"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecordError, match="model-00002-of-00002.safetensors is missing"):
        run(killed, resume=str(folder))


def test_what_a_run_has_gone_back_from_is_no_longer_its_past(tmp_path, whole, caplog):
    """After going back to step 2, checkpoints 4 to 9 of the first attempt lead nowhere."""
    run(tmp_path)
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(3)], resume=str(tmp_path / "out" / "checkpoint-2"))
    with pytest.raises(RecordError, match="checkpoint-6 is of step 6, but the run has gone back to step 2 since"):
        run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-6"))
    with caplog.at_level("WARNING"):
        run(tmp_path, resume=True)
    assert "Resuming from checkpoint-2" in caplog.text
    record = TrainingRecord.load(tmp_path / "record")
    assert [attempt["first_step"] for attempt in record.stage().data["attempts"]] == [2, 2]
    assert record.verify() == []
    assert_same_record(record, whole)


def test_a_checkpoint_of_a_forgotten_attempt_is_refused_though_the_record_is_long_enough(tmp_path):
    """It was saved at a step that the later attempt passed in its own way."""
    run(tmp_path)
    old = shutil.copytree(tmp_path / "out" / "checkpoint-6", tmp_path / "old")
    run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-2"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    old.rename(tmp_path / "out" / "checkpoint-6")
    assert TrainingRecord.load(tmp_path / "record").stage().num_steps == 9
    with pytest.raises(RecordError, match="checkpoint-6 is of step 6, but the run has gone back to step 2 since"):
        run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-6"))


def test_checkpoints_of_two_stages_in_one_folder(tmp_path):
    """The later stage does not take a higher numbered checkpoint of the stage before for its own."""
    run(tmp_path)
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(3)], stage="second")
    run(tmp_path, resume=True, stage="second")
    record = TrainingRecord.load(tmp_path / "record")
    assert record.verify() == [] and [stage.num_steps for stage in record.stages] == [9, 9]


def test_a_checkpoint_folder_of_an_earlier_run_is_no_part_of_a_new_one(tmp_path, monkeypatch):
    """Killed while it writes over checkpoint-2 of the run that it replaces: a mixture must not seem complete."""
    run(tmp_path)
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    assert state.is_file()

    def die(self, *args, **kwargs):
        raise Killed

    monkeypatch.setattr(SourceTrainer, "save_model", die)
    with pytest.raises(Killed):
        run(tmp_path, overwrite_stage=True, learning_rate=1e-3)
    assert not state.exists()
    with pytest.raises(RecordError, match="There is no checkpoint"):
        run(tmp_path, resume=True, learning_rate=1e-3)


def test_a_run_that_was_killed_after_its_last_step_makes_no_further_one(tmp_path, monkeypatch):
    """Transformers 5.23 makes one step more when it resumes from the last one and that was in mid-epoch."""

    def die(*args):
        raise Killed

    run(tmp_path / "whole", max_steps=5)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("hf_source.recording.recorder.StageRecorder.finish", die)
        run(tmp_path / "killed", max_steps=5)
    run(tmp_path / "killed", max_steps=5, resume=True)
    first, second = (TrainingRecord.load(tmp_path / name / "record") for name in ("whole", "killed"))
    assert_same_record(first, second)


def test_few_kept_checkpoints_change_nothing(tmp_path, whole):
    run(tmp_path, save_total_limit=1)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-9"]
    assert_same_record(TrainingRecord.load(tmp_path / "record"), whole)


def test_few_kept_checkpoints_resume(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(7)], save_total_limit=1)
    run(tmp_path, resume=True, save_total_limit=1)
    assert_same_record(TrainingRecord.load(tmp_path / "record"), whole)


def test_checkpoints_of_weights_alone_are_recorded_but_not_resumed(tmp_path, whole):
    run(tmp_path / "done", save_only_model=True)
    assert_same_record(TrainingRecord.load(tmp_path / "done" / "record"), whole)
    with pytest.raises(Killed):
        run(tmp_path / "killed", callbacks=[KillAfter(5)], save_only_model=True)
    with pytest.raises(RecordError, match="holds no recording .*save_only_model"):
        run(tmp_path / "killed", resume=True, save_only_model=True)


class Scripted(SourceTrainer):
    """Its best step is 4."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(abs(self.state.global_step - 4))}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


BEST = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "num_segments": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


@pytest.mark.parametrize("settings", [{"save_total_limit": 1}, {"save_total_limit": 2, "save_only_model": True}])
def test_the_best_checkpoint_is_kept_and_is_where_the_record_ends(tmp_path, settings):
    rows = random_rows()
    Scripted(tiny_gpt2(), config(tmp_path, **BEST, **settings), train_dataset=rows, eval_dataset=rows).train()
    record = TrainingRecord.load(tmp_path / "record")
    assert record.verify() == [] and record.stage().num_steps == 4 and record.stage().status == "complete"


def test_a_run_that_is_killed_on_its_way_to_the_best_checkpoint(tmp_path, monkeypatch):
    """The record has gone back to step 4 then; checkpoints 6 to 9 are no longer part of it."""
    rows = random_rows()

    def trainer(name):
        return Scripted(tiny_gpt2(), config(tmp_path / name, **BEST), train_dataset=rows, eval_dataset=rows)

    def die(*args):
        raise Killed

    trainer("whole").train()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("hf_source.recording.recorder.StageRecorder.finish", die)
        trainer("killed").train()
    assert TrainingRecord.load(tmp_path / "killed" / "record").stage().num_steps == 4
    trainer("killed").train(resume_from_checkpoint=True)
    first, second = (TrainingRecord.load(tmp_path / name / "record") for name in ("whole", "killed"))
    assert second.verify() == []
    assert_same_record(first, second)


# ---- What dead writers leave ----


def test_leftovers_of_dead_writers_are_removed_when_the_run_goes_on(killed, whole):
    root = killed / "record"
    left = [root / ".record.json.1.tmp", root / "stages" / "0-train" / "segments" / "0" / ".parameters.2.tmp"]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("torn")
    (root / ".tokenizer.3.tmp").mkdir()
    assert TrainingRecord.load(root).verify() == []  # a reader is not disturbed
    run(killed, resume=True)
    assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]
    assert_same_record(TrainingRecord.load(root), whole)


def test_a_damaged_stage_can_be_trained_again(tmp_path):
    """As the error about its damage says."""
    model = tiny_gpt2()
    train(tmp_path, model, stage="first")
    train(tmp_path, model, stage="second")
    (tmp_path / "record" / "stages" / "1-second" / "final.safetensors").unlink()
    with pytest.raises(RecordError, match="final.safetensors is damaged: it is missing.*overwrite_stage=True"):
        TrainingRecord.load(tmp_path / "record").stage("second")
    train(tmp_path, tiny_gpt2(), stage="second", overwrite_stage=True)
    assert TrainingRecord.load(tmp_path / "record").verify() == []


def test_damage_to_an_earlier_stage_stops_a_new_one(tmp_path):
    train(tmp_path, tiny_gpt2(), stage="first")
    (tmp_path / "record" / "stages" / "0-first" / "final.safetensors").unlink()
    with pytest.raises(RecordError, match="final.safetensors is damaged"):
        train(tmp_path, tiny_gpt2(), stage="second")
