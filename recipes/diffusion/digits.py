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
"""Train a denoiser on handwritten digits, let it draw, and show which training images made it draw that.

    python recipes/diffusion/digits.py --output_dir runs/digits

Writes `record/`, the scored rows (`scored.parquet`, a column per drawing) and `grid.png`: every drawing, the images
that support it most, and the one that opposes it most.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from transformers import HfArgumentParser

from hf_source import Queries, SourceAttributor, SourceConfig, SourceDiffusionTrainer


@dataclass
class Arguments:
    """What to train and to ask.

    Attributes:
        output_dir: folder for everything.
        rows: training images, at most 1,797.
        epochs: over them.
        drawings: images to generate and to explain.
        method: of `SourceAttributor`; `diffusion-tracin` and `diffusion-retrac` are there to compare with.
        num_samples: of the curvature.
        timesteps: of the noise schedule.
        k: supporting images shown for each drawing.
        seed: of everything.
    """

    output_dir: str = "runs/digits"
    rows: int = 500
    epochs: int = 60
    drawings: int = 6
    method: str = "source"
    num_samples: int = 512
    timesteps: int = 200
    k: int = 6
    seed: int = 0


def denoiser() -> UNet2DModel:
    """Two resolutions, 16 and 32 channels."""
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "add_attention": False}
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **sizes, **blocks)


def digits(rows: int, seed: int) -> Dataset:
    """Images `[1, 8, 8]` between -1 and 1, and which digit each is."""
    images, classes = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(classes))[:rows]
    pixels = images[chosen].reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "digit": classes[chosen].tolist()})


def draw(model: UNet2DModel, scheduler: DDPMScheduler, count: int, seed: int) -> np.ndarray:
    """Images that the model generates, `[count, 1, 8, 8]` between -1 and 1."""
    pipeline = DDPMPipeline(model.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    steps = scheduler.config.num_train_timesteps
    images = pipeline(count, generator, num_inference_steps=steps, output_type="np").images
    return np.moveaxis(images, -1, 1).astype(np.float32) * 2 - 1


def show(file: Path, drawings: np.ndarray, images: np.ndarray, scores: np.ndarray, k: int) -> None:
    """A row for each drawing: the drawing, its `k` strongest images, and the one that opposes it most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * (k + 2), 1.35 * len(drawings)), layout="constrained")
    axes = figure.subplots(len(drawings), k + 2, squeeze=False)
    for line, drawing, own in zip(axes, drawings, scores, strict=True):
        order = np.argsort(-own)
        shown = [(drawing, "drawn"), *((images[row], f"{own[row]:+.2g}") for row in [*order[:k], order[-1]])]
        for axis, (image, title) in zip(line, shown, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Train, draw, attribute, and show."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folder = Path(arguments.output_dir)
    torch.manual_seed(arguments.seed)
    rows, scheduler = digits(arguments.rows, arguments.seed), DDPMScheduler(arguments.timesteps)
    settings = SourceConfig(
        output_dir=str(folder / "out"),
        record_dir=str(folder / "record"),
        num_segments=3,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=25,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer = SourceDiffusionTrainer(denoiser(), settings, train_dataset=rows, noise_scheduler=scheduler)
    trainer.train()
    drawings = draw(trainer.model.cpu(), scheduler, arguments.drawings, arguments.seed)
    queries = Queries.from_rows(Dataset.from_dict({"pixel_values": drawings.tolist()}))
    attributor = SourceAttributor.from_record(
        folder / "record", method=arguments.method, num_samples=arguments.num_samples
    )
    scored = attributor.attribute(rows, queries)
    scored.to_parquet(folder / "scored.parquet")
    scores = np.stack([scored[f"source_{name}"][:] for name in queries.names])
    show(folder / "grid.png", drawings, np.asarray(rows["pixel_values"]), scores, arguments.k)


if __name__ == "__main__":
    main()
