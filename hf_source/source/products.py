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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..curvature.eigen import eigh
from ..gradients import RowGradients, curvature_task, task_labels
from ..gradients.contraction import products
from ..gradients.rows import as_rows
from ..logs import get_logger
from .twice import cheap_twice


logger = get_logger(__name__)

Vectors = dict[str, torch.Tensor]

DIRECTIONS_BYTES = 2**27
"""Derivatives along this many directions are made at once: fast, and held beside the vectors themselves."""


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
        objective, total = Objective(gradients, batch, normalizer), {}
        for queries, found, _ in objective.along(forces):
            for name, part in found.items():
                shape = (len(next(iter(forces.values()))), *part.shape[1:])
                total.setdefault(name, part.new_empty(shape))[queries] = part
        return total


class Objective:
    """The loss of a batch, its gradient, and how both change along vectors.

    Args:
        gradients: engine at the step's weights; its parameters are those wanted.
        batch: model inputs and labels.
        normalizer: what the batch's summed loss is divided by.

    Attributes:
        gradient: by name, without graph; parameters that have no part in the loss are missing.
    """

    def __init__(self, gradients: RowGradients, batch: Mapping[str, torch.Tensor], normalizer: float) -> None:
        self._gradients, task = gradients, gradients.task
        self._wanted = dict(gradients.parameters)
        parameters = list(self._wanted.values())
        with gradients._requiring_grad(parameters), torch.enable_grad():
            with cheap_twice(gradients.model) as made:
                losses = task.row_losses(task.forward(gradients.model, batch), task_labels(task, batch))
                # A weight for each row, whose derivative tells how the row's own loss changes.
                self._weights = torch.full_like(losses, 1 / normalizer).requires_grad_()
                loss = (losses * self._weights).sum()
            found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        self._graph = {name: part for name, part in zip(self._wanted, found, strict=True) if part is not None}
        self.gradient = {name: part.detach() for name, part in self._graph.items()}
        self._direction_bytes = made.num_bytes

    def along(self, forces: Vectors) -> Iterator[tuple[slice, Vectors, torch.Tensor]]:
        """How the gradient and the rows' losses change along the forces of some queries after those of others.

        Yields:
            Which queries, `H h` of those by name (parameters without a part in it are missing), and `<h, gradient of
            the row's loss>`, `[queries, rows]`.
        """
        names = [name for name in forces if name in self._graph and self._graph[name].requires_grad]
        count = len(next(iter(forces.values())))
        size = max(1, int(DIRECTIONS_BYTES // max(1, self._direction_bytes)))
        parts = -(-count // size)
        for part in range(parts):
            queries = slice(count * part // parts, count * (part + 1) // parts)
            *found, dots = self._derivatives(names, [forces[name][queries] for name in names])
            products = {name: each for name, each in zip(self._wanted, found, strict=True) if each is not None}
            yield queries, products, dots

    def _derivatives(self, names: list[str], directions: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Of the gradient's products with the directions, with respect to parameters and rows' weights."""
        inputs, outputs = [*self._wanted.values(), self._weights], [self._graph[name] for name in names]

        def derivatives(*of_one: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return torch.autograd.grad(outputs, inputs, of_one, retain_graph=True, allow_unused=True)

        with self._gradients._requiring_grad(self._wanted.values()):
            try:
                found = torch.vmap(_without_none(derivatives))(*directions)
            except RuntimeError as error:  # an operation that cannot be done for many directions at once
                logger.debug("one direction at a time: %s", error)
                each = [_without_none(derivatives)(*one) for one in zip(*directions, strict=True)]
                found = {number: torch.stack([one[number] for one in each]) for number in each[0]}
        return [found.get(number) for number in range(len(inputs))]


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
        forces, step_sizes = {name: force.clone() for name, force in forces.items()}, step_sizes or {}
        gradients = gradients.with_task(curvature_task(gradients.task, self.probes))
        total: Vectors = {}
        generators = [torch.Generator().manual_seed(seed + 104729 * draw) for draw in range(self.draws)]
        for done in gradients.draws(batch, generators):
            scale = (normalizer * self.draws) ** -0.5
            for name, part in self._flow(gradients, done, forces, step_sizes, scale).items():
                if name in forces and name in step_sizes:
                    forces[name].addcmul_(step_sizes[name].to(part), part, value=-1)
                total[name] = total[name].add_(part) if name in total else part
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
            dots = dots + products(columns, as_rows(forces[name])).double().cpu() * scale
            if name in step_sizes:
                size = step_sizes[name].to(columns)
                weighted = columns * (size.flatten() if size.dim() else size)
                gram = gram + products(weighted, columns).double().cpu() * scale**2
        if gram.dim():
            rates, modes = eigh((gram + gram.T) / 2)
            dots = modes @ (_damping(rates)[:, None] * (modes.T @ dots))
        found: Vectors = {}
        for name, columns in turn(gradients.parameters):
            flat = dots.T.to(columns) @ columns * scale
            found[name] = flat.view(-1, *gradients.parameters[name].shape)
        return found


def _without_none(function: Callable) -> Callable[..., dict[int, torch.Tensor]]:
    """The results that are there, by number: `torch.vmap` knows no `None`."""
    return lambda *args: {number: part for number, part in enumerate(function(*args)) if part is not None}


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
