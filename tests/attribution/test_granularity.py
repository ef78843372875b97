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
"""Scores of parts of answers, and of the tokens of rows: they add up, and are what autograd says."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from hf_source import Queries, SourceAttributor
from hf_source.errors import ConfigError, DataError, UnsupportedError

from ..cases import tiny_llama, train
from ..story import facts


@pytest.fixture(scope="module")
def attributor(story):
    return SourceAttributor.from_record(story.path, num_samples=16, progress=False)


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


def close(found, expected):
    """Float32 sums of terms of both signs."""
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["source", "influence", "tracin", "stepwise"])
def test_tokens_of_answers_add_up(attributor, queries, method):
    own = attributor.like(method=method)
    whole = own.scores(None, queries, "sft")
    parts = own.scores(None, queries, "sft", query_granularity="token")
    assert parts.shape == (len(" Lima") + len(" Havana"), whole.shape[1])  # a byte is a token
    close(np.stack([parts[:5].sum(axis=0), parts[5:].sum(axis=0)]), whole)


def test_tokens_of_answers_are_queries(attributor, queries):
    parts = attributor.split(queries)
    assert parts.names[:6] == ["lima_t0", "lima_t1", "lima_t2", "lima_t3", "lima_t4", "havana_t0"]
    assert list(parts)[2] == ("lima_t2", "Peru: L", "i")
    scored = attributor.attribute(facts(), queries, "pretrain", query_granularity="token")
    assert scored.column_names[-12:] == [f"source_{name}" for name in parts.names]
    top = attributor.top(queries, k=1, stages="sft", query_granularity="token")
    assert list(dict.fromkeys(top["query"])) == parts.names
    assert attributor.split(queries, "sequence").rows == attributor.encode(queries).rows


def test_marked_parts(attributor, queries):
    marked = attributor.mark(queries, {"lima": ["Li", "a"], "havana": (1, 3)})
    asked = [[place for place, label in enumerate(row["labels"]) if label != -100] for row in marked.rows]
    assert asked == [[6, 7, 9], [10, 11]]
    parts = attributor.split(marked, "span")
    assert list(parts) == [
        ("lima_s0", "Peru: ", "Li"),
        ("lima_s1", "Peru: Lim", "a"),
        ("havana_s0", "Q Cuba? A ", "Ha"),
    ]
    sums = attributor.scores(None, marked, "sft")
    found = attributor.scores(None, marked, "sft", query_granularity="span")
    close(np.stack([found[:2].sum(axis=0), found[2]]), sums)
    whole = attributor.mark(queries, {"lima": " Lima"})
    assert whole.rows == attributor.encode(queries).rows


def test_generated_tokens_that_the_tokenizer_would_not_make(attributor):
    """What is generated is marked by what its tokens decode to."""
    said = attributor.generate(["Peru:"], max_new_tokens=5)
    odd = Queries(said.names, ["Another text than its tokens "], said.completions, said.rows)
    marked = attributor.mark(odd, {"q0": (1, 2)})
    asked = [place for place, label in enumerate(marked.rows[0]["labels"]) if label != -100]
    assert asked == [len("Peru:") + 1]


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ({"cuba": "a"}, "no query 'cuba' to mark a part of; there are lima, havana"),
        ({"lima": "Lyon"}, "does not hold 'Lyon'; it is ' Lima'"),
        ({"lima": ""}, "does not hold ''"),
        ({"lima": (3, 9)}, r"\(3, 9\) is no part of the answer .* within 5 letters"),
        ({"lima": [3]}, "3 is no part of the answer"),
    ],
)
def test_parts_that_are_not_there(attributor, queries, spans, said):
    with pytest.raises(DataError, match=said):
        attributor.mark(queries, spans)


def test_tokens_of_rows_add_up(attributor, queries):
    for stage in ("pretrain", "sft"):
        whole = attributor.scores(None, queries, stage)
        parts = attributor.scores(None, queries, stage, granularity="token")
        assert len(parts) == whole.shape[1]
        close(np.stack([part.sum(axis=1) for part in parts], axis=1), whole)


def test_tokens_of_the_rows_that_matter(attributor, queries):
    scored = attributor.attribute(None, queries, "sft")
    best = scored.sort("source_havana", reverse=True).select(range(2))
    tokens = attributor.attribute(best, queries, "sft", granularity="token")
    assert tokens.column_names == [*best.column_names, "source_tokens", "source_lima_tokens", "source_havana_tokens"]
    for row in tokens:
        prompt = len(row["prompt"])
        assert "".join(row["source_tokens"][:-1]) == row["prompt"] + row["completion"]
        assert not any(row["source_havana_tokens"][:prompt]) and all(row["source_havana_tokens"][prompt:])
        close(sum(row["source_havana_tokens"]), row["source_havana"])
    both = attributor.attribute(best, queries, "sft", granularity="token", query_granularity="token")
    close(
        sum(np.array(both[0][f"source_lima_t{place}_tokens"]) for place in range(5)), tokens[0]["source_lima_tokens"]
    )


def test_a_plan_of_tokens(attributor, queries):
    """A pass of the row for each of its label tokens; nothing else of the stages is scored."""
    best = attributor.attribute(None, queries, "sft").select([1, 3])
    whole, some = (attributor.plan(rows, queries, "sft", "token") for rows in (None, best))
    rows, stage = attributor.rows(attributor.record.stage("sft")), attributor.record.stage("sft")
    expected = sum(
        int((rows.lengths[[1, 3]] * rows.items[[1, 3]] * (segment.num_visits()[[1, 3]] > 0)).sum())
        for segment in stage.segments
    )
    assert [each.score_tokens for each in some.stages] == [expected] and some.stages[0].num_rows == 2
    assert some.seconds < whole.seconds and whole.stages[0].score_tokens > expected
    first = attributor.plan(None, queries, "pretrain", "token", "token")
    assert [each.score_tokens > 0 for each in first.stages] == [False, True] and first.num_queries == 12
    with pytest.raises(UnsupportedError, match="scores rows as a whole"):
        attributor.like(method="influence").plan(None, queries, "sft", "token")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One segment of SGD, without curvature: a score is a dot product of gradients."""
    rows = Dataset.from_dict({"input_ids": [[1, 5, 3, 7, 2], [4, 4, 6, 1], [2, 9, 8, 3, 3, 5]]})
    rows = rows.add_column("labels", [[-100, -100, 3, 7, 2], [4, 4, 6, 1], [2, 9, 8, 3, 3, 5]])
    settings = {"optim": "sgd", "num_segments": 1, "max_steps": 3, "learning_rate": 0.1, "weight_decay": 0.0}
    _, record = train(tmp_path_factory.mktemp("plain"), tiny_llama().double(), rows, **settings)
    own = SourceAttributor(record, curvature="identity", progress=False, dtype=torch.float64)
    asked = Dataset.from_dict({"input_ids": [[3, 1, 4, 1]], "labels": [[-100, -100, 4, 1]]})
    return own, Queries.from_dataset(asked), rows


def test_tokens_of_rows_are_dot_products_of_gradients(plain):
    own, queries, rows = plain
    stage = own.record.stage()
    model = own.build_model(stage).double()

    def gradient(ids, labels, place):
        """Of one label token's loss."""
        logits = model(input_ids=torch.tensor([ids])).logits[0, place - 1]
        loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([labels[place]]))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    stage.load_weights(model, "final")
    query = sum(gradient([3, 1, 4, 1], [-100, -100, 4, 1], place) for place in (2, 3))
    stage.load_weights(model, 0)
    scores = own.scores(None, queries, granularity="token")
    weights = stage.segments[0].row_weights()
    for row, found, weight in zip(rows, scores, weights, strict=True):
        expected = np.zeros(len(row["input_ids"]))
        for place in range(1, len(row["labels"])):
            if row["labels"][place] != -100:
                expected[place] = weight * float(query @ gradient(row["input_ids"], row["labels"], place))
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-8 * abs(expected).max())  # float32 scores


def test_labels_without_a_gap_are_a_span(plain):
    own, _, _ = plain
    asked = Dataset.from_dict({"input_ids": [[3, 1, 4, 1, 5]], "labels": [[3, 1, -100, 1, 5]], "name": ["a"]})
    parts = own.split(Queries.from_dataset(asked), "span")
    assert parts.names == ["a_s0", "a_s1"]  # nothing predicts the first token
    assert [row["labels"] for row in parts.rows] == [[-100, 1, -100, -100, -100], [-100, -100, -100, 1, 5]]


def test_a_killed_run_of_tokens_goes_on(attributor, queries, tmp_path):
    whole = attributor.scores(None, queries, "sft", granularity="token")
    kept = attributor.like(cache_dir=tmp_path)
    kept.scores(None, queries, "sft", granularity="token")
    again = attributor.like(cache_dir=tmp_path)
    again.build_model = None  # nothing is computed again
    for one, other in zip(again.scores(None, queries, "sft", granularity="token"), whole, strict=True):
        close(one, other)


def test_more_queries_than_fit_take_several_walks(attributor, queries):
    small = attributor.like(memory_budget=2**18)
    whole = attributor.scores(None, queries, "sft", granularity="token")
    for one, other in zip(small.scores(None, queries, "sft", granularity="token"), whole, strict=True):
        close(one, other)


def test_rows_that_are_not_the_recorded_ones(attributor, queries):
    scored = attributor.attribute(facts(), queries, "pretrain")
    other = scored.select([0, 1]).map(lambda row: {"text": row["text"] + "!"})
    with pytest.raises(DataError, match="Row 0 has another 'text' than in stage 'pretrain'"):
        attributor.scores(other, queries, "pretrain", granularity="token")
    beyond = scored.select([0]).remove_columns("source_row").add_column("source_row", [99])
    with pytest.raises(DataError, match="has no row 99"):
        attributor.scores(beyond, queries, "pretrain", granularity="token")
    with pytest.raises(DataError, match="has the column 'source_tokens' already"):
        attributor.attribute(
            scored.select([0]).add_column("source_tokens", ["x"]), queries, "pretrain", granularity="token"
        )


def test_what_has_no_parts(attributor, queries, tmp_path):
    with pytest.raises(ConfigError, match="granularity='word' should be one of 'row', 'token'"):
        attributor.scores(None, queries, "sft", granularity="word")
    with pytest.raises(ConfigError, match="query_granularity='row' should be one of 'sequence', 'token', 'span'"):
        attributor.scores(None, queries, "sft", query_granularity="row")
    with pytest.raises(UnsupportedError, match="method='grad-dot' scores rows as a whole"):
        attributor.like(method="grad-dot").scores(None, queries, "sft", granularity="token")
    with pytest.raises(UnsupportedError, match="compares whole texts"):
        attributor.like(method="bm25").split(queries)
    with pytest.raises(DataError, match="queries are rows"):
        attributor.split(Queries.from_rows(Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})))


def test_an_encoder_decoder_is_asked_as_a_whole(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 260}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    rows = Dataset.from_dict({"input_ids": [[5, 6, 1], [7, 7, 1]], "labels": [[8, 1], [9, 1]]})
    _, record = train(tmp_path, model, rows, max_steps=2, num_segments=1)
    own = SourceAttributor(record, progress=False)
    with pytest.raises(UnsupportedError, match="reads its own answer"):
        own.split(Queries.from_rows(rows))
