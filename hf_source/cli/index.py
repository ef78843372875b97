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
"""`hf-source index`: build an index of a record, and publish it."""

from pathlib import Path
from typing import Annotated

import typer

from .groups import Scoring
from .options import Datasets, Record
from .processes import is_main_process


def index(
    record: Record,
    folder: Annotated[Path, typer.Argument(help="Folder for the index; one that was begun is gone on with.")],
    scoring: Scoring,
    numbers: Annotated[
        int | None, typer.Option(help="Numbers kept of each row, two or three bytes each.", show_default="2048")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the numbers: int8 or full.")] = "int8",
    dataset: Datasets = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only tell time, memory and size of it.")] = False,
    push: Annotated[
        str | None, typer.Option(help="Also publish it, as this dataset repository on the Hub (user/name).")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who can see what is published.")] = True,
) -> None:
    """Index a record, so that `attribute` and `top` answer new queries with `--index` in seconds.

    It costs about as much as attributing a few queries; a build that was cut off goes on when it is run again.
    """
    from ..index import SourceIndex

    attributor = scoring.open_with(dataset, record)
    if plan:
        typer.echo(str(attributor.plan_index(numbers, precision)))
        return
    built = SourceIndex.load(attributor.build_index(folder, numbers, precision))
    typer.echo(f"Wrote {folder}: {built.num_bytes / 2**20:,.1f} MiB. {built.note(built.stages)}")
    if push is not None and is_main_process():
        typer.echo(f"Pushed to {built.push_to_hub(push, private=private)}.")
    typer.echo(f"Next: hf-source top {record} --index {folder} --prompt '...'")
