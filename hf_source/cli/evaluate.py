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
"""`hf-source evaluate`: train a recorded run again without some of its rows, and say what the scores are worth."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .groups import Asked
from .opening import open_attributor
from .options import Cache, MethodNames, Record, ReportFolder, Settings, Stage
from .processes import is_main_process


class RetrainingName(StrEnum):
    """`--retraining`."""

    stacked = "stacked"
    trainer = "trainer"


def evaluate(
    record: Record,
    asked: Asked,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="removal (same order, few rows left out) or halves (random halves, several orders); repeatable.",
            show_default="removal",
        ),
    ] = None,
    methods: MethodNames = None,
    stage: Stage = None,
    num_subsets: Annotated[int | None, typer.Option(help="Subsets left out.", show_default="64; halves: 100")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of rows left out.", show_default="0.02; 0.5")] = None,
    seeds: Annotated[int | None, typer.Option(help="Orders averaged over.", show_default="the run's; 5")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the subsets.", show_default="0")] = None,
    retraining: Annotated[
        RetrainingName,
        typer.Option(help="stacked (many copies at once; small models) or trainer (a real Trainer for each)."),
    ] = RetrainingName.stacked,
    num_workers: Annotated[int, typer.Option(help="Processes, for --retraining trainer; 0 for this one.")] = 0,
    training: Annotated[
        Path | None,
        typer.Option(help="YAML recipe that trains the stage, for --retraining trainer.", show_default="the record"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --seeds: new initial weights, too.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Make the first ones, tell the time of all, and end.")] = False,
    out: ReportFolder = None,
    cache: Cache = None,
    settings: Settings = None,
) -> None:
    """Measure on your own run how well scores foretell what training without rows does (LDS).

    Finished retrainings are kept: a killed command goes on where it was, and another method costs its scores only. The
    figures are kept beside the record too, and `attribute` and `top` say them with every score.
    """
    from ..evaluation import evaluate as run
    from ..evaluation.planning import plan_evaluation

    chosen = labelled(methods or ["source"])
    attributor = open_attributor([record], None, settings, {})
    wanted = asked.read(attributor)
    chosen_again = {"stage": stage, "cache": cache, "fresh": fresh}
    again = _retraining(attributor, attributor.encode(wanted), retraining, num_workers, training, chosen_again)
    options = {
        "protocols": protocol or ["removal"],
        "num_subsets": num_subsets,
        "fraction": fraction,
        "num_seeds": seeds,
        "seed": seed,
        "retraining": again,
    }
    if plan:
        typer.echo(str(plan_evaluation(attributor, wanted, **options)))
        return
    show_report(run(attributor, wanted, methods=chosen, **options), out)


def _retraining(
    attributor: Any, queries: Any, kind: RetrainingName, num_workers: int, recipe: Path | None, options: dict[str, Any]
) -> Any:
    from ..evaluation.evaluate import stacked_for, trainer_for

    if kind is RetrainingName.stacked:
        if num_workers or recipe is not None:
            raise ConfigError("--num-workers and --training belong to --retraining trainer.")
        return stacked_for(attributor, queries, **options)
    from ..recipes import trainer_of

    make_trainer = None if recipe is None else trainer_of(recipe)
    return trainer_for(attributor, queries, num_workers=num_workers, make_trainer=make_trainer, **options)


def show_report(report: Any, out: Path | None) -> None:
    """Print an evaluation's report, and write it if a folder was given."""
    from rich.console import Console

    Console().print(report.table())
    if out is not None and is_main_process():
        typer.echo(f"Wrote {report.write(out)}: report.json, report.md, report.html.")


def labelled(given: list[str]) -> dict[str, dict[str, Any]]:
    """`source:num_samples=512` as label -> settings.

    Raises:
        ConfigError: if something is empty, given twice, or not of the form key=value.
    """
    from ..recipes import apply_override

    found: dict[str, dict[str, Any]] = {}
    for label in (part.strip() for text in given for part in text.split(",")):
        method, *overrides = label.split(":")
        if not method:
            raise ConfigError("--methods has an empty name: write them as source,influence,bm25.")
        if label in found:
            raise ConfigError(f"--methods names {label!r} twice.")
        found[label] = {"method": method}
        for override in overrides:
            apply_override(found[label], override)
    return found
