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
"""`hf-source experiment`: the evaluations beside the LDS, each a command."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .command import command
from .evaluate import labelled, show_report
from .groups import Asked
from .opening import open_attributor, read_rows
from .options import Cache, MethodNames, QueriesFile, Record, ReportFolder, Settings, Stage


if TYPE_CHECKING:
    from ..evaluation import Report
    from ..evaluation.experiments import Experiment


experiment_app = typer.Typer(
    help="Judge scores by removing rows, training on them again, or rows whose truth is known.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

DatasetPath = Annotated[str | None, typer.Option(help="The stage's dataset, for columns that the record lacks.")]
K = Annotated[list[int] | None, typer.Option("-k", help="Numbers of rows; repeatable.")]
Seeds = Annotated[int, typer.Option(help="Other orders of training to average over; 0 for the run's own.")]
Seed = Annotated[int, typer.Option(help="Of random rows.")]


@dataclass
class Judged:
    """Which scores are judged, on which rows, and where the report goes."""

    methods: MethodNames = None
    stage: Stage = None
    dataset: DatasetPath = None
    settings: Settings = None
    out: ReportFolder = None

    def open(self, record: str, asked: Asked | None, cache: Path | None = None) -> "Experiment":
        """The experiment, with what is asked where it is needed."""
        from ..evaluation.experiments import Experiment

        chosen = labelled(self.methods or ["source"])
        attributor = open_attributor([record], None, self.settings, {})
        if self.dataset is not None:
            attributor.set_dataset(self.stage, read_rows(self.dataset))
        queries = None if asked is None else asked.read(attributor)
        return Experiment(attributor, queries, methods=chosen, stage=self.stage, cache=cache)

    def show(self, report: "Report") -> None:
        """Print it, and write it if a folder was given."""
        show_report(report, self.out)


@command(experiment_app)
def removal(
    record: Record,
    asked: Asked,
    judged: Judged,
    k: K = None,
    bottom: Annotated[bool, typer.Option(help="Also remove the lowest rows.")] = True,
    match: Annotated[str | None, typer.Option(help="Column whose classes a further control keeps.")] = None,
    num_random: Annotated[int, typer.Option(help="Random sets for each -k.")] = 8,
    num_matched: Annotated[int, typer.Option(help="With --match: sets per query, method and -k.")] = 2,
    seeds: Seeds = 0,
    seed: Seed = 0,
    cache: Cache = None,
) -> None:
    """Train again without each query's top rows: how much does its loss rise (QLD)?"""
    experiment = judged.open(record, asked, cache)
    chosen = {"k": k or [1, 5, 10], "bottom": bottom, "num_random": num_random, "num_matched": num_matched}
    judged.show(experiment.subset_removal(match, seeds=_orders(seeds), seed=seed, **chosen))


@command(experiment_app, "leave-one-out")
def leave_one_out(
    record: Record,
    asked: Asked,
    judged: Judged,
    num_top: Annotated[int, typer.Option(help="Top rows of each query.")] = 4,
    num_random: Annotated[int, typer.Option(help="Random rows of each query.")] = 4,
    num_bottom: Annotated[int, typer.Option(help="Lowest rows of each query.")] = 4,
    chosen_by: Annotated[str | None, typer.Option(help="Method that names them.", show_default="the first")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures of predicted against real nats.")] = None,
    seeds: Seeds = 0,
    seed: Seed = 0,
    cache: Cache = None,
) -> None:
    """Train again without single rows: is a score the number of nats that a row is worth?"""
    experiment = judged.open(record, asked, cache)
    chosen = {"num_top": num_top, "num_random": num_random, "num_bottom": num_bottom, "chosen_by": chosen_by}
    judged.show(experiment.leave_one_out(figures, seeds=_orders(seeds), seed=seed, **chosen))


@command(experiment_app, "tail-patch")
def tail_patch(
    record: Record,
    asked: Asked,
    judged: Judged,
    k: K = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the step.", show_default="largest recorded")] = None,
    optimizer: Annotated[str, typer.Option(help="recorded (its moments start at 0) or sgd.")] = "recorded",
    steps: Annotated[int, typer.Option(help="Steps on the same rows.")] = 1,
    num_random: Annotated[int, typer.Option(help="Random batches for each -k.")] = 4,
    seed: Seed = 0,
) -> None:
    """Take one more step on each query's top rows: does the model become likelier to say it?"""
    experiment = judged.open(record, asked)
    chosen = {"learning_rate": learning_rate, "optimizer": optimizer, "steps": steps, "num_random": num_random}
    judged.show(experiment.tail_patch(k=k or [10], seed=seed, **chosen))


@command(experiment_app)
def agreement(
    record: Record,
    asked: Asked,
    judged: Judged,
    k: K = None,
) -> None:
    """Compare with the exact derivative of the recorded training, for few queries on short runs."""
    experiment = judged.open(record, asked)
    judged.show(experiment.agreement(k=k or [10]))


@command(experiment_app)
def mislabelled(
    record: Record,
    asked: Asked,
    judged: Judged,
    known: Annotated[str, typer.Option(help="Column that says which rows are wrong.")] = "is_corrupted",
    k: K = None,
    checked: Annotated[list[float] | None, typer.Option(help="Shares of rows checked; repeatable.")] = None,
) -> None:
    """List rows by self-influence, by loss and (with clean queries) by influence: do wrong ones come first?"""
    experiment = judged.open(record, asked if asked.given else None)
    judged.show(experiment.mislabelled(known, k=k or [10], checked=checked or [0.05, 0.1, 0.2]))


@command(experiment_app)
def retrieval(
    record: Record,
    judged: Judged,
    queries: QueriesFile = None,
    right_row: Annotated[str, typer.Option(help="Column of --queries with the number of the right row.")] = "row",
) -> None:
    """Does the row that states a fact come out on top?"""
    from ..recipes import load_rows

    if queries is None:
        raise ConfigError("Give --queries with prompt, completion and the number of the right row.")
    asked = load_rows(queries)
    if right_row not in asked.column_names:
        raise ConfigError(f"{queries} has no column {right_row!r}; it has {', '.join(asked.column_names)}.")
    rows = [None if row is None else int(row) for row in asked[right_row]]
    experiment = judged.open(record, Asked(queries))
    judged.show(experiment.retrieval(rows))


def _orders(count: int) -> list[int | None]:
    if count < 0:
        raise ConfigError(f"--seeds {count}: give 0 for the run's own order, or how many others.")
    return list(range(1, count + 1)) if count else [None]
