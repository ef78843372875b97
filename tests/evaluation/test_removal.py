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

from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import subset_removal
from hf_source.evaluation.row_sets import Removals, matched_rows

from .fakes import LinearRetraining


def truth(queries: int = 5, rows: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(queries, rows))


def by_kind(found):
    return {(one.method, one.direction, one.k): one for one in found}


def test_top_rows_raise_the_loss_and_bottom_rows_lower_it():
    effects = truth()
    retraining = LinearRetraining(effects)
    found = by_kind(subset_removal(retraining, {"perfect": effects, "opposite": -effects}, k=(1, 3)))
    for k in (1, 3):
        largest = np.sort(effects, axis=1)[:, -k:].sum(axis=1)
        smallest = np.sort(effects, axis=1)[:, :k].sum(axis=1)
        assert found["perfect", "top", k].changes[0] == pytest.approx(largest)
        assert found["perfect", "bottom", k].changes[0] == pytest.approx(smallest)
        assert found["opposite", "top", k].changes[0] == pytest.approx(smallest)
        rise = found["perfect", "top", k].rise
        assert rise.value == pytest.approx(largest.mean())
        assert rise.low < rise.value < rise.high
        assert found["opposite", "top", k].excess.high < 0 < found["perfect", "top", k].excess.low
    # one training with all rows, 8 random sets for each k (some single rows twice), and both ends of every query
    assert len(retraining.trained) == 1
    assert 1 + 2 * 2 * 5 < len(retraining.trained[0]) <= 1 + 2 * 8 + 2 * 2 * 5
    alone = LinearRetraining(effects)
    subset_removal(alone, {"perfect": effects}, k=(1, 3))
    assert np.array_equal(alone.trained[0], retraining.trained[0])  # the ends of the one are those of the other


def test_the_control_is_the_mean_over_its_draws():
    effects = truth()
    control = by_kind(subset_removal(LinearRetraining(effects), {"a": effects}, k=(4,), num_random=300))
    random = control["random", "random", 4]
    assert random.random.shape == (1, 300, 5)
    # the standard error of 300 sums of 4 values of variance 1 is .12
    assert random.changes[0] == pytest.approx(4 * effects.mean(axis=1), abs=0.5)
    assert random.excess.value == pytest.approx(0.0, abs=1e-12)
    top = control["a", "top", 4]
    assert top.ratio.value == pytest.approx(top.changes.mean() / np.abs(random.random).mean())
    assert top.ratio.low < top.ratio.value < top.ratio.high


def test_a_method_that_knows_only_the_class_does_not_beat_rows_of_its_class():
    generator = np.random.default_rng(1)
    classes = np.arange(60) % 3
    effects = (classes == 0) * 1.0 + 0.1 * generator.normal(size=(6, 60))
    by_class = (classes == 0) + 1e-6 * generator.normal(size=(6, 60))
    retraining = LinearRetraining(effects)
    found = by_kind(
        subset_removal(retraining, {"class": by_class, "perfect": effects}, k=(5,), column=classes, num_matched=20)
    )
    class_only = found["class", "top", 5].changes - found["class", "matched", 5].changes
    perfect = found["perfect", "top", 5].changes - found["perfect", "matched", 5].changes
    assert found["class", "top", 5].excess.low > 1  # looks good against random rows
    assert abs(class_only.mean()) < 0.2  # two standard errors of 6 sums of 5 values of .1
    assert perfect.mean() > 0.5


@pytest.mark.parametrize("trial", range(5))
def test_matched_rows_keep_the_histogram(trial):
    generator = np.random.default_rng(trial)
    column = generator.choice(4, size=50, p=[0.7, 0.2, 0.08, 0.02])
    candidates = np.sort(generator.choice(50, size=40, replace=False))
    chosen = generator.choice(candidates, size=12, replace=False)
    matched = matched_rows(chosen, column, candidates, generator)
    assert len(set(matched)) == 12
    assert set(matched) <= set(candidates)
    assert np.bincount(column[matched], minlength=4).tolist() == np.bincount(column[chosen], minlength=4).tolist()


def test_matched_rows_are_others_while_there_are_others():
    column, generator = np.array([0, 0, 0, 0, 1, 1, 1]), np.random.default_rng(0)
    matched = matched_rows(np.array([0, 1, 4, 5]), column, np.arange(7), generator)
    assert {2, 3, 6} < set(matched)  # class 1 has one other row only
    assert set(matched) - {2, 3, 6} < {4, 5}


def test_every_seed_is_compared_with_its_own_training_on_all_rows():
    effects = truth()
    found = by_kind(subset_removal(LinearRetraining(effects), {"a": effects}, k=(2,), seeds=(1, 2, 3)))
    top = found["a", "top", 2]
    assert top.changes.shape == (3, 5)
    # the seeds' own effect on the loss is as large as a row's, and cancels
    assert top.changes == pytest.approx(np.tile(np.sort(effects, axis=1)[:, -2:].sum(axis=1), (3, 1)))
    noisy = by_kind(subset_removal(LinearRetraining(effects, noise=1.0), {"a": effects}, k=(2,), seeds=(1, 2)))
    assert noisy["a", "top", 2].changes[0] != pytest.approx(noisy["a", "top", 2].changes[1])


def test_only_the_given_rows_are_removed():
    effects = truth()
    retraining = LinearRetraining(effects)
    subset_removal(retraining, {"a": effects}, k=(2,), rows=[3, 8, 9, 20], column=[0] * 40)
    removed = np.flatnonzero((~retraining.trained[0]).any(axis=0))
    assert set(removed) == {3, 8, 9, 20}


def test_the_same_rows_are_trained_once():
    removals = Removals(6)
    assert removals.add([1, 2]) == removals.add([2, 1]) == 1
    assert removals.add([]) == 0
    assert len(removals) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": ()}, "give numbers of rows from 1 to 39"),
        ({"k": (0, 3)}, "give numbers of rows from 1 to 39"),
        ({"k": (40,)}, "give numbers of rows from 1 to 39"),
        ({"num_random": 0}, "without random rows"),
        ({"column": [1, 2]}, "has 2 values for 40 rows"),
        ({"column": [1] * 40, "num_matched": 0}, "num_matched=0"),
        ({"rows": [3, 40]}, "Row 40 is none of the 40 rows"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    retraining = LinearRetraining(truth())
    with pytest.raises((ConfigError, DataError), match=message):
        subset_removal(retraining, {"a": truth()}, **settings)
    assert not retraining.trained  # refused before the work


@pytest.mark.parametrize("scores", [np.zeros((5, 41)), np.full((5, 40), np.nan)])
def test_scores_that_do_not_fit(scores):
    with pytest.raises(DataError, match="Scores 'a'"):
        subset_removal(LinearRetraining(truth()), {"a": scores})
