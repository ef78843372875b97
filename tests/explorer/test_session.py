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
"""What the explorer does without its buttons."""

from math import exp

import numpy as np
import pytest

from hf_source import Queries, SourceAttributor
from hf_source.attribution.asking import query_losses
from hf_source.errors import DataError
from hf_source.explorer import Explorer, Group, Removal
from hf_source.explorer.session import row_numbers, shares

from ..story import chats, facts


@pytest.fixture(scope="module")
def explorer(story):
    attributor = SourceAttributor.from_record(story.path, num_samples=16, progress=False)
    attributor.set_dataset("pretrain", facts().add_column("origin", ["atlas"] * 4 + ["wiki"] * 2 + [None] * 2))
    attributor.set_dataset("sft", chats())
    return Explorer(attributor, longest=8)


@pytest.fixture(scope="module")
def found(explorer):
    return explorer.ask("Peru:", " Lima")


def test_generate(explorer):
    expected = explorer.attributor.generate(["Peru:"], max_new_tokens=8).completions[0]
    assert explorer.generate("Peru:", 100) == expected  # no more than the longest
    with pytest.raises(DataError, match="A prompt is empty"):
        explorer.generate("", 4)


def test_an_answer_has_the_attributors_scores(explorer, found):
    queries = Queries.from_text(["Peru:"], [" Lima"])
    for stage in ("pretrain", "sft"):
        expected = explorer.attributor.scores(explorer.attributor.datasets[stage], queries, stage)[0]
        np.testing.assert_array_equal(found.scores[stage], expected)
    assert found.loss == pytest.approx(query_losses(explorer.attributor, explorer.model(), queries)[0])
    assert (found.unit, found.asked, list(found.scores)) == ("nats", " Lima", ["pretrain", "sft"])
    assert sum(share for _, share in shares(found)) == pytest.approx(1)


def test_parts_of_an_answer_add_up_to_it(explorer, found):
    """Log-probabilities of neighbouring spans add, and so do scores."""
    parts = [explorer.ask("Peru:", " Lima", span) for span in ((0, 2), (2, 5))]
    assert [part.asked for part in parts] == [" L", "ima"]
    assert sum(part.loss for part in parts) == pytest.approx(found.loss, rel=1e-5)
    for stage, scores in found.scores.items():
        total = sum(part.scores[stage] for part in parts)
        np.testing.assert_allclose(total, scores, atol=1e-4 * np.abs(scores).max())


def test_a_span_asks_about_the_tokens_it_touches(explorer):
    labels = explorer.question("Peru:", " Lima", (2, 4)).rows[0]["labels"]
    assert [place for place, label in enumerate(labels) if label != -100] == [7, 8]  # a byte is a token
    whole = explorer.question("Peru:", " Lima").rows[0]["labels"]
    for span in (None, (3, 3), (0, 5)):
        assert explorer.question("Peru:", " Lima", span).rows[0]["labels"] == whole
    with pytest.raises(DataError, match="is no part of the answer"):
        explorer.question("Peru:", " Lima", (7, 9))


def test_a_tokenizer_without_offsets(explorer, monkeypatch):
    expected = explorer.question("Peru:", " Lima", (2, 4))
    monkeypatch.setattr(type(explorer.attributor.processing_class), "is_fast", False)
    assert explorer.question("Peru:", " Lima", (2, 4)).rows == expected.rows


def test_columns_and_values(explorer):
    assert explorer.columns(None) == explorer.columns("pretrain") == ["origin"]
    assert explorer.columns("sft") == [] and explorer.values("sft", "origin") == []
    assert explorer.values("pretrain", "origin") == ["(none)", "atlas", "wiki"]
    assert explorer.values(None, None) == []


def test_top_of_a_group(explorer, found):
    rows = explorer.top(found, Group("pretrain", "origin", "wiki"), k=1)
    scores = found.scores["pretrain"][4:6]
    expected = [score for score in sorted(scores, reverse=True)]
    kept = {*[score for score in expected[:1] if score > 0], *[score for score in expected[-1:] if score < 0]}
    assert [row["score"] for row in rows] == pytest.approx(sorted(map(float, kept), reverse=True))
    assert all(row["stage"] == "pretrain" and row["text"].endswith(".") for row in rows)
    every = explorer.top(found, Group(), k=2)
    assert [row["score"] for row in every] == sorted((row["score"] for row in every), reverse=True)
    best = max(("pretrain", "sft"), key=lambda stage: found.scores[stage].max())
    assert (every[0]["stage"], every[0]["row"]) == (best, int(found.scores[best].argmax()))
    assert explorer.top(found, Group("sft", "origin", "wiki")) == []


def test_removal_is_the_sum_of_the_scores(explorer, found):
    group = Group("pretrain", "origin", "atlas")
    removal = explorer.remove(found, group)
    total = found.scores["pretrain"][:4].astype(np.float64).sum()
    assert removal == Removal(4, 12, pytest.approx(total), -found.loss, pytest.approx(-found.loss - total))
    said = " ".join(removal.sentences(found.unit))
    assert f"from a probability of {exp(-found.loss):.3g} to" in said and "33.3 % of all" in said
    assert "first-order prediction" in said
    rows = explorer.remove(found, Group("pretrain", rows=(0, 3)))
    assert rows.change == pytest.approx(float(found.scores["pretrain"][[0, 3]].sum()))
    assert explorer.remove(found, Group()).num_rows == 12
    with pytest.raises(DataError, match="Row numbers belong to a stage"):
        explorer.remove(found, Group(rows=(0,)))
    with pytest.raises(DataError, match="Stage 'sft' has no row 7: it has 4 rows."):
        explorer.remove(found, Group("sft", rows=(7,)))
    with pytest.raises(DataError, match="The group has no row"):
        explorer.remove(found, Group("pretrain", "origin", "elsewhere"))


def test_what_cannot_be_foretold_is_said():
    assert "More than certain cannot be" in Removal(1, 100, -2.0, -1.0, 1.0).sentences("nats")[1]
    assert len(Removal(1, 100, 2.0, -1.0, -3.0).sentences("nats")) == 1
    assert "They have no unit" in Removal(2, 4, 0.5).sentences("")[0]


def test_a_method_without_unit(story):
    plain = Explorer(SourceAttributor.from_record(story.path, method="bm25", progress=False))
    found = plain.ask("Peru:", " Lima")
    assert found.loss is None and found.unit == "" and plain.remove(found, Group()).after is None


def test_an_index_answers(explorer, found, tmp_path):
    """The same questions, without a pass over the rows."""
    attributor = explorer.attributor
    attributor.build_index(tmp_path / "index", precision="full")
    indexed = Explorer(attributor.like(index=tmp_path / "index"), longest=8)
    whole, parts = indexed.ask("Peru:", " Lima"), [indexed.ask("Peru:", " Lima", span) for span in ((0, 2), (2, 5))]
    assert whole.loss == pytest.approx(found.loss) and whole.trust
    for stage, scores in whole.scores.items():
        np.testing.assert_allclose(sum(part.scores[stage] for part in parts), scores, atol=1e-3 * np.abs(scores).max())
        assert np.corrcoef(scores, found.scores[stage])[0, 1] > 0.9
    assert indexed.remove(whole, Group("pretrain", "origin", "atlas")).num_rows == 4


def test_row_numbers():
    assert row_numbers("3, 5 8-10") == (3, 5, 8, 9, 10) and row_numbers(" ") is None
    for wrong in ("x", "3-", "-4", "1.5"):
        with pytest.raises(DataError, match="is no row number"):
            row_numbers(wrong)
