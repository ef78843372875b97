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
"""`hf-source space`: the explorer as an app on the Hub."""

from typing import Annotated, Any

import typer

from .command import command
from .groups import given
from .options import CurvatureOption, Index, MethodOption, NumSamples, NumSegments


space_app = typer.Typer(
    help="The explorer as a Space: an app on the Hub that opens a record on the Hub.", no_args_is_help=True
)


@space_app.callback()
def _space() -> None:
    """The explorer as a Space: an app on the Hub that opens a record on the Hub."""


@command(space_app, "push")
def push_space_command(
    record: Annotated[str, typer.Argument(help="Id of the training record on the Hub.")],
    space: Annotated[str, typer.Argument(metavar="SPACE", help="Id of the Space, as user/name.")],
    method: MethodOption = None,
    curvature: CurvatureOption = None,
    num_samples: NumSamples = None,
    num_segments: NumSegments = None,
    index: Index = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who can see it.", show_default="private unless the record is open"),
    ] = None,
) -> None:
    """Make a Space in which people ask the model of a record, or bring it up to date.

    Push the record first (`hf-source record push`), and for answers in seconds an index. A private record needs a
    secret HF_TOKEN in the Space's settings.
    """
    from ..explorer.space import push_space

    settings: dict[str, Any] = given(
        method=method, curvature=curvature, num_samples=num_samples, num_segments=num_segments, index=index
    )
    typer.echo(f"Pushed to {push_space(record, space, private=private, **settings)}.")
