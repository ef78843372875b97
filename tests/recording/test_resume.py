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
"""A run that was killed and resumed leaves the record of a run that was not."""

import json
import shutil

import pytest
import torch
from cases import config, random_rows, tiny_gpt2, tiny_llama, train
from resuming import KillAfter, Killed, assert_same_record, assert_same_tensors, run
from transformers import TrainerCallback

from hf_source.errors import RecordError
from hf_source.recording import SourceTrainer, TrainingRecord, replay


@pytest.mark.parametrize("steps_per_shard", [500, 3])
@pytest.mark.parametrize(
    ("killed_after", "event"),
    [
        (3, "on_step_end"),
        (7, "on_step_end"),
        (5, "on_pre_optimizer_step"),
        (4, "on_step_begin"),
        (6, "on_substep_end"),
    ],
)
def test_a_killed_run_resumes_to_the_same_record(tmp_path, monkeypatch, whole, killed_after, event, steps_per_shard):
    monkeypatch.setattr("hf_source.recording.recorder.STEPS_PER_SHARD", steps_per_shard)
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(killed_after, event)])
    stage = TrainingRecord.load(tmp_path / "record").stage()
    assert stage.status == "running" and 2 <= stage.num_steps <= killed_after + 1
    with pytest.raises(RecordError, match="is not complete: training stopped after step"):
        stage.build_model()
    run(tmp_path, resume=True)
    record = TrainingRecord.load(tmp_path / "record")
    assert record.verify() == []
    assert_same_record(record, whole)


def test_resuming_from_an_earlier_checkpoint_cuts_the_record_back(tmp_path, monkeypatch, whole):
    """From before the segment's end, with step files that reach over the checkpoint; even after the run was done."""
    monkeypatch.setattr("hf_source.recording.recorder.STEPS_PER_SHARD", 5)
    run(tmp_path, save_steps=3)
    complete = TrainingRecord.load(tmp_path / "record")
    assert complete.stage().status == "complete"
    monkeypatch.setattr("hf_source.recording.recorder.STEPS_PER_SHARD", 500)
    run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-3"), save_steps=3)
    record = TrainingRecord.load(tmp_path / "record")
    assert record.verify() == []
    assert_same_record(record, whole)
    listed = set(record.stage().data["files"])
    on_disk = {p.relative_to(record.path).as_posix() for p in (record.path / "stages").rglob("*") if p.is_file()}
    assert on_disk == listed


def test_a_step_file_that_straddles_the_checkpoint_is_cut(tmp_path, whole):
    """Checkpoints flush, so this takes a record whose step files were merged by hand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hf_source.recording.writer import file_entry

    run(tmp_path)
    root = tmp_path / "record"
    data = json.loads((root / "record.json").read_text())
    files = data["stages"][0]["files"]
    shards = sorted(name for name in files if "/steps/" in name)
    merged = pa.concat_tables([pq.read_table(root / name) for name in shards])
    for name in shards:
        (root / name).unlink()
        del files[name]
    name = "stages/0-train/steps/00000000-00000009.parquet"
    pq.write_table(merged, root / name)
    files[name] = file_entry(root / name)
    (root / "record.json").write_text(json.dumps(data))
    run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-4"))
    assert_same_record(TrainingRecord.load(root), whole)


def test_resume_with_sgd_and_averages_on_cpu(tmp_path):
    settings = {"optim": "sgd", "optim_args": "momentum=0.9", "record_averages_on_cpu": True}
    run(tmp_path / "whole", tiny_gpt2, **settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny_gpt2, [KillAfter(7)], **settings)
    run(tmp_path / "killed", tiny_gpt2, resume=True, **settings)
    first, second = (TrainingRecord.load(tmp_path / name / "record") for name in ("whole", "killed"))
    assert_same_record(first, second)


def test_the_best_checkpoint_is_where_the_record_ends(tmp_path):
    """With load_best_model_at_end, the model's history stops at the checkpoint that was loaded."""

    class Scripted(SourceTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": abs(self.state.global_step - 4)}

    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_segments": 2,
    }
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    model = tiny_llama(dtype=torch.float64)
    rows = random_rows()
    trainer = Scripted(model, config(tmp_path, **settings), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    record = TrainingRecord.load(tmp_path / "record")
    assert record.verify() == []
    stage = record.stage()
    assert stage.num_steps == len(stage.steps()) == 4 and stage.segments[-1].end_step == 4
    assert_same_tensors(stage.weights("final"), {n: p.detach() for n, p in model.named_parameters()})
    for name, parameter in replay(stage, rows).named_parameters():
        torch.testing.assert_close(parameter, stage.weights("final")[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_on_sigterm_is_of_whole_steps(tmp_path, whole, event):
    """The Trainer's own callback saves in the middle of a step; what is half done does not count."""

    class Terminate(TrainerCallback):
        def terminate(self, args, state, control, **kwargs):
            if state.global_step == 5:
                jit.jit_manager.is_checkpoint_requested = True

    settings = {"save_strategy": "no", "num_segments": 2, "enable_jit_checkpoint": True}
    trainer = SourceTrainer(tiny_llama(), config(tmp_path, **settings), train_dataset=random_rows())
    jit = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback")
    terminate = Terminate()
    setattr(terminate, event, terminate.terminate)
    trainer.callback_handler.callbacks.insert(0, terminate)
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
    assert TrainingRecord.load(tmp_path / "record").stage().num_steps in (5, 6)
    run(tmp_path, resume=True, save_strategy="no")
    assert_same_record(TrainingRecord.load(tmp_path / "record"), whole)


def test_early_stopping_leaves_a_complete_record_of_what_was_trained(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 6

    run(tmp_path, callbacks=[Stop()])
    stage = TrainingRecord.load(tmp_path / "record").stage()
    assert stage.status == "complete" and stage.num_steps == 6
    assert [(s.first_step, s.end_step) for s in stage.segments] == [(0, 4), (4, 6)]


# ---- What cannot be resumed is refused ----


@pytest.fixture()
def killed(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(5)])
    return tmp_path


def test_checkpoint_of_another_record(killed):
    shutil.rmtree(killed / "record")
    with pytest.raises(RecordError, match="not in the record"):
        run(killed, resume=True)


def test_checkpoint_of_another_stage(killed):
    with pytest.raises(RecordError, match="is of stage 'train', the config says 'sft'"):
        run(killed, resume=True, stage="sft")


def test_other_length(killed):
    with pytest.raises(RecordError, match="was started with 9 steps and now has 12"):
        run(killed, resume=True, num_train_epochs=4)


def test_other_rows(killed):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_segments": 2}
    other = SourceTrainer(tiny_llama(), config(killed, **settings), train_dataset=random_rows(seed=9))
    with pytest.raises(RecordError, match="The training set changed since stage 'train' was started"):
        other.train(resume_from_checkpoint=True)


def test_a_new_stage_after_an_unfinished_one(killed):
    with pytest.raises(RecordError, match="'train' .* training stopped after step 4.*or train it anew with overwrite"):
        train(killed, tiny_llama(), stage="second")
    run(killed, resume=True)  # nothing was lost


def test_a_stage_with_successors(tmp_path):
    run(tmp_path)
    train(tmp_path, tiny_llama(), stage="second")
    with pytest.raises(RecordError, match="stage 'second' was trained from its result.*overwrite_stage=True"):
        run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-4"))
    assert [stage.status for stage in TrainingRecord.load(tmp_path / "record").stages] == ["complete", "complete"]


def test_killed_before_the_first_checkpoint(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(1)])
    with pytest.raises(RecordError, match="no checkpoint in .* overwrite_stage=True"):
        run(tmp_path, resume=True)
    with pytest.raises(RecordError, match="already .running, 0 steps.: continue it with"):
        run(tmp_path)
    run(tmp_path, overwrite_stage=True)
    assert TrainingRecord.load(tmp_path / "record").stage().status == "complete"
