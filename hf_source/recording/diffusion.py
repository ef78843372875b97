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
"""Training diffusion models of diffusers with a recording Trainer."""

import json
from typing import Any

import torch

from ..data import ROW
from ..errors import DataError
from ..gradients.diffusion import CLASSES, IMAGES, DiffusionTask
from .trainer import SourceTrainer


class SourceDiffusionTrainer(SourceTrainer):
    """Trains a denoiser, and records which timestep and noise each image received.

    The model is any that predicts from a noisy image and a timestep, such as `UNet2DModel` of diffusers. Images are
    the column `pixel_values`, arrays `[channels, height, width]`, scaled as the model wants them and the same at every
    visit (flips and crops have to be made beforehand); the optional column `class_labels` goes to the model as well.
    Every image is noised once per epoch, by a draw that follows from `seed`, image and epoch, so that the record holds
    it; the loss is the mean squared error of the predicted noise, or velocity.

    Args:
        model: the denoiser.
        noise_scheduler: of diffusers; its `prediction_type` says what the model predicts.
        arguments: as of `SourceTrainer`.

    Example:
        >>> scheduler = DDPMScheduler(num_train_timesteps=1000)  # doctest: +SKIP
        >>> trainer = SourceDiffusionTrainer(  # doctest: +SKIP
        ...     unet, args, train_dataset=images, noise_scheduler=scheduler
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    train_rows_kind = "custom"

    def __init__(self, *args: Any, noise_scheduler: Any, **arguments: Any) -> None:
        self._schedule = json.loads(json.dumps(dict(noise_scheduler.config), default=str))
        self._schedule = {key: value for key, value in self._schedule.items() if key != "_use_default_values"}
        self._schedule["_class_name"] = type(noise_scheduler).__name__
        super().__init__(*args, **arguments)
        self._task = DiffusionTask(**self.diffusion_settings(), draws=1)

    def diffusion_settings(self) -> dict[str, Any]:
        """What the record says of the loss."""
        collator = getattr(self.data_collator, "collator", self.data_collator)
        named = collator if hasattr(collator, "__qualname__") else type(collator)
        return {
            "scheduler": self._schedule,
            "seed": self.args.seed,
            "collator": f"{named.__module__}.{named.__qualname__}",
        }

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, IMAGES, CLASSES])]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean squared error of the images of a batch, each at the draw of its epoch.

        Raises:
            DataError: if the batch holds no images.
        """
        if IMAGES not in inputs:
            raise DataError(f"A batch holds no `{IMAGES}`: give the dataset that column, `[channels, height, width]`.")
        inputs = {key: value for key, value in inputs.items() if key != ROW}
        loss, outputs = self._task.mean_loss(model, inputs, int(self.state.epoch or 0))
        return (loss, {"predictions": outputs}) if return_outputs else loss
