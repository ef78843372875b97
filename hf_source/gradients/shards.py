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
"""A model that several processes hold between them (FSDP2), for weights that one device has no room for.

Each holds a share of every layer, and gets the others' when the layer runs, forward and again on the way back. So all
of them have to go through the model at the same time, while their work is not the same: one may have a batch of rows
more, or a pass over the sample. Before each pass they agree on what is done next; who has nothing of that kind goes
along with a row of its own, whose result nobody uses. Before anything else that they do together, such as a sum, they
see that nobody is left with a pass to make (`settle`). Which weights a pass is at, where there are several, is agreed
on with it (`places`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..budget import NotEnoughMemoryError, why_out_of_memory
from ..errors import UnsupportedError
from .recompute import tensors_of
from .rerun import layers_of, leaves_of
from .rows import RowGradients
from .task import Batch, Task, batch_rows


_NOTHING, _FORWARD, _BOTH_WAYS = 0, 1, 2
"""What a process has to do next; of passes at the weights of place `p`, `2 p` more."""


class Shards:
    """The processes that hold a model between them, as one of them sees them.

    Args:
        device: where this one's share goes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._model: nn.Module | None = None
        self._task: Task | None = None
        self._row: Batch = {}
        self._goes_along = False
        self._load: Sequence[Callable[[], None]] = ()
        self._wanted, self._loaded = 0, -1

    @property
    def count(self) -> int:
        """Number of the processes."""
        return dist.get_world_size()

    def take(self, gradients: RowGradients, batch: Batch) -> None:
        """Leave this process its share of a model; `gradients` then has parameters that are shapes alone.

        Args:
            gradients: engine of the whole model, checked, anywhere.
            batch: of its rows, with one of which this process goes along where others make a pass.

        Raises:
            UnsupportedError: if the model has no layers that can be sharded, or parameters that need more than calls.
        """
        model = _plain(gradients.model)
        layers, row = layers_of(model), batch_rows(batch, range(1))
        _refuse(gradients, layers, row)
        stand_ins = {name: _stand_in(each, self.device) for name, each in gradients.parameters.items()}
        gradients.model.requires_grad_(False)
        mesh = init_device_mesh(self.device.type, (self.count,))
        for part in (*layers, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # Before the hooks of FSDP: nobody starts to gather weights that others do not, forward or on the way back.
        model.register_forward_pre_hook(self._before, prepend=True)
        for layer in layers:
            layer.register_forward_pre_hook(_begin_here, prepend=True, with_kwargs=True)
        gradients.parameters, gradients.shards = stand_ins, self
        self.release()
        self._model, self._task = gradients.model, gradients.task
        self._row = {key: value.to(self.device) for key, value in row.items()}

    def settle(self) -> None:
        """Wait until no process has a pass to make, and go along with those that have."""
        while self._model is not None and (next_one := self._agree(_NOTHING)):
            self._go_along(next_one)

    def release(self) -> None:
        """Let the model go: no process has a pass to make any more."""
        self._model, self._task, self._row = None, None, {}
        self._load, self._wanted, self._loaded = (), 0, -1

    def places(self, load: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """Take turns at several weights. Every process has to call it, with nobody left with a pass to make.

        Args:
            load: puts each of them into the model.

        Returns:
            What to call in place of `load`: says where the passes after it are made.
        """
        self._load, self._wanted, self._loaded = load, 0, -1
        return [partial(setattr, self, "_wanted", place) for place in range(len(load))]

    @contextmanager
    def whole_batches(self) -> Iterator[None]:
        """Within it, memory that runs out is an error: the others would wait for this process in vain.

        Raises:
            NotEnoughMemoryError: if it does.
        """
        try:
            yield
        except Exception as error:
            why = why_out_of_memory(error)
            if why is None:
                raise
            raise NotEnoughMemoryError(
                f"Out of memory in a process that holds the model with others ({why}). Lower max_tokens_per_batch= "
                "or memory_budget=, or start more processes."
            ) from error

    def _before(self, model: nn.Module, args: tuple) -> None:
        """Start a pass when all do, or have none."""
        if self._goes_along:
            return
        own = (_BOTH_WAYS if torch.is_grad_enabled() else _FORWARD) + 2 * self._wanted
        while (next_one := self._agree(own)) != own:
            self._go_along(next_one)
        self._enter(own)

    def _agree(self, own: int) -> int:
        wanted = torch.tensor(own, device=self.device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return int(wanted)

    def _enter(self, what: int) -> None:
        place = (what - 1) // 2
        if self._load and self._loaded != place:
            self._load[place]()
            self._loaded = place

    def _go_along(self, what: int) -> None:
        how = _FORWARD if what % 2 else _BOTH_WAYS
        self._enter(what)
        self._goes_along = True
        try:
            with torch.set_grad_enabled(how == _BOTH_WAYS):
                outputs = tensors_of(self._task.forward(self._model, self._row))
                if how == _BOTH_WAYS:
                    torch.autograd.grad(sum(each.float().sum() for each in outputs), leaves_of(*outputs))
        finally:
            self._goes_along = False


def _begin_here(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Let every way back pass every layer, whichever parameters a process wants."""
    given = {**dict(enumerate(args)), **kwargs}
    first = next((key for key, each in given.items() if torch.is_tensor(each) and each.is_floating_point()), None)
    if first is None or given[first].requires_grad or not torch.is_grad_enabled():
        return None
    given[first] = given[first].detach().requires_grad_(True)
    return tuple(given.pop(place) for place in range(len(args))), given


def _stand_in(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter's shape, type and device, in the memory of one number."""
    return torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)


def _plain(model: nn.Module) -> nn.Module:
    """Without PEFT's wrapper, whose `generate` goes past its `forward`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refuse(gradients: RowGradients, layers: list[nn.Module], row: Batch) -> None:
    name = type(gradients.model).__name__
    if not layers:
        raise UnsupportedError(
            f"shard_model=True shards the layers of models of transformers, and {name} has none that it knows. Leave "
            "it out: each process then holds the whole model."
        )
    adapters = getattr(gradients.model, "peft_config", {}).values()
    if any(each.is_prompt_learning for each in adapters):
        raise UnsupportedError(
            "shard_model=True: a learned prompt looks weights up outside of the model's forward. Leave it out."
        )
    packed = next((key for key, each in gradients.model.named_parameters() if not each.is_floating_point()), None)
    if packed is not None:
        raise UnsupportedError(
            f"shard_model=True cannot cut {packed!r}, which is quantized: load the model in bfloat16, or hold the "
            "quantized one whole on each process (shard_model=False)."
        )
    others = [*gradients.around, *gradients.fallback]
    if others:
        raise UnsupportedError(
            f"shard_model=True: the gradient of {others[0]!r} needs its weights at other times than in the model's "
            "passes. Hold the model whole on each process (shard_model=False)."
        )
    if (calls := _calls(gradients, row)) != 1:
        raise UnsupportedError(
            f"shard_model=True: {type(gradients.task).__name__}.forward calls the model {calls} times, and processes "
            "that hold it between them count on once. Give it all inputs in one call, or leave shard_model out."
        )


@torch.no_grad()
def _calls(gradients: RowGradients, row: Batch) -> int:
    """How often the model is called for a batch."""
    count = 0

    def note(*call: Any) -> None:
        nonlocal count
        count += 1

    handle = _plain(gradients.model).register_forward_pre_hook(note)
    try:
        gradients.task.forward(gradients.model, row)
    finally:
        handle.remove()
    return count
