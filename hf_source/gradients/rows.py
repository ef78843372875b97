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
"""Per-row gradients of every wanted parameter of a model, one parameter at a time.

One forward and one backward pass over a batch give, for each module, what went in and the gradient that came back
(`rules.py`). No parameter gradient is computed by autograd on the way, and a parameter's per-row gradients exist only
while they are used. Before the first use each rule is compared with autograd on real rows; a parameter whose module
has no rule, or whose rule does not agree (weights used outside their module, unusual layouts), is handled by one
backward pass per row instead: slower, never silently left out.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import UnsupportedError
from .rules import Call, Rule, rules_for
from .task import Batch, Task, task_labels


logger = logging.getLogger(__name__)

# Rounding of a float32 forward+backward is about 1e-6 relative; a wrong rule is wrong by order one.
_RULE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass
class Use:
    """One place where a parameter enters the model; a tied weight has several."""

    module: nn.Module
    rule: Rule


@dataclass
class Pass:
    """A finished forward and backward pass: losses, the labels that made them, and the captured calls."""

    batch: Batch
    labels: torch.Tensor  # [rows, tokens]
    losses: torch.Tensor  # [rows], nats
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.losses)


class RowGradients:
    """Gradients of each row's summed loss with respect to each wanted parameter.

    Args:
        model: the model, in evaluation mode at the weights where gradients are taken.
        task: what defines a row's loss.
        names: parameters wanted, as in `model.named_parameters()`; they need not be trainable.
        max_block_bytes: largest per-row gradient block held at once; longer blocks come in slices of rows.
    """

    def __init__(self, model: nn.Module, task: Task, names: Sequence[str], max_block_bytes: int = 256 * 2**20) -> None:
        parameters = dict(model.named_parameters())
        missing = [name for name in names if name not in parameters]
        if missing:
            raise UnsupportedError(
                f"The model has no parameter {missing[0]!r} ({len(missing)} are missing): it is not the model that "
                "was recorded. Pass the recorded architecture with `model=`."
            )
        self.model = model.eval()
        self.task = task
        self.parameters = {name: parameters[name] for name in names}
        self.max_block_bytes = max_block_bytes
        self.uses = {name: self._uses_of(parameter) for name, parameter in self.parameters.items()}
        self.fallback = {name for name, uses in self.uses.items() if uses is None}
        self.checked = False

    @property
    def vocabulary(self) -> set[str]:
        """Parameters whose first axis is a vocabulary: embedding tables, and heads tied to them."""
        tables = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        return {name for name, parameter in self.parameters.items() if id(parameter) in tables}

    def _uses_of(self, parameter: nn.Parameter) -> list[Use] | None:
        uses = []
        for module in self.model.modules():
            for attribute, own in module._parameters.items():
                if own is parameter:
                    rule = rules_for(module).get(attribute)
                    if rule is None:
                        return None
                    uses.append(Use(module, rule))
        return uses

    def with_task(self, task: Task) -> "RowGradients":
        """The same engine, its rules already checked, for another loss of the same outputs."""
        other = copy.copy(self)
        other.task = task
        return other

    def only(self, names: Iterable[str]) -> "RowGradients":
        """The same engine, its rules already checked, for some of its parameters."""
        other = copy.copy(self)
        other.parameters = {name: self.parameters[name] for name in names}
        return other

    def run(self, batch: Batch, names: Iterable[str] | None = None, labels: torch.Tensor | None = None,
            generator: torch.Generator | None = None) -> Pass:  # fmt: skip
        """Forward and backward over a batch.

        Args:
            batch: model inputs and `labels`, on the model's device.
            names: parameters whose blocks will be asked for (all by default).
            labels: used instead of the batch's own labels.
            generator: if given, labels are drawn from the model's predictions (for the Fisher).
        """
        given = task_labels(self.task, batch) if labels is None else labels
        return next(self._passes(batch, given, names, [generator]))

    def draws(self, batch: Batch, generators: Sequence[torch.Generator]) -> Iterator[Pass]:
        """A pass for each generator, with labels drawn from the model's predictions: one forward for all of them."""
        return self._passes(batch, task_labels(self.task, batch), None, generators)

    def _passes(
        self,
        batch: Batch,
        given: torch.Tensor,
        names: Iterable[str] | None,
        generators: Sequence[torch.Generator | None],
    ) -> Iterator[Pass]:
        names = list(self.parameters if names is None else names)
        modules = {use.module for name in names if name not in self.fallback for use in self.uses[name]}
        with self._captured(modules, len(given) * getattr(self.task, "sequences_per_row", 1)) as calls:
            with torch.enable_grad():
                outputs = self.task.forward(self.model, batch)
        made = [call for module in calls for call in calls[module]]
        for position, generator in enumerate(generators):
            labels = given
            if generator is not None:
                labels = self.task.sample_labels(outputs.detach(), given, generator)
            with torch.enable_grad():
                losses = self.task.row_losses(outputs, labels)
            calls = self._backward(losses, made, keep=position < len(generators) - 1)
            yield Pass(batch, labels, losses.detach(), calls)

    @staticmethod
    def _backward(losses: torch.Tensor, made: Sequence[Call], keep: bool) -> dict[nn.Module, list[Call]]:
        """The calls with the gradients that came back; those that had no part in the loss are left out."""
        found: dict[nn.Module, list[Call]] = {}
        if not made:
            return found
        grads = torch.autograd.grad(losses.sum(), [call.output for call in made], retain_graph=keep, allow_unused=True)
        for call, grad in zip(made, grads, strict=True):
            if grad is not None:  # None for DoRA's look at its own weights, whatever its layout
                found.setdefault(call.module, []).append(Call(call.module, call.input, call.output.detach(), grad))
        return found

    def blocks(self, done: Pass, names: Iterable[str] | None = None) -> Iterator[tuple[str, slice, torch.Tensor]]:
        """Per-row gradients of one parameter after another.

        Yields:
            name, slice of the batch's rows, gradients `[rows in the slice, *parameter.shape]`.
        """
        names = list(self.parameters if names is None else names)
        slow = [name for name in names if name in self.fallback or not self._fits(name, done)]
        for name in names:
            if name in slow:
                continue
            parameter = self.parameters[name]
            step = max(1, int(self.max_block_bytes // max(1, parameter.numel() * parameter.element_size())))
            for start in range(0, done.num_rows, step):
                rows = slice(start, min(start + step, done.num_rows))
                yield name, rows, self._block(name, done, rows)
        yield from self._fallback_blocks(done, slow)

    def calls(self, name: str, done: Pass) -> list[tuple[Rule, Call]] | None:
        """The calls of a pass that a parameter's gradient is the sum of, with their rules; `None` if no rule holds."""
        if name in self.fallback or not self._fits(name, done):
            return None
        return [(use.rule, call) for use in self.uses[name] for call in done.calls.get(use.module, ())]

    def _fits(self, name: str, done: Pass) -> bool:
        """Whether calls without a row axis hold each row's tokens, or one vector a row, as the check saw it.

        An expert that was routed every token of the checked rows may be routed a part of them here.
        """
        calls = [call for use in self.uses[name] for call in done.calls.get(use.module, ())]
        return all(call.grad.dim() != 2 or len(call.grad) in (done.num_rows, done.labels.numel()) for call in calls)

    def _block(self, name: str, done: Pass, rows: slice) -> torch.Tensor:
        count = rows.stop - rows.start
        result = None
        for use in self.uses[name]:
            for call in done.calls.get(use.module, ()):
                part = use.rule(_rows_of(call, rows, done.num_rows), count)
                result = part if result is None else result.add_(part)
        if result is None:  # the module was never called: the parameter had no part in the loss
            parameter = self.parameters[name]
            result = parameter.new_zeros((count, *parameter.shape))
        return result

    def _fallback_blocks(self, done: Pass, names: Sequence[str]) -> Iterator[tuple[str, slice, torch.Tensor]]:
        if not names:
            return
        for row in range(done.num_rows):
            for name, grad in self._autograd_row(done.batch, done.labels, row, names).items():
                yield name, slice(row, row + 1), grad[None]

    def _autograd_row(
        self, batch: Batch, labels: torch.Tensor, row: int, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Gradients of one row alone, by autograd."""
        one = {key: value[row : row + 1] for key, value in batch.items()}
        parameters = [self.parameters[name] for name in names]
        with self._requiring_grad(parameters), torch.enable_grad():
            losses = self.task.row_losses(self.task.forward(self.model, one), labels[row : row + 1])
            grads = [None] * len(parameters)
            if losses.requires_grad:  # not so if the row uses none of them, as an expert that it is not routed to
                grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if grad is None else grad
            for name, parameter, grad in zip(names, parameters, grads, strict=True)
        }

    def check(self, batch: Batch) -> None:
        """Compare every rule with autograd on one row of the batch, taken alone; disagreeing ones go to the fallback.

        The row is the one with most loss items. Give at least two rows: what a rule gets wrong by mixing rows shows
        only then.

        Raises:
            UnsupportedError: if a gradient is not finite, or no row has a loss item to check with.
        """
        self.checked = True
        names = list(self.parameters)
        labels = task_labels(self.task, batch)
        items = self.task.num_items(labels)
        if not items.any():
            raise UnsupportedError(
                "No row of the batch has a loss item (a label after its first token): nothing to check with."
            )
        row = int(items.argmax())
        truth = self._autograd_row(batch, labels, row, names)
        scale = max(float(grad.norm()) for grad in truth.values()) if truth else 0.0
        if not torch.isfinite(torch.tensor(scale)):
            raise UnsupportedError("The model's gradient is not finite on a training row: check the recorded weights.")
        try:
            done = self.run(batch)
        except RuntimeError as error:  # a layout that no rule foresaw
            logger.warning("per-row rules do not fit this model (%s); using one backward pass per row", error)
            self.fallback = set(names)
            return
        tolerance = _RULE_TOLERANCE.get(next(iter(truth.values())).dtype, 2e-2)
        for name in names:
            # Key biases of attention have a gradient that is zero but for rounding: measure against the model's too.
            size = max(float(truth[name].norm()), 1e-4 * scale)
            if name not in self.fallback and not self._rule_holds(name, done, row, truth[name], tolerance * size):
                logger.warning("parameter %s: no per-row rule fits, using one backward pass per row for it", name)
                self.fallback.add(name)

    def _rule_holds(self, name: str, done: Pass, row: int, truth: torch.Tensor, tolerance: float) -> bool:
        if not truth.any():
            # Zeros agree with anything. Trust only the layout that rules are made for, `[rows, tokens, features]`: an
            # expert that saw no token of these rows was not called at all, and will see a part of others' tokens.
            calls = [call for use in self.uses[name] for call in done.calls.get(use.module, ())]
            if not calls or any(call.grad.dim() < 3 or len(call.grad) != done.num_rows for call in calls):
                return False
        try:
            got = self._block(name, done, slice(row, row + 1))[0]
        except (RuntimeError, TypeError):  # a layout that the rule did not foresee, or a module with more inputs
            return False
        return float((got - truth).norm()) <= tolerance

    @contextmanager
    def _captured(self, modules: Iterable[nn.Module], sequences: int) -> Iterator[dict[nn.Module, list[Call]]]:
        """Record calls of the modules. All parameters are frozen meanwhile; outputs carry the gradient instead."""
        calls: dict[nn.Module, list[Call]] = {}

        def expand(module: nn.Module, args: tuple) -> tuple | None:
            # Position ids come as [1, tokens] for the whole batch; per row, each needs its own gradient.
            if args and args[0].dim() == 2 and args[0].shape[0] == 1 and sequences > 1:
                return (args[0].expand(sequences, -1), *args[1:])
            return None

        def record(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            if not isinstance(output, torch.Tensor):  # several outputs: no rule for that, which `check` will find
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_(True).view_as(output)
            inputs = args[0] if args else next(iter(kwargs.values()))
            calls.setdefault(module, []).append(Call(module, inputs.detach(), output))
            return output

        handles = []
        for module in modules:
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_pre_hook(expand))
            handles.append(module.register_forward_hook(record, with_kwargs=True))
        try:
            with self._requiring_grad(()):
                yield calls
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _requiring_grad(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Only these parameters require a gradient."""
        wanted = {id(parameter) for parameter in parameters}
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        try:
            yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)


def _rows_of(call: Call, rows: slice, num_rows: int) -> Call:
    """The part of a call that belongs to a slice of the batch's rows."""
    if rows.start == 0 and rows.stop == num_rows:
        return call

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(num_rows, -1, *tensor.shape[1:])[rows].flatten(0, 1)

    return Call(call.module, cut(call.input), call.output, cut(call.grad))


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[count, *shape]` as `[count, size]`; `flatten(1)` refuses a scalar parameter's `[count]`."""
    return tensor.reshape(len(tensor), -1)


Vectors = Mapping[str, torch.Tensor]
"""Several vectors over parameters: name -> `[vectors, *parameter.shape]`."""
