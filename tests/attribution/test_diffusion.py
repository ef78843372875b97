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
"""Diffusion models: which timestep and noise every image received, and TracIn, ReTrac and Source of them."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from scipy.stats import spearmanr
from torch import nn

from hf_source import DiffusionTask, Queries, SourceAttributor, SourceDiffusionTrainer, TrainingRecord
from hf_source.errors import ConfigError, DataError, UnsupportedError
from hf_source.evaluation import retrain_in_chunks
from hf_source.gradients.diffusion import visit_draw
from hf_source.recording import replay

from ..cases import config, distance, tiny_gpt2, train
from ..denoisers import SCHEDULER, Denoiser, images, unet


def record_run(folder, model: nn.Module, scheduler=SCHEDULER, **settings):
    plain = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0, "warmup_steps": 0}
    common = {
        "lr_scheduler_type": "constant",
        "num_train_epochs": 6,
        "num_segments": 2,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 5,
    }
    trainer = SourceDiffusionTrainer(
        model, config(folder, **plain | common | settings), train_dataset=images(), noise_scheduler=scheduler
    )
    trainer.train()
    return trainer, TrainingRecord.load(folder / "record")


def noisy(image: np.ndarray, epoch: int, seed: int = 42) -> tuple[int, np.ndarray, np.ndarray]:
    """Timestep, noise and noisy image of a visit, from the definition of the schedule."""
    timestep, noise = visit_draw(image, epoch, seed, 50)
    kept = float(SCHEDULER.alphas_cumprod[timestep])
    return timestep, noise, kept**0.5 * image + (1 - kept) ** 0.5 * noise


def test_the_record_holds_what_every_image_received(tmp_path):
    received = []
    model = Denoiser()
    model.register_forward_pre_hook(lambda _, args: received.append([arg.clone() for arg in args]))
    _, record = record_run(tmp_path, model, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    stage = record.stages[0]
    assert stage.loss["kind"] == "diffusion" and stage.loss["settings"]["seed"] == 42
    rows = np.asarray(images()["pixel_values"], dtype=np.float32)
    steps = stage.steps()
    batches = [(step, batch) for step, own in enumerate(steps.micro_batches) for batch in own]
    assert len(batches) == len(received) == 24
    for (step, batch), (samples, timesteps) in zip(batches, received, strict=True):
        expected = [noisy(rows[row], int(steps.epoch[step])) for row in batch.rows]
        assert timesteps.tolist() == [timestep for timestep, _, _ in expected]
        np.testing.assert_allclose(samples.numpy(), np.stack([image for _, _, image in expected]), atol=1e-6)
    assert len({int(t) for _, timesteps in received for t in timesteps}) > 25  # of 50, in 60 visits


def test_a_unet_is_rebuilt_and_replayed(tmp_path):
    """From its settings in the record, with the draws of every step; scores are the same for rows given anew."""
    _, record = record_run(tmp_path / "whole", unet(), optim="adamw_torch", learning_rate=1e-3)
    stage = record.stages[0]
    assert isinstance(stage.build_model(), UNet2DModel)
    again = dict(replay(stage).named_parameters())
    assert distance(again, stage.weights("final")) <= 1e-4 * distance(stage.weights("initial"), stage.weights("final"))
    attributor = SourceAttributor(record, num_samples=8, progress=False, curvature="ekfac")
    queries = Queries.from_rows(images().select(range(2)))
    scores = attributor.scores(None, queries)
    np.testing.assert_array_equal(scores, attributor.scores(images(), queries))
    assert scores.shape == (2, 10) and np.isfinite(scores).all() and np.abs(scores).max() > 0


def gradient(model, image, timestep, noise) -> torch.Tensor:
    kept = SCHEDULER.alphas_cumprod[timestep].double()
    mixed = kept.sqrt() * torch.from_numpy(image).double() + (1 - kept).sqrt() * torch.from_numpy(noise).double()
    found = model(mixed[None], torch.tensor([timestep]))
    loss = (found - torch.from_numpy(noise).double()).square().mean()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("method", ["diffusion-tracin", "diffusion-retrac"])
def test_tracin_and_retrac_are_what_the_paper_defines(tmp_path, method):
    """Each query at ten timesteps, each row at one that it received, and every gradient over its norm or not."""
    _, record = record_run(tmp_path, Denoiser())
    stage = record.stages[0]
    options = {"method": method, "progress": False, "dtype": torch.float64, "model": lambda stage: Denoiser()}
    attributor = SourceAttributor(record, **options)
    queries = Queries.from_rows(images().select(range(3)))
    scores = attributor.scores(None, queries)
    rows = np.asarray(images()["pixel_values"], dtype=np.float32)
    asked = DiffusionTask(**stage.loss["settings"]).asked()
    timesteps, noises = asked.drawn({"pixel_values": torch.from_numpy(rows[:3])})
    assert timesteps[0].tolist() == [2, 7, 12, 17, 22, 27, 32, 37, 42, 47]
    model, expected = Denoiser().double(), np.zeros((3, 10))
    over = (lambda g: g / g.norm()) if method == "diffusion-retrac" else (lambda g: g)
    for segment, epoch in zip(stage.segments, (1, 4), strict=True):  # the middle one of three
        stage.load_weights(model, segment.index)
        tests = [
            sum(
                over(gradient(model, rows[q], int(t), n.numpy())) for t, n in zip(timesteps[q], noises[q], strict=True)
            )
            for q in range(3)
        ]
        trained = [over(gradient(model, row, *visit_draw(row, epoch, 42, 50))) for row in rows]
        assert segment.row_weights() == pytest.approx(np.full(10, 3 * 0.1 / 5))  # three visits, batches of five
        found = np.array([[float(test @ own) / 10 for own in trained] for test in tests])
        expected += found * 3 * 0.1 / 5
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_scores_agree_with_leaving_images_out(tmp_path):
    _, record = record_run(tmp_path, Denoiser(), num_train_epochs=12, num_segments=4)
    stage = record.stages[0]
    queries = Queries.from_rows(images().select(range(4)))
    make = lambda stage: Denoiser()  # noqa: E731
    keep = np.concatenate([np.ones((1, 10)), 1 - np.eye(10)])
    found = retrain_in_chunks(stage, stage.rows(), keep, queries.rows, model=make)
    actual = (found[1:] - found[:1]).T
    ranks = {}
    for method in ("source", "unrolled", "diffusion-tracin"):
        scores = SourceAttributor(record, method=method, model=make, num_samples=256, progress=False).scores(
            None, queries
        )
        ranks[method] = np.mean([spearmanr(*pair).statistic for pair in zip(scores, actual, strict=True)])
        if method == "unrolled":
            assert (np.sign(scores) == np.sign(actual)).mean() > 0.9
    assert ranks["unrolled"] > 0.95 and ranks["source"] > 0.7 and ranks["source"] > ranks["diffusion-tracin"], ranks


def test_the_sampled_targets_have_the_curvature_of_the_loss():
    """The gradient of the mean over `n` numbers has covariance `2 / n` under targets of variance `n / 2`."""
    task = DiffusionTask({"num_train_timesteps": 50}, draws=2)
    task.at_epochs(range(4))
    assert task.numbers == (1, 3) and task.sequences_per_row == 2
    outputs = torch.randn(2000, 2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs.requires_grad_()
    labels = task.sample_labels(outputs.detach(), outputs.detach(), torch.Generator().manual_seed(1))
    (grads,) = torch.autograd.grad(task.row_losses(outputs, labels).sum(), outputs)
    assert float(grads.square().mean()) == pytest.approx(2 / 18, rel=0.03)  # 36 000 numbers: 0.7 % a standard error


def test_a_velocity_is_predicted_as_the_schedule_says():
    task = DiffusionTask(
        {"num_train_timesteps": 50, "prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}
    )
    pixels = torch.randn(2, 1, 4, 4)
    timesteps, noise = task.drawn({"pixel_values": pixels})
    schedule = DDIMScheduler(num_train_timesteps=50)
    kept = schedule.alphas_cumprod[timesteps[:, 0]][:, None, None, None]
    torch.testing.assert_close(
        task.labels({"pixel_values": pixels})[:, 0], kept.sqrt() * noise[:, 0] - (1 - kept).sqrt() * pixels
    )


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one timestep"):
        DiffusionTask({}, draws=0)
    with pytest.raises(UnsupportedError, match="prediction_type='sample'"):
        DiffusionTask({"prediction_type": "sample"})
    with pytest.raises(UnsupportedError, match="NoSchedule"):
        DiffusionTask({"_class_name": "NoSchedule"})
    with pytest.raises(DataError, match="no `pixel_values`"):
        trainer = SourceDiffusionTrainer(
            Denoiser(),
            config(tmp_path, remove_unused_columns=False),
            train_dataset=images().rename_column("pixel_values", "image"),
            noise_scheduler=SCHEDULER,
        )
        trainer.train()
    _, record = train(tmp_path / "text", tiny_gpt2(), max_steps=3)
    with pytest.raises(ConfigError, match="draws=0"):
        SourceAttributor(record, method="diffusion-tracin", draws=0)
    with pytest.raises(UnsupportedError, match="trained no diffusion model"):
        attributor = SourceAttributor(record, method="diffusion-retrac", progress=False)
        attributor.scores(None, Queries.from_rows(record.stages[0].rows().select(range(2))))


def test_an_index_knows_which_noise_each_segment_gave(tmp_path):
    """With all numbers kept, its scores are those of the walk."""
    _, record = record_run(tmp_path, Denoiser())
    given = {"num_samples": 8, "progress": False, "dtype": torch.float64, "model": lambda stage: Denoiser()}
    exact = SourceAttributor(record, **given)
    queries = Queries.from_rows(images().select(range(3)))
    exact.build_index(tmp_path / "index", numbers=10**6, precision="full")
    found = SourceAttributor(record, index=tmp_path / "index", **given).scores(None, queries)
    expected = exact.scores(None, queries)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
