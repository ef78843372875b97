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
"""Processes that share a walk, as threads of one: what they exchange, and where they go on when one is killed.

`tests/distributed` starts real processes.
"""

import importlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hf_source import Queries, SourceAttributor
from hf_source.curvature import FisherSample, Flow, IdentityCurvature, JointCurvature
from hf_source.errors import ConfigError
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.source import Together, WalkSettings
from hf_source.source.work import Work


propagate = importlib.import_module("hf_source.source.walk")._propagate  # the package has a function of that name
SETTINGS = {"num_samples": 16, "progress": False, "max_tokens_per_batch": 24}


BUILDING = threading.Lock()
"""transformers changes what belongs to the whole process while it builds a model."""


class Thread(Together):
    """One of several threads that exchange tensors through a shared list."""

    def __init__(self, index, barrier, slots, shards=1):
        super().__init__(index, barrier.parties, shards)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "slots", slots)

    def _all(self, value):
        self.slots[self.index] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def total(self, tensor):
        return tensor if self.alone else sum(self._all(tensor.clone())) / (self.rows[1] if self.shards > 1 else 1)

    def union(self, numbers, device):
        return sorted(set().union(*self._all(set(numbers))))

    def least(self, number, device):
        return min(self._all(int(number)))

    def given(self, tensor, owner, like, device):
        found = self._all(tensor)[owner]
        assert found.shape == like.shape and found.dtype == like.dtype
        return found.clone()


class Killed(Exception):
    """What stands for a process that is killed."""


def ask():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"])


def walked(record, count, cache=None, shards=1, **settings):
    """Scores of both stages from threads that walk together, or the errors of those that failed."""
    barrier, slots, parts, errors = threading.Barrier(count), [None] * count, [None] * count, {}

    def work(index):
        own = {"cache_dir": cache / str(index)} if cache is not None else {}
        attributor = SourceAttributor.from_record(record.path, **SETTINGS, **own, **settings)
        known = replace(attributor.walk_settings(), together=Thread(index, barrier, slots, shards))
        attributor.walk_settings = lambda: known
        build = attributor.build_model

        def build_alone(stage):
            with BUILDING:
                return build(stage)

        attributor.build_model = build_alone
        try:
            parts[index] = {name: attributor.scores(None, ask(), name) for name in ("sft", "pretrain")}
        except Exception as error:
            errors[index] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors.values():
        if not isinstance(error, (Killed, threading.BrokenBarrierError)):
            raise error
    if errors:
        return errors
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def assert_same(found, expected):
    """Up to float32 sums in another order: of `K`'s parts, and of a row's parameters."""
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize(
    "count, settings",
    [
        (4, {}),
        (2, {"shards": 2}),
        (4, {"shards": 2, "memory_budget": 2**17}),
        (4, {"shards": 4, "curvature": "ekfac"}),
        (2, {"memory_budget": 2**17}),  # the sample comes in groups, and vectors that are carried on wait on disk
        (2, {"curvature": "ekfac"}),
        (2, {"curvature": "ekfac-hybrid"}),
    ],
    ids=str,
)
def test_threads_score_like_one(story, count, settings, monkeypatch):
    calls, original = [], JointCurvature._tail
    monkeypatch.setattr(JointCurvature, "_tail", lambda self, *args: calls.append(args[0]) or original(self, *args))
    alone = walked(story, 1, **{key: value for key, value in settings.items() if key != "shards"})
    each = len(calls)
    assert_same(walked(story, count, **settings), alone)
    # Each parameter's block was made once, whatever the number of processes, or once in each group of shards.
    assert len(calls) == each + each * (count // settings["shards"] if "shards" in settings else 1)


def test_every_process_has_parameters_of_about_the_same_size():
    sizes = {"a": 5, "b": 5, "c": 3, "d": 2, "e": 1}
    owners = Together(0, 3).owners(sizes)
    work = [sum(size for name, size in sizes.items() if owners[name] == index) for index in range(3)]
    assert sorted(work) == [5, 5, 6]
    assert owners == Together(2, 3).owners(dict(reversed(sizes.items())))


@pytest.fixture(scope="module")
def expected(story):
    """Of two that were left alone."""
    return walked(story, 2, curvature="identity")


@pytest.mark.parametrize(
    "victim, when",
    [(0, "1-1.scoring"), (1, "1-1.carried"), (1, "1-1.done"), (0, "1-0.done"), (1, "0-1.scoring"), (1, "0-0.done")],
)
def test_processes_go_on_where_the_first_was_killed(story, expected, tmp_path, monkeypatch, victim, when):
    """One of two is killed before it writes that. The other may have written it, and is ahead by that much."""
    save = Work.save

    def killed(self, name, tensors):
        if name == when and self.folder.parent.name == str(victim):
            raise Killed
        save(self, name, tensors)

    monkeypatch.setattr(Work, "save", killed)
    errors = walked(story, 2, tmp_path, curvature="identity")
    assert isinstance(errors[victim], Killed) and isinstance(errors[1 - victim], threading.BrokenBarrierError)
    monkeypatch.setattr(Work, "save", save)
    found = walked(story, 2, tmp_path, curvature="identity")
    for name, scores in expected.items():
        np.testing.assert_array_equal(found[name], scores)
    left = [file.name for file in tmp_path.rglob("*") if "scoring" in file.name or "carried" in file.name]
    assert not left


class Silent(Together):
    """One of two processes, of which the other does not answer."""

    total = union = given = None


def test_one_parameter_is_not_shared_between_two_processes():
    """One of them would have none."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    gradients = RowGradients(model, CausalLMTask(), ["1.weight"])
    sample = FisherSample(gradients, [])
    vectors = {"1.weight": torch.ones(2, 5, 3, dtype=torch.float64)}
    flow = Flow(0.5, {"1.weight": torch.tensor(2.0)}, {"1.weight": torch.tensor(0.0)})
    settings = WalkSettings(IdentityCurvature(), 1, torch.float64, together=Silent(1, 2))
    scoring, carried = propagate(settings, dict(vectors), flow, sample, carry=True)
    torch.testing.assert_close(scoring["1.weight"], vectors["1.weight"])  # s P q
    torch.testing.assert_close(carried["1.weight"], vectors["1.weight"])


def test_a_shard_without_parameters_is_refused():
    names = {"own.a": "a", "own.b": "b"}
    with pytest.raises(ConfigError, match="vector_shards=4: some process would have no parameter of the 2"):
        Together(0, 4, 4).shard({"a": 2, "b": 1}, names)
    assert Together(1, 2, 2).shard({"a": 2, "b": 1}, names) == {"own.b": "b"}
