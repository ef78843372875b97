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
"""Products of query vectors with the curvature of one training batch: exact, or by sampled labels for all at once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..curvature.eigen import eigh
from ..gradients import RowGradients, curvature_task, task_labels
from ..gradients.rows import as_rows


Vectors = dict[str, torch.Tensor]


class Products(ABC):
    """How vectors are multiplied by a step's curvature.

    Attributes:
        exact: whether a product is that with the Hessian itself; it then does not depend on a seed.
    """

    exact: bool

    @abstractmethod
    def __call__(
        self,
        gradients: RowGradients,
        batch: Mapping[str, torch.Tensor],
        forces: Vectors,
        normalizer: float,
        step_sizes: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
    ) -> Vectors:
        """Products of one batch.

        Args:
            gradients: engine at the step's weights; its parameters are those wanted in the result.
            batch: model inputs and labels.
            forces: `h`, name -> `[queries, *parameter.shape]`, on parameters that the step trains.
            normalizer: what the batch's summed loss was divided by.
            step_sizes: `eta P` of the parameters that the step trains, 0-dim or whole.
            seed: of labels that are drawn.

        Returns:
            `H h`: name -> `[queries, *parameter.shape]`; parameters that have no part in the loss are missing.
        """


class ExactProducts(Products):
    """`H h` with the Hessian of the batch's objective, by differentiating its gradient: one product per query."""

    exact = True

    def __call__(self, gradients, batch, forces, normalizer, step_sizes=None, seed=0) -> Vectors:
        """See `Products`; step sizes and seed are not used."""
        wanted, task = gradients.parameters, gradients.task
        with gradients._requiring_grad(list(wanted.values())), torch.enable_grad():
            loss = task.row_losses(task.forward(gradients.model, batch), task_labels(task, batch)).sum() / normalizer
            found = torch.autograd.grad(loss, list(wanted.values()), create_graph=True, allow_unused=True)
            grads = {name: part for name, part in zip(wanted, found, strict=True) if part is not None}
            names = [name for name in forces if name in grads and grads[name].requires_grad]
            found = torch.autograd.grad(
                [grads[name] for name in names],
                list(wanted.values()),
                [forces[name] for name in names],
                is_grads_batched=True,
                allow_unused=True,
            )
        return {name: part for name, part in zip(wanted, found, strict=True) if part is not None}


@dataclass
class SampledProducts(Products):
    """The Gauss-Newton matrix of the batch from labels that the model draws, `H ~ sum over draws of S^T S`.

    `S` holds a gradient per row, summed over the row's loss items and divided by `sqrt(normalizer x draws)`, so that
    the expectation is the Gauss-Newton matrix of the batch's objective. Its eigenvalues are few and large, and a step
    of the recorded length is far too long for them; so the factor `I - eta P H` of the step becomes the flows
    `exp(-eta P S^T S)` of one draw after the other, which never overshoot: with `K = S eta P S^T = U diag(x) U^T`,

        H h ~ S^T U diag((1 - exp(-x)) / x) U^T S h.

    Attributes:
        draws: labels drawn per row. A step costs about 4 forward and backward passes over its batch and a backward
            pass for every draw, for any number of queries.
        cache_bytes: per-row gradients of a batch up to this size are kept between the two turns of a draw, which
            otherwise makes them twice.
        probes: `"labels"` or `"signs"`; see `gradients/signs.py`.
    """

    draws: int = 16
    cache_bytes: int = 2**28
    probes: str = "labels"
    exact = False

    def __call__(self, gradients, batch, forces, normalizer, step_sizes=None, seed=0) -> Vectors:
        """See `Products`."""
        forces, step_sizes = dict(forces), step_sizes or {}
        gradients = gradients.with_task(curvature_task(gradients.task, self.probes))
        total: Vectors = {}
        generators = [torch.Generator().manual_seed(seed + 104729 * draw) for draw in range(self.draws)]
        for done in gradients.draws(batch, generators):
            scale = (normalizer * self.draws) ** -0.5
            for name, part in self._flow(gradients, done, forces, step_sizes, scale).items():
                total[name] = total[name] + part if name in total else part
                if name in forces and name in step_sizes:
                    forces[name] = forces[name] - step_sizes[name] * part
        return total

    def _flow(self, gradients, done, forces, step_sizes, scale) -> Vectors:
        """One draw: `K` and `S h` in a first turn over the parameters, `S^T (coefficients)` in a second one."""
        names = list(gradients.parameters)
        sizes = [p.numel() * p.element_size() for p in gradients.parameters.values()]
        if sum(sizes) * done.num_rows <= self.cache_bytes:
            kept = [(name, as_rows(columns)) for name, columns in _columns(gradients, done, names)]
            turn = lambda wanted: ((name, columns) for name, columns in kept if name in wanted)  # noqa: E731
        else:
            turn = lambda wanted: (  # noqa: E731
                (name, as_rows(columns))
                for name, columns in _columns(gradients, done, [name for name in names if name in wanted])
            )
        gram, dots = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for name, columns in turn(forces):
            dots = dots + (columns @ as_rows(forces[name]).T).double().cpu() * scale
            if name in step_sizes:
                size = step_sizes[name].to(columns)
                weighted = columns * (size.flatten() if size.dim() else size)
                gram = gram + (weighted @ columns.T).double().cpu() * scale**2
        if gram.dim():
            rates, modes = eigh((gram + gram.T) / 2)
            dots = modes @ (_damping(rates)[:, None] * (modes.T @ dots))
        found: Vectors = {}
        for name, columns in turn(gradients.parameters):
            flat = dots.T.to(columns) @ columns * scale
            found[name] = flat.view(-1, *gradients.parameters[name].shape)
        return found


def _columns(gradients: RowGradients, done, names):
    """Per-row gradients of one whole parameter after another."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, rows, grads in gradients.blocks(done, names):
        parts.setdefault(name, []).append(grads)
        if rows.stop == done.num_rows:
            found = parts.pop(name)
            yield name, found[0] if len(found) == 1 else torch.cat(found)


def _damping(rates: torch.Tensor) -> torch.Tensor:
    """`(1 - exp(-x)) / x`, 1 at 0."""
    small = rates < 1e-8
    safe = torch.where(small, torch.ones_like(rates), rates)
    return torch.where(small, torch.ones_like(rates), -torch.expm1(-safe) / safe)
