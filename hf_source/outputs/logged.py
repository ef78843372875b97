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
"""Figures and tables of attributions where a run's metrics are: TensorBoard, Weights & Biases, Trackio, ...

They go through the callbacks that transformers has for `report_to`, which know how to reach each of these. Weights &
Biases and Trackio have tables of their own; to the others a table is Markdown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..attribution.queries import Queries
from ..errors import ConfigError
from .attribution_files import Attribution
from .cards import markdown
from .groups import group_of
from .numbers import signed
from .tables import shown


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor

_LONGEST = 300  # characters of a row's text


@dataclass(frozen=True)
class RowTable:
    """The strongest rows of an answer.

    Attributes:
        prompt, completion: what was asked.
        rows: `(score, stage, row number, text)`, the text empty where it is not to be seen.
        trust: how far to trust the scores.
    """

    prompt: str
    completion: str
    rows: tuple[tuple[float, str, int, str], ...]
    trust: str

    COLUMNS = ("score", "stage", "row", "text")

    def markdown(self) -> str:
        """Of which no text is taken for markup."""
        lines = [f"{markdown(self.prompt, 500)} **{markdown(self.completion, 500)}**", ""]
        lines += [f"| {' | '.join(self.COLUMNS)} |", "|---:|---|---:|---|"]
        for score, stage, row, text in self.rows:
            lines.append(f"| {signed(score)} | {markdown(stage)} | {row} | {markdown(text, _LONGEST)} |")
        return "\n".join([*lines, "", markdown(self.trust, 2000)]).strip()

    def wandb(self) -> Any:
        """A `wandb.Table`, which shows text as it is."""
        import wandb

        rows = [[score, shown(stage), row, shown(text)] for score, stage, row, text in self.rows]
        return wandb.Table(columns=list(self.COLUMNS), data=rows)

    def trackio(self) -> Any:
        """A `trackio.Table`, which takes text for Markdown."""
        import trackio

        rows = [[score, markdown(stage), row, markdown(text, _LONGEST)] for score, stage, row, text in self.rows]
        return trackio.Table(columns=list(self.COLUMNS), data=rows)


def log_attribution(
    attribution: "Attribution | SourceAttributor",
    report_to: str | TrainerCallback | Sequence[str | TrainerCallback],
    *,
    output_dir: str | Path = "out",
    step: int = 0,
    queries: Queries | None = None,
) -> dict[str, Any]:
    """Log what an attribution found: sums and largest scores of every stage, and a table of the strongest rows.

    A run of Weights & Biases that is open is added to and left open; one that is begun for this is ended.

    Args:
        attribution: scores, or an attributor that has some.
        report_to: `"tensorboard"`, `"wandb"`, `"trackio"`, ... as in `TrainingArguments`, several of them, or
            callbacks of one's own. Rows and answers are sent along as text.
        output_dir: of the run; TensorBoard's files go to a folder in it.
        step: that the entries are logged at.
        queries: of an attributor; by default those last attributed.

    Returns:
        What was logged: name -> number, or Markdown table.

    Raises:
        ConfigError: if an integration is unknown or not installed.
    """
    if not isinstance(attribution, Attribution):
        from .sharing import collect

        attribution = collect(attribution, queries)
    figures, tables = dict(_figures(attribution)), dict(_tables(attribution))
    args = _arguments(output_dir)
    state, control = TrainerState(global_step=step), TrainerControl()
    for callback in _callbacks(report_to):
        with_tables = {**figures, **{name: _native(table, callback) for name, table in tables.items()}}
        begun = _open_run(callback) is None
        callback.on_train_begin(args, state, control)
        callback.on_log(args, state, control, logs=with_tables)
        callback.on_train_end(args, state, control)
        if begun and (run := _open_run(callback)) is not None:
            run.finish()
    return {**figures, **{name: table.markdown() for name, table in tables.items()}}


def _native(table: RowTable, callback: TrainerCallback) -> Any:
    """A table as the place it goes to has tables."""
    from transformers.integrations import TrackioCallback, WandbCallback

    if isinstance(callback, WandbCallback):
        return table.wandb()
    return table.trackio() if isinstance(callback, TrackioCallback) else table.markdown()


def _open_run(callback: TrainerCallback) -> Any:
    """The run of Weights & Biases that is open; Trackio's callback ends its own, and others have none."""
    from transformers.integrations import WandbCallback

    if not isinstance(callback, WandbCallback):
        return None
    import wandb

    return wandb.run


def _arguments(output_dir: str | Path) -> TrainingArguments:
    """What callbacks ask about a run. To make them resets Accelerate, on which attributors go on to rely."""
    kept = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]
    try:
        return TrainingArguments(output_dir=str(output_dir), report_to="none")
    finally:
        for kind, state in kept:
            if state:
                kind._shared_state.clear()
                kind._shared_state.update(state)


def _callbacks(report_to: str | TrainerCallback | Sequence[str | TrainerCallback]) -> list[TrainerCallback]:
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    given = [report_to] if isinstance(report_to, (str, TrainerCallback)) else list(report_to)
    found: list[TrainerCallback] = []
    for each in given:
        if not isinstance(each, str):
            found.append(each)
            continue
        try:
            found += [kind() for kind in get_reporting_integration_callbacks(each)]
        except (ValueError, RuntimeError) as error:  # unknown, or not installed
            installed = ", ".join(get_available_reporting_integrations()) or "none"
            raise ConfigError(
                f"report_to={each!r} cannot be used ({error}): install it, or choose one that is there ({installed})."
            ) from error
    return found


def _figures(attribution: Attribution) -> Iterator[tuple[str, float]]:
    for stage in attribution.stages:
        for name, scores in zip(attribution.queries.names, attribution.scores(stage), strict=True):
            group = group_of(stage, scores)
            start = f"source/{name}/{stage}"
            yield f"{start}/sum", group.net
            yield f"{start}/supporting", group.supporting
            yield f"{start}/opposing", group.opposing
            yield f"{start}/largest", float(scores.max(initial=0.0))
            yield f"{start}/smallest", float(scores.min(initial=0.0))


def _tables(attribution: Attribution) -> Iterator[tuple[str, RowTable]]:
    for name, prompt, completion in attribution.queries:
        own = [row for row in attribution.top if row["query"] == name]
        rows = tuple((row["score"], row["stage"], row["row"], row["text"] or "") for row in own)
        yield f"source/{name}/rows", RowTable(prompt, completion, rows, attribution.trust or "")
