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

from hf_source import Queries, questions
from hf_source.attribution.asking import query_losses
from hf_source.errors import ConfigError, DataError
from hf_source.questions.why import contrast_of

from ..evaluation.fakes import LinearRetraining
from .conftest import PROMPTS, RIGHT, WRONG


def test_the_push_is_the_difference_of_two_scores(attributor):
    answer = questions.why(attributor, PROMPTS, RIGHT, WRONG, k=4)
    both = Queries.from_text(PROMPTS * 2, WRONG + RIGHT, list("abcd"))
    scores = attributor.scores(None, both).astype(float)
    push = scores[:2] - scores[2:]
    for position, name in enumerate(("q0", "q1")):
        lines = [line for line in answer.table if line["query"] == name]
        order = np.argsort(-push[position], kind="stable")
        assert [line["row"] for line in lines if line["rank"] > 0] == order[:4].tolist()
        assert [line["row"] for line in lines if line["rank"] < 0] == order[::-1][:4].tolist()
        for line in lines:
            assert line["push"] == pytest.approx(push[position, line["row"]], abs=1e-6)
            assert line["push"] == pytest.approx(line["wrong"] - line["right"])
    # The rows that state the wrong answer push towards it.
    assert set(answer.table["row"][:4]) == {8, 9, 10, 11}


def test_how_far_the_model_is_from_the_right_answer(attributor, told):
    answer = questions.why(attributor, "red:", "hue", "fig")
    stage = told.stages[-1]
    model = attributor.build_model(stage)
    stage.load_weights(model, "final")
    losses = query_losses(attributor, model, Queries.from_text(["red:"] * 2, ["fig", "hue"]))
    (line,) = contrast_of(answer)
    assert line["margins"] == pytest.approx(losses[1] - losses[0])
    assert (line["prompts"], line["wrong"], line["right"]) == ("red:", "fig", "hue")
    assert f"by {abs(line['margins']):.2f} nats" in answer.findings[0]


def test_the_model_is_asked_where_no_wrong_answer_is_given(attributor):
    said = attributor.generate(["two:"], max_new_tokens=3).completions[0]
    answer = questions.why(attributor, "two:", "fig", k=1)
    assert contrast_of(answer)[0]["wrong"] == said
    with pytest.raises(DataError, match="the model says it itself"):
        questions.why(attributor, "two:", said)


def test_answers_that_turn_are_counted(attributor):
    asked = questions.contrast_queries(attributor, PROMPTS, RIGHT, WRONG)
    scores = attributor.scores(None, asked).astype(float)
    fake = LinearRetraining(1000 * scores)  # so strong that every answer turns without its rows
    fake.stage.name = "train"
    answer = questions.why(attributor, PROMPTS, RIGHT, WRONG, k=2, verify=fake)
    margins = np.array([line["margins"] for line in contrast_of(answer)])
    assert f"for {int((margins > 0).sum())} of the {int((margins > 0).sum())} wrong answers" in answer.findings[-1]
    push = scores[:2] - scores[2:]
    best = -np.sort(-push, axis=1)[:, :2].sum(axis=1)
    assert answer.check.predicted[:, 0] == pytest.approx(-best)
    assert answer.check.measured[:, 0] == pytest.approx(-1000 * best)
    # The first mask keeps all rows, then one without each prompt's rows, then as many random ones.
    assert (~fake.trained[0]).sum(axis=1).tolist() == [0, 2, 2, 2, 2]


def test_a_real_training_without_the_wrong_rows(attributor):
    answer = questions.why(attributor, "red:", "hue", "fig", k=4, verify=True)
    assert answer.check.measured[0, 0] < -0.5  # nats: four of eight rows for that prompt said so
    assert np.sign(answer.check.predicted[0, 0]) == -1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((PROMPTS, ["hue"]), "2 prompts, 1 right"),
        ((PROMPTS, RIGHT, ["fig"]), "2 right answers, 1 wrong"),
        (("red:", "hue", "hue"), "wrong and right are the same"),
    ],
)
def test_answers_that_do_not_fit(attributor, given, message):
    with pytest.raises(DataError, match=message):
        questions.why(attributor, *given)


def test_what_is_refused(attributor, story):
    with pytest.raises(ConfigError, match="k=0"):
        questions.why(attributor, "red:", "hue", "fig", k=0)
    with pytest.raises(ConfigError, match="give a SourceAttributor"):
        questions.why(None, "red:", "hue", "fig")
    from hf_source import SourceAttributor

    two = SourceAttributor(story, num_samples=8, progress=False)
    with pytest.raises(ConfigError, match=r"choose stage= from \['pretrain', 'sft'\]"):
        questions.why(two, "Peru:", " Lima", " Suva", verify=True)
    assert set(questions.why(two, "Peru:", " Lima", " Suva", k=1).table["stage"]) == {"pretrain", "sft"}
