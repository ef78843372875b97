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
"""`hf-source`: record a training, generate, and ask which rows made the model say it."""

import logging
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .ask import ask_app
from .command import command
from .evaluate import evaluate
from .experiment import experiment_app
from .explore import explore
from .groups import Asked, Models, Scoring
from .index import index
from .opening import open_attributor, read_rows
from .options import (
    SAMPLES_HELP,
    Candidates,
    DatasetPath,
    Filter,
    GranularityName,
    GranularityOption,
    Index,
    MaxNewTokens,
    Prompts,
    Record,
    Stage,
)
from .processes import is_main_process
from .push import push
from .record import record_app
from .report import report
from .space import space_app


app = typer.Typer(
    help="Which training rows made the model say this, and in which stage?\n\n"
    "Start with `hf-source demo`. For your own model: `train` (or SourceTrainer in Python) leaves a training record; "
    "`generate` lets the model speak and writes queries; `plan` tells the cost; `attribute` writes the scores as "
    "columns of the dataset; `top` shows the rows that matter; `ask` answers what people ask of them; `report` writes "
    "a page; `explore` opens an app; `index` makes the next question cheap; `push` shares scores on the Hub.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(record_app, name="record")
app.add_typer(experiment_app, name="experiment")
app.add_typer(space_app, name="space")
app.add_typer(ask_app, name="ask")
for verb in (evaluate, index, push, report, explore):
    command(app)(verb)


@command(app)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the record, datasets, page and summary.")] = Path("runs/demo"),
    num_samples: Annotated[int, typer.Option(help=SAMPLES_HELP)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Only write rows, queries and tokenizer to this folder, for `train` to take.", metavar="FOLDER"
        ),
    ] = None,
) -> None:
    """Train a small model on facts about countries in two stages, let it answer, and show which rows made it.

    Runs on a CPU in a few minutes, with no network: the facts come with the package `countryinfo`.
    """
    if export is not None:
        from ..demo.export import export_demo

        for path in export_demo(export):
            typer.echo(f"Wrote {path}.")
        return
    from ..demo.run import run_demo

    run_demo(out, num_samples=num_samples, seed=seed)


@command(app)
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of one stage.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, e.g. training.learning_rate=1e-4", show_default=False)
    ] = None,
) -> None:
    """Train one stage and record it.

    A recipe names `model` (Hub id, folder, or a record to go on from) or `model_config` and `tokenizer`, `dataset`,
    optionally `peft`, and under `training` everything SourceConfig takes:

        model: runs/capitals

        dataset: chats.jsonl

        training: {output_dir: out/sft, record_dir: runs/capitals, stage: sft, num_train_epochs: 3}
    """
    from ..recipes import read_recipe, train_from_recipe

    settings = read_recipe(recipe, overrides or [])
    path = train_from_recipe(settings)
    typer.echo(f"Recorded in {path}. Next: hf-source top {path} --prompt '...'")


@command(app)
def generate(
    record: Record,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON Lines file for the queries.")],
    prompt: Prompts = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    max_new_tokens: MaxNewTokens = 32,
) -> None:
    """Let the trained model complete prompts, and keep prompts and answers as queries for `attribute` and `top`."""
    prompts = list(prompt or [])
    if prompts_file is not None:
        prompts += [line for line in _read_text(prompts_file).splitlines() if line]
    if not prompts:
        raise ConfigError("There is no prompt: give --prompt (repeatable) or --prompts-file.")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: end the name in .jsonl, so that --queries can read it.")
    queries = open_attributor([record], None, [], {}).generate(prompts, max_new_tokens=max_new_tokens)
    if is_main_process():
        out.parent.mkdir(parents=True, exist_ok=True)
        queries.to_dataset().to_json(str(out))
    for _, text, completion in queries:
        typer.echo(f"{text}{completion}")
    typer.echo(f"Wrote {len(queries)} queries to {out}.")


@command(app)
def plan(
    record: Record,
    asked: Asked,
    scoring: Scoring,
    models: Models,
    stage: Stage = None,
    dataset: DatasetPath = None,
    granularity: GranularityOption = GranularityName.row,
    filter: Filter = None,
    candidates: Candidates = 1000,
) -> None:
    """Tell passes, time and memory of an attribution, or with --filter of `top`, before it runs."""
    attributor = models.open(record, scoring)
    asked_of = read_rows(dataset), asked.read(attributor), stage, granularity.value
    typer.echo(str(attributor.plan(*asked_of, filter=filter, candidates=candidates)))


@command(app)
def attribute(
    record: Record,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the scored rows: .parquet, .csv or .jsonl.")],
    asked: Asked,
    scoring: Scoring,
    models: Models,
    stage: Stage = None,
    dataset: DatasetPath = None,
    index: Index = None,
    granularity: GranularityOption = GranularityName.row,
    std: Annotated[bool, typer.Option("--std", help="Also say how far an ensemble's members differ.")] = False,
    resume: Annotated[
        bool,
        typer.Option(help="Keep finished work in OUT.work until all is done: the same command goes on after a kill."),
    ] = True,
) -> None:
    """Score every row of a stage, and write the rows with one column per query."""
    writers = {".parquet": "to_parquet", ".csv": "to_csv", ".jsonl": "to_json"}
    if out.suffix not in writers:
        raise ConfigError(f"--out {out}: end the name in {', '.join(writers)}.")
    kept = out.with_name(f"{out.name}.work")
    attributor = models.open(record, scoring, index=index, cache_dir=str(kept) if resume else None)
    wanted = asked.read(attributor)
    scored = attributor.attribute(read_rows(dataset), wanted, stage, std=std, granularity=granularity.value)
    if is_main_process():
        out.parent.mkdir(parents=True, exist_ok=True)
        getattr(scored, writers[out.suffix])(str(out))
        if resume and attributor.cache_dir == kept:
            shutil.rmtree(kept, ignore_errors=True)
    from ..outputs.tables import describe_columns

    typer.echo(f"Wrote {out}: {describe_columns(scored, wanted.names)}.")
    if scored.info.description:
        typer.echo(scored.info.description)


@command(app)
def top(
    record: Record,
    asked: Asked,
    scoring: Scoring,
    models: Models,
    k: Annotated[int, typer.Option("-k", help="Rows per query, stage and direction.")] = 5,
    opposing: Annotated[bool, typer.Option(help="Also show the rows that speak against it.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write an HTML page.")] = None,
    index: Index = None,
    filter: Filter = None,
    candidates: Candidates = 1000,
) -> None:
    """Show the rows of every stage that support or oppose what was said most."""
    from rich.console import Console

    from ..attribution.methods import METHODS
    from ..outputs.page import write_page
    from ..outputs.tables import print_top

    attributor = models.open(record, scoring, index=index)
    wanted = asked.read(attributor)
    table = attributor.top(wanted, k=k, opposing=opposing, filter=filter, candidates=candidates)
    unit = "nats" if METHODS[attributor.method].nats else ""
    print_top(Console(), wanted, table, unit)
    chosen = filter is not None or attributor.index is not None or attributor.taken is not None
    if chosen and table.info.description:
        typer.echo(table.info.description)
    if out is not None and is_main_process():
        write_page(out, f"Attribution from {record}", wanted, table, unit=unit)
        typer.echo(f"Wrote {out}.")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    return path.read_text(encoding="utf-8")


def main() -> None:
    """Entry point of `hf-source`."""
    # On import it warns of an optional package of its own, at every command, whether or not it is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app()
