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
"""`hf-source push`: attribute, and share the scores on the Hub."""

from typing import Annotated, Any

import typer

from .groups import Asked, Scoring
from .opening import by_stage
from .options import Datasets, Record, Revision, Stages


def push(
    record: Record,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Dataset repository on the Hub, as user/name.")],
    asked: Asked,
    scoring: Scoring,
    stage: Stages = None,
    dataset: Datasets = None,
    k: Annotated[int, typer.Option("-k", help="Rows per query, stage and direction in `top_influences`.")] = 10,
    include_rows: Annotated[
        bool | None,
        typer.Option(
            help="Publish the rows themselves, or row numbers and scores only.",
            show_default="rows of stages whose --source-dataset anybody can read",
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who can see it.", show_default="private unless its source is known and open"
        ),
    ] = None,
    source_dataset: Annotated[
        list[str] | None,
        typer.Option(help="Dataset on the Hub that the rows come from, as id or stage=id; repeatable."),
    ] = None,
    max_columns: Annotated[int, typer.Option(help="With more queries, scores are one list per row.")] = 100,
    shaded: Annotated[
        int,
        typer.Option(help="Answers whose tokens are scored too, for shaded reports of what is shared; 0 for none."),
    ] = 8,
    revision: Revision = None,
    commit_message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload attribution",
) -> None:
    """Attribute, and publish scores, strongest rows and queries on the Hub as a dataset with a card.

    Log in first with `hf auth login`. `hf_source.load_attribution` and `datasets.load_dataset` read it.
    """
    sources = _sources(source_dataset)
    attributor = scoring.open_with(dataset, record)
    url = attributor.push_to_hub(
        repo_id,
        asked.read(attributor),
        stage,
        k,
        include_rows=include_rows,
        private=private,
        source_datasets=sources,
        max_columns=max_columns,
        shaded=shaded,
        revision=revision,
        commit_message=commit_message,
    )
    typer.echo(f"Pushed to {url}.")


def _sources(given: list[str] | None) -> Any:
    """One id for all stages, or stage -> id."""
    if given and len(given) == 1 and "=" not in given[0]:
        return given[0]
    return by_stage(given, "--source-dataset")
