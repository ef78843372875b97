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
"""A record whose segments are read as fewer is the record that fewer would have left."""

import numpy as np
import pytest
import torch
from cases import config, random_rows, tiny_gpt2, tiny_llama, train
from transformers import TrainerCallback

from hf_source import Queries, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.errors import ConfigError, RecordError
from hf_source.recording.optimizers import CombinedOptimizer


# Sums of the same float64 numbers in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class FreezeFor(TrainerCallback):
    """Some weights do not train for some steps, across a cut."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        model.lm_head.weight.requires_grad_(not 2 <= state.global_step < 5)


def groups(model):
    head = [model.lm_head.weight]
    rest = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    return [{"params": rest, "lr": 0.005, "weight_decay": 0.1}, {"params": head, "lr": 0.02, "weight_decay": 0.3}]


CASES = {
    "adamw": {},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.8"},
    "adafactor": {"optim": "adafactor"},
    "mean gradients": {"record_gradient_mean": True},
    "two groups": {"optimizer": lambda model: torch.optim.AdamW(groups(model))},
    "coupled decay": {"optimizer": lambda model: torch.optim.Adam(groups(model))},
    "frozen for a while": {"trainer": {"callbacks": [FreezeFor()]}},
}


def recorded(folder, case, num_segments, dtype=torch.float64):
    settings, model = dict(CASES[case]), tiny_llama(dtype=dtype)
    make = settings.pop("optimizer", None)
    trainer = settings.pop("trainer", {}) | ({"optimizers": (make(model), None)} if make else {})
    return train(folder, model, trainer=trainer, num_segments=num_segments, **settings)[1]


def assert_same_segments(found, expected, case):
    assert len(found.segments) == len(expected.segments)
    for one, two in zip(found.segments, expected.segments, strict=True):
        assert (one.index, one.first_step, one.end_step) == (two.index, two.first_step, two.end_step)
        for key in ("learning_rate_sum", "effective_learning_rate_sum"):
            assert getattr(one, key) == pytest.approx(getattr(two, key), rel=1e-12)
            assert getattr(one, f"{key}_per_group") == pytest.approx(getattr(two, f"{key}_per_group"), rel=1e-12)
        reads = ["parameters", "preconditioner", "decay"] + ["gradient_mean"] * ("gradients" in case)
        for read in reads:
            own, other = getattr(one, read)(), getattr(two, read)()
            assert list(own) == list(other)
            for name in own:
                torch.testing.assert_close(own[name], other[name], **CLOSE)
        np.testing.assert_allclose(one.row_weights(), two.row_weights(), rtol=1e-12)
        np.testing.assert_allclose(one.applied_weights(), two.applied_weights(), rtol=1e-12)
        np.testing.assert_array_equal(one.num_visits(), two.num_visits())
        assert one.objective_scale() == pytest.approx(two.objective_scale(), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_one_segment_of_three(tmp_path, case):
    three, one = (recorded(tmp_path / str(number), case, number) for number in (3, 1))
    assert_same_segments(three.merged(1).stage(), one.stage(), case)
    if "frozen" in case:
        assert three.merged(1).stage().segments[0].missed_learning_rates  # or nothing was frozen
    assert len(three.stage().segments) == 3  # the record itself stays


def test_three_segments_of_nine(tmp_path):
    """Cuts are those of the recorded ones that are nearest to equal shares: here the same steps."""
    nine = recorded(tmp_path / "9", "adamw", 9)
    found = nine.merged(3).stage()
    starts = [segment.first_step for segment in found.segments]
    expected = recorded(tmp_path / "3", "adamw", 3).stage()
    assert starts == [segment.first_step for segment in expected.segments]
    assert_same_segments(found, expected, "adamw")
    for index, segment in enumerate(found.segments):
        for name, tensor in found.weights(index).items():
            torch.testing.assert_close(tensor, segment.parameters()[name], rtol=0, atol=0)


def test_merging_starts_from_what_was_recorded(tmp_path):
    record = recorded(tmp_path, "adamw", 3)
    assert record.merged(None) is record and record.merged(3) is record
    once = record.merged(1)
    assert len(once.merged(2).stage().segments) == 2
    assert len(once.merged(None).stage().segments) == 3


def test_checkpoints_of_all_parts(tmp_path):
    record = train(tmp_path, tiny_llama(), num_segments=3, checkpoints_per_segment=2)[1]
    parts, (segment,) = record.stage().segments, record.merged(1).stage().segments
    assert segment.checkpoint_steps == [step for part in parts for step in part.checkpoint_steps]
    for part in parts:
        for step in part.checkpoint_steps:
            for name, tensor in record.merged(1).stage().weights((0, step)).items():
                assert torch.equal(tensor, part.checkpoint(step)[name])
    with pytest.raises(RecordError, match="holds no weights of step 1000"):
        segment.checkpoint(1000)


def test_matrix_preconditioners_are_averaged(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    other = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizer = CombinedOptimizer(torch.optim.Muon(inner, lr=0.01), torch.optim.AdamW(other, lr=0.01))
    record = train(tmp_path, model, trainer={"optimizers": (optimizer, None)}, num_segments=3)[1]
    parts, (segment,) = record.stage().segments, record.merged(1).stage().segments
    assert segment.matrix_sides == parts[0].matrix_sides and segment.matrix_sides
    shares = [part.effective_learning_rate_sum / segment.effective_learning_rate_sum for part in parts]
    for name, mean in segment.preconditioner().items():
        expected = sum(share * part.preconditioner()[name] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(mean, expected, **CLOSE)


def test_a_part_in_which_nothing_moved_has_no_weight(tmp_path):
    """Its weights are those of a moment, its preconditioner 0; where no part moved, the weights stay."""
    warm = {"lr_scheduler_type": "constant_with_warmup", "segment_boundaries": [1, 5]}  # the first step's rate is 0
    record = train(tmp_path / "first", tiny_llama(dtype=torch.float64), warmup_steps=4, **warm)[1]
    first, second, _ = record.stage().segments
    assert first.effective_learning_rate_sum == 0 < second.effective_learning_rate_sum
    (whole,) = record.merged(1).stage().segments
    warm["segment_boundaries"] = []
    once = train(tmp_path / "once", tiny_llama(dtype=torch.float64), warmup_steps=4, **warm)
    for read in ("parameters", "preconditioner"):
        for name, tensor in getattr(whole, read)().items():
            torch.testing.assert_close(tensor, getattr(once[1].stage().segments[0], read)()[name], **CLOSE)
    still = train(tmp_path / "still", tiny_llama(), learning_rate=0.0)[1]
    (segment,) = still.merged(1).stage().segments
    for name, tensor in segment.parameters().items():
        assert torch.equal(tensor, still.stage().weights("final")[name])


@pytest.mark.parametrize("wrong", [0, -1, 4, 1.0, True, "2"])
def test_an_impossible_number(tmp_path_factory, wrong):
    folder = tmp_path_factory.getbasetemp() / "impossible"
    if not (folder / "record").exists():
        recorded(folder, "adamw", 3)
    with pytest.raises(ConfigError, match="read as 1 to 3. More are recorded by SourceConfig"):
        TrainingRecord.load(folder / "record").merged(wrong)
    with pytest.raises(ConfigError, match="read as 1 to 3"):
        SourceAttributor.from_record(folder / "record", num_segments=wrong)


# ---- attribution ------------------------------------------------------------------------------------------------


def two_stages(folder, num_segments):
    """A GPT-2 in two stages, of which the second has one segment less."""
    model, rows = tiny_gpt2(dtype=torch.float64), {"a": random_rows(), "b": random_rows(14, seed=5)}
    for stage, number in {"a": num_segments, "b": max(num_segments - 1, 1)}.items():
        args = config(folder, stage=stage, num_segments=number, num_train_epochs=2)
        trainer = SourceTrainer(model, args, train_dataset=rows[stage])
        trainer.train()
        model = trainer.model
    return TrainingRecord.load(folder / "record")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-stages")
    return {number: two_stages(folder / str(number), number) for number in (1, 3)}


QUERIES = Queries.from_dataset(random_rows(3, seed=9))
SETTINGS = {"num_samples": 12, "progress": False, "dtype": torch.float64}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "fast-source", "curvature": "ekfac"},
        {"curvature": "diagonal"},
        {"method": "tracin"},
        {"method": "trak", "checkpoints": "segments"},
    ],
    ids=str,
)
def test_scores_are_those_of_a_record_with_fewer_segments(records, settings):
    for stage in ("a", "b"):
        found, expected = (
            SourceAttributor(records[number], **SETTINGS, **settings, num_segments=1).scores(None, QUERIES, stage)
            for number in (3, 1)
        )
        # The same labels are drawn; scores are float32.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        assert np.abs(expected).max() > 0


def test_fewer_segments_than_recorded_are_other_scores_and_settings(records, tmp_path):
    recorded_, merged = (SourceAttributor(records[3], **SETTINGS, num_segments=number) for number in (None, 2))
    assert [len(stage.segments) for stage in merged.record.stages] == [2, 2]
    assert "num_segments" not in recorded_.settings() and merged.settings()["num_segments"] == 2
    first, second = (each.scores(None, QUERIES, "a") for each in (recorded_, merged))
    assert not np.allclose(first, second, rtol=1e-3)
    assert merged.plan(None, QUERIES, "a").stages[-1].num_segments == 2
    again = merged.like(num_segments=None)
    np.testing.assert_array_equal(again.scores(None, QUERIES, "a"), first)
    # What was kept of one is never taken for the other's.
    kept = [
        SourceAttributor(records[3], **SETTINGS, num_segments=number, cache_dir=tmp_path).scores(None, QUERIES, "a")
        for number in (None, 2, None, 2)
    ]
    np.testing.assert_array_equal(kept[0], first)
    np.testing.assert_array_equal(kept[1], second)
    np.testing.assert_array_equal(kept[2], first)
    np.testing.assert_array_equal(kept[3], second)


def test_ensembles_and_indexes_read_fewer_segments_too(records, tmp_path):
    both = SourceAttributor([records[3], records[1]], **SETTINGS, num_segments=1)  # the same run, recorded twice
    alone = SourceAttributor(records[1], **SETTINGS)
    expected = alone.scores(None, QUERIES, "a")
    close = {"rtol": 1e-5, "atol": 1e-6 * np.abs(expected).max()}
    np.testing.assert_allclose(both.scores(None, QUERIES, "a"), expected, **close)
    SourceAttributor(records[3], **SETTINGS, num_segments=1).build_index(tmp_path / "index")
    answered = SourceAttributor(records[3], **SETTINGS, index=tmp_path / "index")
    assert answered.settings()["num_segments"] == 1
    found = answered.scores(None, QUERIES, "a")
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99  # one byte a number
    np.testing.assert_allclose(
        SourceAttributor(records[3], **SETTINGS, num_segments=1).self_influence(stage="a"),
        alone.self_influence(stage="a"),
        rtol=1e-4,
    )
