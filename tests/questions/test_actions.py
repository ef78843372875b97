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

from hf_source import Queries, SourceAttributor, questions
from hf_source.attribution.changed import changed_rows, with_changed_rows
from hf_source.errors import ConfigError, DataError, UnsupportedError
from hf_source.evaluation import StackedRetraining, retrain_in_chunks

from ..evaluation.fakes import LinearRetraining
from .conftest import rows


def named(answer) -> dict:
    return {(line["action"], line["what"]): line for line in answer.table}


def test_effects_are_sums_of_scores(attributor, queries, scores):
    answer = questions.actions(attributor, queries, "source", k=(1, 3))
    mean = scores.mean(axis=0)
    expected = {
        ("drop rows", "the 1 most opposing"): mean.min(),
        ("drop rows", "the 3 most opposing"): np.sort(mean)[:3].sum(),
        ("repeat rows", "the 1 most supporting"): -mean.max(),
        ("repeat rows", "the 3 most supporting"): -np.sort(mean)[-3:].sum(),
    }
    for name, part in (("a", slice(0, 8)), ("b", slice(8, 12)), ("c", slice(12, 16))):
        expected |= {("drop group", name): mean[part].sum(), ("repeat group", name): -mean[part].sum()}
    assert {key: line["predicted"] for key, line in named(answer).items()} == {
        key: pytest.approx(value, rel=1e-5) for key, value in expected.items() if value < 0
    }
    effects = answer.table["predicted"][:]
    assert effects == sorted(effects) and effects[0] < 0
    assert set(questions.actions(attributor, queries, "source", kinds=["drop rows"]).table["action"]) == {"drop rows"}


def test_weights_do_what_they_say(attributor, queries, told):
    """Twice the weight is twice the gradient, no weight is no row."""
    answer = questions.actions(attributor, queries, k=2, verify=True)
    again = StackedRetraining(told, attributor.encode(queries), progress=False)
    base = again.losses(np.ones((1, 16), dtype=bool))[0]
    stage = told.stages[0]
    for line in answer.table:
        weights = np.ones((1, 16), dtype=np.float64)
        weights[0, line["rows"]] = 0 if line["action"] == "drop rows" else 2
        losses = retrain_in_chunks(stage, stage.rows(), weights, attributor.encode(queries).rows)[0]
        assert line["measured"] == pytest.approx((losses - base).mean(), abs=1e-5)  # float32 trainings
    assert len(answer.table) == 2


def test_the_score_of_a_row_that_was_never_there(attributor, queries, told):
    stage = told.stages[0]
    texts = rows()["text"]
    new = changed_rows(attributor, stage, {8: {"text": texts[0]}})
    assert new[8]["input_ids"] == stage.rows()[0]["input_ids"]
    # Unchanged content leaves every score as it was.
    same = with_changed_rows(attributor, stage, changed_rows(attributor, stage, {8: {"text": texts[8]}}))
    assert same.scores(None, queries) == pytest.approx(attributor.scores(None, queries), abs=1e-6)
    other = with_changed_rows(attributor, stage, new).scores(None, queries)
    kept = np.arange(16) != 8
    # The curvature draws rows at random, of which one has changed; the others' scores hardly move.
    assert np.corrcoef(other[:, kept].ravel(), attributor.scores(None, queries)[:, kept].ravel())[0, 1] > 0.99
    assert other[0, 8] > 0 > attributor.scores(None, queries)[0, 8]  # "red:hue" instead of "red:fig"


def test_a_replaced_row_is_scored_as_what_it_says(attributor, queries, told):
    """A product of gradients at the final weights depends on the row's content alone."""
    plain = attributor.like(method="grad-dot")
    stage, scores = told.stages[0], plain.scores(None, queries)
    new = changed_rows(plain, stage, {8: {"text": "red:hue"}, 15: {"text": "odd two"}})
    other = with_changed_rows(plain, stage, new).scores(None, queries)
    kept = np.setdiff1d(np.arange(16), [8, 15])
    assert other[:, kept] == pytest.approx(scores[:, kept], rel=1e-5)
    assert other[:, [8, 15]] == pytest.approx(scores[:, [0, 13]], rel=1e-5)
    assert plain.scores(None, queries) == pytest.approx(scores)  # nothing of the attributor has changed
    with pytest.raises(UnsupportedError, match="trains on the rows again"):
        with_changed_rows(attributor.like(method="stepwise"), stage, new)


def test_relabelling_is_predicted_and_measured(attributor, queries, scores, told):
    relabel = {number: {"text": "red:hue"} for number in range(8, 12)}
    answer = questions.actions(attributor, queries, relabel=relabel, kinds=["relabel", "drop rows"], verify=True)
    line = named(answer)["relabel", "rows with their right labels"]
    stage = told.stages[0]
    other = with_changed_rows(attributor, stage, changed_rows(attributor, stage, relabel))
    expected = (scores[:, 8:12] - other.scores(None, queries)[:, 8:12]).sum(axis=1).mean()
    assert line["predicted"] == pytest.approx(expected, rel=1e-5)
    assert line["rows"] == [8, 9, 10, 11]
    right = stage.rows().to_list()
    for number in relabel:
        right[number] = {**right[number], **{key: right[0][key] for key in ("input_ids", "labels")}}
    asked = attributor.encode(queries).rows
    trained = [retrain_in_chunks(stage, listed, np.ones((1, 16)), asked)[0] for listed in (right, stage.rows())]
    assert line["measured"] == pytest.approx((trained[0] - trained[1]).mean(), abs=1e-5)
    assert line["measured"] < 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["drop"]}, "choose from drop rows"),
        ({"kinds": []}, "choose from drop rows"),
        ({"k": 0}, "k=0"),
        ({"k": [1, 16]}, "from 1 to 15"),
        ({"relabel": {99: {"text": "x"}}}, "Row 99 is none of the rows"),
        ({"relabel": {0: {"source": "x"}}}, "Column 'source' is not one that training read"),
        ({"relabel": {0: {"completion": "x"}}}, "its 'prompt' is not known"),
    ],
)
def test_what_is_refused(attributor, queries, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        questions.actions(attributor, queries, **settings)


def test_what_cannot_be_answered(attributor, queries, story):
    with pytest.raises(UnsupportedError, match="no unit"):
        questions.actions(attributor.like(method="bm25"), queries)
    fake = LinearRetraining(np.zeros((2, 16)))
    fake.stage.name = "train"
    with pytest.raises(UnsupportedError, match="Only StackedRetraining can weigh rows"):
        questions.actions(attributor, queries, verify=fake)
    with pytest.raises(UnsupportedError, match="Only StackedRetraining can replace rows"):
        questions.actions(attributor, queries, relabel={8: {"text": "red:hue"}}, kinds=["relabel"], verify=fake)
    with pytest.raises(ConfigError, match="which needs an attributor"):
        attributor.scores(None, queries)
        from hf_source.outputs.sharing import collect

        questions.actions(collect(attributor, queries), relabel={0: {"text": "x"}})
    two = SourceAttributor(story, num_samples=8, progress=False)
    with pytest.raises(ConfigError, match="Rows of one stage are changed"):
        questions.actions(two, Queries.from_text(["Peru:"], [" Lima"]))
