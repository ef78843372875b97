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
"""`hf-source record`: look at a training record, check it, and share it."""

from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .options import Record, Revision


record_app = typer.Typer(
    help="Look at a training record, check it, and share it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(help="Folder of the training record.")]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Who can see it.",
        show_default="private unless its rows and base model are known to be open",
    ),
]
RepoId = Annotated[str, typer.Argument(help="Repository on the Hub, as user/name.")]


@command(record_app)
def show(record: Record, revision: Revision = None) -> None:
    """Show stages, segments, optimizers, sizes and versions."""
    from rich.console import Console

    from .. import TrainingRecord
    from ..outputs.records import print_record

    print_record(Console(), TrainingRecord.load(record, revision))


@command(record_app)
def verify(
    record: Record,
    replay: Annotated[int, typer.Option(help="Steps of each stage to train again and compare; 0 for none.")] = 4,
    revision: Revision = None,
) -> None:
    """Re-read everything, compare hashes, and train the first steps of each stage again.

    Ends with exit code 1 if anything is wrong.
    """
    from .. import TrainingRecord

    found = TrainingRecord.load(record, revision)
    problems = found.verify()
    for check in found.check_replays(replay) if replay > 0 and not problems else []:
        if check.problem:
            problems.append(check.problem)
        elif check.note:
            typer.echo(f"stage {check.stage}: not compared with a replay, {check.note}.")
        else:
            typer.echo(
                f"stage {check.stage}: a replay of {check.steps} steps agrees with {len(check.compared)} recorded "
                f"states of the weights (relative error {check.error:.1e})."
            )
    for problem in problems:
        typer.echo(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)
    files = sum(len(listed) for listed in found._file_lists())
    typer.echo(f"{found.path}: {files} files and {sum(s.num_steps for s in found.stages)} steps are as recorded.")


@command(record_app, "from-checkpoints")
def from_checkpoints(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint folders of one run, or ids on the Hub.")],
    recipe: Annotated[
        Path,
        typer.Option(help="YAML recipe as for `train`: the run's model, dataset and training settings."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Overrides, e.g. training.learning_rate=1e-4; repeatable.")
    ] = None,
) -> None:
    """Rebuild a record from checkpoints of a run that was not recorded. Visits are then assumed uniform.

    The recipe's `model` is the one that training started from; record_dir, stage and num_segments are read from its
    `training`.
    """
    from ..recipes import read_recipe, record_from_recipe

    record = record_from_recipe(read_recipe(recipe, overrides or []), checkpoints)
    typer.echo(f"Rebuilt {record.stages[-1]} in {record.path}.")


@command(record_app)
def push(
    record: Folder,
    repo_id: RepoId,
    include_rows: Annotated[
        bool | None,
        typer.Option(help="Publish the training rows that the record holds, or leave them out.", show_default=False),
    ] = None,
    private: Private = None,
    revision: Revision = None,
) -> None:
    """Publish a record on the Hub with a card. Log in first with `hf auth login`."""
    from .. import TrainingRecord

    url = TrainingRecord.load(record).push_to_hub(
        repo_id, include_rows=include_rows, private=private, revision=revision
    )
    typer.echo(f"Pushed to {url}.")


@command(record_app, "push-model")
def push_model(
    record: Folder,
    repo_id: RepoId,
    stage: Annotated[str | None, typer.Option(help="Stage whose model it is.", show_default="the last")] = None,
    record_id: Annotated[str | None, typer.Option(help="Repository of the record, for the card.")] = None,
    private: Private = None,
    revision: Revision = None,
) -> None:
    """Publish the model that a stage ended with, with its tokenizer and a card. Log in first with `hf auth login`."""
    from .. import TrainingRecord

    url = TrainingRecord.load(record).push_model_to_hub(
        repo_id, stage, record_id=record_id, private=private, revision=revision
    )
    typer.echo(f"Pushed to {url}.")


@command(record_app)
def pull(
    repo_id: RepoId,
    folder: Annotated[Path, typer.Argument(help="Where to put it.")],
    revision: Revision = None,
) -> None:
    """Copy a record from the Hub to a folder."""
    from .. import TrainingRecord

    record = TrainingRecord.pull(repo_id, folder, revision)
    typer.echo(f"Pulled {', '.join(stage.name for stage in record.stages)} to {folder}.")
