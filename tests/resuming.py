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
"""Runs that end before their time, and what is to be equal when they have gone on."""

import numpy as np
import torch
from cases import config, random_rows, tiny_llama
from transformers import TrainerCallback

from hf_source.recording import SourceTrainer


class Killed(Exception):
    """Stands for a process that is killed."""


class KillAfter(TrainerCallback):
    def __init__(self, step, event="on_step_end"):
        self.step = step
        setattr(self, event, self.kill)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def run(folder, make=tiny_llama, callbacks=(), resume=None, **settings):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_segments": 2} | settings
    trainer = SourceTrainer(make(), config(folder, **settings), train_dataset=random_rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_record(first, second):
    """All that a reader can see is equal, bit for bit."""
    for left, right in zip(first.stages, second.stages, strict=True):
        assert (left.name, left.num_steps, left.status) == (right.name, right.num_steps, right.status)
        one, two = left.steps(), right.steps()
        for field in ("step", "epoch", "learning_rate", "grad_norm", "clip_factor", "skipped"):
            np.testing.assert_array_equal(getattr(one, field), getattr(two, field), err_msg=field)
        assert one.micro_batches == two.micro_batches
        assert left.data["segments"] == right.data["segments"]
        for a, b in zip(left.segments, right.segments, strict=True):
            assert_same_tensors(a.parameters(), b.parameters())
            assert_same_tensors(a.preconditioner(), b.preconditioner())
        for which in ("initial", "final"):
            assert_same_tensors(left.weights(which), right.weights(which))


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
