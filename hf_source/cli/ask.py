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

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .command import command
from .groups import Asked, Scoring
from .opening import read_rows
from .options import QueriesFile
from .processes import is_main_process


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


@dataclass
class Recorded(Scoring):
    """The record whose rows are meant, and how they are scored."""

    stage: Stage = None
    dataset: DatasetPath = None

    shared = False

    def load(self, record: str) -> Any:
        """An attributor of the record, or the scores that were shared."""
        if self.shared or Path(record, "attribution.json").is_file():
            if self.dataset or self.named or self.recipe or self.settings:
                raise ConfigError(
                    "Shared scores have their rows and settings already: leave the options for them out."
                )
            from .. import load_attribution

            return load_attribution(record)
        attributor = self.open(record)
        names = [own.name for own in attributor.record.stages]
        for given in self.dataset or []:
            name, sign, path = given.partition("=")
            of_stage = bool(sign) and name in names
            attributor.set_dataset(name if of_stage else self.stage, read_rows(path if of_stage else given))
        return attributor


@dataclass
class Source(Recorded):
    """The same, where scores that were shared have an answer, too."""

    shared: Shared = False


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


@command(ask_app)
def why(
    record: Record,
    source: Recorded,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What was asked; repeatable.")],
    right: Annotated[list[str], typer.Option("--right", help="The right answer to each prompt.")],
    wrong: Annotated[
        list[str] | None, typer.Option("--wrong", help="The wrong one.", show_default="what the model says")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Rows per prompt, stage and direction.")] = 5,
    verify: Verify = False,
    out: Out = None,
) -> None:
    """Why this error? The rows that push towards a wrong answer and away from the right one."""
    from ..questions import why as question

    opened = source.load(record)
    _show(question(opened, prompt, right, wrong or None, k=k, stage=source.stage, verify=verify), out)


@command(ask_app)
def groups(
    record: Record,
    asked: Asked,
    source: Source,
    by: By = None,
    clusters: Clusters = None,
    verify: Verify = False,
    out: Out = None,
) -> None:
    """Which group? Influence of the values of a column, of stages, of clusters of texts."""
    from ..questions import groups as question

    opened = source.load(record)
    wanted = _wanted(opened, asked)
    _show(question(opened, wanted, by, clusters=clusters, stage=source.stage, verify=verify), out)


@command(ask_app)
def missing(
    record: Record,
    asked: Asked,
    source: Source,
    by: Annotated[str | None, typer.Option(help="Column of --queries whose values are regions.")] = None,
    out: Out = None,
) -> None:
    """What is missing? Queries that no row supports, compared with the others."""
    from ..questions import missing as question

    opened = source.load(record)
    wanted = _wanted(opened, asked)
    _show(question(opened, wanted, by=_regions(asked.queries, by), stage=source.stage), out)


@command(ask_app)
def actions(
    record: Record,
    asked: Asked,
    source: Source,
    by: By = None,
    k: Annotated[list[int] | None, typer.Option("-k", help="Numbers of single rows to drop or repeat.")] = None,
    relabel: Annotated[
        Path | None, typer.Option(help="JSON Lines with `row` and the columns to correct, e.g. completion.")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Actions wanted; repeatable.")] = None,
    verify: Verify = False,
    out: Out = None,
) -> None:
    """What should I change? Rows or groups to drop, to repeat or to relabel, by their predicted effect."""
    from ..questions import actions as question
    from ..questions.actions import KINDS

    opened = source.load(record)
    wanted = _wanted(opened, asked)
    chosen = {"k": k or [1, 10], "relabel": _corrections(relabel), "kinds": kinds or KINDS}
    _show(question(opened, wanted, by, stage=source.stage, verify=verify, **chosen), out)


@command(ask_app)
def mislabelled(
    record: Record,
    source: Recorded,
    queries: QueriesFile = None,
    order: Annotated[Order, typer.Option(help="What puts rows first.")] = Order.self_influence,
    known: Annotated[str | None, typer.Option(help="Column that says which rows are wrong, to judge by.")] = None,
    k: Annotated[int, typer.Option("-k", help="Rows to list.")] = 20,
    out: Out = None,
) -> None:
    """Which rows are mislabelled? The ones that no other row supports; a list to check."""
    from ..questions import mislabelled as question

    opened = source.load(record)
    wanted = None if queries is None else _wanted(opened, Asked(queries))
    _show(question(opened, wanted, order=order.value, known=known, k=k, stage=source.stage), out)


@command(ask_app)
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
    from ..questions import duplicates as question

    opened = Source(stage=stage, dataset=dataset, shared=shared).load(record)
    _show(question(opened, by=by.value, threshold=threshold, stage=stage), out)


@command(ask_app)
def keep(
    record: Record,
    asked: Asked,
    source: Source,
    budget: Annotated[float, typer.Option(help="Rows to keep, or a share of them below 1.")] = 0.5,
    judge: Annotated[
        Path | None, typer.Option(help="Other queries, whose loss judges the choice.", show_default="the same")
    ] = None,
    num_random: Annotated[int, typer.Option(help="Draws of random rows to compare with.")] = 3,
    verify: Verify = False,
    out: Out = None,
) -> None:
    """Which data to keep? The rows that help a target most, against random rows of the same number."""
    from ..questions import keep as question

    opened = source.load(record)
    wanted = _wanted(opened, asked)
    judges = None if judge is None else _wanted(opened, Asked(judge))
    size = budget if budget < 1 else int(budget) if budget.is_integer() else budget
    options = {"judge": judges, "num_random": num_random, "stage": source.stage, "verify": verify}
    _show(question(opened, wanted, size, **options), out)


@command(ask_app)
def credit(
    record: Record,
    asked: Asked,
    source: Source,
    by: Annotated[str, typer.Option(help="Column that names the contributor of a row, or `stage`.")] = "source",
    rule: Annotated[Rule, typer.Option(help="Positive parts of summed scores, or of each row's.")] = Rule.groups,
    out: Out = None,
) -> None:
    """Who deserves credit? Shares per contributor that sum to one, by a rule that is said."""
    from ..questions import credit as question

    opened = source.load(record)
    wanted = _wanted(opened, asked)
    _show(question(opened, wanted, by, rule=rule.value, stage=source.stage), out)


@command(ask_app)
def trust(
    record: Record,
    scoring: Scoring,
    stage: Stage = None,
    shared: Shared = False,
    out: Out = None,
) -> None:
    """Can I trust this? What was measured of scores on this run, and what stands against relying on them."""
    from ..questions import trust as question

    opened = Source(**vars(scoring), stage=stage, shared=shared).load(record)
    _show(question(opened, stage=stage), out)


def _wanted(source: Any, asked: Asked) -> Any:
    """The queries; of shared scores all of them by default."""
    from .. import SourceAttributor

    if not isinstance(source, SourceAttributor):
        if not asked.given:
            return None
        if asked.queries is None and not asked.completion:
            raise ConfigError("Shared scores cannot generate: give --completion for each --prompt, or neither.")
        if asked.span or asked.query_granularity != "sequence":
            raise ConfigError("Shared scores are of the answers that were attributed: leave the parts of answers out.")
    return asked.read(source)


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
    if out is not None and is_main_process():
        typer.echo(f"Wrote {answer.write(out)}: answer.md, answer.parquet, answer.json.")
