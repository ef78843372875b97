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
"""Diffusion models: a row is an image, and every visit of it in training had a timestep and a noise of its own.

What a visit drew follows from the seed, the image and the epoch alone. So the record, which holds the seed and the
epoch of every step, holds the very timestep and noise of every visit, without storing any; whoever needs them draws
them again (`visit_draw`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from ..errors import ConfigError, UnsupportedError
from .heads import HeadTask
from .task import Batch


IMAGES = "pixel_values"
"""The column of the images, `[channels, height, width]`."""

CLASSES = "class_labels"
"""The column of the classes that a conditional model is told."""


_TIMESTEPS, _NOISE = "source_timesteps", "source_noise"


def visit_draw(image: np.ndarray, epoch: int, seed: int, timesteps: int) -> tuple[int, np.ndarray]:
    """Timestep and standard normal noise that an image is given in an epoch.

    Args:
        image: float32 `[channels, height, width]`.
        epoch: epochs done before.
        seed: of the run.
        timesteps: of the noise schedule.

    Returns:
        The timestep, and float32 noise of the image's shape.
    """
    generator = _generator(image, epoch, seed)
    timestep = int(generator.randint(timesteps))
    return timestep, generator.standard_normal(image.shape).astype(np.float32)


def _generator(image: np.ndarray, number: int, seed: int) -> np.random.RandomState:
    """A generator whose numbers NumPy promises never to change."""
    digest = xxhash.xxh64(np.ascontiguousarray(image, dtype=np.float32).tobytes(), seed=seed).intdigest()
    return np.random.RandomState(np.array([digest >> 32, digest & 0xFFFFFFFF, number & 0xFFFFFFFF], dtype=np.uint32))


class DiffusionTask(HeadTask):
    """The mean squared error of the noise (or velocity) that a diffusion model predicts (Ho et al. 2020, 2006.11239).

    A row is one item; its loss is the mean over its pixels and over some of its draws. For rows these are draws that
    they really received: in the epochs that `at_epochs` was told of. For queries (`asked`), timesteps from a grid over
    the whole schedule, with noise of their own: a generated image had no visit.

    The loss is the negative log-likelihood, divided by the number `n` of its terms, of a Gaussian with variance 1/2.
    Targets for the curvature have variance `n / 2`, which makes the covariance of the gradient the second derivative
    `2 / n`, and the Fisher the Gauss-Newton matrix.

    Args:
        scheduler: name (`_class_name`) and settings of the noise schedule of diffusers.
        seed: of the draws.
        draws: draws of a row that are averaged over.
        grid: timesteps that a query is asked about.
        asks: whether rows are queries.
        settings: see `HeadTask`.
    """

    needs_labels = False

    def __init__(
        self,
        scheduler: Mapping[str, Any],
        seed: int = 0,
        draws: int = 4,
        grid: int = 10,
        asks: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**{"columns": (IMAGES, CLASSES), **settings})
        if draws < 1 or grid < 1:
            raise ConfigError(f"draws={draws}, grid={grid}: a diffusion loss needs at least one timestep.")
        self._settings = {"scheduler": dict(scheduler), "seed": seed, "draws": draws, "grid": grid, **settings}
        self.seed, self.draws, self.grid, self.asks = seed, draws, grid, asks
        self.scheduler = build_scheduler(scheduler)
        self.timesteps = int(self.scheduler.config["num_train_timesteps"])
        self.numbers: tuple[int, ...] = ()
        self.at_epochs((0,))
        if asks:
            self.at_points(range(grid))

    @property
    def sequences_per_row(self) -> int:
        """Images that the model is given for one row."""
        return len(self.numbers)

    @sequences_per_row.setter
    def sequences_per_row(self, value: int) -> None:
        """Told by the draws alone."""

    def asked(self) -> "DiffusionTask":
        """The task of queries."""
        return DiffusionTask(**self._settings, asks=True)

    def drawn_anew(self, seed: int | None) -> "DiffusionTask":
        """The task of another run, with draws of its own; of the same run, for `None`."""
        return self if seed is None else DiffusionTask(**{**self._settings, "seed": seed})

    def mean_loss(self, model: torch.nn.Module, batch: Batch, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What training minimises for a batch in an epoch, and the predictions."""
        self.at_epochs((epoch,))
        outputs = self.forward(model, batch)
        return self.row_losses(outputs, self.labels(batch)).mean(), outputs

    def at_epochs(self, epochs: Sequence[int]) -> None:
        """Take the draws of some epochs: at most `draws` of them, spread evenly."""
        if self.asks:
            return
        epochs = sorted(set(epochs)) or [0]
        count = min(self.draws, len(epochs))
        self.numbers = tuple(epochs[(2 * i + 1) * len(epochs) // (2 * count)] for i in range(count))

    def at_points(self, points: Sequence[int]) -> None:
        """Ask queries about some points of the grid only."""
        self.numbers = tuple(points)

    def complete(self, batch: Batch) -> Batch:
        """The batch with its draws."""
        timesteps, noise = self.drawn(batch)
        return {**batch, _TIMESTEPS: timesteps, _NOISE: noise}

    def drawn(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `[rows, draws]` and noise `[rows, draws, channels, height, width]` of a batch."""
        if _NOISE in batch:
            return batch[_TIMESTEPS], batch[_NOISE]
        images = batch[IMAGES]
        found = [self._draw(image, number) for image in images.cpu().float().numpy() for number in self.numbers]
        shape = (len(images), len(self.numbers))
        timesteps = torch.tensor([timestep for timestep, _ in found]).view(shape)
        noise = torch.from_numpy(np.stack([noise for _, noise in found])).view(*shape, *images.shape[1:])
        return timesteps.to(images.device), noise.to(images.device)

    def _draw(self, image: np.ndarray, number: int) -> tuple[int, np.ndarray]:
        if not self.asks:
            return visit_draw(image, number, self.seed, self.timesteps)
        generator = _generator(image, -1 - number, self.seed)  # no epoch has such a number
        timestep = (2 * number + 1) * self.timesteps // (2 * self.grid)
        return timestep, generator.standard_normal(image.shape).astype(np.float32)

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Predictions for every draw, float `[rows, draws, channels, height, width]`."""
        images, dtype = batch[IMAGES], next(model.parameters()).dtype
        timesteps, noise = self.drawn(batch)
        repeated = images[:, None].expand_as(noise).flatten(0, 1).to(dtype)
        noisy = self.scheduler.add_noise(repeated, noise.flatten(0, 1).to(dtype), timesteps.flatten())
        given = {}
        if CLASSES in batch:
            given[CLASSES] = batch[CLASSES].repeat_interleave(len(self.numbers), dim=0)
        outputs = model(noisy.to(dtype), timesteps.flatten(), **given)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        return outputs.unflatten(0, noise.shape[:2])

    def labels(self, batch: Batch) -> torch.Tensor:
        """What the model should have predicted, of the shape of its predictions."""
        images = batch[IMAGES]
        timesteps, noise = self.drawn(batch)
        if self.scheduler.config["prediction_type"] == "epsilon":
            return noise
        repeated = images[:, None].expand_as(noise).flatten(0, 1).float()
        return self.scheduler.get_velocity(repeated, noise.flatten(0, 1), timesteps.flatten()).view_as(noise)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean squared error of each row, `[rows]`."""
        return (outputs - labels.to(outputs)).square().flatten(1).mean(dim=1)

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Targets drawn from the model's Gaussian, with the variance that belongs to a mean."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        return outputs + noise * (outputs[0].numel() / 2) ** 0.5

    def fits(self, outputs: torch.Tensor, labels: torch.Tensor) -> bool:
        """The Trainer says it."""
        return True

    def num_items(self, labels: torch.Tensor) -> torch.Tensor:
        """One for each row."""
        return torch.ones(len(labels), dtype=torch.int64)

    def count_items(self, row: Mapping[str, Any]) -> int:
        """One."""
        return 1

    def length(self, row: Mapping[str, Any]) -> int:
        """Pixels of a row's draws by the hundred: activations of a UNet are many."""
        image = row[IMAGES]
        pixels = int(np.prod(np.asarray(image).shape))
        return max(1, pixels // 100) * (self.grid if self.asks else self.draws)


def build_scheduler(settings: Mapping[str, Any]) -> Any:
    """A noise schedule of diffusers from its name and settings.

    Raises:
        ConfigError: if diffusers is not installed.
        UnsupportedError: if there is no such schedule, or what it has the model predict is not known.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("Diffusion models need diffusers: `pip install hf_source[diffusion]`.") from error
    name = str(settings.get("_class_name", "DDPMScheduler"))
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "add_noise"):
        raise UnsupportedError(f"The noise schedule {name} is none of diffusers': train with a DDPMScheduler.")
    scheduler = cls.from_config({key: value for key, value in settings.items() if not key.startswith("_")})
    if scheduler.config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise UnsupportedError(
            f"prediction_type={scheduler.config['prediction_type']!r} is not known: train a model that predicts the "
            "noise ('epsilon') or the velocity ('v_prediction')."
        )
    return scheduler
