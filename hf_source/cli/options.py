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
"""Arguments and options that several commands of `hf-source` have, each with its one text of help."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """`--method`."""

    source = "source"
    auto = "auto"
    fast_source = "fast-source"
    stepwise = "stepwise"
    unrolled = "unrolled"
    influence = "influence"
    tracin = "tracin"
    diffusion_tracin = "diffusion-tracin"
    diffusion_retrac = "diffusion-retrac"
    grad_dot = "grad-dot"
    grad_cos = "grad-cos"
    trak = "trak"
    trackstar = "trackstar"
    logra = "logra"
    datainf = "datainf"
    bm25 = "bm25"
    embedding = "embedding"


class CurvatureName(StrEnum):
    """`--curvature`."""

    joint = "joint"
    ekfac = "ekfac"
    ekfac_hybrid = "ekfac-hybrid"
    diagonal = "diagonal"
    identity = "identity"
    exact = "exact"


class EnsembleName(StrEnum):
    """`--ensemble`."""

    independent = "independent"
    dropout = "dropout"
    lora = "lora"


class GranularityName(StrEnum):
    """`--granularity`."""

    row = "row"
    token = "token"


class QueryGranularityName(StrEnum):
    """`--query-granularity`."""

    sequence = "sequence"
    token = "token"
    span = "span"


Record = Annotated[str, typer.Argument(help="Folder of the training record, or its id on the Hub.")]
Runs = Annotated[
    list[str] | None,
    typer.Option("--run", help="Record of another run of the same stages with another seed; repeatable: an ensemble."),
]
Ensemble = Annotated[
    EnsembleName | None,
    typer.Option(help="Average over models: the runs, dropout masks, or briefly tuned LoRA adapters.",
                 show_default="independent with --run"),
]  # fmt: skip
EnsembleSize = Annotated[
    int | None, typer.Option(help="Dropout masks or adapters of each run.", show_default="10 masks, 3 adapters")
]
QueriesFile = Annotated[
    Path | None,
    typer.Option("--queries", "-q", help="JSON Lines (or csv, parquet) with prompt, completion and optional name."),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")]
Completions = Annotated[
    list[str] | None,
    typer.Option("--completion", "-c", help="What was said after each --prompt. Without it the model generates."),
]
Spans = Annotated[
    list[str] | None,
    typer.Option(
        "--span", help="Ask only about this part of the completions; repeatable.", show_default="all of them"
    ),
]
QueryGranularityOption = Annotated[
    QueryGranularityName,
    typer.Option("--query-granularity", help="Scores of whole completions, of each token, or of each --span."),
]
GranularityOption = Annotated[
    GranularityName,
    typer.Option(help="Scores of rows, or of each token of rows: a pass for every token, so of few rows."),
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest generated completion.")]
Stage = Annotated[str | None, typer.Option(help="Stage whose rows are meant (needed if there are several).")]
DatasetPath = Annotated[
    str | None, typer.Option(help="The stage's dataset, as it was trained on. By default the rows in the record.")
]
Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="A stage's dataset with all its columns, as stage=path; repeatable.",
        show_default="the rows in the record",
    ),
]
Stages = Annotated[
    list[str] | None, typer.Option("--stage", help="Stage whose rows are scored; repeatable.", show_default="all")
]
# Not given means: as the recipe says, or by default as SourceAttributor does.
MethodOption = Annotated[Method | None, typer.Option(help="How rows are scored.", show_default="source")]
CurvatureOption = Annotated[
    CurvatureName | None, typer.Option(help="Curvature of Source: `joint` is the most accurate.", show_default="joint")
]
SAMPLES_HELP = "Sampled gradients per segment: accuracy against time and memory."
NumSamples = Annotated[int | None, typer.Option(help=SAMPLES_HELP, show_default="1024")]
NumSegments = Annotated[
    int | None,
    typer.Option(
        help="Segments to read each stage's record as: fewer take less time and memory.", show_default="as recorded"
    ),
]
Index = Annotated[
    str | None,
    typer.Option("--index", help="Answer from an index (`hf-source index`): its folder, or its id on the Hub."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Any other setting of SourceAttributor as key=value, e.g. seed=1; repeatable."),
]
Recipe = Annotated[Path | None, typer.Option(help="YAML file with settings of SourceAttributor; options override it.")]
MethodNames = Annotated[
    list[str] | None,
    typer.Option(
        "--methods",
        "-m",
        help="Methods to compare, repeatable or with commas; settings after a colon: source:num_samples=512.",
        show_default="source",
    ),
]
ReportFolder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for report.json, report.md and report.html.")
]
Cache = Annotated[Path | None, typer.Option(help="Folder of finished retrainings.", show_default="the record's")]
Revision = Annotated[str | None, typer.Option(help="Branch on the Hub.", show_default="main")]
Filter = Annotated[
    str | None,
    typer.Option(
        help="Score only rows that a cheap method (bm25), or an index (folder or id), proposes.", metavar="FILTER"
    ),
]
Candidates = Annotated[int, typer.Option(help="Rows that --filter proposes per query and stage.")]
