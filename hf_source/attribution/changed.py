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
"""Rows that training could have had instead of its own: what they would have done at the same visits."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..data import prepare_rows
from ..errors import DataError, UnsupportedError
from ..gradients import CausalLMTask, RowLossTask
from ..recording import StageRecord
from .rows import StageRows


if TYPE_CHECKING:
    from .attributor import SourceAttributor

_RAW = (("text",), ("prompt", "completion"))


class ChangedRows(StageRows):
    """A stage's rows, some of them replaced; made by `changed_rows`."""

    def _check_first_loss(self, gradients: Any) -> None:
        """They are not the rows that the loss was computed from, so there is nothing to compare."""


def changed_rows(
    attributor: "SourceAttributor", stage: StageRecord, changes: Mapping[int, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Rows as the Trainer would have read them, had some of their columns been different.

    Args:
        attributor: has the dataset and the tokenizer.
        stage: whose rows.
        changes: row number -> columns to replace, e.g. `{"completion": " Suva."}` or `{"label": 2}`.

    Raises:
        DataError: if a number or a column is not there, or a changed text has no tokenizer.
    """
    rows = attributor.rows(stage)
    if stage.packing is not None:
        raise UnsupportedError(f"Stage {stage.name!r} packed its rows into sequences, in which none can be replaced.")
    place = {int(number): position for position, number in enumerate(rows.numbers)}
    trained = set(rows.trained.tolist())
    found = {}
    for number, change in changes.items():
        if number not in trained or number not in place:
            raise DataError(f"Row {number} is none of the rows that stage {stage.name!r} trained on.")
        tokens = rows.dataset.with_format(None)[int(rows.positions[number])]
        given = rows.given.with_format(None)[place[number]]
        found[int(number)] = tokens | _as_read(attributor, stage, {**given, **change}, change, tokens)
    return found


def _as_read(
    attributor: "SourceAttributor",
    stage: StageRecord,
    row: Mapping[str, Any],
    change: Mapping[str, Any],
    tokens: Mapping[str, Any],
) -> dict[str, Any]:
    kinds = [kind for kind in _RAW if set(kind) & set(change)]
    own = {key: value for key, value in change.items() if key in tokens}
    if kinds:
        missing = [key for key in kinds[0] if key not in row]
        if missing:
            raise DataError(
                f"A row's {kinds[0][-1]!r} is changed, but its {missing[0]!r} is not known: give it too, or the "
                "dataset that was trained on."
            )
        raw = Dataset.from_list([{key: row[key] for key in kinds[0]}])
        made = prepare_rows(raw, attributor.processing_class, stage.dataset.get("max_length")).with_format(None)[0]
        own |= {key: value for key, value in made.items() if key in tokens}
        if "attention_mask" in tokens:
            own["attention_mask"] = [1] * len(made["input_ids"])
    unread = set(change) - set(own) - {key for kind in kinds for key in kind}
    if not own or unread:
        raise DataError(
            f"Column {sorted(unread or change)[0]!r} is not one that training read: change "
            f"{', '.join(sorted(set(tokens) | {'text', 'prompt', 'completion'}))}."
        )
    return own


def replaced(dataset: Dataset, places: Mapping[int, int], rows: Mapping[int, Mapping[str, Any]]) -> Any:
    """A dataset with further rows at its end that take the place of some of its rows.

    Args:
        dataset: tokenised rows.
        places: row number -> position.
        rows: row number -> the row instead.

    Returns:
        The longer dataset, and the new positions by number.
    """
    dataset = dataset.with_format(None)
    more = Dataset.from_list([dict(row) for row in rows.values()], features=dataset.features)
    moved = {int(number): len(dataset) + index for index, number in enumerate(rows)}
    return concatenate_datasets([dataset, more]), {**places, **moved}


def with_changed_rows(
    attributor: "SourceAttributor", stage: StageRecord, rows: Mapping[int, Mapping[str, Any]]
) -> "SourceAttributor":
    """An attributor whose scores are of other rows at the visits of some of a stage's rows.

    The recorded weights, preconditioners and normalizers stay: score `m` is then what the other row would have done in
    place of row `m`, to first order.

    Args:
        attributor: of the record.
        stage: whose rows.
        rows: from `changed_rows`.

    Raises:
        UnsupportedError: for an ensemble, and methods that make the recorded steps again.
    """
    if attributor.method in ("stepwise", "unrolled"):
        raise UnsupportedError(
            f"method={attributor.method!r} trains on the rows again, so other rows would make it another run: use "
            "`attributor.like(method='source')`."
        )
    if attributor.ensemble is not None:
        raise UnsupportedError("Rows cannot be replaced in an ensemble: ask an attributor of one record.")
    other = attributor.like()
    own = copy.copy(other.rows(stage))
    own.__class__ = ChangedRows
    task = own.task if isinstance(own.task, RowLossTask) else CausalLMTask()
    places = {int(number): int(own.positions[number]) for number in own.trained}
    own.dataset, places = replaced(own.dataset, places, rows)
    own.positions, own.lengths, own.items = (np.array(part) for part in (own.positions, own.lengths, own.items))
    for number, row in rows.items():
        own.positions[number] = places[int(number)]
        own.lengths[number], own.items[number] = task.length(row), task.count_items(row)
    other._rows[stage.name] = own
    return other
