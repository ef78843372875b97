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
"""fp16 with loss scaling: steps that overflow are skipped, by the optimizer or (fused) inside it.

Accelerate makes no fp16 on a CPU, so its parts are put together here: fp16 autocast and a `GradScaler`, both torch's.
"""

import numpy as np
import pytest
import torch
from cases import config, distance, random_rows, tiny_gpt2, tiny_llama, train

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.recording import SourceTrainer, TrainingRecord, replay


@pytest.fixture
def half(monkeypatch):
    """Makes a trainer that trains in fp16."""

    def make(folder, model, init_scale=2.0**10, dataset=None, growth_interval=3, **settings):
        trainer = SourceTrainer(model, config(folder, **settings), train_dataset=dataset or random_rows())
        accelerator = trainer.accelerator
        monkeypatch.setattr(accelerator, "native_amp", True)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
        monkeypatch.setattr(accelerator, "scaler", scaler)
        monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
        assert accelerator.mixed_precision == "fp16"
        return trainer

    return make


def replay_error(stage, **options):
    final = stage.weights("final")
    again = dict(replay(stage, random_rows(), **options).named_parameters())
    return distance(again, final), distance(stage.weights("initial"), final)


# Gradients of these models overflow fp16 with a scale of 2^24 (losses of a few nats), and do not with 2^16.
TOO_LARGE = 2.0**24


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_skipped_steps_are_recorded_and_replayed(tmp_path, half, make, optim):
    trainer = half(tmp_path, make(), TOO_LARGE, optim=optim, num_train_epochs=8, learning_rate=0.02)
    weights = []

    class Watch(type(trainer)):
        def _before_update(self):
            weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            super()._before_update()

    trainer.__class__ = Watch
    trainer.train()
    stage = TrainingRecord.load(tmp_path / "record").stage()
    steps = stage.steps()
    weights.append(stage.weights("final"))
    stood_still = [distance(before, after) == 0 for before, after in zip(weights, weights[1:], strict=False)]
    moving = steps.learning_rate[:, 0] > 0
    assert steps.skipped.any() and not steps.skipped.all()
    assert np.array_equal(np.array(stood_still)[moving], steps.skipped[moving])
    assert np.array_equal(np.isfinite(steps.grad_norm), ~steps.skipped)

    scales = stage.data["loss_scales"]
    assert scales[0] == {"step": 0, "scale": TOO_LARGE} and len(scales) > 2
    first = int(np.flatnonzero(steps.skipped)[0])
    assert stage.loss_scale_at(first + 1) == stage.loss_scale_at(first) / 2
    assert stage.training["fp16"] and not stage.training["bf16"]
    total = sum(segment.learning_rate_sum for segment in stage.segments)
    assert total == pytest.approx(steps.reference_learning_rate[~steps.skipped].sum(), rel=1e-12)
    error, moved = replay_error(stage)
    assert moved > 0.05 and error <= 1e-4 * moved
    stage.data["loss_scales"] = []
    without, _ = replay_error(stage)
    assert without > 10 * error  # small gradients vanish without it


def test_averages_leave_skipped_steps_out(tmp_path, half):
    half(tmp_path, tiny_llama(), TOO_LARGE, num_segments=1, num_train_epochs=8).train()
    stage = TrainingRecord.load(tmp_path / "record").stage()
    steps, sums, total = stage.steps(), None, 0.0
    seen = [stage.weights("initial")]
    replay(stage, random_rows(), callback=lambda step, model, _: seen.append(copy(model)))
    for step in np.flatnonzero(~steps.skipped):
        weight = steps.effective_learning_rate[step]
        total += weight
        scaled = {name: weight * value for name, value in seen[step].items()}
        sums = scaled if sums is None else {name: sums[name] + value for name, value in scaled.items()}
    assert steps.skipped.any() and total == pytest.approx(stage.segments[0].effective_learning_rate_sum, rel=1e-9)
    average = {name: value / total for name, value in sums.items()}
    assert distance(average, stage.segments[0].parameters()) < 1e-3 * distance(seen[0], seen[-1])


def copy(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_the_loss_itself(tmp_path, half):
    """Norm and clip factor in the record are unscaled: about those of the same run in float32."""
    half(tmp_path / "half", tiny_llama(), max_steps=3, num_segments=1).train()
    _, plain = train(tmp_path / "full", tiny_llama(), max_steps=3, num_segments=1)
    ours = TrainingRecord.load(tmp_path / "half" / "record").stage().steps()
    theirs = plain.stage().steps()
    assert not ours.skipped.any() and (theirs.clip_factor < 1).any()
    np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=0.02)
    np.testing.assert_allclose(ours.clip_factor, theirs.clip_factor, rtol=0.02)


def test_scores_of_an_fp16_run(tmp_path, half):
    half(tmp_path, tiny_llama(), num_segments=1).train()
    record = TrainingRecord.load(tmp_path / "record")
    scores = SourceAttributor(record, num_samples=16, progress=False).scores(
        None, Queries.from_dataset(random_rows(2, seed=9))
    )
    assert np.isfinite(scores).all() and np.abs(scores).max() > 1e-3


def test_a_resumed_run_goes_on_with_its_scale(tmp_path, half):
    settings = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 4}
    half(tmp_path, tiny_llama(), TOO_LARGE, **settings).train()
    whole = TrainingRecord.load(tmp_path / "record").stage().data["loss_scales"]
    again = half(tmp_path, tiny_llama(), 2.0**13, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    scales = TrainingRecord.load(tmp_path / "record").stage().data["loss_scales"]
    assert any(change["step"] > 4 for change in whole) and scales == whole  # the Trainer brings the scaler back


def test_gradients_that_no_scale_saves_stop_training(tmp_path, half):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(UnsupportedError, match="not finite .nan. even with losses scaled by"):
        half(tmp_path, model, init_scale=2.0**-18, num_train_epochs=3).train()


def test_other_formats_are_refused(tmp_path, monkeypatch):
    trainer = SourceTrainer(tiny_llama(), config(tmp_path), train_dataset=random_rows())
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp8")
    with pytest.raises(UnsupportedError, match="Mixed precision 'fp8'.*Use bf16=True, fp16=True or float32"):
        trainer.train()
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp16")
    trainer.is_fsdp_enabled = True
    from hf_source.recording.precision import refuse_formats

    with pytest.raises(UnsupportedError, match="With FSDP.*fp16.*Use bf16=True"):
        refuse_formats(trainer)
