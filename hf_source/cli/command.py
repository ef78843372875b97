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
"""A command of `hf-source`: options that come in groups, and errors without a traceback."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

import typer

from .errors import friendly_errors
from .processes import said_once


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: makes a function a command of `app`.

    A parameter that is annotated with a dataclass is a group of options (`groups.py`): the command has an option for
    each of its fields, and the function gets the group with what was given.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name)(_with_single_options(function))
        return function

    return register


def _with_single_options(function: Callable[..., None]) -> Callable[..., None]:
    """The same for typer, which knows nothing of groups."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    groups = {own.name: own.annotation for own in parameters if is_dataclass(own.annotation)}

    @wraps(function)
    def run(**given: Any) -> None:
        filled = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        with friendly_errors(), said_once():
            function(**given, **filled)

    options: list[inspect.Parameter] = []
    for own in parameters:
        options += inspect.signature(own.annotation).parameters.values() if own.name in groups else [own]
    run.__signature__ = inspect.Signature([o.replace(kind=inspect.Parameter.KEYWORD_ONLY) for o in options])
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run
