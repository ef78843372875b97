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

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .errors import friendly_errors
from .opening import open_attributor, read_queries, read_rows
from .options import (
    Cache,
    Completions,
    MethodNames,
    Prompts,
    QueriesFile,
    Record,
    ReportFolder,
    Settings,
    Stage,
)


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


@experiment_app.command()
def removal(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    methods: MethodNames = None,
    k: K = None,
    bottom: Annotated[bool, typer.Option(help="Also remove the lowest rows.")] = True,
    match: Annotated[str | None, typer.Option(help="Column whose classes a further control keeps.")] = None,
    num_random: Annotated[int, typer.Option(help="Random sets for each -k.")] = 8,
    num_matched: Annotated[int, typer.Option(help="With --match: sets per query, method and -k.")] = 2,
    seeds: Seeds = 0,
    seed: Seed = 0,
    stage: Stage = None,
    dataset: DatasetPath = None,
    cache: Cache = None,
    out: ReportFolder = None,
    settings: Settings = None,
) -> None:
    """Train again without each query's top rows: how much does its loss rise (QLD)?"""
    with friendly_errors():
        experiment = _experiment(record, queries, prompt, completion, methods, stage, dataset, cache, settings)
        chosen = {"k": k or [1, 5, 10], "bottom": bottom, "num_random": num_random, "num_matched": num_matched}
        _show(experiment.subset_removal(match, seeds=_orders(seeds), seed=seed, **chosen), out)


@experiment_app.command("leave-one-out")
def leave_one_out(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    methods: MethodNames = None,
    num_top: Annotated[int, typer.Option(help="Top rows of each query.")] = 4,
    num_random: Annotated[int, typer.Option(help="Random rows of each query.")] = 4,
    num_bottom: Annotated[int, typer.Option(help="Lowest rows of each query.")] = 4,
    chosen_by: Annotated[str | None, typer.Option(help="Method that names them.", show_default="the first")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures of predicted against real nats.")] = None,
    seeds: Seeds = 0,
    seed: Seed = 0,
    stage: Stage = None,
    dataset: DatasetPath = None,
    cache: Cache = None,
    out: ReportFolder = None,
    settings: Settings = None,
) -> None:
    """Train again without single rows: is a score the number of nats that a row is worth?"""
    with friendly_errors():
        experiment = _experiment(record, queries, prompt, completion, methods, stage, dataset, cache, settings)
        chosen = {"num_top": num_top, "num_random": num_random, "num_bottom": num_bottom, "chosen_by": chosen_by}
        _show(experiment.leave_one_out(figures, seeds=_orders(seeds), seed=seed, **chosen), out)


@experiment_app.command("tail-patch")
def tail_patch(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    methods: MethodNames = None,
    k: K = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the step.", show_default="largest recorded")] = None,
    optimizer: Annotated[str, typer.Option(help="recorded (its moments start at 0) or sgd.")] = "recorded",
    steps: Annotated[int, typer.Option(help="Steps on the same rows.")] = 1,
    num_random: Annotated[int, typer.Option(help="Random batches for each -k.")] = 4,
    seed: Seed = 0,
    stage: Stage = None,
    dataset: DatasetPath = None,
    out: ReportFolder = None,
    settings: Settings = None,
) -> None:
    """Take one more step on each query's top rows: does the model become likelier to say it?"""
    with friendly_errors():
        experiment = _experiment(record, queries, prompt, completion, methods, stage, dataset, None, settings)
        chosen = {"learning_rate": learning_rate, "optimizer": optimizer, "steps": steps, "num_random": num_random}
        _show(experiment.tail_patch(k=k or [10], seed=seed, **chosen), out)


@experiment_app.command()
def agreement(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    methods: MethodNames = None,
    k: K = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    out: ReportFolder = None,
    settings: Settings = None,
) -> None:
    """Compare with the exact derivative of the recorded training, for few queries on short runs."""
    with friendly_errors():
        experiment = _experiment(record, queries, prompt, completion, methods, stage, dataset, None, settings)
        _show(experiment.agreement(k=k or [10]), out)


@experiment_app.command()
def mislabelled(
    record: Record,
    known: Annotated[str, typer.Option(help="Column that says which rows are wrong.")] = "is_corrupted",
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    methods: MethodNames = None,
    k: K = None,
    checked: Annotated[list[float] | None, typer.Option(help="Shares of rows checked; repeatable.")] = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    out: ReportFolder = None,
    settings: Settings = None,
) -> None:
    """List rows by self-influence, by loss and (with clean queries) by influence: do wrong ones come first?"""
    with friendly_errors():
        experiment = _experiment(record, queries, prompt, completion, methods, stage, dataset, None, settings, False)
        _show(experiment.mislabelled(known, k=k or [10], checked=checked or [0.05, 0.1, 0.2]), out)


@experiment_app.command()
def retrieval(
    record: Record,
    queries: QueriesFile = None,
    right_row: Annotated[str, typer.Option(help="Column of --queries with the number of the right row.")] = "row",
    methods: MethodNames = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    out: ReportFolder = None,
    settings: Settings = None,
) -> None:
    """Does the row that states a fact come out on top?"""
    with friendly_errors():
        from ..recipes import load_rows

        if queries is None:
            raise ConfigError("Give --queries with prompt, completion and the number of the right row.")
        asked = load_rows(queries)
        if right_row not in asked.column_names:
            raise ConfigError(f"{queries} has no column {right_row!r}; it has {', '.join(asked.column_names)}.")
        rows = [None if row is None else int(row) for row in asked[right_row]]
        experiment = _experiment(record, queries, None, None, methods, stage, dataset, None, settings)
        _show(experiment.retrieval(rows), out)


def _experiment(
    record: str,
    queries: Path | None,
    prompts: list[str] | None,
    completions: list[str] | None,
    methods: list[str] | None,
    stage: str | None,
    dataset: str | None,
    cache: Path | None,
    settings: list[str] | None,
    needs_queries: bool = True,
) -> Any:
    from ..evaluation.experiments import Experiment
    from .evaluate import labelled

    chosen = labelled(methods or ["source"])
    attributor = open_attributor([record], None, settings, {})
    if dataset is not None:
        attributor.set_dataset(stage, read_rows(dataset))
    asked = None
    if needs_queries or queries is not None or prompts:
        asked = read_queries(attributor, queries, prompts, completions, 32)
    return Experiment(attributor, asked, methods=chosen, stage=stage, cache=cache)


def _orders(count: int) -> list[int | None]:
    if count < 0:
        raise ConfigError(f"--seeds {count}: give 0 for the run's own order, or how many others.")
    return list(range(1, count + 1)) if count else [None]


def _show(report: Any, out: Path | None) -> None:
    from rich.console import Console

    Console().print(report.table())
    if out is not None:
        typer.echo(f"Wrote {report.write(out)}: report.json, report.md, report.html.")
