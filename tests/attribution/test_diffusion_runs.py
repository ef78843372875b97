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
"""Diffusion models beyond the scores: interrupted runs, training again, and pages with images."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor, SourceDiffusionTrainer, TrainingRecord, load_attribution
from hf_source.cli import app
from hf_source.errors import UnsupportedError
from hf_source.evaluation import StackedRetraining, TrainerRetraining, evaluate
from hf_source.outputs.pictures import address, pictures_of
from hf_source.outputs.report import write_report

from ..cases import config
from ..denoisers import SCHEDULER, Denoiser, images, unet
from ..resuming import KillAfter, Killed, assert_same_record


def run(folder, model=None, callbacks=(), resume=None, **settings):
    given = {"optim": "adamw_torch", "learning_rate": 3e-3, "num_segments": 2, "gradient_accumulation_steps": 1}
    given |= {"per_device_train_batch_size": 5, "num_train_epochs": 4, "max_grad_norm": 0.0, "weight_decay": 0.0}
    trainer = SourceDiffusionTrainer(
        model or Denoiser(),
        config(folder, **given | settings),
        train_dataset=images(),
        noise_scheduler=SCHEDULER,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return TrainingRecord.load(folder / "record")


def test_a_killed_run_goes_on_with_the_same_draws(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "whole", **saves)
    with pytest.raises(Killed):
        run(tmp_path / "killed", callbacks=[KillAfter(5)], **saves)
    assert_same_record(whole, run(tmp_path / "killed", resume=True, **saves))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a UNet, which can be rebuilt from its record."""
    return run(tmp_path_factory.mktemp("unet"), unet(attention=False))


@pytest.fixture(scope="module")
def queries():
    return Queries.from_rows(images().select(range(2)))


def test_a_trainer_trains_it_again(record, queries):
    """The recorded order and draws give the recorded weights' losses; another seed draws anew."""
    stacked, trainer = (kind(record, queries, progress=False) for kind in (StackedRetraining, TrainerRetraining))
    keep = np.ones((3, 10), dtype=bool)
    keep[1, :5], keep[2, 5:] = False, False
    ours, theirs = stacked.losses(keep), trainer.losses(keep)
    np.testing.assert_allclose(theirs[0], ours[0], rtol=1e-4)
    # A row that is left out stays in the stacked normalizer and leaves the Trainer's; both see the other rows only.
    np.testing.assert_array_equal(np.sign(theirs[1] - theirs[2]), np.sign(ours[1] - ours[2]))
    one, other = trainer.losses(keep[:1], seed=1), trainer.losses(keep[:1], seed=2)
    assert np.abs(one - theirs[:1]).min() > 1e-6 and np.abs(one - other).min() > 1e-6
    np.testing.assert_array_equal(one, trainer.losses(keep[:1], seed=1))


def test_what_cannot_be_stacked_is_trained_one_by_one(queries, tmp_path):
    """Torch has no stacked form of a channel norm inside the attention of diffusers."""
    record = run(tmp_path, unet(), num_train_epochs=2)
    keep = np.ones((1, 10), dtype=bool)
    with pytest.raises(UnsupportedError, match="cannot be trained at once(?s:.*)TrainerRetraining"):
        StackedRetraining(record, queries, progress=False).losses(keep)
    assert np.isfinite(TrainerRetraining(record, queries, progress=False).losses(keep)).all()


@pytest.mark.parametrize("retraining", [StackedRetraining, TrainerRetraining])
def test_an_evaluation(record, queries, retraining, tmp_path):
    attributor = SourceAttributor(record, curvature="ekfac", num_samples=8, progress=False)
    again = retraining(record, queries, progress=False, cache=tmp_path)
    report = evaluate(
        attributor, queries, methods=["source", "diffusion-tracin"], retraining=again, num_subsets=4, fraction=0.3,
        store=False, progress=False,
    )  # fmt: skip
    assert [entry.method for entry in report.entries] == ["source", "diffusion-tracin"]
    assert all(-1 <= entry.value <= 1 for entry in report.entries)


def shown(page: str) -> list[np.ndarray]:
    """Images of a page, as grey values `[height, width]`."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(found) == page.count("<img ")
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(part)))) for part in found]


def test_a_report_shows_the_images(record, queries, tmp_path):
    """Every answer has a grid: what is asked, two images that support it and two that oppose it; then its table."""
    attributor = SourceAttributor(record, curvature="ekfac", num_samples=8, progress=False)
    page = attributor.report(tmp_path / "r.html", queries, k=2).read_text(encoding="utf-8")
    assert "img-src data:" in page and "default-src 'none'" in page
    pixels = np.asarray(images()["pixel_values"], dtype=np.float32)[:, 0]
    top = attributor.top(queries, k=2)
    expected = []
    for place, name in enumerate(queries.names):
        own = sorted((row for row in top if row["query"] == name), key=lambda row: -row["score"])
        rows = [row["row"] for row in own if row["rank"] > 0] + [row["row"] for row in own if row["rank"] < 0]
        expected += [pixels[place], *pixels[rows], *pixels[rows]]
    found = shown(page)
    every = np.stack(expected)
    low, high = every.min(), every.max()  # none of the usual ranges: stripes of 0 and 1, with noise
    grey = np.round((every - low) / (high - low) * 255)
    assert len(found) == len(expected) == 18
    np.testing.assert_allclose(np.stack(found), grey, atol=1)
    attributor.save(tmp_path / "scores", queries, k=2)
    again = write_report(tmp_path / "again.html", load_attribution(tmp_path / "scores"))
    np.testing.assert_array_equal(np.stack(shown(again.read_text(encoding="utf-8"))), np.stack(found))


def test_a_report_from_a_shell(record, tmp_path):
    images().select([3]).to_parquet(tmp_path / "drawn.parquet")
    words = ["report", str(record.path), "--queries", str(tmp_path / "drawn.parquet"), "--curvature", "ekfac"]
    words += ["--num-samples", "8", "-k", "1", "--out", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(shown((tmp_path / "r.html").read_text(encoding="utf-8"))) == 5


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 3, 5), (4, 2, 2)])
def test_an_address_holds_the_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    encoded = address(pixels, (0, 255)).removeprefix("data:image/png;base64,")
    found = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(encoded))))
    np.testing.assert_array_equal(found.reshape(*shape[1:], shape[0]).transpose(2, 0, 1), pixels)


@pytest.mark.parametrize(
    ("value", "drawn"),
    [
        ([[0.0, 1.0], [0.5, 0.0]], True),  # of two axes: grey
        ([[[0.0, 1.0]]] * 3, True),
        ([[[-1.0, 1.0]]], True),
        ([[[300.0, 1.0]]], True),
        ([[[0.0]]] * 2, False),  # two channels are no image
        ([0.0, 1.0], False),
        ('"><script>alert(1)</script>', False),
        (["a", "b"], False),
    ],
)
def test_only_images_are_drawn(tmp_path, value, drawn):
    """A column with the name of images may hold anything; nothing of it reaches the page but pixels."""
    rows = Dataset.from_dict({"source_row": [0], "pixel_values": [value], "source_q": np.zeros(1, dtype=np.float32)})
    top = [{"query": "q", "stage": "train", "row": 0, "rank": 1, "score": 0.5, "text": ""}]
    about = {"unit": "nats", "k": 1, "layout": "columns", "record": {}, "stages": {}}
    asked = Queries(["q"], [""], [""], [{"pixel_values": value}], are_rows=True)
    from hf_source.outputs.attribution_files import Attribution

    attribution = Attribution(asked, {"train": rows}, Dataset.from_list(top), {}, about=about)
    assert bool(pictures_of(attribution)) == drawn
    page = write_report(tmp_path / "r.html", attribution).read_text(encoding="utf-8")
    assert page.count("<img ") == (3 if drawn else 0) and ("img-src" in page) == drawn
    assert "<script" not in page
