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
"""Attributions that are killed go on where they were, with the same scores; memory that runs out costs no more."""

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_source import Queries, SourceAttributor
from hf_source.budget import parse_bytes
from hf_source.errors import ConfigError
from hf_source.source.unrolled import RecordedRun
from hf_source.source.work import Work


walk_module = importlib.import_module("hf_source.source.walk")  # the package has a function of that name
SETTINGS = {"num_samples": 16, "progress": False, "max_tokens_per_batch": 24}
KILLED = """
import importlib, os, signal, sys
sys.path[:0] = [{tests!r}]
from test_resume_scores import SETTINGS, ask
from hf_source import SourceAttributor
from hf_source.source.work import Work

walk = importlib.import_module("hf_source.source.walk")
where, left = sys.argv[3], int(sys.argv[4])
original = getattr(walk, where)

def counted(*args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(walk, where, counted)
Work.__init__.__defaults__ = (None, 0.0)  # every batch is a chunk
SourceAttributor.from_record(sys.argv[1], cache_dir=sys.argv[2], **SETTINGS).scores(None, ask(), "pretrain")
"""


def ask() -> Queries:
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"])


def kill(record, cache: Path, where: str, left: int) -> None:
    """Run an attribution in a process of its own that kills itself after some calls of a function of the walk."""
    script = KILLED.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(record.path), str(cache), where, str(left)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def counting(monkeypatch, module, name: str) -> list[int]:
    """Count calls of a function."""
    calls, original = [0], getattr(module, name)

    def counted(*args, **kwargs):
        calls[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.fixture(scope="module")
def expected(story):
    """Scores of the first stage, which the walk comes to last, without a cache."""
    return SourceAttributor.from_record(story.path, **SETTINGS).scores(None, ask(), "pretrain")


def test_a_killed_attribution_goes_on_with_the_same_scores(story, expected, tmp_path, monkeypatch):
    """Killed while it scores the last stage, while it draws the first stage's sample, and while it scores that."""
    batches = counting(monkeypatch, walk_module, "score_rows")
    drawn = counting(monkeypatch, walk_module, "draw_sample")
    SourceAttributor.from_record(story.path, **SETTINGS).scores(None, ask(), "pretrain")
    all_batches, all_drawn = batches[0], drawn[0]
    assert all_drawn == 4 and all_batches >= 8  # two stages of two segments
    cache = tmp_path / "cache"
    kill(story, cache, "score_rows", 1)
    kill(story, cache, "draw_sample", 2)
    kill(story, cache, "score_rows", 1)
    batches[0] = drawn[0] = 0
    found = SourceAttributor.from_record(story.path, cache_dir=cache, **SETTINGS).scores(None, ask(), "pretrain")
    np.testing.assert_array_equal(found, expected)
    assert drawn[0] < all_drawn / 2 and 0 < batches[0] < all_batches / 2  # what was done is not done again
    # All is done: nothing is computed, and the vectors are gone.
    batches[0] = drawn[0] = 0
    again = SourceAttributor.from_record(story.path, cache_dir=cache, **SETTINGS)
    np.testing.assert_array_equal(again.scores(None, ask(), "pretrain"), expected)
    assert again.scores(None, ask(), "sft").any()
    assert (batches[0], drawn[0]) == (0, 0)
    assert not [file.name for file in cache.rglob("*") if "scoring" in file.name or "carried" in file.name]


@pytest.mark.parametrize("changed", [{"num_samples": 8}, {"seed": 1}, {"curvature": "identity"}])
def test_nothing_is_taken_for_another_attribution(story, tmp_path, changed):
    settings = {**SETTINGS, "cache_dir": tmp_path}
    first = SourceAttributor.from_record(story.path, **settings).scores(None, ask(), "sft")
    other = SourceAttributor.from_record(story.path, **{**settings, **changed}).scores(None, ask(), "sft")
    alone = SourceAttributor.from_record(story.path, **{**SETTINGS, **changed}).scores(None, ask(), "sft")
    np.testing.assert_array_equal(other, alone)
    assert not np.array_equal(first, other)


QUERIES = 4  # two, in a batch of their own, in each of two stages
AGAIN = {  # what scores or projects rows, and how often it is still called: for the queries
    "grad-dot": ("hf_source.attribution.methods.final.score_rows", 0),
    "influence": ("hf_source.attribution.methods.final.score_rows", 0),
    "tracin": ("hf_source.attribution.methods.tracin.score_rows", 0),
    "trak": ("hf_source.gradients.projection.DenseProjection.project", QUERIES),
    "logra": ("hf_source.gradients.projection.SidedProjection.project", QUERIES),
    "trackstar": ("hf_source.gradients.projection.SidedProjection.project", QUERIES),
    "stepwise": ("hf_source.source.unrolled.RecordedRun.step_back", 0),
    "unrolled": ("hf_source.source.unrolled.RecordedRun.step_back", 0),
}


@pytest.mark.parametrize("method", AGAIN)
def test_other_methods_are_kept_too(story, tmp_path, method, monkeypatch):
    settings = {**SETTINGS, "method": method}
    expected = SourceAttributor.from_record(story.path, **settings).scores(None, ask(), "pretrain")
    (path, name), again = AGAIN[method][0].rsplit(".", 1), AGAIN[method][1]
    calls = counting(monkeypatch, pkgutil.resolve_name(path), name)
    made = []
    for _ in range(2):
        calls[0] = 0
        attributor = SourceAttributor.from_record(story.path, cache_dir=tmp_path, **settings)
        np.testing.assert_array_equal(attributor.scores(None, ask(), "pretrain"), expected)
        made.append(calls[0])
    assert made[0] > made[1] == again


@pytest.mark.parametrize("method", ["stepwise", "unrolled"])
@pytest.mark.parametrize("after", [0.3, 0.8], ids=["in the last stage", "in the first stage"])
def test_steps_that_were_followed_are_not_followed_again(story, tmp_path, method, after, monkeypatch):
    settings = {**SETTINGS, "method": method}
    calls = counting(monkeypatch, RecordedRun, "step_back")
    expected = SourceAttributor.from_record(story.path, **settings).scores(None, ask(), "pretrain")
    steps, calls[0] = calls[0], 0
    monkeypatch.setattr(Work.__init__, "__defaults__", (None, 0.0))  # every step is written
    original = RecordedRun.step_back

    def dying(self, *args):
        if calls[0] >= int(after * steps):
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedRun, "step_back", dying)
        with pytest.raises(KeyboardInterrupt):
            SourceAttributor.from_record(story.path, cache_dir=tmp_path, **settings).scores(None, ask(), "pretrain")
    attributor = SourceAttributor.from_record(story.path, cache_dir=tmp_path, **settings)
    np.testing.assert_array_equal(attributor.scores(None, ask(), "pretrain"), expected)
    assert calls[0] == steps
    assert {file.name for file in tmp_path.rglob("*.safetensors")} == {"0.done.safetensors", "1.done.safetensors"}


def test_a_damaged_file_is_named(tmp_path):
    work = Work(tmp_path)
    work.save("x", {"a": torch.ones(3)})
    for device in ("cpu", torch.device("cpu", 0)):  # as several processes are given theirs
        assert torch.equal(work.load("x", device)["a"], torch.ones(3))
    (tmp_path / "x.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception, match="delete .* and start again"):
        work.load("x")


# ---- memory -----------------------------------------------------------------------------------------------------


def test_queries_that_do_not_fit_the_budget_walk_after_one_another(story, monkeypatch):
    attributor = SourceAttributor.from_record(story.path, **SETTINGS)
    expected = attributor.scores(None, ask(), "pretrain")
    walks = counting(monkeypatch, importlib.import_module("hf_source.attribution.methods.source"), "walk")
    small = attributor.like(memory_budget="20 kB")
    found = small.scores(None, ask(), "pretrain")
    assert walks[0] == 2
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "given, size", [(None, 2**30), (1000, 1000), ("2GiB", 2**31), ("1.5 gb", 3 * 2**29), ("7", 7)]
)
def test_sizes_are_read(given, size):
    assert parse_bytes(given) == size


@pytest.mark.parametrize("given", ["much", "", "-1GiB", 0, "2 apples"])
def test_what_is_no_size_is_refused(story, given):
    with pytest.raises(ConfigError, match="memory_budget"):
        SourceAttributor.from_record(story.path, memory_budget=given)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "trak", "projection_dim": 1024},
        {"method": "trak", "projection_dim": 1024, "checkpoints": "segments"},
        {"method": "logra", "rank": 8},
    ],
)
def test_features_take_the_disk_that_was_planned(story, tmp_path, settings):
    walker = SourceAttributor.from_record(story.path, cache_dir=tmp_path, **{**SETTINGS, **settings})
    planned = walker.plan(None, ask(), "pretrain").written
    walker.scores(None, ask(), "pretrain")
    assert size_of(tmp_path) == pytest.approx(planned, rel=0.25)


def test_vectors_take_no_more_disk_than_was_planned(story, tmp_path, monkeypatch):
    walker = SourceAttributor.from_record(story.path, cache_dir=tmp_path, **SETTINGS)
    planned, sizes, save = walker.plan(None, ask(), "pretrain").written, [], Work.save

    def noted(self, *given):
        save(self, *given)
        sizes.append(size_of(tmp_path))

    monkeypatch.setattr(Work, "save", noted)
    walker.scores(None, ask(), "pretrain")
    assert 0.75 * planned < max(sizes) < 1.25 * planned
