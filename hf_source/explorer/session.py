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
"""What the explorer does, without its buttons: generate, ask about a span, choose rows, and remove a group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..attribution.asking import query_losses
from ..attribution.methods import METHODS
from ..attribution.queries import Queries
from ..errors import DataError
from ..outputs.groups import column_values, grouping_columns


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor


@dataclass(frozen=True)
class Group:
    """Rows that are looked at together; everything that is not given is not narrowed down.

    Attributes:
        stage: name of one stage.
        column: of its dataset.
        value: of the column.
        rows: numbers, in one stage.
    """

    stage: str | None = None
    column: str | None = None
    value: str | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Found:
    """Scores of every row for one question.

    Attributes:
        asked: the text that was asked about: the answer, or a part of it.
        loss: its negative log-likelihood, nats; `None` where that is not what is measured.
        scores: stage -> float32 `[rows]`, in the order of the stage's dataset.
        unit: of the scores; empty if they have none.
        trust: what is known of how far to trust them.
    """

    asked: str
    loss: float | None
    scores: Mapping[str, np.ndarray]
    unit: str
    trust: str = ""


@dataclass(frozen=True)
class Removal:
    """What is predicted had a group not been trained on.

    Attributes:
        num_rows: of the group.
        num_all: rows of all stages.
        change: sum of the scores: of the answer's loss, in the unit of the scores.
        before, after: log-probability of the answer in nats; `None` where scores do not say.
    """

    num_rows: int
    num_all: int
    change: float
    before: float | None = None
    after: float | None = None

    def sentences(self, unit: str) -> list[str]:
        """The prediction in words."""
        share = 100 * self.num_rows / max(1, self.num_all)
        rows = f"{self.num_rows:,} {'row' if self.num_rows == 1 else 'rows'} ({share:.3g} % of all)"
        if self.before is None:
            return [f"{rows}: the scores add up to {self.change:+.4g}. They have no unit, so nothing more follows."]
        found = [
            f"Without these {rows} the answer's log-probability would go from {self.before:.4g} to {self.after:.4g} "
            f"{unit}: from a probability of {_probability(self.before)} to {_probability(self.after)}."
        ]
        if self.after > 0:
            found.append("More than certain cannot be: the group is too large for a first-order prediction.")
        elif share > 10:
            found.append("This is a first-order prediction; a tenth of the data or more is not a small group.")
        return found


def _probability(log: float) -> str:
    return f"{exp(min(log, 0.0)):.3g}"


@dataclass
class Explorer:
    """One recorded model, opened to be asked.

    Args:
        attributor: of the record. Datasets given to it may have more columns than the record, which then make groups.
        longest: tokens that may be generated at once.
    """

    attributor: "SourceAttributor"
    longest: int = 64
    _lock: RLock = field(default_factory=RLock, repr=False)  # the app answers several people, the model one at a time
    _model: Any = field(default=None, repr=False)
    _columns: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in the order of training."""
        return [stage.name for stage in self.attributor.record.stages]

    def generate(self, prompt: str, max_new_tokens: int = 32) -> str:
        """What the model says after a prompt.

        Raises:
            DataError: if the prompt is empty or too long.
        """
        with self._lock:
            count = max(1, min(int(max_new_tokens), self.longest))
            return self.attributor.generate([prompt], max_new_tokens=count).completions[0]

    def question(self, prompt: str, completion: str, span: tuple[int, int] | None = None) -> Queries:
        """A query about an answer, or about the tokens of it that a span of its letters touches.

        Raises:
            DataError: if there is nothing to ask about.
            UnsupportedError: if the model is an encoder-decoder and a span was given.
        """
        queries = self.attributor.encode(Queries.from_text([prompt], [completion], ["answer"]))
        if span is None or span[0] >= span[1] or span == (0, len(completion)):
            return queries
        marked = self.attributor.mark(queries, {"answer": span})
        return Queries(["answer"], [prompt + completion[: span[0]]], [completion[slice(*span)]], marked.rows)

    def ask(self, prompt: str, completion: str, span: tuple[int, int] | None = None) -> Found:
        """Score every row for an answer, or for a marked span of it.

        Raises:
            DataError: see `question`.
        """
        with self._lock:
            queries, attributor = self.question(prompt, completion, span), self.attributor
            scores = {
                stage: attributor.scores(attributor.datasets.get(stage), queries, stage)[0]
                for stage in reversed(self.stages)  # the walk goes backwards
            }
            nats = METHODS[attributor.method].nats and "measurement" not in attributor.settings()
            loss = float(query_losses(attributor, self.model(), queries)[0]) if nats else None
            ordered = {stage: scores[stage] for stage in self.stages}
            return Found(queries.completions[0], loss, ordered, "nats" if nats else "", attributor.trust())

    def model(self) -> torch.nn.Module:
        """The model at the end of training, built once."""
        if self._model is None:
            last = self.attributor.record.stages[-1]
            self._model = self.attributor.build_model(last)
            last.load_weights(self._model, "final")
        return self._model

    # ---- groups ------------------------------------------------------------------------------------------------

    def columns(self, stage: str | None) -> list[str]:
        """Columns of a stage (of all stages) whose values make groups."""
        names = [stage] if stage else self.stages
        return list(dict.fromkeys(column for name in names for column in grouping_columns(self._given(name))))

    def values(self, stage: str | None, column: str | None) -> list[str]:
        """Values of a column, as groups are named."""
        names = [stage] if stage else self.stages
        return sorted({value for name in names for value in self._values(name, column)[1]}) if column else []

    def _given(self, stage: str) -> Any:
        return self.attributor.rows(self.attributor.record.stage(stage)).given

    def _values(self, stage: str, column: str) -> tuple[np.ndarray, list[str]]:
        rows = self._given(stage)
        if column not in rows.column_names:
            return np.zeros(len(rows), dtype=np.int64), []
        key = f"{stage}\0{column}"
        if key not in self._columns:
            self._columns[key] = column_values(rows, column)
        return self._columns[key]

    def members(self, group: Group) -> dict[str, np.ndarray]:
        """Rows of a group: stage -> bool `[rows]`.

        Raises:
            DataError: if rows are given without a stage, or there is no such row.
        """
        if group.rows is not None and group.stage is None:
            raise DataError("Row numbers belong to a stage: choose the stage that they are of.")
        found = {}
        for stage in [group.stage] if group.stage else self.stages:
            numbers = self.attributor.rows(self.attributor.record.stage(stage)).numbers
            kept = np.ones(len(numbers), dtype=bool)
            if group.column and group.value is not None:
                codes, names = self._values(stage, group.column)
                kept &= np.isin(codes, [code for code, name in enumerate(names) if name == group.value])
                kept &= len(names) > 0
            if group.rows is not None:
                missing = sorted(set(group.rows) - set(numbers.tolist()))
                if missing:
                    raise DataError(f"Stage {stage!r} has no row {missing[0]}: it has {len(numbers):,} rows.")
                kept &= np.isin(numbers, group.rows)
            found[stage] = kept
        return found

    def top(self, found: Found, group: Group, k: int = 5) -> list[dict[str, Any]]:
        """The strongest rows of a group, as `stage`, `row`, `score`, `text`: supporting ones, then opposing ones."""
        pool = []
        for stage, kept in self.members(group).items():
            places = np.flatnonzero(kept)
            order = places[np.argsort(-found.scores[stage][places], kind="stable")]
            pool += [(float(found.scores[stage][place]), stage, int(place)) for place in (*order[:k], *order[k:][-k:])]
        pool.sort(key=lambda entry: -entry[0])
        supporting = [entry for entry in pool if entry[0] > 0][:k]
        opposing = [entry for entry in pool if entry[0] < 0][-k:]
        return [self._row(*entry) for entry in (*supporting, *opposing)]

    def _row(self, score: float, stage: str, place: int) -> dict[str, Any]:
        rows = self.attributor.rows(self.attributor.record.stage(stage))
        number = int(rows.numbers[place])
        text = rows.text(number, self.attributor.processing_class)
        return {"stage": stage, "row": number, "score": score, "text": text}

    def remove(self, found: Found, group: Group) -> Removal:
        """What is predicted had none of a group's rows been trained on: the sum of their scores.

        Raises:
            DataError: if the group has no row.
        """
        members = self.members(group)
        count = int(sum(kept.sum() for kept in members.values()))
        if not count:
            raise DataError("The group has no row: choose another stage or value.")
        change = sum(float(found.scores[stage][kept].astype(np.float64).sum()) for stage, kept in members.items())
        every = sum(map(len, found.scores.values()))
        if found.loss is None:
            return Removal(count, every, change)
        return Removal(count, every, change, -found.loss, -found.loss - change)


def row_numbers(text: str) -> tuple[int, ...] | None:
    """Numbers as people write them, `3, 5 8-10`; `None` for nothing.

    Raises:
        DataError: if something is no number.
    """
    found: list[int] = []
    for part in text.replace(",", " ").split():
        first, sign, last = part.partition("-")
        if not first.isdecimal() or (sign and not last.isdecimal()):
            raise DataError(f"{part!r} is no row number: write them as 3, 5, 8-10.")
        found += range(int(first), int(last or first) + 1) if int(last or first) - int(first) < 10**6 else []
    return tuple(found) or None


def shares(found: Found) -> Sequence[tuple[str, float]]:
    """Share of the support that comes from each stage, 0 to 1."""
    sums = {stage: float(np.maximum(scores, 0).sum()) for stage, scores in found.scores.items()}
    total = sum(sums.values()) or 1.0
    return [(stage, value / total) for stage, value in sums.items()]
