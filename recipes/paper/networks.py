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
"""The paper's networks, from what the rows look like."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn


class Network(nn.Module):
    """Layers, and the loss of what they say: the cross-entropy of classes, or the squared error of a number.

    Args:
        layers: take `pixel_values` or `features`.
        classes: whether labels are classes.
    """

    def __init__(self, layers: nn.Module, classes: bool) -> None:
        super().__init__()
        self.layers, self.classes = layers, classes

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Logits or values, and the mean loss where there are labels."""
        outputs = self.layers(features if pixel_values is None else pixel_values)
        if labels is None:
            return {"logits": outputs}
        loss = F.cross_entropy(outputs, labels) if self.classes else F.mse_loss(outputs[:, 0], labels)
        return {"loss": loss, "logits": outputs}


class Residual(nn.Module):
    """What two convolutions add to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images of the same shape."""
        return x + self.layers(x)


def convolution(inside: int, outside: int) -> nn.Sequential:
    """A convolution with GroupNorm: BatchNorm mixes the rows of a batch, so that no row has a gradient of its own."""
    layers = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.GroupNorm(min(8, outside), outside), nn.ReLU()]
    return nn.Sequential(*layers)


def mlp(inputs: int, outputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    sizes = [inputs, *hidden, outputs]
    layers = [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def resnet9(channels: int, outputs: int, width: int) -> nn.Sequential:
    """Four convolutions, two residual blocks of two, and a linear layer; three times half the size."""
    return nn.Sequential(
        convolution(channels, width),
        nn.Sequential(convolution(width, 2 * width), nn.MaxPool2d(2)),
        Residual(2 * width),
        nn.Sequential(convolution(2 * width, 4 * width), nn.MaxPool2d(2)),
        nn.Sequential(convolution(4 * width, 8 * width), nn.MaxPool2d(2)),
        Residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, outputs),
    )


def network(settings: Mapping[str, Any], rows: Dataset, classes: int, seed: int) -> Network:
    """A network that fits the rows.

    Args:
        settings: `kind`, `"mlp"` with `hidden` sizes or `"resnet9"` with the `width` of its first layer.
        rows: with `pixel_values` or `features`.
        classes: number of classes; 0 for a number.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    first = torch.tensor(rows[0]["pixel_values" if "pixel_values" in rows.column_names else "features"])
    if settings["kind"] == "resnet9":
        return Network(resnet9(len(first), classes or 1, settings["width"]), bool(classes))
    return Network(mlp(first.numel(), classes or 1, settings["hidden"]), bool(classes))
