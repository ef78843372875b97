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
"""`hf-source ask`: the questions people ask of scores, each a command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .errors import friendly_errors
from .opening import open_attributor, read_queries, read_rows
from .options import Completions, MaxNewTokens, MethodOption, NumSamples, Prompts, QueriesFile, Settings


ask_app = typer.Typer(
    help="Ask what people ask: why this error, which group, what is missing, what to change, which rows are wrong or "
    "repeated, which to keep, who deserves credit, and whether to trust it. Every answer says how far to trust it; "
    "`--verify` trains again and holds the prediction against what happens.",
    no_args_is_help=True,
)

Record = Annotated[
    str, typer.Argument(metavar="RECORD", help="Folder or Hub id of the training record; or of saved scores.")
]
Shared = Annotated[
    bool,
    typer.Option("--shared", help="RECORD is scores that were pushed, not a record (a folder is told by itself)."),
]
Stage = Annotated[str | None, typer.Option(help="Stage whose rows are meant.", show_default="all, where it can be")]
DatasetPath = Annotated[
    list[str] | None,
    typer.Option(help="A stage's dataset, for columns that the record lacks, as path or stage=path; repeatable."),
]
Verify = Annotated[bool, typer.Option("--verify", help="Train again (many copies at once), and compare.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for answer.md, answer.parquet and answer.json.")]
By = Annotated[str | None, typer.Option(help="Column whose values make the groups, or `stage`.")]
Clusters = Annotated[int | None, typer.Option(help="Instead of --by: so many clusters of texts by their words.")]


class Order(StrEnum):
    """`--order`."""

    self_influence = "self-influence"
    loss = "loss"
    opposition = "opposition"


class Rule(StrEnum):
    """`--rule`."""

    groups = "groups"
    rows = "rows"


class Likeness(StrEnum):
    """`--by` of `duplicates`."""

    text = "text"
    gradient = "gradient"


@ask_app.command()
def why(
    record: Record,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What was asked; repeatable.")],
    right: Annotated[list[str], typer.Option("--right", help="The right answer to each prompt.")],
    wrong: Annotated[
        list[str] | None, typer.Option("--wrong", help="The wrong one.", show_default="what the model says")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Rows per prompt, stage and direction.")] = 5,
    stage: Stage = None,
    dataset: DatasetPath = None,
    verify: Verify = False,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Why this error? The rows that push towards a wrong answer and away from the right one."""
    with friendly_errors():
        from ..questions import why as question

        source = _source(record, False, dataset, stage, method, num_samples, settings)
        _show(question(source, prompt, right, wrong or None, k=k, stage=stage, verify=verify), out)


@ask_app.command()
def groups(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    by: By = None,
    clusters: Clusters = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    verify: Verify = False,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    max_new_tokens: MaxNewTokens = 32,
    settings: Settings = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """Which group? Influence of the values of a column, of stages, of clusters of texts."""
    with friendly_errors():
        from ..questions import groups as question

        source = _source(record, shared, dataset, stage, method, num_samples, settings)
        asked = _asked(source, queries, prompt, completion, max_new_tokens)
        _show(question(source, asked, by, clusters=clusters, stage=stage, verify=verify), out)


@ask_app.command()
def missing(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    by: Annotated[str | None, typer.Option(help="Column of --queries whose values are regions.")] = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    max_new_tokens: MaxNewTokens = 32,
    settings: Settings = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """What is missing? Queries that no row supports, compared with the others."""
    with friendly_errors():
        from ..questions import missing as question

        source = _source(record, shared, dataset, stage, method, num_samples, settings)
        asked = _asked(source, queries, prompt, completion, max_new_tokens)
        _show(question(source, asked, by=_regions(queries, by), stage=stage), out)


@ask_app.command()
def actions(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    by: By = None,
    k: Annotated[list[int] | None, typer.Option("-k", help="Numbers of single rows to drop or repeat.")] = None,
    relabel: Annotated[
        Path | None, typer.Option(help="JSON Lines with `row` and the columns to correct, e.g. completion.")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Actions wanted; repeatable.")] = None,
    stage: Stage = None,
    dataset: DatasetPath = None,
    verify: Verify = False,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    max_new_tokens: MaxNewTokens = 32,
    settings: Settings = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """What should I change? Rows or groups to drop, to repeat or to relabel, by their predicted effect."""
    with friendly_errors():
        from ..questions import actions as question
        from ..questions.actions import KINDS

        source = _source(record, shared, dataset, stage, method, num_samples, settings)
        asked = _asked(source, queries, prompt, completion, max_new_tokens)
        chosen = {"k": k or [1, 10], "relabel": _corrections(relabel), "kinds": kinds or KINDS}
        _show(question(source, asked, by, stage=stage, verify=verify, **chosen), out)


@ask_app.command()
def mislabelled(
    record: Record,
    queries: QueriesFile = None,
    order: Annotated[Order, typer.Option(help="What puts rows first.")] = Order.self_influence,
    known: Annotated[str | None, typer.Option(help="Column that says which rows are wrong, to judge by.")] = None,
    k: Annotated[int, typer.Option("-k", help="Rows to list.")] = 20,
    stage: Stage = None,
    dataset: DatasetPath = None,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Which rows are mislabelled? The ones that no other row supports; a list to check."""
    with friendly_errors():
        from ..questions import mislabelled as question

        source = _source(record, False, dataset, stage, method, num_samples, settings)
        asked = None if queries is None else _asked(source, queries, None, None, 0)
        _show(question(source, asked, order=order.value, known=known, k=k, stage=stage), out)


@ask_app.command()
def duplicates(
    record: Record,
    by: Annotated[Likeness, typer.Option(help="Compare texts, or gradients (last stage).")] = Likeness.text,
    threshold: Annotated[float, typer.Option(help="Similarity from which on rows belong together.")] = 0.8,
    stage: Stage = None,
    dataset: DatasetPath = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """Which rows are duplicates? Sets of rows with the same text, nearly so, or nearly the same gradient."""
    with friendly_errors():
        from ..questions import duplicates as question

        source = _source(record, shared, dataset, stage, None, None, None)
        _show(question(source, by=by.value, threshold=threshold, stage=stage), out)


@ask_app.command()
def keep(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    budget: Annotated[float, typer.Option(help="Rows to keep, or a share of them below 1.")] = 0.5,
    judge: Annotated[
        Path | None, typer.Option(help="Other queries, whose loss judges the choice.", show_default="the same")
    ] = None,
    num_random: Annotated[int, typer.Option(help="Draws of random rows to compare with.")] = 3,
    stage: Stage = None,
    dataset: DatasetPath = None,
    verify: Verify = False,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    max_new_tokens: MaxNewTokens = 32,
    settings: Settings = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """Which data to keep? The rows that help a target most, against random rows of the same number."""
    with friendly_errors():
        from ..questions import keep as question

        source = _source(record, shared, dataset, stage, method, num_samples, settings)
        asked = _asked(source, queries, prompt, completion, max_new_tokens)
        judges = None if judge is None else _asked(source, judge, None, None, 0)
        size = budget if budget < 1 else int(budget) if budget.is_integer() else budget
        options = {"judge": judges, "num_random": num_random, "stage": stage, "verify": verify}
        _show(question(source, asked, size, **options), out)


@ask_app.command()
def credit(
    record: Record,
    queries: QueriesFile = None,
    prompt: Prompts = None,
    completion: Completions = None,
    by: Annotated[str, typer.Option(help="Column that names the contributor of a row, or `stage`.")] = "source",
    rule: Annotated[Rule, typer.Option(help="Positive parts of summed scores, or of each row's.")] = Rule.groups,
    stage: Stage = None,
    dataset: DatasetPath = None,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    max_new_tokens: MaxNewTokens = 32,
    settings: Settings = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """Who deserves credit? Shares per contributor that sum to one, by a rule that is said."""
    with friendly_errors():
        from ..questions import credit as question

        source = _source(record, shared, dataset, stage, method, num_samples, settings)
        asked = _asked(source, queries, prompt, completion, max_new_tokens)
        _show(question(source, asked, by, rule=rule.value, stage=stage), out)


@ask_app.command()
def trust(
    record: Record,
    stage: Stage = None,
    method: MethodOption = None,
    num_samples: NumSamples = None,
    settings: Settings = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """Can I trust this? What was measured of scores on this run, and what stands against relying on them."""
    with friendly_errors():
        from ..questions import trust as question

        _show(question(_source(record, shared, None, stage, method, num_samples, settings), stage=stage), out)


def _source(
    record: str,
    shared: bool,
    datasets: list[str] | None,
    stage: str | None,
    method: MethodOption,
    num_samples: int | None,
    settings: list[str] | None,
) -> Any:
    """An attributor of the record, or the scores that were shared."""
    if shared or Path(record, "attribution.json").is_file():
        if datasets or method or num_samples or settings:
            raise ConfigError("Shared scores have their rows and settings already: leave the options for them out.")
        from ..outputs.attribution_files import load_attribution

        return load_attribution(record)
    named = {"method": method and method.value, "num_samples": num_samples}
    attributor = open_attributor([record], None, settings, {k: v for k, v in named.items() if v is not None})
    names = [own.name for own in attributor.record.stages]
    for given in datasets or []:
        name, sign, path = given.partition("=")
        of_stage = bool(sign) and name in names
        attributor.set_dataset(name if of_stage else stage, read_rows(path if of_stage else given))
    return attributor


def _asked(
    source: Any, file: Path | None, prompts: list[str] | None, completions: list[str] | None, max_new_tokens: int
) -> Any:
    """The queries; of shared scores all of them by default."""
    from ..attribution.attributor import SourceAttributor

    if not isinstance(source, SourceAttributor):
        if file is None and not prompts:
            return None
        if file is None and not completions:
            raise ConfigError("Shared scores cannot generate: give --completion for each --prompt, or neither.")
    return read_queries(source, file, prompts, completions, max_new_tokens)


def _regions(file: Path | None, column: str | None) -> list[str] | None:
    """A column of the queries' file."""
    from ..recipes import load_rows

    if column is None:
        return None
    if file is None:
        raise ConfigError("--by is a column of --queries: give the file.")
    rows = load_rows(file)
    if column not in rows.column_names:
        raise ConfigError(f"{file} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    return [str(value) for value in rows[column]]


def _corrections(file: Path | None) -> dict[int, dict[str, Any]] | None:
    from ..recipes import load_rows

    if file is None:
        return None
    rows = load_rows(file)
    if "row" not in rows.column_names or len(rows.column_names) < 2:
        raise ConfigError(f"{file} needs a column `row`, and at least one column with what it should say.")
    return {int(row.pop("row")): {key: v for key, v in row.items() if v is not None} for row in rows}


def _show(answer: Any, out: Path | None) -> None:
    from rich.console import Console

    Console().print(answer)
    if out is not None:
        typer.echo(f"Wrote {answer.write(out)}: answer.md, answer.parquet, answer.json.")
