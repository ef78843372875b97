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
"""`hf-source report`: one HTML file on why the model said something."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .groups import Asked, Scoring
from .options import Datasets, Index, Stages


def report(
    run: Annotated[str, typer.Argument(help="Training record (folder or Hub id), or folder of saved scores.")],
    asked: Asked,
    scoring: Scoring,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    stage: Stages = None,
    dataset: Datasets = None,
    k: Annotated[int, typer.Option("-k", help="Rows per answer, stage and direction.")] = 5,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column whose values make groups, e.g. a source or a label; repeatable.",
            show_default="those that look like it",
        ),
    ] = None,
    shaded: Annotated[int, typer.Option(help="Answers whose tokens are shaded; 0 for none.")] = 8,
    title: Annotated[str | None, typer.Option(help="Heading.", show_default="Why did the model say this?")] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="RUN holds scores (`push`, `save`) rather than a record.")
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Also log figures and rows to tensorboard, wandb, trackio, ...; repeatable."),
    ] = None,
    index: Index = None,
) -> None:
    """Write one self-contained HTML page: the answers, the rows and tokens behind them, and how far to trust that.

    Of saved scores it needs no model: give the folder that `save` wrote, or with --scores a dataset on the Hub.
    """
    from ..attribution.tokens import TokenInfluence
    from ..outputs.logged import log_attribution
    from ..outputs.report import write_report

    if out.suffix != ".html":
        raise ConfigError(f"--out {out}: end the name in .html.")
    if scores or (Path(run).expanduser() / "attribution.json").is_file():
        asking = {"--queries": asked.queries, "--prompt": asked.prompt, "--stage": stage}
        attribution = _scores(run, asking)
        tokens = None if shaded else TokenInfluence()
        write_report(out, attribution, columns=column, tokens=tokens, **({} if title is None else {"title": title}))
    else:
        attribution = scoring.open_with(dataset, run, index=index)
        attribution.report(out, asked.read(attribution), stage, k, title=title, columns=column, shaded=shaded)
    if report_to:
        log_attribution(attribution, report_to, output_dir=out.parent)
    typer.echo(f"Wrote {out}.")


def _scores(run: str, given: dict[str, Any]) -> Any:
    from .. import load_attribution

    for option, value in given.items():
        if value:
            raise ConfigError(f"{option} asks the model, but {run} holds scores: give the training record instead.")
    return load_attribution(run)
