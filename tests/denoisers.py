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
"""Tiny diffusion models, and images for them, that tests of several areas share."""

import numpy as np
import torch
from datasets import Dataset
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn


SCHEDULER = DDPMScheduler(num_train_timesteps=50)


class Denoiser(nn.Module):
    """Two convolutions that are told the timestep as a channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, sample, timestep):
        time = (timestep / 50).to(sample)[:, None, None, None].expand_as(sample)
        return self.last(torch.tanh(self.first(torch.cat([sample, time], dim=1))))


def unet(attention: bool = True) -> UNet2DModel:
    """Two resolutions of 8 channels."""
    torch.manual_seed(0)
    inner = "Attn" if attention else ""
    blocks = {"down_block_types": ("DownBlock2D", f"{inner}DownBlock2D")}
    blocks |= {"up_block_types": (f"{inner}UpBlock2D", "UpBlock2D"), "add_attention": attention}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4}
    return UNet2DModel(sample_size=4, in_channels=1, out_channels=1, **sizes, **blocks)


def images(count: int = 10) -> Dataset:
    """Two kinds of stripes, with noise."""
    generator = np.random.default_rng(0)
    stripes = np.zeros((count, 1, 4, 4), dtype=np.float32)
    stripes[::2, :, ::2], stripes[1::2, :, :, ::2] = 1, 1
    return Dataset.from_dict({"pixel_values": (stripes + 0.2 * generator.standard_normal(stripes.shape)).tolist()})
