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
import numpy as np
import pytest

from hf_source import load_attribution, questions
from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import StackedRetraining
from hf_source.questions.grouping import word_clusters
from hf_source.questions.groups import sum_interval
from hf_source.questions.scored import scored

from ..evaluation.fakes import LinearRetraining
from .conftest import rows


def lines(answer):
    return {line["group" if "group" in line else "contributor"]: line for line in answer.table}


def test_a_group_is_the_sum_of_its_rows(attributor, queries, scores):
    answer = questions.groups(attributor, queries, by="source")
    found, mean = lines(answer), scores.mean(axis=0)
    for name, places in {"a": range(8), "b": range(8, 12), "c": range(12, 16)}.items():
        assert found[name]["total"] == pytest.approx(mean[list(places)].sum(), rel=1e-6)
        assert found[name]["mean"] == pytest.approx(mean[list(places)].mean(), rel=1e-6)
        assert found[name]["num_rows"] == len(places) and found[name]["share_of_rows"] == len(places) / 16
        assert found[name]["low"] <= found[name]["total"] <= found[name]["high"]
    totals = [line["total"] for line in answer.table]
    assert totals == sorted(totals, reverse=True)
    assert sum(abs(line["share"]) for line in answer.table) == pytest.approx(1)
    assert "more than 20 % of a stage" in str(answer) and "Nobody has measured" in str(answer)


def test_groups_by_function_by_stage_and_by_words(attributor, queries, scores):
    longer = questions.groups(attributor, queries, by=lambda row: len(row["text"]) > 7)
    assert {line["group"]: line["num_rows"] for line in longer.table} == {"True": 2, "False": 14}
    (whole,) = questions.groups(attributor, queries, by="stage").table
    assert whole["total"] == pytest.approx(scores.mean(axis=0).sum(), rel=1e-6)
    clusters = questions.groups(attributor, queries, clusters=4, stage="train").table
    assert sum(clusters["num_rows"]) == 16 and len(set(clusters["group"])) == len(clusters) <= 4


def test_words_in_common_make_a_cluster(attributor, queries):
    (own,) = scored(attributor, queries)
    made = {group.name: sorted(own.numbers[group.places].tolist()) for group in word_clusters(own, 5)}
    texts = rows()["text"]
    assert all(len({texts[row].lower().split()[0] for row in chosen}) == 1 for chosen in made.values())


def test_leaving_a_group_out_is_measured(attributor, queries, told):
    answer = questions.groups(attributor, queries, by="source", verify=True)
    again = StackedRetraining(told, attributor.encode(queries), progress=False)
    keep = np.ones((2, 16), dtype=bool)
    keep[1, 8:12] = False
    losses = again.losses(keep)
    assert lines(answer)["b"]["measured"] == pytest.approx((losses[1] - losses[0]).mean(), abs=1e-6)
    assert answer.check.measured.shape == (3, 2) and np.isfinite(answer.check.pearson)
    assert "Trained again" in str(answer)


def test_predictions_that_come_true(attributor, queries, scores):
    fake = LinearRetraining(scores)
    fake.stage.name = "train"
    answer = questions.groups(attributor, queries, by="source", verify=fake)
    assert answer.check.pearson == pytest.approx(1) and answer.check.same_sign == 1
    assert answer.check.measured == pytest.approx(answer.check.predicted)
    wrong = questions.groups(attributor, queries, by="source", verify=_named(LinearRetraining(-scores)))
    assert wrong.check.pearson == pytest.approx(-1) and wrong.check.same_sign == 0


def _named(fake):
    fake.stage.name = "train"
    return fake


def test_shared_scores_answer_alike(attributor, queries, tmp_path):
    attributor.save(tmp_path, queries)
    shared = load_attribution(tmp_path)
    for question in (questions.groups, questions.credit):
        one, other = question(attributor, queries, by="source"), question(shared, by="source")
        assert one.table.to_dict() == other.table.to_dict()
    assert questions.keep(shared, None, 3).table["row"][:] == questions.keep(attributor, queries, 3).table["row"][:]
    with pytest.raises(ConfigError, match="ask an attributor"):
        questions.groups(shared, by="source", verify=True)
    with pytest.raises(DataError, match="has no query 'x'"):
        questions.groups(shared, questions_of("other"), by="source")


def questions_of(completion):
    from hf_source import Queries

    return Queries.from_text(["red:"], [completion], ["x"])


def test_the_interval_of_a_sum():
    scores = np.random.default_rng(0).normal(1, 1, size=400)
    low, high = sum_interval(scores, 2000)
    spread = 1.96 * scores.std() * 20  # sqrt(400) rows
    assert (low, high) == pytest.approx((scores.sum() - spread, scores.sum() + spread), abs=0.1 * spread)
    assert all(np.isnan(sum_interval(scores[:1])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Say what makes a group"),
        ({"by": "source", "clusters": 3}, "Say what makes a group"),
        ({"by": "sauce"}, "no column 'sauce'|a column 'sauce'"),
        ({"clusters": 99}, "has 16 rows"),
        ({"by": lambda row: [1]}, "holds lists"),
        ({"by": lambda row: 1, "verify": True}, "every row of the stage"),
    ],
)
def test_what_is_refused(attributor, queries, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        questions.groups(attributor, queries, **settings)


def test_shares_sum_to_one(attributor, queries, scores):
    answer = questions.credit(attributor, queries)
    totals = np.stack([scores[:, part].sum(axis=1) for part in (slice(0, 8), slice(8, 12), slice(12, 16))])
    counted = totals.clip(0)
    expected = (counted / counted.sum(axis=0)).mean(axis=1)
    found = lines(answer)
    assert [found[name]["share"] for name in "abc"] == pytest.approx(expected.tolist(), abs=1e-9)
    assert sum(line["share"] for line in answer.table) == pytest.approx(1)
    by_rows = questions.credit(attributor, queries, rule="rows")
    counted = np.stack([scores[:, part].clip(0).sum(axis=1) for part in (slice(0, 8), slice(8, 12), slice(12, 16))])
    expected = (counted / counted.sum(axis=0)).mean(axis=1)
    assert [lines(by_rows)[name]["share"] for name in "abc"] == pytest.approx(expected.tolist(), abs=1e-9)
    assert (totals[1].mean() < 0) == ("'b'" in answer.findings[-1] and "oppose" in answer.findings[-1])


def test_credit_that_nobody_earns(attributor, queries, monkeypatch):
    with pytest.raises(ConfigError, match="rule='size' is unknown"):
        questions.credit(attributor, queries, rule="size")
    monkeypatch.setattr(type(attributor), "scores", lambda self, *_: -np.ones((2, 16), dtype=np.float32))
    with pytest.raises(DataError, match="no credit to share"):
        questions.credit(attributor, queries)
