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
import pyarrow as pa
import pytest
from datasets import Dataset

from hf_source.errors import DataError
from hf_source.outputs import add_score_columns, check_names, column_name, top_table


SCORES = np.array([[0.5, -2.0, 1.0, 0.0], [3.0, 3.0, -1.0, 2.0]], dtype=np.float32)


@pytest.fixture
def rows():
    return Dataset.from_dict({"text": ["a", "b", "c", "d"], "source_note": [1, 2, 3, 4]})


def test_columns_follow_the_rows(rows):
    scored = add_score_columns(rows, SCORES, ["x", "y"])
    assert scored.column_names == ["text", "source_note", "source_row", "source_x", "source_y"]
    assert {name: scored.features[name].dtype for name in scored.column_names[2:]} == {
        "source_row": "int64",
        "source_x": "float32",
        "source_y": "float32",
    }
    assert scored["text"] == rows["text"]
    assert scored["source_row"] == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.stack([scored["source_x"], scored["source_y"]]), SCORES)


def test_scores_of_wider_type_become_float32(rows):
    scored = add_score_columns(rows, SCORES.astype(np.float64), ["x", "y"])
    assert scored.features["source_y"].dtype == "float32"
    assert scored.sort("source_x", reverse=True)["text"] == ["c", "a", "d", "b"]


def test_own_row_numbers_stay(rows):
    numbered = rows.add_column("source_row", [7, 5, 6, 4])
    scored = add_score_columns(numbered, SCORES, ["x", "y"])
    assert scored["source_row"] == [7, 5, 6, 4]
    assert scored.column_names.count("source_row") == 1


def test_shuffled_rows_get_their_scores_by_position(rows):
    scored = add_score_columns(rows.select([2, 0]), SCORES[:1, :2], ["x"])
    assert scored["text"] == ["c", "a"]
    assert scored["source_x"] == [0.5, -2.0]


def test_columns_are_arrow_arrays_that_share_memory(rows, monkeypatch):
    """A million rows times a thousand queries must not pass through Python numbers."""
    given = []
    make = pa.array
    monkeypatch.setattr("hf_source.outputs.columns.pa.array", lambda values: given.append(make(values)) or given[-1])
    scores = np.ascontiguousarray(SCORES)
    add_score_columns(rows, scores, ["x", "y"])
    addresses = [array.buffers()[1].address for array in given[1:]]
    assert addresses == [scores[query].__array_interface__["data"][0] for query in range(2)]


def test_a_name_that_is_taken_is_refused(rows):
    assert column_name("lima") == "source_lima"
    with pytest.raises(
        DataError, match="'note' would need column 'source_note', which the dataset has already: rename"
    ):
        add_score_columns(rows, SCORES[:1], ["note"])
    with pytest.raises(DataError, match="'source_row'"):
        check_names(rows, ["row"])
    check_names(rows, ["notes", "rows"])


def test_one_score_column_per_name(rows):
    with pytest.raises(ValueError, match="zip"):
        add_score_columns(rows, SCORES, ["x"])


# ---- the long table ------------------------------------------------------------------------------------------------


def table(k: int, **settings) -> list[dict]:
    numbers = np.array([10, 11, 12, 13])
    stage = ("sft", SCORES, numbers, lambda row: f"text {row}")
    return list(top_table([stage], ["x", "y"], k, **settings))


def test_top_table_ranks_both_ways():
    found = [(row["query"], row["rank"], row["row"], row["score"], row["text"]) for row in table(1)]
    assert found == [
        ("x", 1, 12, 1.0, "text 12"),
        ("x", -1, 11, -2.0, "text 11"),
        ("y", 1, 10, 3.0, "text 10"),  # of equal rows the first comes first
        ("y", -1, 12, -1.0, "text 12"),
    ]
    assert {row["stage"] for row in table(1)} == {"sft"}


def test_top_table_supporting_only():
    assert [(row["rank"], row["row"]) for row in table(2, opposing=False)] == [(1, 12), (2, 10), (1, 10), (2, 11)]


@pytest.mark.parametrize(("k", "ranks"), [(2, [1, 2, -1, -2]), (3, [1, 2, 3, -1]), (9, [1, 2, 3, 4])])
def test_top_table_lists_a_row_once(k, ranks):
    of_x = [row for row in table(k) if row["query"] == "x"]
    assert [row["rank"] for row in of_x] == ranks
    assert len({row["row"] for row in of_x}) == 4
    assert of_x[-1]["row"] == {2: 13, 3: 11, 9: 11}[k]


def test_top_table_types():
    stage = ("sft", SCORES, np.arange(4), str)
    features = top_table([stage, stage], ["x", "y"], 2).features
    assert {name: feature.dtype for name, feature in features.items()} == {
        "query": "string",
        "stage": "string",
        "row": "int64",
        "rank": "int64",
        "score": "float32",
        "text": "string",
    }
