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
"""The strongest rows of each query as tables for the terminal."""

from collections.abc import Iterable, Mapping

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..attribution.queries import Queries
from .numbers import signed


def print_top(
    console: Console, queries: Queries, top: Dataset, unit: str = "nats", marked: Mapping[tuple, str] = {}
) -> None:
    """Print, for each query, its supporting and opposing rows in each stage.

    Args:
        console: where to print.
        queries: what was asked.
        top: from `SourceAttributor.top`.
        unit: of the scores, for the heading.
        marked: `(query, stage, row)` -> a note to put beside the row.
    """
    rows = list(top)
    if top.info.description:
        console.print(Text(shown(top.info.description), "yellow"))
    for name, prompt, completion in queries:
        console.print()
        said = (shown(completion), "bold yellow")
        console.print(Text.assemble((shown(name), "bold"), "  ", shown(prompt), said), highlight=False)
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("stage")
        table.add_column(Text(f"score ({unit})" if unit else "score"), justify="right")
        table.add_column("row", justify="right")
        table.add_column("text", overflow="fold")
        for row in (row for row in rows if row["query"] == name):
            style = "green" if row["score"] >= 0 else "red"
            note = marked.get((name, row["stage"], row["row"]), "")
            table.add_row(
                Text(shown(row["stage"])),
                Text(signed(row["score"]), style),
                str(row["row"]),
                Text.assemble(_one_line(row["text"]), (f"  {shown(note)}" if note else "", "bold yellow")),
            )
        console.print(table)


def retrieval_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> Table:
    """`{method: {stage: {measure: value}}}` as one table."""
    stages = list(next(iter(summary.values())))
    measures = ("recall@1", "recall@5", "mrr")
    table = Table(title=Text(title), title_justify="left")
    table.add_column("method")
    for stage in stages:
        for measure in measures:
            table.add_column(Text(f"{stage} {measure}"), justify="right")
    for method, by_stage in summary.items():
        values = [f"{by_stage[stage][measure]:.3f}" for stage in stages for measure in measures]
        table.add_row(Text(method), *values)
    return table


def shown(text: str) -> str:
    """Text without what a terminal would obey: escape sequences, carriage returns, changes of direction."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _one_line(text: str) -> str:
    return shown(" ".join(text.split()))


def describe_columns(dataset: Dataset, names: Iterable[str]) -> str:
    """One line that tells what columns a dataset has gained."""
    columns = [name for name in dataset.column_names if name.startswith("source_")]
    shown = ", ".join(columns[:3]) + (f", ... ({len(columns)} in all)" if len(columns) > 3 else "")
    count = len(list(names))
    return f"{len(dataset):,} rows with {shown} for {count} {'query' if count == 1 else 'queries'}"
