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
"""A filter proposes rows, Source scores those alone, and what may have been missed is estimated."""

import sys

import numpy as np
import pytest

from hf_source import Queries, SourceAttributor
from hf_source.attribution import filtered
from hf_source.attribution.filtered import estimated_recall
from hf_source.errors import ConfigError, UnsupportedError


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


def attributor(record, **settings):
    return SourceAttributor(record, **{"num_samples": 16, "progress": False, **settings})


def as_rows(table):
    return {(row["query"], row["stage"], row["row"]): row["score"] for row in table}


@pytest.mark.parametrize("filter", ["bm25", "attributor", "index"])
def test_candidates_get_the_scores_of_the_full_walk(story, queries, tmp_path, monkeypatch, filter):
    monkeypatch.setattr(filtered, "NUM_DRAWN", 0)
    scorer = attributor(story)
    if filter == "attributor":
        filter = scorer.like(method="grad-dot")
    elif filter == "index":
        filter = scorer.build_index(tmp_path / "index", numbers=200)
    full = {stage: scorer.scores(None, queries, stage) for stage in ("pretrain", "sft")}
    table = scorer.top(queries, k=2, opposing=False, filter=filter, candidates=3)
    for (query, stage, row), score in as_rows(table).items():
        assert score == pytest.approx(full[stage][["lima", "havana"].index(query), row], rel=1e-5)
    own = {row["row"] for row in table if row["stage"] == "pretrain"}
    assert len(own) <= 6
    # Scores of all rows that are asked for later are those of all rows.
    np.testing.assert_array_equal(scorer.scores(None, queries, "pretrain"), full["pretrain"])


def test_rows_that_the_filter_left_out_are_not_scored(story, queries, monkeypatch):
    """Two segments visit every row of the first stage; the later stage, which is walked through, scores none."""
    module, counts = sys.modules["hf_source.source.walk"], []
    score_rows = module.score_rows

    def counting(gradients, batch, *given):
        counts.append(len(batch["labels"]))
        return score_rows(gradients, batch, *given)

    monkeypatch.setattr(module, "score_rows", counting)
    for drawn, expected in ((0, 2 * 2), (3, 2 * (2 + 3))):
        monkeypatch.setattr(filtered, "NUM_DRAWN", drawn)
        counts.clear()
        given = {"k": 1, "opposing": False, "stages": ["pretrain"], "filter": "bm25", "candidates": 2}
        attributor(story).top(queries.select([0]), **given)
        assert sum(counts) == expected


def test_enough_candidates_change_nothing(story, queries):
    scorer = attributor(story)
    whole, chosen = scorer.top(queries, k=3), scorer.top(queries, k=3, filter="bm25", candidates=100)
    assert whole["row"] == chosen["row"] and whole["rank"] == chosen["rank"]
    np.testing.assert_allclose(whole["score"], chosen["score"], rtol=1e-5)
    assert "Of stage 'pretrain' bm25 proposed 8 of 8 rows: all are scored." in chosen.info.description


def test_the_note_says_what_may_be_missed(story, queries):
    table = attributor(story).top(queries, k=1, filter="bm25", candidates=2)
    assert "bm25 proposed" in table.info.description and "estimated recall of the 1 most" in table.info.description
    # The rows drawn beside the candidates are all others here: the best row is found, whoever proposed it.
    best = attributor(story).top(queries, k=1)
    assert as_rows(table).keys() == as_rows(best).keys()


def test_a_filter_with_a_sign_proposes_opposing_rows_too(story, queries, monkeypatch):
    monkeypatch.setattr(filtered, "NUM_DRAWN", 0)
    scorer = attributor(story)
    exact = scorer.top(queries.select([0]), k=1, stages=["pretrain"])
    found = scorer.top(queries.select([0]), k=1, stages=["pretrain"], filter=scorer.like(num_samples=16), candidates=2)
    assert as_rows(found).keys() == as_rows(exact).keys()


def test_the_plan_counts_the_candidates_and_the_filter(story, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(filtered, "NUM_DRAWN", 1)
    scorer = attributor(story)
    whole, plan = scorer.plan(None, queries), scorer.plan(None, queries, filter="bm25", candidates=1)
    assert [stage.num_rows for stage in plan.stages] == [3, 3]  # of each query one, and one at random
    for some, every in zip(plan.stages, whole.stages, strict=True):
        assert some.sample_tokens == every.sample_tokens
        assert some.score_tokens == int(every.score_tokens * 3 / every.num_rows)
    name, own = plan.filter
    assert name == "bm25" and 0 < own.seconds < plan.seconds and own.memory["texts"] > 0
    assert [stage.num_rows for stage in own.stages] == [4, 8] and "first bm25" in str(plan)
    first = scorer.plan(None, queries, "pretrain", filter=scorer.like(method="grad-dot"), candidates=1)
    assert [stage.score_tokens for stage in first.stages][0] == 0 and first.filter[1].stages[0].score_tokens > 0
    assert first.peak_memory == max(sum(first.memory.values()), first.filter[1].peak_memory)
    index = scorer.build_index(tmp_path / "index", numbers=50)
    assert "the index" in scorer.plan(None, queries, filter=index, candidates=1).filter[1].memory


def test_the_plan_of_a_method_that_reads_texts_builds_no_model(story, queries, monkeypatch):
    monkeypatch.setattr(SourceAttributor, "build_model", lambda *given: pytest.fail("a model was built"))

    class Encoder:
        def encode(self, texts):
            return [[len(text), 1.0] for text in texts]

    for settings in ({"method": "bm25"}, {"method": "embedding", "encoder": Encoder()}):
        plan = attributor(story, **settings).plan(None, queries)
        assert plan.seconds > 0 and plan.peak_memory > 0 and "look up 'pretrain': 8 rows" in str(plan)
    with pytest.raises(UnsupportedError, match="scores all rows at once"):
        attributor(story, method="bm25").plan(None, queries, filter="bm25")


def test_estimated_recall_is_right_on_average():
    generator = np.random.default_rng(0)
    exact = generator.normal(size=(1, 2000))
    proposed = exact + generator.normal(size=exact.shape)
    chosen = np.zeros(2000, dtype=bool)
    chosen[np.argsort(-proposed[0])[:200]] = True
    kept = np.sort(exact[0][chosen])[::-1]
    missed = (exact[0][~chosen] > kept[9]).sum()
    assert missed > 0
    estimates = []
    for _ in range(300):
        drawn = generator.choice(np.flatnonzero(~chosen), 256, replace=False)
        estimates.append(10 / estimated_recall(exact[:, chosen], exact[:, drawn], 1800, 10) - 10)
    assert np.mean(estimates) == pytest.approx(missed, rel=0.2)


@pytest.mark.parametrize("settings, given, error, message", [
    ({}, {"candidates": 3}, ConfigError, r"candidates=3: at least as many as rows wanted \(4\)"),
    ({"method": "trak"}, {}, UnsupportedError, "method='trak' scores all rows at once"),
    ({}, {"filter": "bm52"}, Exception, "bm52"),
])  # fmt: skip
def test_refusals(hub, story, queries, settings, given, error, message):
    with pytest.raises(error, match=message):
        attributor(story, **settings).top(queries, k=2, **{"filter": "bm25"} | given)
