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
"""Rows that a Trainer subclass drops before training keep their numbers, but have no score."""

import numpy as np
import pytest
from transformers import Trainer

from hf_source import Queries, RecordingMixin, SourceAttributor

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..story import facts


class ShortRows(Trainer):
    """Trains on short rows only, as preparing trainers do."""

    def __init__(self, *args, train_dataset, **kwargs):
        super().__init__(*args, train_dataset=train_dataset.filter(lambda row: len(row["input_ids"]) < 13), **kwargs)


class Recorded(RecordingMixin, ShortRows):
    pass


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    from hf_source.data import CausalLMCollator, prepare_rows

    folder = tmp_path_factory.mktemp("filtered")
    rows = prepare_rows(facts(), byte_tokenizer())
    args = config(folder, max_steps=12, num_segments=1, gradient_accumulation_steps=1)
    trainer = Recorded(
        tiny_gpt2(vocab_size=260),
        args,
        CausalLMCollator(byte_tokenizer()),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    kept = [number for number, row in enumerate(rows) if len(row["input_ids"]) < 13]
    assert 0 < len(kept) < len(rows)
    return folder / "record", rows, kept


def test_only_rows_that_trained_are_scored(filtered):
    path, rows, kept = filtered
    walker = SourceAttributor.from_record(path, num_samples=8, progress=False)
    queries = Queries.from_text(["Oman:"], [" Muscat"])
    scored = walker.attribute(None, queries)
    assert scored["source_row"] == kept
    assert np.abs(np.asarray(scored["source_q0"])).min() > 0
    top = walker.top(queries, k=len(rows))
    assert sorted(top["row"]) == kept
    assert [row["text"] for row in top] == [rows[row["row"]]["text"] for row in top]
