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
"""The dataset that scores are asked for need not be the one that trained, as long as its rows are told apart."""

import numpy as np
import pytest
import torch

from hf_source import Queries, SourceAttributor, SourceTrainer, number_rows
from hf_source.data import ROW, CausalLMCollator, prepare_rows
from hf_source.errors import DataError
from hf_source.recording import TrainingRecord

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..story import facts
from .test_filtered import Recorded


QUERIES = Queries.from_text(["Oman:"], [" Muscat"])
SETTINGS = {"max_steps": 6, "num_segments": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


def run(folder, rows, cls=SourceTrainer, collator=None, **settings):
    model, tokenizer = tiny_gpt2(vocab_size=260), byte_tokenizer()
    args = config(folder, train_sampling_strategy="sequential", **SETTINGS | settings)
    cls(model, args, collator, train_dataset=rows, processing_class=tokenizer).train()
    return folder / "record"


def scores(path, dataset, **settings):
    walker = SourceAttributor.from_record(path, num_samples=8, progress=False, **settings)
    return walker.attribute(dataset, QUERIES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same batches once from a dataset and once from its stream."""
    folder = tmp_path_factory.mktemp("runs")
    return run(folder / "rows", facts()), run(folder / "stream", facts().to_iterable_dataset(num_shards=2))


def test_a_streamed_run_scores_as_the_same_run_of_a_dataset(runs):
    rows, stream = (scores(path, None) for path in runs)
    assert np.abs(rows["source_q0"]).min() > 0
    assert stream["source_row"] == rows["source_row"] == list(range(8))
    np.testing.assert_array_equal(stream["source_q0"], rows["source_q0"])
    assert rows["text"] == facts()["text"] and "text" not in stream.column_names  # tokens are what a stream leaves
    walker = SourceAttributor.from_record(runs[1], num_samples=8, progress=False)
    top = walker.top(QUERIES, k=2)
    assert {row["text"] for row in top} <= set(facts()["text"])


@pytest.mark.parametrize("which", ["dataset", "stream"])
def test_every_form_of_the_dataset_gets_the_same_scores(runs, which):
    path = runs[which == "stream"]
    expected = dict(zip(range(8), scores(path, None)["source_q0"], strict=True))
    tokens = prepare_rows(facts(), byte_tokenizer()).select_columns(["input_ids", "labels"])

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {name: torch.tensor(value) for name, value in tokens[index].items()}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from tokens

    def encode(batch):
        return prepare_rows(facts().from_dict({"text": batch["text"]}), byte_tokenizer()).to_dict()

    forms = {
        "text": facts(),
        "tokens": tokens,
        "stream of text": facts().to_iterable_dataset(num_shards=3),
        "shuffled with numbers": number_rows(tokens).shuffle(seed=2),
        "shuffled stream with numbers": number_rows(tokens.to_iterable_dataset()).shuffle(seed=2, buffer_size=4),
        "torch format": tokens.with_format("torch"),
        "list": [dict(row) for row in tokens],
        "torch": Rows(),
        "torch stream": Stream(),
        "transform": facts().with_transform(encode),
    }
    for name, form in forms.items():
        found = scores(path, form)
        numbers = found[ROW]
        assert found["source_q0"] == [expected[row] for row in numbers], name
        assert (numbers == list(range(8))) == ("shuffled" not in name), name


def test_rows_that_never_trained_score_zero(tmp_path):
    """Half an epoch of a stream: the other rows of the dataset had no influence."""
    path = run(tmp_path, facts().to_iterable_dataset(), max_steps=2, per_device_train_batch_size=2)
    assert TrainingRecord.load(path).stage().num_rows == 4
    for form in (facts(), number_rows(facts())):
        found = np.asarray(scores(path, form)["source_q0"])
        assert (found[:4] != 0).all() and (found[4:] == 0).all()
    assert scores(path, facts().to_iterable_dataset())[ROW] == [0, 1, 2, 3]  # a stream is read as far as it trained


@pytest.mark.parametrize("stored", [True, False])
def test_rows_that_the_trainer_filtered_out_score_zero(tmp_path, stored):
    rows = prepare_rows(facts(), byte_tokenizer())
    path = run(tmp_path, rows, Recorded, CausalLMCollator(byte_tokenizer()), record_rows=stored)
    kept = [number for number, row in enumerate(rows) if len(row["input_ids"]) < 13]
    assert 0 < len(kept) < len(rows)
    full = scores(path, rows)
    assert full["text"] == facts()["text"]
    found = np.asarray(full["source_q0"])
    assert np.flatnonzero(found).tolist() == kept
    part = scores(path, number_rows(rows).select(kept[::-1]))
    assert part[ROW] == kept[::-1] and part["source_q0"] == found[kept[::-1]].tolist()
    if stored:
        assert scores(path, None)["source_q0"] == found[kept].tolist()
    other = rows.map(lambda row, i: {"input_ids": row["input_ids"][:: -1 if i == kept[0] else 1]}, with_indices=True)
    with pytest.raises(DataError, match="content hash differs"):
        scores(path, other)
    with pytest.raises(DataError, match="was trained on 8.*pass the dataset exactly"):
        scores(path, rows.select(kept[1:]))


@pytest.mark.parametrize("numbers", [[0] * 8, [-1, *range(1, 8)], [float(i) for i in range(8)]])
def test_numbers_that_tell_no_rows_apart(runs, numbers):
    for path in runs:
        with pytest.raises(DataError, match="different whole number for every row"):
            scores(path, facts().add_column(ROW, numbers))
