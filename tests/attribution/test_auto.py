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
"""`method="auto"` and the advice of a plan: which method is taken, why, and what is said of it."""

import importlib
import logging
import time
from dataclasses import replace

import numpy as np
import pytest

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.attribution.advice import Advice, Candidate
from hf_source.errors import ConfigError

from ..cases import random_rows, tiny_gpt2, train
from ..story import facts


STEPS = 60


@pytest.fixture(scope="module")
def asked():
    return Queries.from_dataset(random_rows(2, seed=5))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return train(tmp_path_factory.mktemp("short"), tiny_gpt2(), max_steps=3, num_segments=2)[1]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return train(tmp_path_factory.mktemp("long"), tiny_gpt2(), max_steps=STEPS, num_segments=2, learning_rate=1e-3)[1]


def attributor(record, method="auto", **settings):
    return SourceAttributor(record, method=method, progress=False, **settings)


def test_a_short_run_is_replayed(short, asked):
    """Three steps against a sample of 1,024 gradients: anything but Source is cheaper, and two queries exact."""
    own = attributor(short)
    assert own.settings() == {**own.settings(), "method": "auto", "max_cost": 3.0}
    scored = own.attribute(None, asked)
    assert own.settings()["method"] == "unrolled" and "max_cost" not in own.settings()
    assert "method='auto' took `unrolled`: the exact derivative, for " in scored.info.description
    scores = own.scores(None, asked)
    np.testing.assert_array_equal(scores, attributor(short, "unrolled").scores(None, asked))
    assert own.like(max_cost=4.0).settings()["max_cost"] == 4.0


def test_many_queries_of_a_short_run_are_not_scored_exactly(short, monkeypatch):
    """With more queries than steps pay for, `stepwise` takes the place of `unrolled`."""
    own, many = attributor(short, max_cost=1e9), Queries.from_dataset(random_rows(40, seed=6))
    advice = own.plan(None, many).advice
    stepwise, exact = advice.replays[1], advice.replays[2]
    assert (stepwise.options, exact.method) == ({"draws": 16}, "unrolled") and exact.passes > stepwise.passes
    # As if they had been timed so: little lies between the two for a model as small as this.
    timed = (advice.replays[0], stepwise, replace(exact, seconds=2 * stepwise.seconds))
    own = attributor(short, max_cost=1.5 * advice.times(stepwise))
    monkeypatch.setattr("hf_source.attribution.advice._replays", lambda *_: timed)
    monkeypatch.setattr("hf_source.attribution.advice._candidate", lambda *_: advice.default)
    scores = own.scores(None, many)
    assert own.settings() == attributor(short, "stepwise").settings() and own.settings()["draws"] == 16
    np.testing.assert_array_equal(scores, attributor(short, "stepwise").scores(None, many))


def test_exact_products_are_timed_only_where_they_fit(short, asked, monkeypatch):
    """A plan does not take memory that neither the default method nor the budget takes."""
    advice, timing = (
        importlib.import_module(f"hf_source.{name}") for name in ("attribution.advice", "source.replay_cost")
    )
    candidate, timed = advice._candidate, []

    class Timed(timing.ExactProducts):
        def __init__(self):
            timed.append(1)
            super().__init__()

    monkeypatch.setattr(timing, "ExactProducts", Timed)
    own = attributor(short, memory_budget=2**20)
    expected = own.plan(None, asked).advice
    assert timed
    room = max(2**20, expected.default.memory)

    def larger(*given):
        found = candidate(*given)
        return replace(found, memory=room + 1) if found.method == "unrolled" else found

    monkeypatch.setattr(advice, "_candidate", larger)
    timed.clear()
    found = own.plan(None, asked).advice
    assert not timed and [each.method for each in found.replays] == ["stepwise", "stepwise", "unrolled"]
    assert 0 < found.replays[-1].seconds < float("inf")


def test_a_long_run_is_walked_through(long, asked):
    own = attributor(long, num_samples=4)
    scores = own.scores(None, asked)
    np.testing.assert_array_equal(scores, attributor(long, "source", num_samples=4).scores(None, asked))
    assert own.settings() == attributor(long, "source", num_samples=4).settings()
    assert f"took `source`: a replay of the {STEPS} steps takes at least" in own.taken[1]
    assert attributor(long, num_samples=4, max_cost=1e9).plan(None, asked).method == "unrolled"


def test_what_cannot_be_replayed_is_walked_through(tmp_path, asked):
    _, record = train(tmp_path, tiny_gpt2(resid_pdrop=0.1), max_steps=2, num_segments=1)
    own = attributor(record, num_samples=8)
    plan = own.plan(None, asked)
    assert plan.method == "source" and not plan.advice.replays
    assert "better buy: `source`: the run cannot be replayed. Stage 'train' trained with dropout" in str(plan)
    np.testing.assert_array_equal(
        own.scores(None, asked), attributor(record, "source", num_samples=8).scores(None, asked)
    )
    assert "trained with dropout" in own.taken[1]


def test_a_replay_that_ends_elsewhere_is_given_up(tmp_path, asked, caplog):
    _, record = train(tmp_path, tiny_gpt2(), max_steps=3, num_segments=1, neftune_noise_alpha=20.0)
    # As of a kind of noise that nobody told of.
    record.stage().training["neftune_noise_alpha"] = record.stage().loss["first_micro_batch"] = None
    own = attributor(record, num_samples=1024)
    with caplog.at_level(logging.WARNING, "hf_source"):
        scores = own.scores(None, asked)
    assert "goes on with `source`: `unrolled` failed: Replaying stage 'train' ended" in caplog.text
    assert own.settings()["method"] == "source" and "of the distance" in own.taken[1]
    np.testing.assert_array_equal(scores, attributor(record, "source").scores(None, asked))


def test_an_earlier_stage_is_replayed_before_scores_of_the_later_one_are_told(story):
    """Scores of both stages come from one method, whichever is asked for first."""
    queries = Queries.from_text(["Peru:"], [" Lima"])
    one, other = attributor(story, max_cost=1e9), TrainingRecord.load(story.path)
    found = one.scores(None, queries, "sft")
    np.testing.assert_array_equal(found, attributor(story, "unrolled").scores(None, queries, "sft"))
    assert one.scores(facts(), queries, "pretrain").any() and one.settings()["method"] == "unrolled"
    other.stage("pretrain").training["max_grad_norm"] = 1e-3  # not how it was clipped
    fallen = attributor(other, max_cost=1e9, num_samples=16)
    np.testing.assert_array_equal(
        fallen.scores(None, queries, "sft"), attributor(story, "source", num_samples=16).scores(None, queries, "sft")
    )
    assert "Replaying stage 'pretrain' ended" in fallen.taken[1]


def test_a_plan_compares_methods(short, asked):
    plan = attributor(short, "source", num_samples=32).plan(None, asked)
    names = [(each.method, each.options) for each in plan.advice.replays]
    assert names == [("stepwise", {"draws": 4}), ("stepwise", {"draws": 16}), ("unrolled", {})]
    visits = sum(len(batch.rows) for step in short.stage().steps().micro_batches for batch in step) / 22
    passes = [each.passes / visits for each in plan.advice.replays]
    assert passes == pytest.approx([8, 20, 7], rel=0.2)  # 4 a visit, and draws or two thirds of two for each query
    assert "compared: `source` " in str(plan) and "`stepwise` with 16 draws " in str(plan)
    stepwise = attributor(short, "stepwise", draws=7).plan(None, asked)
    assert [each.options.get("draws") for each in stepwise.advice.replays] == [4, 7, 16, None]
    assert stepwise.seconds == stepwise.advice.replays[1].seconds
    assert attributor(short, "tracin").plan(None, asked).advice is None


def test_a_replay_takes_about_as_long_as_was_said(long, asked):
    own = attributor(long, "stepwise", draws=4)
    predicted = own.plan(None, asked).seconds
    start = time.thread_time()
    own.scores(None, asked)
    assert predicted / 4 < time.thread_time() - start < 4 * predicted


CHEAP = Candidate("source", {}, 10.0, 2**20, 9)
FEW = Candidate("stepwise", {"draws": 4}, 20.0, 2**20, 30)
MANY = Candidate("stepwise", {"draws": 16}, 40.0, 2**20, 80)
EXACT = Candidate("unrolled", {}, 29.0, 2**30, 60)


@pytest.mark.parametrize(
    ("max_cost", "max_memory", "best", "said"),
    [
        (3.0, 2**31, EXACT, "the exact derivative, for 2.9 times the time of `source`, at most 3"),
        (3.0, 2**29, FEW, "follows every step, for 2 times"),
        (5.0, 2**29, MANY, "follows every step, for 4 times"),
        (1.5, 2**31, CHEAP, "a replay of the 64 steps takes at least 2 times as long, more than 1.5"),
        (3.0, 2**10, CHEAP, "a replay of the 64 steps holds 1 MiB, more than 0"),
    ],
)
def test_the_most_accurate_one_that_fits_is_the_better_buy(max_cost, max_memory, best, said):
    advice = Advice(CHEAP, (FEW, MANY, EXACT), "", max_cost, max_memory, 64)
    assert advice.best == best and advice.reason.startswith(said)
    assert str(advice).startswith(f"  better buy: {best.name}: {said}")


def test_what_makes_no_sense_is_refused(story, short):
    with pytest.raises(ConfigError, match="max_cost=0: give a positive number"):
        attributor(short, max_cost=0)
    with pytest.raises(ConfigError, match="method='auto' chooses for one run, ensemble='dropout'"):
        attributor(story, ensemble="dropout")
