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

from hf_source import Queries, SourceAttributor
from hf_source.errors import ConfigError
from hf_source.evaluation import StackedRetraining, agreement, leave_one_out

from ..cases import random_rows, tiny_gpt2, train
from .fakes import LinearRetraining


def test_scores_that_are_the_truth_and_scores_that_are_not():
    effects = np.random.default_rng(0).normal(size=(4, 30))
    scores = {"perfect": effects, "doubled": 2 * effects, "opposite": -effects, "silent": np.zeros((4, 30))}
    found = {one.method: one for one in leave_one_out(LinearRetraining(effects), scores)}
    assert {name: one.spearman.value for name, one in found.items()} == pytest.approx(
        {"perfect": 1.0, "doubled": 1.0, "opposite": -1.0, "silent": 0.0}
    )
    assert found["doubled"].pearson.value == pytest.approx(1.0)
    errors = {name: one.relative_error.value for name, one in found.items()}
    assert errors == pytest.approx({"perfect": 0.0, "doubled": 1.0, "opposite": 2.0, "silent": 1.0}, abs=1e-12)


def test_rows_are_the_top_the_bottom_and_others_of_one_method():
    effects = np.random.default_rng(0).normal(size=(3, 20))
    judge = np.random.default_rng(1).normal(size=(3, 20))
    found = leave_one_out(
        LinearRetraining(effects), {"a": effects, "b": judge}, num_top=3, num_random=2, num_bottom=1, chosen_by="b"
    )
    assert found[0].groups == ["top"] * 3 + ["random"] * 2 + ["bottom"]
    order = np.argsort(-judge, axis=1)
    assert found[0].rows[:, :3].tolist() == order[:, :3].tolist()
    assert found[0].rows[:, -1].tolist() == order[:, -1].tolist()
    assert all(len(set(rows)) == 6 for rows in found[0].rows.tolist())
    assert np.array_equal(found[0].rows, found[1].rows)  # all methods are asked about the same rows
    assert np.array_equal(found[0].predicted, np.take_along_axis(effects, found[0].rows, axis=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_top": 1, "num_random": 1, "num_bottom": 0},
        {"num_top": 40},
        {"num_top": -1},
        {"chosen_by": "none"},
        {"seeds": ()},
    ],
)
def test_settings_that_make_no_sense(settings):
    effects = np.ones((2, 20))
    with pytest.raises(ConfigError):
        leave_one_out(LinearRetraining(effects), {"a": effects}, **settings)


def test_the_exact_derivative_predicts_leaving_one_out(tmp_path):
    """Nothing is approximated on a run with small steps but the row's own finite size."""
    rows = random_rows()
    _, record = train(tmp_path, tiny_gpt2(), rows, optim="sgd", learning_rate=2e-2, max_grad_norm=0.0)
    queries = Queries.from_dataset(rows.select([0, 3, 7]))
    scores = SourceAttributor(record, method="unrolled", progress=False).scores(None, queries)
    random = np.random.default_rng(0).normal(size=scores.shape)
    retraining = StackedRetraining(record, queries, progress=False)
    exact, chance = leave_one_out(retraining, {"exact": scores, "random": random})
    assert exact.spearman.value > 0.97
    assert exact.pearson.value > 0.99
    assert exact.relative_error.value < 0.2
    assert abs(chance.spearman.value) < 0.6
    file = tmp_path / "figures" / "loo.svg"
    exact.figure(file)
    assert file.read_text().count("<use") > 36  # a mark for each row of each query
    with pytest.raises(ConfigError, match="end the name"):
        exact.figure(tmp_path / "loo.txt")


def test_agreement_with_exact_scores():
    exact = np.random.default_rng(0).normal(size=(4, 50))
    found = agreement(3 * exact, exact, k=(5, 10))
    assert found.spearman.value == pytest.approx(1.0)
    assert {k: one.value for k, one in found.overlap.items()} == {5: 1.0, 10: 1.0}
    assert found.relative_error.value == pytest.approx(2.0)
    opposite = agreement(-exact, exact, k=(5,))
    assert opposite.spearman.value == pytest.approx(-1.0)
    assert opposite.overlap[5].value == 0.0
    half = exact.copy()
    first = np.argsort(-exact, axis=1)[:, 2:4]
    np.put_along_axis(half, first, -10.0, axis=1)  # two of the four best are lost
    assert agreement(half, exact, k=(4,)).overlap[4].value == 0.5
    assert agreement(np.zeros((4, 50)), exact).spearman.value == 0.0


def test_agreement_over_some_rows_only():
    exact = np.random.default_rng(0).normal(size=(2, 30))
    scores = exact.copy()
    scores[:, 10:] = -exact[:, 10:]
    assert agreement(scores, exact, rows=range(10)).spearman.value == pytest.approx(1.0)
    assert agreement(scores, exact).spearman.value < 0.5


def test_agreement_of_what_does_not_fit():
    with pytest.raises(ValueError, match="have shape"):
        agreement(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not all finite"):
        agreement(np.full((2, 30), np.inf), np.zeros((2, 30)))
    with pytest.raises(ConfigError, match="from 1 to 30"):
        agreement(np.zeros((2, 30)), np.zeros((2, 30)), k=(31,))
