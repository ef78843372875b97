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
"""Influence between tokens: what it must add up to."""

import numpy as np
import pytest

from hf_source import Queries, SourceAttributor
from hf_source.attribution.row_tokens import RowTokens
from hf_source.attribution.tokens import TokenWalk, token_influence
from hf_source.errors import UnsupportedError


@pytest.fixture(scope="module")
def asked(story):
    attributor = SourceAttributor.from_record(story.path, num_samples=16, progress=False)
    queries = Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])
    return attributor, queries, attributor.top(queries, k=2)


def test_tokens_add_up_to_rows(asked):
    """Source is linear: a row's score is the sum over its tokens, and over the answer's."""
    attributor, queries, top = asked
    found = token_influence(attributor, queries, top)
    for row in top:
        tokens = found.rows[row["query"], row["stage"], row["row"]]
        total = sum(score for _, score in tokens if score is not None)
        # Scores are float32, and tokens of both signs cancel.
        scale = sum(abs(score) for _, score in tokens if score is not None)
        np.testing.assert_allclose(total, row["score"], atol=1e-4 * scale)
        assert scale > 0
    for name, _, completion in queries:
        shown = sum(row["score"] for row in top if row["query"] == name)
        received = found.answers[name]
        scale = sum(abs(row["score"]) for row in top if row["query"] == name)
        np.testing.assert_allclose(sum(score for _, score in received), shown, atol=1e-4 * scale)
        assert "".join(text for text, _ in received) == completion
        assert len(received) == len(completion)  # a byte is a token


def test_texts_of_rows_are_whole(asked):
    attributor, queries, top = asked
    found = token_influence(attributor, queries, top, max_parts=40)
    for row in top:
        tokens = found.rows[row["query"], row["stage"], row["row"]]
        assert "".join(text for text, _ in tokens) == row["text"] + "∎"
        assert tokens[-1][0] == "∎"
        if row["stage"] == "sft":  # the prompt did not train
            assert tokens[0][0].startswith("Q ") and tokens[0][1] is None


def test_long_rows_are_cut_into_parts(asked):
    attributor, queries, top = asked
    whole, cut = token_influence(attributor, queries, top), token_influence(attributor, queries, top, max_parts=3)
    for key, tokens in cut.rows.items():
        assert sum(score is not None for _, score in tokens) == 3
        total = sum(score for _, score in whole.rows[key] if score is not None)
        scale = sum(abs(score) for _, score in whole.rows[key] if score is not None)
        np.testing.assert_allclose(sum(score for _, score in tokens if score is not None), total, atol=1e-4 * scale)


def test_parts_are_bounded_by_memory(asked):
    attributor, queries, top = asked
    size = sum(int(np.prod(info["shape"])) for info in attributor.record.stages[0].tensor_info.values())
    small = attributor.like(memory_budget=3 * 4 * size * 2 * 2)
    assert {len(tokens) for tokens in token_influence(small, queries, top).answers.values()} == {2}
    none = attributor.like(memory_budget=1)
    assert not token_influence(none, queries, top).answers  # one part would say nothing


def test_row_tokens_respect_the_token_budget(asked):
    attributor, _, _ = asked
    rows = attributor.like(max_tokens_per_batch=30).rows(attributor.record.stages[0])
    tokens = RowTokens(rows, [0, 3])
    batches = tokens.batches(range(tokens.count))
    assert sorted(np.concatenate(batches)) == list(range(tokens.count)) and len(batches) > 2
    for batch in batches:
        inputs = tokens.collated(batch, attributor.device)
        assert inputs["input_ids"].numel() <= 30
        assert (inputs["labels"] != -100).sum(dim=1).tolist() == [1] * len(batch)


def test_a_letter_of_several_tokens_stays_whole(asked):
    attributor, _, _ = asked
    queries = Queries.from_text(["Peru:"], [" Pérou"])
    found = token_influence(attributor, queries, attributor.top(queries, k=1))
    assert [text for text, _ in found.answers["q0"]] == [" ", "P", "é", "r", "o", "u"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "grad-dot"}, "scores rows as a whole: use 'source'"),
        ({"ensemble": "dropout", "ensemble_size": 2, "dropout": 0.1}, "an ensemble scores rows as a whole"),
        ({"measurement": "margin"}, "a measurement other than the loss is no sum over tokens"),
    ],
)
def test_what_has_no_tokens_is_refused(asked, settings, reason):
    attributor, queries, top = asked
    with pytest.raises(UnsupportedError, match=reason):
        token_influence(attributor.like(**settings), queries, top)


def test_a_walk_takes_tokens_along(asked, monkeypatch):
    """One sample of the curvature gives the rows' scores, as ever, and those of the tokens."""
    attributor, queries, top = asked
    drawn = []
    fresh = attributor.like()
    propagate = type(fresh.curvature).propagate
    counted = lambda *given, **named: (drawn.append(1), propagate(*given, **named))[1]  # noqa: E731
    monkeypatch.setattr(type(fresh.curvature), "propagate", counted)
    along = TokenWalk(fresh, queries, 2)
    assert not fresh.is_followed(queries)
    fresh.follow(along.queries, along.scores())
    assert fresh.is_followed(queries)
    again = fresh.top(queries, k=2)
    np.testing.assert_allclose(again["score"][:], top["score"][:], rtol=1e-3, atol=1e-6)
    found, expected = along.influence(again), token_influence(attributor, queries, top)
    assert len(drawn) == 2 * 4  # four segments, of the two walks here: the tokens' second look drew nothing
    for key, tokens in expected.rows.items():
        ours = np.array([score or 0.0 for _, score in found.rows[key]])
        theirs = np.array([score or 0.0 for _, score in tokens])
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


def test_without_room_tokens_take_a_walk_of_their_own(asked, tmp_path):
    attributor, queries, top = asked
    size = 4 * sum(int(np.prod(info["shape"])) for info in attributor.record.stages[0].tensor_info.values())
    assert TokenWalk(attributor, queries, 2).takes_rows_along
    assert not TokenWalk(attributor.like(cache_dir=tmp_path), queries, 2).takes_rows_along
    assert not TokenWalk(attributor.like(memory_budget=3 * size), queries, 2).takes_rows_along
    small = attributor.like(memory_budget=3 * size * 2 * 2)  # room for two parts of each answer, but not to keep them
    along = TokenWalk(small, queries, 2)
    small.follow(along.queries, along.scores())
    found = along.influence(small.top(queries, k=1))
    assert along._curvature is None and len(found.rows) == 2 * 2 * 2


def test_an_index_has_no_tokens(asked, tmp_path):
    attributor, queries, top = asked
    indexed = attributor.like(index=attributor.build_index(tmp_path / "index"))
    with pytest.raises(UnsupportedError, match="an index keeps rows as a whole"):
        token_influence(indexed, queries, top)
