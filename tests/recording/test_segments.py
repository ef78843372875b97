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
"""Where segments start."""

import numpy as np
import pytest
import torch
from cases import tiny_llama, train
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hf_source.errors import ConfigError
from hf_source.recording.segment_plan import plan_segments, scheduled_learning_rates


def shares(starts, rates):
    ends = [*starts[1:], len(rates)]
    return [rates[start:end].sum() / rates.sum() for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("num_segments", [1, 2, 3, 7])
def test_segments_share_the_summed_learning_rate_to_within_a_step(num_segments):
    rates = np.concatenate([np.linspace(0, 1, 40), 0.5 * (1 + np.cos(np.linspace(0, np.pi, 160)))])
    starts = plan_segments(200, rates, num_segments)
    assert len(starts) == num_segments and starts[0] == 0
    largest_step = rates.max() / rates.sum()
    assert np.abs(np.array(shares(starts, rates)) - 1 / num_segments).max() <= largest_step


def test_given_shares_and_steps():
    assert plan_segments(100, np.ones(100), boundaries=(0.5, 0.9)) == [0, 50, 90]
    assert plan_segments(100, np.ones(100), boundaries=(7, 99)) == [0, 7, 99]
    assert plan_segments(100, np.ones(100), boundaries=()) == [0]
    assert plan_segments(9, None, num_segments=3) == [0, 3, 6]
    assert plan_segments(9, np.zeros(9), num_segments=3) == [0, 3, 6]


def test_every_segment_has_a_step_even_where_nothing_moves():
    rates = np.array([1.0, 0, 0, 0, 0])
    for num_segments in range(1, 6):
        starts = plan_segments(5, rates, num_segments)
        assert len(starts) == num_segments
        assert all(later > earlier for earlier, later in zip(starts, starts[1:], strict=False))
        assert starts[-1] < 5


def test_more_segments_than_steps_is_an_error_that_names_the_number_of_steps():
    with pytest.raises(ConfigError, match="5 segments do not fit into 4 .* at most 4"):
        plan_segments(4, None, num_segments=5)
    with pytest.raises(ConfigError, match="beyond the stage's 4 optimizer steps"):
        plan_segments(4, None, boundaries=(2, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "linear", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {"lr_scheduler_type": "constant"},
    ],
)
def test_learning_rates_are_known_ahead(tmp_path, settings):
    """The plan's learning rates are those that training then has, so the shares of the record are equal."""
    seen = {}

    def spy(scheduler, num_steps, groups):
        seen["rates"] = scheduled_learning_rates(scheduler, num_steps, groups)
        return seen["rates"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_source.recording.start.scheduled_learning_rates", spy)
        _, record = train(tmp_path, tiny_llama(), **settings)
    stage = record.stage()
    np.testing.assert_allclose(stage.steps().reference_learning_rate, seen["rates"], rtol=1e-12)
    assert [segment.first_step for segment in stage.segments] == plan_segments(9, seen["rates"], 3)


def test_a_schedule_that_is_not_known_ahead_is_cut_into_equal_numbers_of_steps(tmp_path, caplog):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = ReduceLROnPlateau(optimizer)
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model, trainer={"optimizers": (optimizer, scheduler)})
    assert [(s.first_step, s.end_step) for s in record.stage().segments] == [(0, 3), (3, 6), (6, 9)]
    assert "equal numbers of steps" in caplog.text


def test_own_boundaries_reach_the_record(tmp_path):
    _, record = train(tmp_path, tiny_llama(), segment_boundaries=[2, 8])
    assert [(s.first_step, s.end_step) for s in record.stage().segments] == [(0, 2), (2, 8), (8, 9)]


def test_a_short_stage_has_a_segment_per_step(tmp_path, caplog):
    _, record = train(tmp_path, tiny_llama(), max_steps=2)
    assert [(s.first_step, s.end_step) for s in record.stage().segments] == [(0, 1), (1, 2)]
    assert "2 optimizer step(s), so each is a segment; num_segments=3 needs more" in caplog.text


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"segment_boundaries": [step / 10 for step in range(1, 10)]}, "10 segments do not fit into 9"),
        ({"num_train_epochs": 0}, "makes no optimizer step: set max_steps or num_train_epochs"),
    ],
)
def test_impossible_segments_stop_the_run_before_its_first_step(tmp_path, settings, complaint):
    model = tiny_llama()
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(ConfigError, match=complaint):
        train(tmp_path, model, **settings)
    assert torch.equal(before, model.lm_head.weight)
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_segments": 0}, "at least 1"),
        ({"num_segments": 1.5}, "whole number"),
        ({"segment_boundaries": [0.5, 10]}, "mixes"),
        ({"segment_boundaries": [0, 10]}, "leave 0"),
        ({"segment_boundaries": [0.5, 1.0, 1.5]}, "mixes|neither"),
        ({"segment_boundaries": [10, 5]}, "must increase"),
        ({"segment_boundaries": "half"}, "list of numbers"),
        ({"stage": "a/b"}, "cannot name a folder"),
        ({"stage": ""}, "cannot name a folder"),
        ({"max_length": 1}, "at least 2"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_made(tmp_path, settings, message):
    from cases import config

    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **settings)
