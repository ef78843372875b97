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
"""Commands whose options come in groups."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from hf_source.cli.command import command
from hf_source.errors import ConfigError


@dataclass
class Fruit:
    """What is eaten."""

    name: Annotated[str, typer.Option("--fruit", "-f", help="Which.")] = "apple"
    count: int = 1


@dataclass
class Peeled(Fruit):
    """The same, peeled."""

    knife: Annotated[bool, typer.Option("--knife")] = False


@pytest.fixture()
def app():
    app = typer.Typer()

    @command(app)
    def eat(who: str, fruit: Peeled, loudly: bool = False) -> None:
        """Eat."""
        if fruit.count < 1:
            raise ConfigError("There is none: give --count.")
        typer.echo(f"{who} {fruit} {loudly}")

    @command(app, "throw-away")
    def throw(fruit: Fruit) -> None:
        """Waste."""
        raise KeyboardInterrupt

    return app


def test_a_group_becomes_options(app):
    run = CliRunner().invoke(app, ["eat", "Ada", "-f", "pear", "--count", "2", "--knife", "--loudly"])
    assert run.stdout == "Ada Peeled(name='pear', count=2, knife=True) True\n"
    run = CliRunner().invoke(app, ["eat", "Ada"])
    assert run.stdout == "Ada Peeled(name='apple', count=1, knife=False) False\n"


def test_errors_are_shown_without_a_traceback(app):
    refused = CliRunner().invoke(app, ["eat", "Ada", "--count", "0"])
    assert refused.exit_code == 1 and refused.stderr == "error: There is none: give --count.\n"
    stopped = CliRunner().invoke(app, ["throw-away"])
    assert stopped.exit_code == 130 and "Interrupted." in stopped.stderr


def test_two_groups_with_one_option_are_refused(app):
    with pytest.raises(ValueError, match="duplicate parameter name"):

        @command(app)
        def mix(first: Fruit, second: Fruit) -> None:
            """Mix."""
