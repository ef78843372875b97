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
"""Questions about the rows themselves: duplicates, wrong ones, those to keep; and what no row says."""

import numpy as np
import pytest
from datasets import Dataset

from hf_source import Queries, questions
from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import find_mislabelled
from hf_source.questions.duplicates import similar_texts
from hf_source.questions.missing import supports

from ..evaluation.fakes import LinearRetraining
from .conftest import PROMPTS, RIGHT, rows


# ---- duplicates ----------------------------------------------------------------------------------------------------


def sets_of(answer) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for line in answer.table:
        found.setdefault(line["set"], []).append(line["row"])
    return list(found.values())


def test_rows_that_say_the_same(attributor):
    answer = questions.duplicates(attributor, threshold=1.0)
    assert sets_of(answer) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 14]]  # letter case and spaces aside
    assert set(answer.table["similarity"]) == {1.0} and "6 of 16 rows would be left" in answer.findings[0]
    assert "rests on no influence scores" in str(answer)
    assert sets_of(questions.duplicates(rows(), threshold=1.0)) == sets_of(answer)
    gradients = questions.duplicates(attributor, by="gradient", threshold=0.999)
    assert sets_of(gradients)[:3] == sets_of(answer)[:3]


def test_near_duplicates_are_those_of_all_pairs():
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcdef"), size=60)) for _ in range(30)]
    for source in range(10):
        letters = list(texts[source])
        letters[20 + source] = "X"
        texts.append("".join(letters))
    grams = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (t.lower() for t in texts)]
    expected = {}
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            similarity = len(grams[i] & grams[j]) / len(grams[i] | grams[j])
            if similarity >= 0.7:
                expected[i, j] = pytest.approx(similarity)
    assert len(expected) == 10
    assert similar_texts(texts, 0.7) == expected


def test_duplicates_across_stages(story):
    from hf_source import SourceAttributor

    answer = questions.duplicates(SourceAttributor(story, progress=False), threshold=0.2)
    assert set(answer.table["stage"][:]) <= {"pretrain", "sft"}
    only = questions.duplicates(SourceAttributor(story, progress=False), threshold=0.2, stage="sft")
    assert set(only.table["stage"][:]) <= {"sft"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"by": "sound"}, "by='sound'"), ({"threshold": 0}, "threshold=0"), ({"threshold": 1.5}, "threshold=1.5")],
)
def test_duplicates_refuse(attributor, settings, message):
    with pytest.raises(ConfigError, match=message):
        questions.duplicates(attributor, **settings)
    with pytest.raises(ConfigError, match="needs the model"):
        questions.duplicates(Dataset.from_dict({"text": ["a"]}), by="gradient")


# ---- mislabelled ---------------------------------------------------------------------------------------------------


def test_the_list_of_suspicious_rows(attributor, queries):
    answer = questions.mislabelled(attributor, queries, known="is_corrupted", k=5)
    own, losses = attributor.self_influence().astype(float), attributor.row_losses()
    order = np.argsort(-own, kind="stable")[:5]
    assert answer.table["row"][:] == order.tolist()
    assert answer.table["self_influence"][:] == pytest.approx(own[order].tolist())
    assert answer.table["loss"][:] == pytest.approx(losses[order].tolist())
    wrong = np.asarray(rows()["is_corrupted"])
    figures = answer.settings["question"]["auroc"]
    assert figures["self-influence"] == find_mislabelled(own, wrong, k=(4,)).auroc.value
    assert set(figures) == {"self-influence", "loss", "opposition"}
    by_loss = questions.mislabelled(attributor, order="loss", k=3)
    assert by_loss.table["row"][:] == np.argsort(-losses, kind="stable")[:3].tolist()


def test_wrong_rows_refuse(attributor, queries):
    for settings, message in (
        ({"order": "size"}, "order='size'"),
        ({"order": "opposition"}, "needs `queries=`"),
    ):
        with pytest.raises(ConfigError, match=message):
            questions.mislabelled(attributor, **settings)
    with pytest.raises(DataError, match="does not say true or false"):
        questions.mislabelled(attributor, known="source")
    with pytest.raises(DataError, match="column 'wrong'"):
        questions.mislabelled(attributor, known="wrong")
    with pytest.raises(ConfigError, match="method='source'"):
        questions.mislabelled(attributor.like(method="grad-dot"))
    with pytest.raises(ConfigError, match="need the model"):
        questions.mislabelled(attributor.like(method="bm25"))


# ---- keep ----------------------------------------------------------------------------------------------------------


def test_rows_worth_keeping(attributor, queries, scores):
    answer = questions.keep(attributor, queries, 0.25)
    best = np.argsort(-scores.mean(axis=0), kind="stable")[:4]
    assert answer.table["row"][:] == best.tolist()
    assert answer.table["rank"][:] == [1, 2, 3, 4]


def test_the_choice_is_judged_by_training(attributor, queries, scores):
    fake = LinearRetraining(scores)
    fake.stage.name = "train"
    answer = questions.keep(attributor, queries, 8, verify=fake, num_random=5, seeds=[1, 2])
    figures = answer.settings["question"]["losses"]
    assert {name: len(values) for name, values in figures.items()} == {"all": 2, "chosen": 2, "random": 10}
    sizes = fake.trained[0].sum(axis=1)
    assert sizes.tolist() == [16] + [8] * 6
    assert max(figures["chosen"]) < min(figures["random"]) + 10  # another seed is another model altogether
    best = fake.trained[0][1]
    assert sorted(np.flatnonzero(best)) == sorted(answer.table["row"][:])
    one = questions.keep(attributor, queries, 8, verify=_named(LinearRetraining(scores)), num_random=5)
    found = one.settings["question"]["losses"]
    assert found["chosen"][0] == pytest.approx(found["all"][0] + _lost(scores, one), abs=1e-6)
    assert found["chosen"][0] < min(found["random"]) and "better than 5 of 5 draws" in one.findings[-1]
    assert "flatters the choice" in one.findings[-1]


def _named(fake):
    fake.stage.name = "train"
    return fake


def _lost(scores, answer):
    kept = np.isin(np.arange(16), answer.table["row"][:])
    return scores[:, ~kept].sum(axis=1).mean()


def test_other_queries_judge(attributor, queries):
    judge = Queries.from_text(["odd "], ["one"])
    answer = questions.keep(attributor, queries, 8, judge=judge, verify=True, num_random=1)
    assert "loss of the judge's queries" in answer.findings[-1]
    with pytest.raises(DataError, match="make it of the same"):
        fake = _named(LinearRetraining(np.zeros((2, 16))))
        questions.keep(attributor, queries, 8, judge=judge, verify=fake)


@pytest.mark.parametrize("budget", [0, 16, 1.5, 0.0, -1, True])
def test_impossible_budgets(attributor, queries, budget):
    with pytest.raises(ConfigError, match="budget="):
        questions.keep(attributor, queries, budget)


# ---- missing -------------------------------------------------------------------------------------------------------


def test_support_is_what_stands_out():
    scores = np.array([[5.0, 1, -1, -1], [1.0, 2, -2, -1], [0.5, 0.5, 1.0, 2.0]])
    support, strongest, opposing = supports(scores)
    assert support[:2].tolist() == [5.0, 1.0] and support[2] > 1e9  # nothing opposes it
    assert strongest.tolist() == [5, 2, 2] and opposing.tolist() == [-1, -2, 0]
    assert supports(scores, 2)[0][:2].tolist() == [3.0, 1.0]


def test_what_no_row_says(attributor):
    prompts, completions = [*PROMPTS, "sea:"], [*RIGHT, "jam"]
    asked = Queries.from_text(prompts, completions, ["red", "two", "sea"])
    answer = questions.missing(attributor, asked, by=["known", "known", "unknown"])
    scores = attributor.scores(None, asked).astype(float)
    support = {name: value for name, value in zip(asked.names, supports(scores)[0], strict=True)}
    lines = {line["query"]: line for line in answer.table}
    assert {name: line["support"] for name, line in lines.items()} == pytest.approx(support)
    assert answer.table["support"][:] == sorted(support.values())
    for position, name in enumerate(asked.names):
        assert lines[name]["missing"] == (support[name] < 1)
        assert lines[name]["row"] == scores[position].argmax()
        assert lines[name]["text"] == rows()["text"][scores[position].argmax()]
        assert lines[name]["loss_per_token"] > 0
    assert lines["sea"]["loss_per_token"] > lines["red"]["loss_per_token"]
    every = questions.missing(attributor, asked, threshold=1e12, by=["known", "known", "unknown"])
    assert every.settings["question"]["num_missing"] == 3


def test_regions_that_lack_rows():
    from hf_source.questions.missing import _findings

    lacking = np.array([True, True, True, False, False, False, False, False])
    asked = Queries.from_text([""] * 8, ["x"] * 8)
    said = _findings(asked, np.ones(8), lacking, 1.0, ["far"] * 4 + ["near"] * 4)
    assert len(said) == 2 and "'far': 3 of 4" in said[1]


def test_missing_refuses(attributor, queries):
    with pytest.raises(ConfigError, match="k=9"):
        questions.missing(attributor, queries, k=9)
    with pytest.raises(DataError, match="1 regions for 2 queries"):
        questions.missing(attributor, queries, by=["x"])
