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
"""The sample matrix `S`: gradients with labels drawn from the model, scaled so that `E[S^T S] = H`.

`H` is the Gauss-Newton matrix of the objective that was trained, the mean over loss items. Row `i` of `S` is the
gradient of the loss summed over the items of training row `i` with labels drawn from the model. A row is drawn with
probability proportional to its weight in the segment (learning rate x clip factor / items of its batch, summed over
visits), so the scale is one number: `1 / sqrt(number of loss items in the whole sample)`.

`S` has one column per parameter and is never held whole: `matrices` gives the columns of a group of parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ..gradients.rows import Pass, RowGradients, as_rows
from ..gradients.rules import Call, Rule
from ..gradients.signs import curvature_task
from ..gradients.task import task_labels
from .columns import Columns, Narrowed


def systematic_sample(weights: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` row numbers drawn with expected counts proportional to `weights`.

    Systematic sampling in random order: a row's count is its expected count rounded up or down, so a sample as large
    as the data set holds every equally weighted row once.

    Args:
        weights: non-negative, float `[rows]`.
        size: number of draws.
        seed: of the random order and the offset.

    Returns:
        int64 `[size]`, sorted.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(weights))
    edges = np.cumsum(weights[order] / weights.sum()) * size
    points = np.arange(size) + generator.uniform()
    positions = np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1)
    return np.sort(order[positions])


class FisherSample:
    """Gradients of sampled-label losses on a fixed list of batches.

    Args:
        gradients: engine at the segment's weights.
        batches: model inputs; the samples are their rows in order.
        seed: of the label draws. Labels are drawn once and reused, so every pass sees the same `S`.
        objective_scale: the objective that was trained over the mean loss per item, if the losses were divided by
            another number than that of their items.
        entering: batch number -> what to do before that batch and those after it, where a sample is spread over
            several weights: put them into the model. The first batch has to be among them, if there is any.
        probes: `"labels"` or `"signs"`; see `gradients/signs.py`.
        dtype: that factored columns are held in; that of the gradients by default.
    """

    def __init__(
        self,
        gradients: RowGradients,
        batches: Sequence[dict[str, torch.Tensor]],
        seed: int = 0,
        objective_scale: float = 1.0,
        entering: Mapping[int, Callable[[], None]] | None = None,
        probes: str = "labels",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.entering = entering or {}
        self.dtype = dtype
        self.batches = batches
        self.gradients = gradients.with_task(curvature_task(gradients.task, probes))
        labels = [task_labels(self.gradients.task, batch) for batch in batches]
        self.size = sum(map(len, labels))
        items = sum(int(gradients.task.num_items(part).sum()) for part in labels)
        self.objective_scale = objective_scale
        self.scale = (objective_scale / max(items, 1)) ** 0.5
        self.num_passes = 0
        self._labels: list[torch.Tensor | None] = [None] * len(batches)
        self._generator = torch.Generator().manual_seed(seed)

    def passes(self, names: Iterable[str]) -> Iterator[tuple[slice, Pass]]:
        """Forward and backward over every batch; yields the sample numbers and the finished pass."""
        self.num_passes += 1
        start = 0
        for index, batch in enumerate(self.visit()):
            labels = self._labels[index]
            done = self.gradients.run(batch, names, labels, self._generator if labels is None else None)
            self._labels[index] = done.labels
            yield slice(start, start + done.num_rows), done
            start += done.num_rows

    def stream(
        self,
        names: Iterable[str],
        consume: Callable[[str, slice, Rule, Call], None],
        consume_rows: Callable[[str, slice, torch.Tensor], None],
    ) -> None:
        """Forward and backward over every batch; each call is used as soon as its gradient is there.

        Args:
            names: parameters wanted.
            consume: called with a name, sample numbers, and one of the calls that the gradients are the sum of.
            consume_rows: called with a name, sample numbers and their gradients, where no rule fits.
        """
        self.num_passes += 1
        start = 0
        for index, batch in enumerate(self.visit()):
            labels, first = self._labels[index], start
            done = self.gradients.stream(
                batch,
                names,
                lambda name, rule, call, rows, first=first: consume(name, slice(first, first + rows), rule, call),
                lambda name, rows, grads, first=first: consume_rows(
                    name, slice(first + rows.start, first + rows.stop), grads
                ),
                labels,
                self._generator if labels is None else None,
            )
            self._labels[index] = done.labels
            start += done.num_rows

    @property
    def _sequences(self) -> int:
        return getattr(self.gradients.task, "sequences_per_row", 1)

    @property
    def num_tokens(self) -> int | None:
        """Tokens of all samples, padding included; `None` for inputs that are not tokens."""
        inputs = [batch.get("input_ids") for batch in self.batches]
        if any(ids is None or ids.dim() != 2 for ids in inputs) or self._sequences != 1:
            return None
        return sum(ids.numel() for ids in inputs)

    def tokens_of(self, name: str) -> int | None:
        """Tokens of all samples that a parameter meets; `None` if that is not known beforehand."""
        return self.size if self.num_tokens is None and name in self.gradients.single else self.num_tokens

    def columns(self, names: Sequence[str], piece_bytes: int = 2**28) -> dict[str, Columns]:
        """Columns of `S` that belong to the named parameters, held as what takes less.

        Args:
            names: of the parameters.
            piece_bytes: dense columns that are made at once of what is held.
        """
        parameters = self.gradients.parameters
        narrow = None if self.dtype is None else Narrowed(self.dtype)
        result = {name: Columns(self.size, parameters[name], self.scale, piece_bytes, narrow) for name in names}
        last = None

        def add(name: str, samples: slice, rule: Rule, call: Call) -> None:
            nonlocal last
            if narrow is not None and samples != last:
                narrow.forget()
            last = samples
            result[name].add(samples, rule, call)

        self.stream(names, add, lambda name, samples, grads: result[name].add_rows(samples, grads))
        if narrow is not None:
            narrow.forget()
        return result

    def visit(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches, each while the model has the weights that belong to it."""
        for index, batch in enumerate(self.batches):
            if index in self.entering:
                self.entering[index]()
            yield batch

    def matrices(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Columns of `S` that belong to the named parameters: name -> `[samples, *parameter.shape]`."""
        result = {}
        for name in names:
            parameter = self.gradients.parameters[name]
            result[name] = parameter.new_empty((self.size, *parameter.shape))
        for samples, done in self.passes(names):
            for name, rows, grads in self.gradients.blocks(done, names):
                torch.mul(grads, self.scale, out=result[name][samples][rows])
        return result

    def combine(self, coefficients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`S^T C`, each parameter with its own `C`, by one weighted pass that stores no `S`.

        Args:
            coefficients: name -> `C`, `[samples, vectors]`.

        Returns:
            name -> `[vectors, *parameter.shape]`.
        """
        result = {}
        for samples, done in self.passes(coefficients):
            for name, rows, grads in self.gradients.blocks(done, coefficients):
                part = combine(grads, coefficients[name][samples][rows] * self.scale)
                result[name] = part if name not in result else result[name].add_(part)
        return result


def combine(columns: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """`S^T C` of one parameter: `[samples, *shape]` and `[samples, vectors]` to `[vectors, *shape]`."""
    flat = coefficients.T.to(columns) @ as_rows(columns)
    return flat.view(-1, *columns.shape[1:])
