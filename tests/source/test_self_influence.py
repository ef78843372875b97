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
import dataclasses
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.evaluation import corrupt_labels, find_mislabelled
from hf_source.source import segment_flow

from ..cases import byte_tokenizer, random_rows, tiny_gpt2, train


CURVATURES = {
    "identity": {"curvature": "identity"},
    "ekfac": {"curvature": "ekfac"},
    "joint": {"curvature": "joint"},
    "joint without tail": {"curvature": "joint", "tail": False},
    "joint in groups": {"curvature": "joint", "memory_budget": 22 * 4000 * 8},
    "any other": {"curvature": "diagonal"},
}
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "elementwise decay": {"optim": "rmsprop"},  # coupled to the gradient, it passes through the preconditioner
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def still(request, tmp_path_factory):
    """A run of one segment that hardly moves: its weights are the final ones."""
    settings = {"learning_rate": 1e-7, "num_segments": 1, "max_grad_norm": 0.0, **OPTIMIZERS[request.param]}
    model = tiny_gpt2(dtype=torch.float64)
    return train(tmp_path_factory.mktemp("still"), model, random_rows(), **settings)[1]


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("momentum", [True, False])
def test_a_row_alone_is_a_row_as_a_query(still, name, momentum, monkeypatch):
    """With one segment, whose weights do not change, it is the diagonal of the scores of all rows as queries."""

    def stretched(*given):  # so long that curvature and decay matter
        return dataclasses.replace(segment_flow(*given), length=1.0)

    for module in ("walk", "self_influence"):
        monkeypatch.setattr(sys.modules[f"hf_source.source.{module}"], "segment_flow", stretched)
    rows = random_rows()
    settings = CURVATURES[name] | {"num_samples": 16, "momentum": momentum, "dtype": torch.float64, "progress": False}
    attributor = SourceAttributor(still, **settings)
    expected = np.diag(attributor.scores(None, Queries.from_dataset(rows)))
    got = attributor.self_influence()
    assert got.dtype == np.float32
    # weights move by 1e-6 in the segment, and scores are float32
    assert got == pytest.approx(expected, rel=1e-3, abs=float(1e-4 * expected.max()))
    if name != "identity":
        free = SourceAttributor(still, **settings | {"curvature": "identity"}).self_influence()
        assert (got < 0.9 * free).any()  # the curvature did something


def test_on_a_real_run_the_order_is_that_of_rows_as_queries(tmp_path):
    rows = random_rows()
    record = train(tmp_path, tiny_gpt2(), rows, num_segments=2)[1]
    attributor = SourceAttributor(record, progress=False)
    exact = np.diag(attributor.scores(None, Queries.from_dataset(rows)))
    assert np.corrcoef(np.argsort(np.argsort(exact)), np.argsort(np.argsort(attributor.self_influence())))[0, 1] > 0.8
    with pytest.raises(UnsupportedError, match="method='source'"):
        SourceAttributor(record, method="bm25").self_influence()


def test_rows_come_in_the_order_of_the_dataset(tmp_path):
    rows = random_rows()
    record = train(tmp_path, tiny_gpt2(), rows)[1]
    attributor = SourceAttributor(record, curvature="identity", progress=False)
    straight = attributor.self_influence()
    order = np.random.default_rng(0).permutation(22)
    numbered = rows.add_column("source_row", np.arange(22)).select(order)
    assert attributor.self_influence(numbered) == pytest.approx(straight[order], rel=1e-5)


def test_losses_of_rows_are_those_of_the_final_model(tmp_path):
    rows = random_rows()
    record = train(tmp_path, tiny_gpt2(), rows)[1]
    got = SourceAttributor(record, progress=False).row_losses()
    model = record.stages[0].build_model()
    for number in (0, 5):
        ids, labels = torch.tensor([rows[number]["input_ids"]]), torch.tensor([rows[number]["labels"]])
        mean = model(ids, labels=labels).loss.item()
        assert got[number] == pytest.approx(
            mean * sum(label != -100 for label in rows[number]["labels"][1:]), rel=1e-4
        )


def test_wrong_rows_stand_out(tmp_path):
    """Each of two questions has one right answer in nearly all rows; a wrong one is supported by no other row."""
    facts = Dataset.from_dict({"prompt": ["red:", "two:"] * 24, "completion": ["colour", "number"] * 24})
    facts = corrupt_labels(facts, 0.1, seed=3, column="completion")
    model = tiny_gpt2(vocab_size=260)
    settings = {"num_train_epochs": 12, "num_segments": 2}
    record = train(tmp_path, model, facts, trainer={"processing_class": byte_tokenizer()}, **settings)[1]
    attributor = SourceAttributor(record, progress=False)
    known = facts["is_corrupted"][:]
    assert find_mislabelled(attributor.self_influence(facts), known).auroc.value > 0.9
    assert find_mislabelled(attributor.row_losses(), known).auroc.value > 0.9
    clean = Queries.from_text(["red:", "two:"], ["colour", "number"])
    assert find_mislabelled(-attributor.scores(facts, clean).mean(axis=0), known).auroc.value > 0.9
