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
"""`verify(replay=)`: a short replay tells whether steps, rows and weights in the record are those of the training."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases import random_rows, tiny_gpt2, tiny_llama, train

from hf_source.recording import TrainingRecord
from hf_source.recording.reading.verifying import check_replay
from hf_source.recording.weight_samples import is_sampled, sample_weights
from hf_source.recording.writer import STEP_SCHEMA, file_entry


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model = tiny_gpt2()
    train(folder, model, stage="pretrain")
    train(folder, model, random_rows(seed=1), stage="sft", optim="sgd", learning_rate=0.1)
    return folder / "record"


@pytest.fixture()
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "record")
    return tmp_path / "record"


def test_sampled_steps():
    assert [step for step in range(20) if is_sampled(step)] == [1, 2, 4, 8, 16]


def test_a_sample_holds_sums_and_entries_of_every_tensor():
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(7.0, dtype=torch.bfloat16)]
    assert sample_weights(tensors).tolist() == [15, 0, 1, 2, 3, 4, 5, 7, 7]
    many = [torch.full((5,), float(i)) for i in range(300)]
    assert sample_weights(many).tolist() == [value for i in range(300) for value in (5.0 * i, i)]
    assert sample_weights([]) is None


def test_some_steps_hold_weights(original):
    steps = TrainingRecord.load(original).stage("pretrain").steps()
    assert [step for step in range(9) if steps.weight_sample(step) is not None] == [0, 1, 3, 7]


@pytest.mark.parametrize(("steps", "compared"), [(1, 1), (3, 3), (4, 4), (100, 8)])
def test_a_true_record_agrees(original, steps, compared):
    """9 steps: samples after 1, 2, 4 and 8, three segments (the first ends at step 3), final weights."""
    checks = TrainingRecord.load(original).check_replays(steps)
    assert all(check.problem is None and check.note is None for check in checks)
    assert [check.steps for check in checks] == [min(steps, 9)] * 2
    assert len(checks[0].compared) == compared
    assert max(check.error for check in checks) < 1e-5
    assert TrainingRecord.load(original).verify(replay=steps) == []


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: tiny_llama(dtype=torch.float64), {}),
        (lambda: tiny_llama(dtype=torch.bfloat16), {}),
        (tiny_llama, {"bf16": True}),
    ],
)
def test_every_precision_agrees(tmp_path, make, settings):
    train(tmp_path, make(), **settings)
    (check,) = TrainingRecord.load(tmp_path / "record").check_replays(100)
    assert check.problem is None and "final weights" in check.compared


def rewrite_steps(folder, change):
    """Change the steps of the first stage, with hashes that fit: a lie rather than damage."""
    data = json.loads((folder / "record.json").read_text())
    files = data["stages"][0]["files"]
    for name in [name for name in files if "/steps/" in name]:
        rows = pq.read_table(folder / name).to_pylist()
        for row in rows:
            change(row)
        pq.write_table(pa.Table.from_pylist(rows, schema=STEP_SCHEMA), folder / name)
        files[name] = file_entry(folder / name)
    (folder / "record.json").write_text(json.dumps(data))


def other_row(step):
    if step["step"] == 1:
        step["micro_batches"][0]["rows"][0] = (step["micro_batches"][0]["rows"][0] + 1) % 22


def other_rate(step):
    step["learning_rate"] = [rate * 1.05 for rate in step["learning_rate"]]


def other_clipping(step):
    step["clip_factor"] = 1.0 if step["step"] == 1 else step["clip_factor"]


@pytest.mark.parametrize(("change", "steps"), [(other_row, 4), (other_rate, 2), (other_clipping, 4)])
def test_a_lie_is_found(folder, change, steps):
    rewrite_steps(folder, change)
    record = TrainingRecord.load(folder)
    assert record.verify() == []  # hashes fit
    (problem,) = record.verify(replay=steps)
    assert "The replay of stage 'pretrain' leaves the record at step" in problem


def test_damage_is_found_before_anything_is_replayed(folder):
    file = folder / "stages" / "0-pretrain" / "initial.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (problem,) = TrainingRecord.load(folder).verify(replay=2)
    assert "its content differs" in problem


def test_older_records_are_compared_at_their_end(caplog):
    record = TrainingRecord.load(Path(__file__).parents[1] / "data" / "record_v1")
    first, second = record.check_replays(100)
    assert first.compared == ["segment 0", "segment 1", "final weights"] and first.problem is None
    assert second.compared == ["segment 0", "final weights"] and second.problem is None
    assert "replay all 12 of them" in check_replay(record.stages[0], 2).note
    with caplog.at_level("WARNING"):
        assert record.verify(replay=2) == []
    assert "Stage 'pretrain' was not compared with a replay" in caplog.text


def test_what_cannot_be_replayed_says_why(tmp_path):
    train(tmp_path / "dropout", tiny_gpt2(resid_pdrop=0.1))
    train(tmp_path / "rows", tiny_gpt2(), record_rows=False)
    record = TrainingRecord.load(tmp_path / "dropout" / "record")
    assert "dropout" in check_replay(record.stage(), 2).note
    record = TrainingRecord.load(tmp_path / "rows" / "record")
    assert "does not hold its rows" in check_replay(record.stage(), 2).note
    assert check_replay(record.stage(), 2, random_rows()).compared
