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
"""Convolutions and channel norms: rows against autograd, the sample against the explicit Gauss-Newton matrix."""

import pytest
import torch
from torch import nn

from hf_source.curvature.ekfac import KroneckerMoments
from hf_source.curvature.preconditioner import Diagonal
from hf_source.curvature.sample import FisherSample
from hf_source.errors import UnsupportedError
from hf_source.gradients import RegressionTask, RowGradients


class Images(nn.Module):
    """A layer under test between two others, and one number for each row."""

    def __init__(self, layer: nn.Module, dims: int, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, channels, 1)
        self.layer = layer
        self.head = nn.LazyLinear(1)

    def forward(self, pixels):
        made = torch.tanh(self.layer(torch.tanh(self.first(pixels))))
        return (self.head(made.flatten(1)),)


def engine(layer: nn.Module, dims: int = 2, channels: int = 4, rows: int = 3):
    """Row gradients of every parameter, and a batch."""
    generator = torch.Generator().manual_seed(1)
    places = (7, 6, 5)[:dims]
    pixels = torch.randn(rows, 2, *places, generator=generator, dtype=torch.float64)
    batch = {"pixels": pixels, "labels": torch.randn(rows, generator=generator, dtype=torch.float64)}
    model = Images(layer, dims, channels).double().eval()
    model(pixels)  # makes the lazy head
    with torch.no_grad():  # far from where scales are 1 and biases 0
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return RowGradients(model, RegressionTask(), [name for name, _ in model.named_parameters()]), batch


def jacobian(gradients: RowGradients, batch) -> torch.Tensor:
    """Derivatives of every row's prediction, `[rows, p]`, one row at a time."""
    rows = []
    for row in range(len(batch["labels"])):
        prediction = gradients.model(batch["pixels"][row : row + 1])[0].sum()
        grads = torch.autograd.grad(prediction, list(gradients.parameters.values()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def flat(gradients: RowGradients, blocks) -> torch.Tensor:
    """Blocks, whole or in slices, as `[rows, p]`."""
    found: dict[str, list] = {}
    for name, _, grads in blocks:
        found.setdefault(name, []).append(grads)
    return torch.cat([torch.cat(found[name]).flatten(1) for name in gradients.parameters], dim=1)


def frozen_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 5, 3), 1),
    "1d, grouped, strided, dilated": (lambda: nn.Conv1d(4, 6, 2, stride=2, dilation=2, groups=2), 1),
    "2d": (lambda: nn.Conv2d(4, 3, 3, padding=1), 2),
    "2d, uneven": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2)), 2),
    "2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), 2),
    "2d, same": (lambda: nn.Conv2d(4, 4, (3, 2), padding="same", dilation=(1, 3)), 2),
    "2d, reflected": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), 2),
    "2d, circular": (lambda: nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode="circular"), 2),
    "3d": (lambda: nn.Conv3d(4, 2, 2, groups=2), 3),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1), 1),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 3, 3), 2),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), padding=(1, 0), dilation=(1, 2), groups=2), 2,
    ),
    "transposed, wide": (lambda: nn.ConvTranspose2d(4, 2, 2, dilation=3, output_padding=1), 2),
    "group norm": (lambda: nn.GroupNorm(2, 4), 2),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), 2),
    "batch norm": (frozen_batch_norm, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_and_curvature_of_every_layer(kind):
    """The Fisher of one number a row with signs for noise is the Gauss-Newton matrix, without sampling error."""
    make, dims = LAYERS[kind]
    gradients, batch = engine(make(), dims)
    gradients.check(batch)
    assert not gradients.fallback and not gradients.around
    derivatives = jacobian(gradients, batch)
    predictions = gradients.model(batch["pixels"])[0].detach()[:, 0]
    expected = 2 * (predictions - batch["labels"])[:, None] * derivatives
    got = flat(gradients, gradients.blocks(gradients.run(batch)))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    gradients.max_block_bytes = 1  # row by row
    torch.testing.assert_close(flat(gradients, gradients.blocks(gradients.run(batch))), got)
    sample = FisherSample(gradients, [batch])
    columns = torch.cat([part.flatten(1) for part in sample.matrices(list(gradients.parameters)).values()], dim=1)
    curvature = 2 * derivatives.T @ derivatives / len(derivatives)
    torch.testing.assert_close(columns.T @ columns, curvature, rtol=1e-9, atol=1e-9 * float(curvature.abs().max()))


def test_kronecker_factors_of_a_convolution_are_those_of_its_patches():
    """Full over the patch x full over the channels, patch by patch as an image is looked at."""
    layer = nn.Conv2d(4, 3, (2, 3), stride=(1, 2), padding=(1, 0))
    gradients, batch = engine(layer)
    assert KroneckerMoments.fits(gradients, "layer.weight") and KroneckerMoments.fits(gradients, "first.weight")
    moments = KroneckerMoments(gradients, "layer.weight", Diagonal(torch.tensor(1.0)))
    done = gradients.run(batch)
    moments.add(done, scale=0.5)
    inputs = torch.tanh(gradients.model.first(batch["pixels"])).detach()
    inputs = torch.cat([torch.zeros(3, 4, 1, 6), inputs, torch.zeros(3, 4, 1, 6)], dim=2).double()
    (call,) = done.calls[layer]
    right, left = torch.zeros(24, 24).double(), torch.zeros(3, 3).double()
    for row in range(3):
        for y in range(call.grad.shape[2]):
            for x in range(call.grad.shape[3]):
                patch = inputs[row, :, y : y + 2, 2 * x : 2 * x + 3].flatten()
                right += torch.outer(patch, patch)
                left += 0.25 * torch.outer(call.grad[row, :, y, x], call.grad[row, :, y, x])
    torch.testing.assert_close(moments.right, right)
    torch.testing.assert_close(moments.left, left)


def test_grouped_and_transposed_convolutions_take_the_moments_of_their_gradients():
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 3, 2)):
        gradients, _ = engine(layer)
        assert not KroneckerMoments.fits(gradients, "layer.weight")


def test_a_norm_by_the_batch_is_refused():
    """Not told by any gradient of a row alone: it has none."""
    gradients, batch = engine(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(UnsupportedError, match="`layer` is a BatchNorm2d without running statistics.*GroupNorm"):
        gradients.check(batch)
