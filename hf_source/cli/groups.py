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
"""Options that belong together, each group with what is made of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .opening import by_stage, open_attributor, read_rows
from .options import (
    Completions,
    CurvatureOption,
    Datasets,
    Ensemble,
    EnsembleSize,
    MaxNewTokens,
    MethodOption,
    NumSamples,
    NumSegments,
    Prompts,
    QueriesFile,
    QueryGranularityName,
    QueryGranularityOption,
    Recipe,
    Runs,
    Settings,
    Spans,
)


if TYPE_CHECKING:
    from ..attribution import Queries, SourceAttributor


@dataclass
class Asked:
    """What is to be explained: a file of queries, prompts with completions, or prompts that the model completes."""

    queries: QueriesFile = None
    prompt: Prompts = None
    completion: Completions = None
    max_new_tokens: MaxNewTokens = 32
    span: Spans = None
    query_granularity: QueryGranularityOption = QueryGranularityName.sequence

    @property
    def given(self) -> bool:
        """Whether anything is asked."""
        return self.queries is not None or bool(self.prompt)

    def read(self, attributor: "SourceAttributor") -> "Queries":
        """The queries.

        Raises:
            ConfigError: if there is none of them or more than one, or a file that is no file of queries.
            DataError: if a completion holds none of the parts.
        """
        queries = self._whole(attributor)
        if self.span:
            spans = {name: [part for part in self.span if part in said] for name, _, said in queries}
            missing = [said for name, _, said in queries if not spans[name]]
            if missing:
                raise DataError(f"The answer {missing[0]!r} holds no {' and no '.join(map(repr, self.span))}.")
            queries = attributor.mark(queries, spans)
        whole = self.query_granularity is QueryGranularityName.sequence
        return queries if whole else attributor.split(queries, self.query_granularity.value)

    def _whole(self, attributor: "SourceAttributor") -> "Queries":
        from .. import Queries

        if (self.queries is None) == (not self.prompt):
            raise ConfigError(
                "Say what to explain: either --queries FILE, or --prompt (with --completion, or generated)."
            )
        if self.queries is not None:
            return self._from_file(attributor)
        if not self.completion:
            return attributor.generate(self.prompt, max_new_tokens=self.max_new_tokens)
        if len(self.completion) != len(self.prompt):
            raise ConfigError(
                f"{len(self.prompt)} --prompt but {len(self.completion)} --completion: give one for each."
            )
        return Queries.from_text(self.prompt, self.completion)

    def _from_file(self, attributor: "SourceAttributor") -> "Queries":
        from .. import Queries
        from ..gradients.diffusion import IMAGES
        from ..recipes import load_rows

        rows = load_rows(self.queries)
        if "input_ids" in rows.column_names:
            queries = Queries.from_dataset(rows, attributor.processing_class)
            given = {"prompt", "completion"} <= set(rows.column_names)
            return Queries(queries.names, rows["prompt"][:], rows["completion"][:], queries.rows) if given else queries
        if IMAGES in rows.column_names:
            return Queries.from_rows(rows)
        if {"text", "label"} <= set(rows.column_names):
            return _labelled_queries(attributor, rows)
        missing = {"prompt", "completion"} - set(rows.column_names)
        if missing:
            raise ConfigError(
                f"{self.queries} has no column {sorted(missing)[0]!r}: queries have prompt and completion."
            )
        names = rows["name"][:] if "name" in rows.column_names else None
        return Queries.from_text(rows["prompt"][:], rows["completion"][:], names)


def _labelled_queries(attributor: "SourceAttributor", rows: Any) -> "Queries":
    """Rows as `trainer: classification` takes them: what is asked is the loss, or measurement, of their label."""
    from .. import Queries
    from ..recipe_trainers import labelled_rows

    stage = attributor.record.stages[-1]
    if stage.loss["kind"] != "classification":
        raise ConfigError(f"Queries with `text` and `label` are for classifiers; stage {stage.name!r} trained none.")
    shown = [name for name in ("text", "text_pair") if name in rows.column_names]
    prompts = [" / ".join(texts) for texts in zip(*(rows[name][:] for name in shown), strict=True)]
    made = labelled_rows(rows, attributor.processing_class, stage.dataset.get("max_length")).remove_columns(shown)
    asked = Queries.from_rows(made)
    return Queries(asked.names, prompts, [str(label) for label in rows["label"][:]], asked.rows, are_rows=True)


@dataclass
class Scoring:
    """How rows are scored: settings of SourceAttributor."""

    method: MethodOption = None
    curvature: CurvatureOption = None
    num_samples: NumSamples = None
    num_segments: NumSegments = None
    recipe: Recipe = None
    settings: Settings = None

    @property
    def named(self) -> dict[str, Any]:
        """The settings that have an option of their own, where it was given."""
        return given(
            method=self.method,
            curvature=self.curvature,
            num_samples=self.num_samples,
            num_segments=self.num_segments,
        )

    def open(self, *records: str, **more: Any) -> "SourceAttributor":
        """The attributor of the records, with `more` settings where they are not None."""
        return open_attributor(records, self.recipe, self.settings, self.named | given(**more))

    def open_with(self, datasets: Datasets, record: str, **more: Any) -> "SourceAttributor":
        """The attributor of a record whose stages have other datasets than its own, as `stage=path`."""
        paths = by_stage(datasets, "--dataset")
        attributor = self.open(record, **more)
        for stage, path in paths.items():
            attributor.set_dataset(stage, read_rows(path))
        return attributor


@dataclass
class Models:
    """Other models of the same training, whose scores are averaged with the record's."""

    run: Runs = None
    ensemble: Ensemble = None
    ensemble_size: EnsembleSize = None

    def open(self, record: str, scoring: Scoring, **more: Any) -> "SourceAttributor":
        """The attributor of all of them."""
        return scoring.open(
            record, *(self.run or []), ensemble=self.ensemble, ensemble_size=self.ensemble_size, **more
        )


def given(**options: Any) -> dict[str, Any]:
    """Those that were given, with the names of choices as text."""
    return {name: getattr(value, "value", value) for name, value in options.items() if value is not None}
