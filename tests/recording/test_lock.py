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
"""Two trainings cannot write to one record at a time."""

import subprocess
import sys

import pytest
from cases import tiny_gpt2, train
from transformers import TrainerCallback

from hf_source.errors import RecordError
from hf_source.recording import TrainingRecord
from hf_source.recording.lock import LOCK_FILE, writing


HOLDER = """
import os, signal, sys
from pathlib import Path
from hf_source.recording.lock import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    if sys.argv[2] == "fork" and os.fork() == 0:
        sys.stdin.read()  # like a data loader that outlives its parent
        os._exit(0)
    sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
"""


def holder(root, how):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_record_that_another_process_writes_is_refused(tmp_path):
    process = holder(tmp_path / "record", "wait")
    try:
        with pytest.raises(RecordError, match=f"is being written by process {process.pid} on .* another record_dir"):
            train(tmp_path, tiny_gpt2())
    finally:
        process.communicate()
    train(tmp_path, tiny_gpt2())
    assert not (tmp_path / "record" / LOCK_FILE).exists()


@pytest.mark.parametrize("how", ["die", "fork"])
def test_a_dead_writer_leaves_no_lock(tmp_path, how):
    process = holder(tmp_path / "record", how)
    process.wait()
    assert (tmp_path / "record" / LOCK_FILE).exists()
    _, record = train(tmp_path, tiny_gpt2())
    assert record.verify() == [] and not (tmp_path / "record" / LOCK_FILE).exists()
    process.communicate()


def test_two_trainers_of_one_process(tmp_path):
    class Intruder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(RecordError, match="written by another trainer of this process"):
                train(tmp_path, tiny_gpt2(), stage="other")
            control.should_training_stop = True

    train(tmp_path, tiny_gpt2(), trainer={"callbacks": [Intruder()]})
    assert [stage.name for stage in TrainingRecord.load(tmp_path / "record").stages] == ["train"]


def test_nothing_is_left_of_a_training_that_did_not_start(tmp_path):
    with pytest.raises(ValueError, match="on purpose"), writing(tmp_path / "record"):
        raise ValueError("on purpose")
    assert not (tmp_path / "record").exists()
    with writing(tmp_path / "record"):  # the lock is free again
        pass


def test_readers_are_not_locked_out(tmp_path):
    train(tmp_path, tiny_gpt2())
    with writing(tmp_path / "record"):
        assert TrainingRecord.load(tmp_path / "record").verify() == []
