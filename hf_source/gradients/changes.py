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
"""Changes of a model's activations while its gradients are taken: what the members of an ensemble differ in.

A change is a set of hooks on the model's modules. Weights, their names and the code that loads them stay as they are,
and gradient rules see the changed inputs and output gradients, so per-row gradients are those of the changed model.
What compares the model with its own training is computed `without_changes`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


_paused: ContextVar[bool] = ContextVar("changes_are_paused", default=False)


def change_output(module: nn.Module, change: Callable[[tuple, Any], Any]) -> None:
    """Let `change(inputs, output)` give the module's output from now on."""
    module.register_forward_hook(lambda _, inputs, output: None if _paused.get() else change(inputs, output))


def change_input(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Let `change(input)` give the module's first input from now on."""
    module.register_forward_pre_hook(lambda _, args: None if _paused.get() else (change(args[0]), *args[1:]))


@contextmanager
def without_changes() -> Iterator[None]:
    """Every model computes as it was trained."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)
