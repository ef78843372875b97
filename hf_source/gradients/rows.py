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
(`rules.py`, `convolutions.py`). No parameter gradient is computed by autograd on the way, and a parameter's per-row
gradients exist only while they are used. Before the first use each rule is compared with autograd on real rows. A
parameter whose module has no rule, or whose rule does not agree (weights used outside their module), is told from
running the smallest module around it again that does agree (`recompute.py`); where none does (unusual layouts), by one
backward pass per row through the whole model: slower, never silently left out.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..budget import is_out_of_memory
from ..errors import UnsupportedError
from .convolutions import channel_rules, mixes_rows
from .recompute import NotByRow, cut, recomputed, tensors_of
from .rerun import Rerun, leaves_of, with_grads
from .rules import Call, Rule, rules_for
from .task import Batch, Task, task_labels


if TYPE_CHECKING:
    from .shards import Shards

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

    Attributes:
        around: parameters without a rule that holds -> the module that is run again for them.
        fallback: parameters that take a backward pass per row.
        single: parameters that meet one vector of each row, as the check saw, so that gradients are outer products.
        vocabulary: parameters whose first axis is a vocabulary: embedding tables, and heads tied to them.
        shards: processes that hold the model between them, if they do; `parameters` are then shapes alone.
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
        self.fallback: set[str] = set()
        self.around: dict[str, str] = {}
        for name, uses in self.uses.items():
            if uses is None:
                self._leave_rules(name, next(iter(self._modules_around(name)), None))
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self.vocabulary = {name for name, parameter in self.parameters.items() if id(parameter) in tables}
        self.checked = False
        self.single: set[str] = set()
        self.shards: Shards | None = None

    def _uses_of(self, parameter: nn.Parameter) -> list[Use] | None:
        uses = []
        for module in self.model.modules():
            for attribute, own in module._parameters.items():
                if own is parameter:
                    rule = (rules_for(module) or channel_rules(module)).get(attribute)
                    if rule is None:
                        return None
                    uses.append(Use(module, rule))
        return uses

    def _modules_around(self, name: str) -> list[str]:
        """Modules that hold all uses of a parameter, from the smallest on, without the model itself."""
        wanted = self.parameters[name]
        paths = [key for key, own in self.model.named_parameters(remove_duplicate=False) if own is wanted]
        shared = os.path.commonprefix([path.split(".")[:-1] for path in paths])
        return [".".join(shared[:length]) for length in range(len(shared), 0, -1)]

    def _leave_rules(self, name: str, around: str | None) -> None:
        """Tell a parameter from running a module again, or by the fallback."""
        self.around.pop(name, None)
        if around is None:
            self.fallback.add(name)
        else:
            self.around[name] = around

    def ruled(self, name: str) -> bool:
        """Whether rules give the parameter's gradient."""
        return name not in self.fallback and name not in self.around

    def rules(self, name: str) -> list[Rule] | None:
        """The rules of a parameter's uses; `None` if they do not give its gradient."""
        return [use.rule for use in self.uses[name]] if self.ruled(name) else None

    def _modules_for(self, name: str) -> list[nn.Module]:
        """The modules whose calls tell the parameter's gradient."""
        if name in self.around:
            return [self.model.get_submodule(self.around[name])]
        return [use.module for use in self.uses[name] or ()] if self.ruled(name) else []

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
        with self._whole_batches():
            return next(self._passes(batch, given, names, [generator]))

    def _whole_batches(self) -> AbstractContextManager:
        return nullcontext() if self.shards is None else self.shards.whole_batches()

    def stream(
        self,
        batch: Batch,
        names: Iterable[str],
        consume: Callable[[str, Rule, Call, int], None],
        consume_rows: Callable[[str, slice, torch.Tensor], None],
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Pass:
        """Forward and backward, each module's call being used as soon as its gradient is there and then let go.

        Args:
            batch, labels, generator: see `run`.
            names: parameters wanted.
            consume: called with a name, the rule of one of the calls that its gradient is the sum of, that call, and
                the number of rows.
            consume_rows: called with blocks (see `blocks`) of the parameters that no rule fits.

        Returns:
            The pass, without the calls that were consumed.
        """
        asked = set(names)
        names = [name for name in self.parameters if name in asked]  # one order, so that sums round in one way
        given = task_labels(self.task, batch) if labels is None else labels
        modules = {module for name in names for module in self._modules_for(name)}
        sequences = len(given) * getattr(self.task, "sequences_per_row", 1)
        with self._whole_batches(), Rerun(self.model) as rerun, self._captured(modules, sequences, rerun) as calls:
            with torch.enable_grad():
                outputs = self.task.forward(self.model, batch)
            if generator is not None:
                given = self.task.sample_labels(outputs.detach(), given, generator)
            with torch.enable_grad():
                losses = self.task.row_losses(outputs, given)
            del outputs
            done = Pass(batch, given, losses.detach())
            made = {**calls, **rerun.shapes}
            streamed = [name for name in names if self.ruled(name) and self._will_fit(name, done, made)]
            del made
            wanted: dict[nn.Module, list[tuple[str, Rule]]] = {}
            for name in streamed:
                for use in self.uses[name]:
                    wanted.setdefault(use.module, []).append((name, use.rule))

            def arrived(call: Call, grad: torch.Tensor) -> None:
                finished = call.with_tensors(call.input, grad.detach())
                for name, rule in wanted[call.module]:
                    consume(name, rule, finished, done.num_rows)

            def watch(calls: Mapping[nn.Module, list[Call]]) -> None:
                for module in wanted:
                    for call in calls.get(module, ()):
                        call.outputs[0].register_hook(partial(arrived, call.with_tensors(call.input, None)))

            watch(calls)
            kept = {module for name in names if name not in streamed for module in self._modules_for(name)}
            rerun.go_back(watch, kept)
            of_kept = [call for module in kept for call in calls.pop(module, ())]
            done.calls = self._backward(losses, of_kept, False, leaves_of(losses))
            for module, own in rerun.kept.items():
                done.calls.setdefault(module, []).extend(own)
        rest = [name for name in names if name not in streamed]
        for name, rows, grads in self.blocks(done, rest):
            consume_rows(name, rows, grads)
        return done

    def _will_fit(self, name: str, done: Pass, calls: Mapping[nn.Module, list[Call]]) -> bool:
        """Whether `_fits` will hold once gradients, which have the shapes of outputs, are there."""
        sizes = (done.num_rows, done.labels.numel())
        own = [call.outputs for module in self._modules_for(name) for call in calls.get(module, ())]
        return all(len(each) == 1 and (each[0].dim() != 2 or len(each[0]) in sizes) for each in own)

    def draws(self, batch: Batch, generators: Sequence[torch.Generator]) -> Iterator[Pass]:
        """A pass for each generator, with labels drawn from the model's predictions: one forward for all of them."""
        return self._passes(batch, task_labels(self.task, batch), None, generators)

    def _passes(
        self,
        batch: Batch,
        given: torch.Tensor,
        names: Iterable[str] | None,
        generators: Sequence[torch.Generator | None],
        also: Iterable[nn.Module] = (),
    ) -> Iterator[Pass]:
        names = list(self.parameters if names is None else names)
        modules = {module for name in names for module in self._modules_for(name)} | set(also)
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
            leaves = () if self.shards is None else leaves_of(losses)  # through every layer, as the others go
            calls = self._backward(losses, made, position < len(generators) - 1, leaves)
            yield Pass(batch, labels, losses.detach(), calls)

    @staticmethod
    def _backward(
        losses: torch.Tensor, made: Sequence[Call], keep: bool, leaves: Sequence[torch.Tensor] = ()
    ) -> dict[nn.Module, list[Call]]:
        """The calls with the gradients that came back; those that had no part in the loss are left out."""
        found: dict[nn.Module, list[Call]] = {}
        outputs = [output for call in made for output in call.outputs if output.requires_grad]
        if not outputs and not (leaves and losses.requires_grad):
            return found
        # Down to the leaves too: what is on the way there calls its hooks.
        grads = torch.autograd.grad(losses.sum(), [*outputs, *leaves], retain_graph=keep, allow_unused=True)
        for call in with_grads(made, grads):
            found.setdefault(call.module, []).append(call)
        return found

    def blocks(self, done: Pass, names: Iterable[str] | None = None) -> Iterator[tuple[str, slice, torch.Tensor]]:
        """Per-row gradients of one parameter after another.

        Yields:
            name, slice of the batch's rows, gradients `[rows in the slice, *parameter.shape]`.
        """
        names = list(self.parameters if names is None else names)
        slow = [name for name in names if name in self.fallback or not self._fits(name, done)]
        groups: dict[str, list[str]] = {}
        for name in names:
            if name in slow:
                continue
            if name in self.around:
                groups.setdefault(self.around[name], []).append(name)
                continue
            for rows in self._slices([name], done):
                yield name, rows, self._block(name, done, rows)
        for path, group in groups.items():
            yield from self._recomputed_blocks(done, path, group)
        yield from self._fallback_blocks(done, slow)

    def _slices(self, names: Sequence[str], done: Pass) -> Iterator[slice]:
        """Slices of the batch's rows whose gradients of these parameters may be held at once."""
        size = sum(self.parameters[name].numel() * self.parameters[name].element_size() for name in names)
        step = max(1, int(self.max_block_bytes // max(1, size)))
        for start in range(0, done.num_rows, step):
            yield slice(start, min(start + step, done.num_rows))

    def _recomputed_blocks(self, done: Pass, path: str, names: Sequence[str]):
        """Blocks of parameters for which a module is run again, once for all of them."""
        for rows in self._slices(names, done):
            try:
                found = self._recomputed(done, path, names, rows)
            except NotByRow as error:
                logger.warning("%s; using one backward pass per row for this batch", error)
                yield from self._fallback_blocks(done, names, start=rows.start)
                return
            for name, grads in found.items():
                yield name, rows, grads

    def _recomputed(self, done: Pass, path: str, names: Sequence[str], rows: slice) -> dict[str, torch.Tensor]:
        count = rows.stop - rows.start
        local = {name: name[len(path) + 1 :] for name in names}
        found = {name: self.parameters[name].new_zeros((count, *self.parameters[name].shape)) for name in names}
        for call in done.calls.get(self.model.get_submodule(path), ()):
            parts = recomputed(call, rows, done.num_rows, list(local.values()))
            for name in names:
                found[name] += parts[local[name]]
        return found

    def calls(self, name: str, done: Pass) -> list[tuple[Rule, Call]] | None:
        """The calls of a pass that a parameter's gradient is the sum of, with their rules; `None` if no rule holds."""
        if not self.ruled(name) or not self._fits(name, done):
            return None
        return [(use.rule, call) for use in self.uses[name] for call in done.calls.get(use.module, ())]

    def _calls_of(self, name: str, done: Pass) -> list[Call]:
        return [call for module in self._modules_for(name) for call in done.calls.get(module, ())]

    def _fits(self, name: str, done: Pass) -> bool:
        """Whether calls without a row axis hold each row's tokens, or one vector a row, as the check saw it.

        An expert that was routed every token of the checked rows may be routed a part of them here.
        """
        vectors = done.num_rows * getattr(self.task, "sequences_per_row", 1)
        sizes = (done.num_rows, vectors, done.labels.numel())
        return all(call.grad.dim() != 2 or len(call.grad) in sizes for call in self._calls_of(name, done))

    def _block(self, name: str, done: Pass, rows: slice) -> torch.Tensor:
        count = rows.stop - rows.start
        result = None
        for use in self.uses[name]:
            for call in done.calls.get(use.module, ()):
                part = use.rule(cut(call, rows, done.num_rows), count)
                result = part if result is None else result.add_(part)
        if result is None:  # the module was never called: the parameter had no part in the loss
            parameter = self.parameters[name]
            result = parameter.new_zeros((count, *parameter.shape))
        return result

    def _fallback_blocks(
        self, done: Pass, names: Sequence[str], start: int = 0
    ) -> Iterator[tuple[str, slice, torch.Tensor]]:
        for row in range(start, done.num_rows if names else start):
            for name, grad in self._autograd_row(done.batch, done.labels, row, names).items():
                yield name, slice(row, row + 1), grad[None]

    def _autograd_row(
        self, batch: Batch, labels: torch.Tensor, row: int, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Gradients of one row alone, by autograd."""
        if self.shards is not None:
            raise UnsupportedError(
                f"A batch came back from the module of {names[0]!r} in a layout that is unknown, and its weights are "
                "on other processes: hold the model whole on each (shard_model=False)."
            )
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
        """Compare every rule with autograd on one row of the batch, taken alone.

        A parameter whose rule disagrees is told from the smallest module around it that agrees when it is run again,
        and goes to the fallback if there is none. The row is the one with most loss items. Give at least two rows:
        what a rule gets wrong by mixing rows shows only then.

        Raises:
            UnsupportedError: if a gradient is not finite, no row has a loss item to check with, or a module mixes
                rows.
        """
        self.checked = True
        self._refuse_mixing()
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
        candidates = {name: self._modules_around(name) for name in names}
        modules = {self.model.get_submodule(path) for paths in candidates.values() for path in paths}
        try:
            done = next(self._passes(batch, labels, names, [None], modules))
        except RuntimeError as error:  # a layout that no rule foresaw
            if is_out_of_memory(error):
                raise
            logger.warning("per-row rules do not fit this model (%s); using one backward pass per row", error)
            self.around, self.fallback = {}, set(names)
            return
        relative = _RULE_TOLERANCE.get(next(iter(truth.values())).dtype, 2e-2)
        for name in names:
            # Key biases of attention have a gradient that is zero but for rounding: measure against the model's too.
            tolerance = relative * max(float(truth[name].norm()), 1e-4 * scale)
            if name not in self.fallback and not (self.ruled(name) and self._holds(name, done, row, truth, tolerance)):
                self._look_around(name, candidates[name], done, row, truth, tolerance)
        self.single = {name for name in names if self.ruled(name) and self._vectors(name, done) == done.num_rows}

    def _vectors(self, name: str, done: Pass) -> int:
        """How many vectors of the batch a parameter meets."""
        return sum(call.grad.numel() // call.grad.shape[-1] for call in self._calls_of(name, done))

    def _refuse_mixing(self) -> None:
        for path, module in self.model.named_modules():
            if mixes_rows(module):
                raise UnsupportedError(
                    f"The module `{path}` is a {type(module).__name__} without running statistics: its output for a "
                    "row depends on the rest of the batch, so a row has no loss of its own. Replace it by LayerNorm "
                    "or GroupNorm."
                )

    def _look_around(self, name, candidates, done, row, truth, tolerance) -> None:
        """Find the smallest module that tells the parameter's gradient when it is run again."""
        for path in candidates:
            self._leave_rules(name, path)
            if self._holds(name, done, row, truth, tolerance):
                logger.info("parameter %s: no per-row rule fits, running %s again for it", name, path)
                return
        logger.warning("parameter %s: no per-row rule fits, using one backward pass per row for it", name)
        self._leave_rules(name, None)

    def _holds(self, name: str, done: Pass, row: int, truth: Mapping[str, torch.Tensor], tolerance: float) -> bool:
        calls = self._calls_of(name, done)
        # Zeros agree with anything. Trust only the layout that rules are made for, `[rows, tokens, features]`: an
        # expert that saw no token of these rows was not called at all, and will see a part of others' tokens.
        layout = calls and all(call.grad.dim() >= 3 and len(call.grad) == done.num_rows for call in calls)
        if not truth[name].any() and not layout:
            return False
        rows = slice(row, row + 1)
        try:
            if name in self.around:
                got = self._recomputed(done, self.around[name], [name], rows)[name][0]
            else:
                got = self._block(name, done, rows)[0]
        except (RuntimeError, TypeError) as error:  # a layout that it did not foresee, or a module with more inputs
            if is_out_of_memory(error):
                raise
            return False
        return float((got - truth[name]).norm()) <= tolerance

    @contextmanager
    def _captured(
        self,
        modules: Iterable[nn.Module],
        sequences: int,
        rerun: Rerun | None = None,
    ) -> Iterator[dict[nn.Module, list[Call]]]:
        """Record calls of the modules. All parameters are frozen meanwhile; outputs carry the gradient instead."""
        calls: dict[nn.Module, list[Call]] = {}

        def expand(module: nn.Module, args: tuple) -> tuple | None:
            # Position ids come as [1, tokens] for the whole batch; per row, each needs its own gradient.
            if args and args[0].dim() == 2 and args[0].shape[0] == 1 and sequences > 1:
                return (args[0].expand(sequences, -1), *args[1:])
            return None

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if rerun is not None and rerun.passes_over(module, output):
                return output
            output, found = _with_gradient(output)
            if found:
                given = (tree_map(_plain, held) if held else held for held in (args, kwargs))
                place = calls if rerun is None else rerun.place(calls)
                place.setdefault(module, []).append(Call(module, *given, found))
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


def _with_gradient(output: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """A module's output with gradients asked for, and its tensors."""
    found = tensors_of(output)
    if not found or any(tensor.requires_grad for tensor in found):
        return output, tuple(found)
    if isinstance(output, torch.Tensor):
        output = output.detach().requires_grad_(True).view_as(output)
    elif type(output) in (tuple, list):
        output = type(output)(_with_gradient(part)[0] for part in output)
    elif isinstance(output, MutableMapping):  # what models of transformers give
        output = copy.copy(output)
        for key, part in list(output.items()):
            output[key] = _with_gradient(part)[0]
    else:
        return output, ()
    return output, tuple(tensors_of(output))


def _plain(held: Any) -> Any:
    return held.detach() if isinstance(held, torch.Tensor) else held


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[count, *shape]` as `[count, size]`; `flatten(1)` refuses a scalar parameter's `[count]`."""
    return tensor.reshape(len(tensor), -1)


Vectors = Mapping[str, torch.Tensor]
"""Several vectors over parameters: name -> `[vectors, *parameter.shape]`."""
