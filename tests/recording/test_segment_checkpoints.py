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
"""Weights stored along a segment (`checkpoints_per_segment`): where, which, and that they outlast interruptions."""

import json
import shutil

import numpy as np
import pytest
from cases import config, random_rows, tiny_gpt2, tiny_llama, train
from peft import LoraConfig, get_peft_model
from resuming import KillAfter, Killed, assert_same_record, assert_same_tensors, run
from transformers import TrainerCallback

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.errors import ConfigError, RecordError
from hf_source.recording.segment_plan import plan_checkpoints
from hf_source.recording.writer import file_entry


# PEFT asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TWO = {"checkpoints_per_segment": 2}


class Watch(TrainerCallback):
    """Weights before every step."""

    def __init__(self):
        self.weights = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in trained.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, **TWO)
    return TrainingRecord.load(folder / "record")


def steps_of(record):
    return [segment.checkpoint_steps for segment in record.stage().segments]


def assert_same_checkpoints(record, other):
    assert_same_record(record, other)
    assert steps_of(record) == steps_of(other)
    for one, two in zip(record.stage().segments, other.stage().segments, strict=True):
        for step in one.checkpoint_steps:
            assert_same_tensors(one.checkpoint(step), two.checkpoint(step))
    listed = set(record.stage().data["files"])
    on_disk = {p.relative_to(record.path).as_posix() for p in (record.path / "stages").rglob("*") if p.is_file()}
    assert on_disk == listed


@pytest.mark.parametrize("per_segment", [1, 2, 3])
def test_checkpoints_are_the_middles_of_equal_shares(per_segment):
    rates = np.concatenate([np.linspace(0.1, 1.0, 30), np.linspace(1.0, 0.0, 70)])
    starts = [0, 28, 52]
    steps = plan_checkpoints(100, rates, starts, per_segment)
    assert len(steps) == 3 * per_segment and steps == sorted(set(steps))
    before = np.concatenate([[0.0], np.cumsum(rates)])
    for number, (start, end) in enumerate(zip(starts, [28, 52, 100], strict=True)):
        own = steps[number * per_segment : (number + 1) * per_segment]
        shares = (before[own] - before[start]) / (before[end] - before[start])
        wanted = (2 * np.arange(per_segment) + 1) / (2 * per_segment)
        # A step is never farther off than half of the largest learning rate.
        assert abs(shares - wanted).max() <= 0.5 / (before[end] - before[start])


def test_checkpoints_of_short_segments():
    assert plan_checkpoints(9, None, [0, 3], 0) == []
    assert plan_checkpoints(4, None, [0, 2], 2) == [0, 1, 2, 3]
    assert plan_checkpoints(4, np.zeros(4), [0, 2], 1) == [1, 3]
    assert plan_checkpoints(4, np.array([1.0, 0.0, 0.0, 0.0]), [0], 3) == [0, 1, 2]
    with pytest.raises(ConfigError, match="checkpoints_per_segment=3 do not fit into the 2 steps.*at most 2"):
        plan_checkpoints(5, None, [0, 3], 3)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_settings_that_are_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="checkpoints_per_segment=.* must be a whole number: 0 for none"):
        config(tmp_path, checkpoints_per_segment=value)


def test_too_many_for_the_run_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="checkpoints_per_segment=9 do not fit"):
        train(tmp_path, tiny_llama(), checkpoints_per_segment=9)


@pytest.mark.parametrize("settings", [{}, {"optim": "sgd", "record_averages_on_cpu": True}])
def test_the_weights_are_those_before_the_step(tmp_path, settings):
    watch = Watch()
    _, record = train(tmp_path, tiny_gpt2(), trainer={"callbacks": [watch]}, **TWO, **settings)
    stage = record.stage()
    planned = stage.data["planned_checkpoints"]
    assert steps_of(record) == [planned[:2], planned[2:4], planned[4:]]
    for segment in stage.segments:
        assert all(segment.first_step <= step < segment.end_step for step in segment.checkpoint_steps)
        for step in segment.checkpoint_steps:
            assert_same_tensors(segment.checkpoint(step), watch.weights[step])
            model = stage.build_model()
            stage.load_weights(model, (segment.index, step))
            assert_same_tensors(dict(model.named_parameters()), watch.weights[step])
    assert record.verify(replay=100) == []
    with pytest.raises(RecordError, match="holds no weights of step 1000; it has .*checkpoints_per_segment=2"):
        stage.segments[0].checkpoint(1000)


def test_none_are_stored_unless_asked_for(tmp_path):
    _, record = train(tmp_path, tiny_gpt2())
    assert steps_of(record) == [[], [], []]
    assert not list(record.path.rglob("weights-*")) and "planned_checkpoints" not in record.stage().data
    with pytest.raises(RecordError, match="it has none"):
        record.stage().segments[0].checkpoint(1)


def test_of_an_adapter_only_what_trains_is_stored(tmp_path):
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    watch = Watch()
    _, record = train(tmp_path, model, trainer={"callbacks": [watch]}, **TWO)
    segment = record.stage().segments[1]
    for step in segment.checkpoint_steps:
        assert set(segment.checkpoint(step)) == set(record.stage().trainable)
        assert_same_tensors(segment.checkpoint(step), watch.weights[step])


@pytest.mark.parametrize("killed_after", [2, 3, 4, 5, 7, 8])
def test_a_killed_run_has_the_same_checkpoints(tmp_path, whole, killed_after):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[KillAfter(killed_after)], save_steps=1, **TWO)
    run(tmp_path, resume=True, save_steps=1, **TWO)
    record = TrainingRecord.load(tmp_path / "record")
    assert record.verify() == []
    assert_same_checkpoints(record, whole)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_going_back_forgets_later_checkpoints(tmp_path, whole, step):
    """Also where the run had been complete: its segments are open again, with what was stored on the way."""
    run(tmp_path, save_steps=1, **TWO)
    run(tmp_path, resume=str(tmp_path / "out" / f"checkpoint-{step}"), save_steps=1, **TWO)
    assert_same_checkpoints(TrainingRecord.load(tmp_path / "record"), whole)


def test_a_run_that_stops_early_keeps_those_that_it_reached(tmp_path, whole):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    run(tmp_path, callbacks=[Stop()], save_steps=1, **TWO)
    record = TrainingRecord.load(tmp_path / "record")
    assert record.stage().num_steps == 6
    assert [step for steps in steps_of(record) for step in steps] == [
        step for steps in steps_of(whole) for step in steps if step < 6
    ]
    run(tmp_path, resume=True, save_steps=1, **TWO)
    assert_same_checkpoints(TrainingRecord.load(tmp_path / "record"), whole)


def test_a_torn_checkpoint_is_found(tmp_path, whole):
    folder = shutil.copytree(whole.path, tmp_path / "record")
    file = sorted(folder.rglob("weights-*"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (problem,) = TrainingRecord.load(folder).verify()
    assert file.name in str(problem)


def test_weights_of_another_moment_do_not_replay(tmp_path, whole):
    folder = shutil.copytree(whole.path, tmp_path / "record")
    files = sorted(folder.rglob("weights-*"))
    shutil.copyfile(files[-1], files[1])
    relist(folder, files[1])
    assert TrainingRecord.load(folder).verify() == []
    (problem,) = TrainingRecord.load(folder).verify(replay=100)
    assert "leaves the record at checkpoint" in str(problem)


def relist(folder, file):
    data = json.loads((folder / "record.json").read_text())
    data["stages"][0]["files"][file.relative_to(folder).as_posix()] = file_entry(file)
    (folder / "record.json").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def queries():
    return Queries.from_dataset(random_rows(2, seed=5))


def scores(path, queries, **settings):
    settings = {"num_samples": 16, "progress": False} | settings
    return SourceAttributor.from_record(path, **settings).scores(None, queries)


@pytest.mark.parametrize("curvature", ["joint", "ekfac", "diagonal", "identity"])
def test_source_takes_the_checkpoints_and_fast_source_the_averages(whole, queries, curvature):
    source = scores(whole.path, queries, curvature=curvature)
    fast = scores(whole.path, queries, curvature=curvature, method="fast-source")
    assert np.isfinite(source).all() and np.abs(source - fast).max() > 1e-4 * np.abs(fast).max()
    averages = scores(whole.path, queries, curvature=curvature, checkpoints=False)
    np.testing.assert_array_equal(averages, fast)
    small = scores(whole.path, queries, curvature=curvature, memory_budget=1000)
    np.testing.assert_allclose(small, source, rtol=1e-3, atol=1e-4 * np.abs(source).max())


def test_with_a_checkpoint_at_the_averages_both_are_the_same(tmp_path, queries):
    train(tmp_path, tiny_llama(), checkpoints_per_segment=1)
    folder = tmp_path / "record"
    before = scores(folder, queries)
    for file in folder.rglob("weights-*"):
        shutil.copyfile(file.with_name("parameters.safetensors"), file)
        relist(folder, file)
    fast = scores(folder, queries, method="fast-source")
    np.testing.assert_array_equal(scores(folder, queries), fast)
    assert np.abs(before - fast).max() > 0


def test_the_plan_counts_the_checkpoints(whole, queries):
    plans = [
        SourceAttributor.from_record(whole.path, method=method, progress=False).plan(None, queries)
        for method in ("source", "fast-source")
    ]
    assert plans[0].stages[0].score_tokens == 2 * plans[1].stages[0].score_tokens
    assert plans[0].stages[0].sample_tokens == plans[1].stages[0].sample_tokens > 0


def test_a_record_with_checkpoints_is_shown_pushed_and_pulled(hub, whole, tmp_path, queries):
    from fake_hub import TOKEN
    from typer.testing import CliRunner

    from hf_source.cli import app

    shown = CliRunner().invoke(app, ["record", "show", str(whole.path)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and ", ".join(map(str, steps_of(whole)[0])) in shown.output
    whole.push_to_hub("me/kept", include_rows=True, private=False, token=TOKEN)
    assert steps_of(TrainingRecord.load("me/kept")) == steps_of(whole)
    np.testing.assert_array_equal(scores("me/kept", queries), scores(whole.path, queries))


def test_a_run_that_starts_again_with_smaller_batches_plans_anew(tmp_path):
    """As after memory ran out: what was stored stays, the rest is counted from where the run starts again."""
    from hf_source.recording.recorder import StageRecorder

    recorder = StageRecorder.__new__(StageRecorder)
    recorder.segment_starts, recorder.checkpoint_steps, recorder.step = [0, 6], [2, 5, 8], 4
    recorder.streamed, recorder.flush = None, lambda: None
    recorder.writer = type("Writer", (), {"stage": {}})()
    recorder.restart([0, 9], {}, [3, 12])
    assert recorder.checkpoint_steps == [2, 7, 16] and recorder.segment_starts == [0, 13]
