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
from typing import Annotated, Any

import typer

from .cli_ask import ask_app
from .cli_errors import friendly_errors
from .cli_evaluate import evaluate
from .cli_experiment import experiment_app
from .cli_explore import explore
from .cli_index import index
from .cli_options import (
    SAMPLES_HELP,
    Completions,
    CurvatureName,
    CurvatureOption,
    DatasetPath,
    Ensemble,
    EnsembleName,
    EnsembleSize,
    Index,
    MaxNewTokens,
    Method,
    MethodOption,
    NumSamples,
    Prompts,
    QueriesFile,
    Recipe,
    Record,
    Runs,
    Settings,
    Stage,
)
from .cli_push import push
from .cli_record import record_app
from .cli_report import report
from .cli_space import space_app
from .errors import ConfigError


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
app.command()(evaluate)
app.command()(index)
app.command()(push)
app.command()(report)
app.command()(explore)


@app.command()
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

    Runs on a CPU in about two minutes, with no network: the facts come with the package `countryinfo`.
    """
    with friendly_errors():
        if export is not None:
            from .demo.export import export_demo

            for path in export_demo(export):
                typer.echo(f"Wrote {path}.")
            return
        from .demo.run import run_demo

        run_demo(out, num_samples=num_samples, seed=seed)


@app.command()
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
    with friendly_errors():
        from .recipes import read_recipe, train_from_recipe

        settings = read_recipe(recipe, overrides or [])
        path = train_from_recipe(settings)
        typer.echo(f"Recorded in {path}. Next: hf-source top {path} --prompt '...'")


@app.command()
def generate(
    record: Record,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON Lines file for the queries.")],
    prompt: Prompts = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    max_new_tokens: MaxNewTokens = 32,
) -> None:
    """Let the trained model complete prompts, and keep prompts and answers as queries for `attribute` and `top`."""
    with friendly_errors():
        prompts = list(prompt or [])
        if prompts_file is not None:
            prompts += [line for line in _read_text(prompts_file).splitlines() if line]
        if not prompts:
            raise ConfigError("There is no prompt: give --prompt (repeatable) or --prompts-file.")
        if out.suffix != ".jsonl":
            raise ConfigError(f"--out {out}: end the name in .jsonl, so that --queries can read it.")
        queries = _attributor([record], None, [], {}).generate(prompts, max_new_tokens=max_new_tokens)
        out.parent.mkdir(parents=True, exist_ok=True)
        queries.to_dataset().to_json(str(out))
        for _, text, completion in queries:
            typer.echo(f"{text}{completion}")
        typer.echo(f"Wrote {len(queries)} queries to {out}.")


@app.command()
def plan(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    method: MethodOption = None,
    curvature: CurvatureOption = None,
    num_samples: NumSamples = None,
    run: Runs = None,
    ensemble: Ensemble = None,
    ensemble_size: EnsembleSize = None,
    max_new_tokens: MaxNewTokens = 32,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Tell passes, time and memory of an attribution before it runs."""
    with friendly_errors():
        named = _named(method, curvature, num_samples, ensemble, ensemble_size)
        attributor = _attributor([record, *(run or [])], recipe, settings, named)
        asked = _queries(attributor, queries, prompt, completion, max_new_tokens)
        typer.echo(str(attributor.plan(_rows(dataset), asked, stage)))


@app.command()
def attribute(
    record: Record,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the scored rows: .parquet, .csv or .jsonl.")],
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    method: MethodOption = None,
    curvature: CurvatureOption = None,
    num_samples: NumSamples = None,
    run: Runs = None,
    ensemble: Ensemble = None,
    ensemble_size: EnsembleSize = None,
    index: Index = None,
    max_new_tokens: MaxNewTokens = 32,
    std: Annotated[bool, typer.Option("--std", help="Also say how far an ensemble's members differ.")] = False,
    resume: Annotated[
        bool,
        typer.Option(help="Keep finished work in OUT.work until all is done: the same command goes on after a kill."),
    ] = True,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Score every row of a stage, and write the rows with one column per query."""
    with friendly_errors():
        named = _named(method, curvature, num_samples, ensemble, ensemble_size, index)
        writers = {".parquet": "to_parquet", ".csv": "to_csv", ".jsonl": "to_json"}
        if out.suffix not in writers:
            raise ConfigError(f"--out {out}: end the name in {', '.join(writers)}.")
        kept = out.with_name(f"{out.name}.work")
        if resume:
            named = {"cache_dir": str(kept), **named}
        attributor = _attributor([record, *(run or [])], recipe, settings, named)
        asked = _queries(attributor, queries, prompt, completion, max_new_tokens)
        scored = attributor.attribute(_rows(dataset), asked, stage, std=std)
        out.parent.mkdir(parents=True, exist_ok=True)
        getattr(scored, writers[out.suffix])(str(out))
        if resume and attributor.cache_dir == kept and attributor.accelerator.is_main_process:
            shutil.rmtree(kept, ignore_errors=True)
        from .outputs.tables import describe_columns

        typer.echo(f"Wrote {out}: {describe_columns(scored, asked.names)}.")
        if scored.info.description:
            typer.echo(scored.info.description)


@app.command()
def top(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    k: Annotated[int, typer.Option("-k", help="Rows per query, stage and direction.")] = 5,
    opposing: Annotated[bool, typer.Option(help="Also show the rows that speak against it.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write an HTML page.")] = None,
    method: MethodOption = None,
    curvature: CurvatureOption = None,
    num_samples: NumSamples = None,
    run: Runs = None,
    ensemble: Ensemble = None,
    ensemble_size: EnsembleSize = None,
    index: Index = None,
    filter: Annotated[
        str | None,
        typer.Option(
            help="Score only rows that a cheap method (bm25), or an index (folder or id), proposes.", metavar="FILTER"
        ),
    ] = None,
    candidates: Annotated[int, typer.Option(help="Rows that --filter proposes per query and stage.")] = 1000,
    max_new_tokens: MaxNewTokens = 32,
    recipe: Recipe = None,
    settings: Settings = None,
) -> None:
    """Show the rows of every stage that support or oppose what was said most."""
    with friendly_errors():
        named = _named(method, curvature, num_samples, ensemble, ensemble_size, index)
        from rich.console import Console

        from .attribution.methods import METHODS
        from .outputs.page import write_page
        from .outputs.tables import print_top

        attributor = _attributor([record, *(run or [])], recipe, settings, named)
        asked = _queries(attributor, queries, prompt, completion, max_new_tokens)
        table = attributor.top(asked, k=k, opposing=opposing, filter=filter, candidates=candidates)
        unit = "nats" if METHODS[attributor.method].nats else ""
        print_top(Console(), asked, table, unit)
        if (filter is not None or attributor.index is not None) and table.info.description:
            typer.echo(table.info.description)
        if out is not None:
            write_page(out, f"Attribution from {record}", asked, table, unit=unit)
            typer.echo(f"Wrote {out}.")


def _named(
    method: Method | None,
    curvature: CurvatureName | None,
    num_samples: int | None,
    ensemble: EnsembleName | None = None,
    ensemble_size: int | None = None,
    index: str | None = None,
) -> dict[str, Any]:
    """The options that were given."""
    named = {"method": method and method.value, "curvature": curvature and curvature.value, "num_samples": num_samples}
    named |= {"ensemble": ensemble and ensemble.value, "ensemble_size": ensemble_size, "index": index}
    return {key: value for key, value in named.items() if value is not None}


def _attributor(records: list[str], recipe: Path | None, overrides: list[str] | None, named: dict[str, Any]) -> Any:
    """The attributor, with settings from the recipe, then the options given on the command line, then `--set`."""
    import inspect
    from dataclasses import fields

    from . import SourceAttributor
    from .attribution import ENSEMBLES, METHODS
    from .recipes import apply_override, read_settings

    settings = {**(read_settings(recipe) if recipe is not None else {}), **named}
    for override in overrides or []:
        apply_override(settings, override)
    # Objects such as a dataset or a task cannot be written on a command line.
    parameters = inspect.signature(SourceAttributor.__init__).parameters.values()
    known = {p.name: p.default for p in parameters if isinstance(p.default, (str, int))}
    method = METHODS.get(str(settings.get("method", known["method"])))
    ensemble = ENSEMBLES.get(str(settings.get("ensemble")))
    own = [field for owner in (method, ensemble) if owner is not None for field in fields(owner.options)]
    examples = {field.name: field.metadata.get("example", field.default) for field in own}
    known |= {name: example for name, example in examples.items() if isinstance(example, (str, int, float))}
    known |= {"cache_dir": "folder", "memory_budget": "2GiB"}
    if isinstance(settings.get("memory_budget"), int):
        settings["memory_budget"] = str(settings["memory_budget"])
    known |= {"ensemble": "dropout", "ensemble_size": 10, "index": "runs/capitals-index"}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"{key!r} is not a setting of SourceAttributor with this method; it has {', '.join(sorted(known))}."
            )
        if type(value) is not type(known[key]) and not (type(known[key]) is float and type(value) is int):
            raise ConfigError(f"{key}={value!r} should be of type {type(known[key]).__name__}, e.g. {known[key]!r}.")
    return SourceAttributor.from_record(records, **settings)


def _queries(
    attributor: Any, file: Path | None, prompts: list[str] | None, completions: list[str] | None, max_new_tokens: int
) -> Any:
    from . import Queries
    from .recipes import load_rows

    if (file is None) == (not prompts):
        raise ConfigError("Say what to explain: either --queries FILE, or --prompt (with --completion, or generated).")
    if file is not None:
        rows = load_rows(file)
        if "input_ids" in rows.column_names:
            queries = Queries.from_dataset(rows, attributor.processing_class)
            given = {"prompt", "completion"} <= set(rows.column_names)
            return Queries(queries.names, rows["prompt"][:], rows["completion"][:], queries.rows) if given else queries
        missing = {"prompt", "completion"} - set(rows.column_names)
        if missing:
            raise ConfigError(f"{file} has no column {sorted(missing)[0]!r}: queries have prompt and completion.")
        names = rows["name"][:] if "name" in rows.column_names else None
        return Queries.from_text(rows["prompt"][:], rows["completion"][:], names)
    if completions:
        if len(completions) != len(prompts):
            raise ConfigError(f"{len(prompts)} --prompt but {len(completions)} --completion: give one for each.")
        return Queries.from_text(prompts, completions)
    return attributor.generate(prompts, max_new_tokens=max_new_tokens)


def _rows(path: str | None) -> Any:
    from .recipes import load_rows

    return None if path is None else load_rows(path)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    return path.read_text(encoding="utf-8")


def main() -> None:
    """Entry point of `hf-source`."""
    # On import it warns of an optional package of its own, at every command, whether or not it is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app()


if __name__ == "__main__":
    main()
