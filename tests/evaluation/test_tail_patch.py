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
import torch

from hf_source import Queries, SourceAttributor
from hf_source.errors import ConfigError
from hf_source.evaluation import tail_patch

from ..cases import random_rows, tiny_gpt2, train


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    rows = random_rows()
    _, record = train(tmp_path_factory.mktemp("tail"), tiny_gpt2(), rows)
    queries = Queries.from_dataset(rows.select([0, 3, 7]))
    attributor = SourceAttributor(record, method="grad-dot", progress=False)
    return rows, record, queries, attributor, attributor.scores(None, queries)


def loss_of(model, row) -> torch.Tensor:
    """Summed loss of a row, with nothing of the library."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(ids).logits[0, :-1]
    asked = labels[1:] != -100
    return torch.nn.functional.cross_entropy(logits[asked], labels[1:][asked], reduction="sum")


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 1), ("sgd", 3), ("recorded", 1), ("recorded", 2)])
def test_a_patch_is_a_step_made_by_hand(told, optimizer, steps):
    rows, record, queries, attributor, scores = told
    settings = {"learning_rate": 3e-3, "optimizer": optimizer, "steps": steps, "num_random": 2}
    found = tail_patch(attributor, queries, {"grad-dot": scores}, k=(4,), **settings)
    for query, row in enumerate(rows.select([0, 3, 7])):
        model = record.stages[0].build_model().eval()
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        constants = {} if optimizer == "sgd" else {"weight_decay": 0.0}
        hand = kind(model.parameters(), lr=3e-3, **constants)
        before = loss_of(model, row).item()
        top = [rows[int(i)] for i in np.argsort(-scores[query], kind="stable")[:4]]
        items = sum(sum(label != -100 for label in one["labels"][1:]) for one in top)
        for _ in range(steps):
            hand.zero_grad()
            (sum(loss_of(model, one) for one in top) / items).backward()
            hand.step()
        # float32 losses of about 30 nats, summed in another order; Adam normalises the rounding of zero gradients
        assert found[1].gains[0, query] == pytest.approx(before - loss_of(model, row).item(), abs=2e-3)
    assert found[0].method == "random"
    assert found[0].gains.shape == (2, 3)
    assert found[0].excess.value == pytest.approx(0.0)
    assert found[1].excess.value > 0


def test_a_small_step_gains_the_product_of_gradients(told):
    """To first order a step with SGD gains `lr <grad f_q, mean gradient of the rows>`: the scores of grad-dot."""
    rows, record, queries, attributor, scores = told
    found = tail_patch(attributor, queries, {"a": scores}, k=(1,), learning_rate=1e-3, optimizer="sgd", num_random=1)
    best = scores.argmax(axis=1)
    items = [sum(label != -100 for label in rows[int(row)]["labels"][1:]) for row in best]
    expected = 1e-3 * scores.max(axis=1) / items
    assert found[1].gains[0] == pytest.approx(expected, rel=0.1)
    tenfold = tail_patch(attributor, queries, {"a": scores}, k=(1,), learning_rate=1e-2, optimizer="sgd", num_random=1)
    assert (tenfold[1].gains > 3 * found[1].gains).all()


def test_the_recorded_rate_is_used_and_nothing_stays_changed(told):
    _, record, queries, attributor, scores = told
    first = tail_patch(attributor, queries, {"a": scores, "b": scores}, k=(2, 5))
    assert first[0].settings["learning_rate"] == pytest.approx(record.stages[0].steps().reference_learning_rate.max())
    assert [(one.method, one.k) for one in first] == [
        ("random", 2), ("a", 2), ("b", 2), ("random", 5), ("a", 5), ("b", 5),
    ]  # fmt: skip
    assert np.array_equal(first[1].gains, first[2].gains)  # the weights are put back between
    again = tail_patch(attributor, queries, {"a": scores}, k=(2,))
    assert np.array_equal(first[0].gains, again[0].gains)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"steps": 0},
        {"num_random": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"k": (22,)},
        {"k": (0,)},
    ],
)
def test_settings_that_make_no_sense(told, settings):
    _, _, queries, attributor, scores = told
    with pytest.raises(ConfigError):
        tail_patch(attributor, queries, {"a": scores}, **settings)


def test_scores_that_do_not_fit(told):
    _, _, queries, attributor, scores = told
    with pytest.raises(ConfigError, match="Scores 'a' have shape"):
        tail_patch(attributor, queries, {"a": scores[:, :4]})
