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
from datasets import ClassLabel, Dataset, Features, Value

from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import corrupt_labels, find_mislabelled
from hf_source.evaluation.mislabelled import auroc


def wrong(count: int = 400, share: float = 0.1) -> np.ndarray:
    return np.random.default_rng(0).random(count) < share


def test_perfect_random_and_opposite_lists():
    known = wrong()
    perfect = find_mislabelled(known.astype(float), known, k=(10,), checked=(0.2, 1.0))
    assert perfect.auroc.value == 1.0
    assert perfect.precision[10].value == 1.0
    assert perfect.found[0.2].value == 1.0
    chance = find_mislabelled(np.random.default_rng(1).random(400), known, checked=(0.2, 1.0))
    assert chance.auroc.low < 0.5 < chance.auroc.high
    assert 0.35 < chance.auroc.value < 0.65
    assert chance.found[0.2].value < 0.45
    assert chance.found[1.0].value == 1.0
    assert find_mislabelled(-known.astype(float), known).auroc.value == 0.0
    assert (perfect.num_wrong, perfect.num_rows) == (known.sum(), 400)


def test_ties_say_nothing():
    known = np.zeros(200, dtype=bool)
    known[:50] = True  # in the order of the rows they would all come first
    found = find_mislabelled(np.zeros(200), known, k=(50,), checked=(0.25,))
    assert found.auroc.value == 0.5
    assert found.precision[50].value < 0.5
    assert found.found[0.25].value < 0.5


def test_auroc_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(3)
    suspicion, known = generator.integers(5, size=40).astype(float), generator.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in suspicion[known] for b in suspicion[~known]]
    assert auroc(suspicion, known) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(suspicion, np.zeros(40, dtype=bool)))


def test_found_after_checking_a_share():
    known = np.array([True, False, True, False, False, False, False, False, True, False])
    found = find_mislabelled(-np.arange(10.0), known, k=(1, 3), checked=(0.1, 0.3))
    assert {k: one.value for k, one in found.precision.items()} == pytest.approx({1: 1.0, 3: 2 / 3})
    assert {share: one.value for share, one in found.found.items()} == pytest.approx({0.1: 1 / 3, 0.3: 2 / 3})


@pytest.mark.parametrize(
    ("suspicion", "known", "settings", "error"),
    [
        (np.zeros(3), [True, False], {}, DataError),
        (np.array([np.nan, 0.0]), [True, False], {"k": (1,)}, DataError),
        (np.zeros(2), [True, True], {"k": (1,)}, DataError),
        (np.zeros(2), [False, False], {"k": (1,)}, DataError),
        (np.zeros(2), [True, False], {"k": (3,)}, ConfigError),
        (np.zeros(2), [True, False], {"k": (1,), "checked": (0.0,)}, ConfigError),
    ],
)
def test_lists_that_cannot_be_judged(suspicion, known, settings, error):
    with pytest.raises(error):
        find_mislabelled(suspicion, known, **settings)


def test_corrupted_labels_are_wrong_and_known():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    labels = ([0] * 6 + [1] * 3 + [2]) * 10
    dataset = Dataset.from_dict({"text": [str(i) for i in range(100)], "label": labels}, features=features)
    found = corrupt_labels(dataset, 0.3, seed=1)
    changed = np.array(found["label"]) != np.array(labels)
    assert changed.tolist() == found["is_corrupted"][:]
    assert changed.sum() == 30
    assert found.features["label"] == features["label"]
    assert found["text"][:] == dataset["text"][:]
    assert corrupt_labels(dataset, 0.3, seed=1)["label"][:] == found["label"][:]
    assert corrupt_labels(dataset, 0.3, seed=2)["label"][:] != found["label"][:]
    assert "is_corrupted" not in dataset.column_names
    assert sum(corrupt_labels(dataset, 1e-6)["is_corrupted"]) == 1


def test_corrupted_text():
    dataset = Dataset.from_dict({"prompt": ["Peru", "Cuba", "Fiji"], "completion": ["Lima", "Havana", "Suva"]})
    found = corrupt_labels(dataset, 0.34, column="completion")
    rows = [i for i, one in enumerate(found) if one["is_corrupted"]]
    assert len(rows) == 1
    assert found[rows[0]]["completion"] in set(dataset["completion"]) - {dataset[rows[0]]["completion"]}


def test_wrong_labels_of_the_right_kind():
    columns = {"relation": ["a", "a", "b", "b", "c"] * 4, "label": [0, 1, 2, 3, 4] * 4}
    found = corrupt_labels(Dataset.from_dict(columns), 0.8, within="relation")
    swapped = {0: 1, 1: 0, 2: 3, 3: 2}
    for before, after, wrong in zip(columns["label"], found["label"], found["is_corrupted"], strict=True):
        assert wrong == (before != 4)  # all rows of kind c have the same label
        assert after == (swapped[before] if wrong else before)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"label": [0, 1]}, {"fraction": 0.0}, "fraction=0.0"),
        ({"label": [0, 1]}, {"fraction": 1.0}, "fraction=1.0"),
        ({"text": ["a", "b"]}, {"fraction": 0.5}, "no column 'label'"),
        ({"label": [0, 1]}, {"fraction": 0.5, "within": "kind"}, "no column 'kind'"),
        ({"label": [0, 1, 2], "kind": [0, 0, 1]}, {"fraction": 0.9, "within": "kind"}, "only 2 have another label"),
        ({"label": [1, 1]}, {"fraction": 0.5}, "same value in every row"),
        ({"label": [[1], [2]]}, {"fraction": 0.5}, "holds lists"),
        ({"label": [0, 1], "is_corrupted": [True, False]}, {"fraction": 0.5}, "already"),
    ],
)
def test_labels_that_cannot_be_corrupted(columns, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        corrupt_labels(Dataset.from_dict(columns), **settings)
