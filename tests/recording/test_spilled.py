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
"""Rows of any number in little memory."""

import gc

import numpy as np
import pyarrow as pa
import pytest
from cases import random_rows, tiny_llama, train

from hf_source import Queries, SourceAttributor, TrainingRecord, number_rows
from hf_source.data import ROW
from hf_source.recording.rows import spilled as module
from hf_source.recording.rows.spilled import spilled
from hf_source.recording.rows.stored import rows_dataset


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def tables(count, rows=1000, extra=False):
    for number in range(count):
        columns = {"n": np.arange(number * rows, (number + 1) * rows), "ids": [[number] * 50] * rows}
        if extra and number > 1:  # a column that the first tables lack
            columns["note"] = ["x"] * rows
        yield pa.table(columns)


@pytest.mark.parametrize("extra", [False, True])
def test_tables_come_back_as_they_were(cache, extra):
    expected = pa.concat_tables(tables(6, extra=extra), promote_options="permissive")
    for held in (0, 500_000, 10**9):
        assert spilled(tables(6, extra=extra), held).equals(expected)
    assert list(cache.iterdir()) == []  # nothing is left behind
    assert spilled([]).num_rows == 0


def test_memory_does_not_grow_with_the_rows(cache):
    """Arrow counts what it allocated, without what is mapped from disk: 2 and 20 times the limit take the same."""
    size, used = next(tables(1)).nbytes, []
    for count in (4, 40):
        gc.collect()
        before = pa.total_allocated_bytes()
        table = spilled(tables(count), 2 * size)
        used.append(pa.total_allocated_bytes() - before)
        assert table.num_rows == count * 1000 and table["ids"][-1].as_py() == [count - 1] * 50
        del table
    assert max(used) < 3.5 * size


def test_a_long_stream_of_rows_is_not_held(cache, monkeypatch):
    monkeypatch.setattr(module, "HELD", 2**20)
    gc.collect()
    before = pa.total_allocated_bytes()
    rows = rows_dataset({ROW: number, "input_ids": list(range(number, number + 100))} for number in range(20000))
    assert rows.data.nbytes > 16e6
    assert pa.total_allocated_bytes() - before < 4e6
    assert rows[19999]["input_ids"][:2] == [19999, 20000]


def test_scores_of_a_stream_are_the_same_from_disk(cache, monkeypatch, tmp_path):
    """Recorded out of order, read in pieces, and given again as a stream."""
    stream = number_rows(random_rows().to_iterable_dataset()).shuffle(seed=3, buffer_size=7)
    _, record = train(tmp_path, tiny_llama(), stream, max_steps=6)
    queries = Queries.from_dataset(random_rows(2, seed=9))
    scores = []
    for held in (10**9, 0):
        monkeypatch.setattr(module, "HELD", held)
        opened = TrainingRecord.load(record.path)
        assert opened.stage().rows()[ROW] == sorted(opened.stage().rows()[ROW])
        for given in (None, stream):
            attributor = SourceAttributor(opened, num_samples=8, progress=False)
            found = attributor.attribute(given, queries)
            scores.append(dict(zip(found[ROW], found["source_q0"], strict=True)))
    assert len(scores[0]) == 22 and any(scores[0].values())
    assert all(each == scores[0] for each in scores)
