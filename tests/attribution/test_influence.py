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
"""`influence` solved by conjugate gradient."""

import numpy as np
import pytest
import torch

from hf_source import Queries, SourceAttributor
from hf_source.curvature import EKFACInverse, FisherSample, JointInverse, gauss_newton, systematic_sample
from hf_source.errors import ConfigError
from hf_source.gradients import RowGradients
from hf_source.source import draw_sample

from ..cases import random_rows, tiny_gpt2, train


def attributor(record, **settings):
    return SourceAttributor.from_record(record.path, **{"num_samples": 16, "progress": False, **settings})


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


@pytest.mark.parametrize(("curvature", "product_rows"), [("ekfac", 0), ("joint", 0), ("joint", 3)])
def test_influence_by_conjugate_gradient_is_that_of_the_gauss_newton_matrix(tmp_path, caplog, curvature, product_rows):
    """Against a dense solve with the curvature of all rows (or of those drawn), not of a sample."""
    rows = random_rows(6, shortest=3, longest=5)
    _, record = train(tmp_path, tiny_gpt2(n_embd=8, n_layer=1), rows, num_train_epochs=1, num_segments=1)
    settings = {"solver": "cg", "iterations": 5000, "tolerance": 1e-10, "product_rows": product_rows}
    walker = attributor(
        record, method="influence", curvature=curvature, damping=1.0, num_samples=5, dtype=torch.float64, **settings
    )
    queries = Queries.from_dataset(random_rows(2, seed=9, shortest=4, longest=4))
    got = walker.scores(None, queries)
    assert "stopped after" not in caplog.text
    stage = record.stage()
    mine, model = walker.rows(stage), walker.build_model(stage)
    gradients = RowGradients(model, mine.task, stage.trainable)
    sample = draw_sample(mine, np.ones(6), gradients, walker.walk_settings(), walker.seed)
    inverse = (EKFACInverse if curvature == "ekfac" else JointInverse)(stage.trainable, sample, 1.0)
    chosen = systematic_sample(np.ones(6), product_rows, walker.seed + 1) if product_rows else np.arange(6)
    H = gauss_newton(FisherSample(gradients, [mine.collated(chosen, walker.device)]), stage.trainable)
    strengths = [torch.full((gradients.parameters[n].numel(),), inverse.strengths[n]) for n in stage.trainable]
    asked, own = (
        torch.cat([vectors[name].flatten(1) for name in stage.trainable], dim=1)
        for vectors in (
            walker.query_gradients(gradients, queries),
            {name: part for name, _, part in gradients.blocks(gradients.run(mine.collated(range(6), walker.device)))},
        )
    )
    expected = torch.linalg.solve(H + torch.diag(torch.cat(strengths)), asked.T).T @ own.T / mine.items.sum()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_conjugate_gradient_says_when_it_stops_early(story, queries, caplog):
    walker = attributor(story, method="influence", solver="cg", iterations=1, tolerance=1e-4)
    first = walker.scores(None, queries, "sft")
    assert "stopped after 1 iterations with up to" in caplog.text and "set iterations= higher" in caplog.text
    plan = walker.plan(None, queries, "sft")
    direct = attributor(story, method="influence").plan(None, queries, "sft")
    assert plan.stages[0].sample_tokens == 3 * 2 * direct.stages[0].score_tokens
    assert plan.peak_memory > direct.peak_memory
    caplog.clear()
    more = attributor(story, method="influence", solver="cg", iterations=200, tolerance=1e-4)
    assert np.abs(more.scores(None, queries, "sft") - first).max() > 0
    assert "stopped after" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"solver": "lissa"}, "solver='lissa' is unknown; choose 'direct' or 'cg'"),
        ({"damping": 0.0}, "damping=0.0: the inverse needs a positive damping"),
        ({"iterations": 0}, "iterations=0: at least one"),
        ({"tolerance": 1.5}, "tolerance=1.5 must be at least 0 and below 1"),
        ({"product_rows": -1}, "product_rows=-1 must be a number of rows"),
    ],
)
def test_settings_of_influence_that_are_refused(story, settings, match):
    with pytest.raises(ConfigError, match=match):
        attributor(story, method="influence", **settings)
