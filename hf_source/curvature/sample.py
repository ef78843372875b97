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
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from ..budget import NotEnoughMemoryError, Parts, give_back, why_out_of_memory
from ..gradients.rows import Pass, RowGradients, as_rows
from ..gradients.rules import Call, Rule
from ..gradients.signs import curvature_task
from ..gradients.task import batch_rows, task_labels
from .columns import Columns, Narrowed


Result = TypeVar("Result")


class TornPassError(NotEnoughMemoryError):
    """Memory ran out in the middle of a pass whose first results were used already.

    Args:
        why: what the failed allocation said.
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"Out of memory in a pass over the sample ({why}). Lower max_tokens_per_batch=.")
        self.why = why


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
        self._parts = Parts()
        self._part = 0  # rows that went through the model last

    def passes(self, names: Iterable[str]) -> Iterator[tuple[slice, Pass]]:
        """Forward and backward over every batch; yields the sample numbers and the finished pass."""
        names, start = list(names), 0
        self.num_passes += 1
        for index, batch in enumerate(self.visit()):
            run = lambda rows, index=index: self._run(index, rows, self.gradients.run, names)  # noqa: E731
            for rows, done in self._parts(run, range(len(task_labels(self.gradients.task, batch)))):
                yield slice(start + rows.start, start + rows.stop), done
                done.calls.clear()  # whoever still holds the pass does not hold what went through the model
            start += rows.stop

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

        Raises:
            TornPassError: if memory ran out when a part of a batch had been used already.
        """
        self.num_passes += 1
        names, start = list(names), 0

        def run(index: int, first: int, rows: range) -> None:
            used = False

            def of_call(name: str, rule: Rule, call: Call, count: int) -> None:
                nonlocal used
                used = True
                consume(name, slice(first + rows.start, first + rows.start + count), rule, call)

            def of_rows(name: str, own: slice, grads: torch.Tensor) -> None:
                nonlocal used
                used = True
                offset = first + rows.start
                consume_rows(name, slice(offset + own.start, offset + own.stop), grads)

            try:
                self._run(index, rows, self.gradients.stream, names, of_call, of_rows)
            except Exception as error:
                why = why_out_of_memory(error)
                if why is None or not used:
                    raise
            else:
                return
            raise TornPassError(why)

        for index, batch in enumerate(self.visit()):
            rows = range(len(task_labels(self.gradients.task, batch)))
            for _ in self._parts(partial(run, index, start), rows):
                pass
            start += len(rows)

    def _run(self, index: int, rows: range, run: Callable[..., Pass], *args: Any) -> Pass:
        """Some rows of a batch through the model, with the labels that were drawn, or are drawn now."""
        self._part = len(rows)
        batch = self.batches[index]
        given, before = task_labels(self.gradients.task, batch), self._generator.get_state()
        try:
            if self._labels[index] is None and len(rows) < len(given):
                self._labels[index] = self._draw(batch, given)
            labels = self._labels[index]
            if labels is not None:
                return run(batch_rows(batch, rows), *args, labels=labels[rows.start : rows.stop])
            done = run(batch, *args, generator=self._generator)
        except Exception:
            if self._labels[index] is None:  # drawn for nothing
                self._generator.set_state(before)
            raise
        self._labels[index] = done.labels
        return done

    @torch.no_grad()
    def _draw(self, batch: dict[str, torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        """Labels of a whole batch that has to go through the model in parts: the same as if it went at once."""
        task, model = self.gradients.task, self.gradients.model
        forward = lambda rows: task.forward(model, batch_rows(batch, rows)).cpu()  # noqa: E731
        outputs = torch.cat([found for _, found in self._parts(forward, range(len(given)))])
        return task.sample_labels(outputs, given.cpu(), self._generator).to(given.device)

    def anew(self, compute: Callable[[], Result]) -> Result:
        """What passes give, all over again with half the rows at once where memory runs out while they are used.

        Args:
            compute: makes the passes, and uses them in a way that leaves nothing behind when it fails.

        Raises:
            NotEnoughMemoryError: if memory does not suffice for one row.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                why = error.why if isinstance(error, TornPassError) else why_out_of_memory(error)
                if why is None:
                    raise
            self._parts.halve(self._part, why)

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
        return self.anew(lambda: self._columns(list(names), piece_bytes))

    def _columns(self, names: list[str], piece_bytes: int) -> dict[str, Columns]:
        parameters = self.gradients.parameters
        narrow = None if self.dtype is None else Narrowed(self.dtype)
        result = {name: Columns(self.size, parameters[name], self.scale, piece_bytes, narrow) for name in names}
        last = None

        def add(name: str, samples: slice, rule: Rule, call: Call) -> None:
            nonlocal last
            if samples != last:
                if narrow is not None:
                    narrow.forget()
                give_back(now=False)
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
        return self.anew(lambda: self._matrices(list(names)))

    def _matrices(self, names: list[str]) -> dict[str, torch.Tensor]:
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
        return self.anew(lambda: self._combine(coefficients))

    def _combine(self, coefficients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
