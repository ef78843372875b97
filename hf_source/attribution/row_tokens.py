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
"""Scores of the label tokens of rows: the terms that a row's score is the sum of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from ..data import IGNORE_INDEX, ROW
from ..errors import DataError, UnsupportedError
from ..gradients import CausalLMTask, RowGradients
from ..recording import StageRecord
from ..source import walk
from .methods.base import Method, Scores, in_chunks
from .queries import Queries
from .rows import StageRows


if TYPE_CHECKING:
    from .attributor import SourceAttributor


_CONTENT = ("text", "prompt", "completion", "input_ids", "labels")


class RowTokens:
    """The label tokens of some rows, in place of the rows: what a walk scores.

    Args:
        rows: of the stage.
        numbers: of the rows wanted; some may never have trained.
        max_parts: longer rows are cut into so many parts of several tokens; `None` for a part per token.

    Attributes:
        count: parts there are.
        row: int64 `[parts]`, the part's own number, in whose place its score goes.
        example: int64 `[parts]`, see `StageRows`.
        parts: of each wanted row, `(token ids, [label positions of a part], [numbers of the parts])` for each of its
            pieces.
    """

    def __init__(self, rows: StageRows, numbers: Sequence[int], max_parts: int | None = None) -> None:
        self.rows = rows
        self._origin: list[int] = []
        self._positions: list[np.ndarray] = []
        self.parts: dict[int, list[tuple[list[int], list[list[int]], list[int]]]] = {}
        first = 0 if getattr(rows.task, "virtual_tokens", 0) else 1
        usable = rows.trained[rows.items[rows.trained] > 0]
        usable = usable[np.argsort(rows.row[usable], kind="stable")]
        for number in map(int, numbers):
            begin, end = np.searchsorted(rows.row[usable], [number, number + 1])
            self.parts[number] = []
            for piece in usable[begin:end]:
                self._add(number, int(piece), first, max_parts)
        self.count = len(self._origin)
        self.row = np.arange(self.count)
        self.example = rows.example[np.asarray(self._origin, dtype=np.int64)]

    def _add(self, number: int, piece: int, first: int, max_parts: int | None) -> None:
        batch = self.rows.collated([piece], torch.device("cpu"))
        asked = [place for place in np.flatnonzero(batch["labels"][0] != IGNORE_INDEX) if place >= first]
        parts = np.array_split(asked, len(asked) if max_parts is None else min(len(asked), max_parts))
        own = list(range(len(self._origin), len(self._origin) + len(parts)))
        self._origin += [piece] * len(parts)
        self._positions += parts
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[0]
        ids = batch["input_ids"][0][: int(mask.nonzero().max()) + 1].tolist()  # a collator may pad a row that is alone
        self.parts[number].append((ids, [part.tolist() for part in parts], own))

    def batches(self, parts: Sequence[int]) -> list[np.ndarray]:
        """Parts of one piece at a time, under the token budget."""
        found: dict[int, list[int]] = {}
        for part in parts:
            found.setdefault(self._origin[part], []).append(int(part))
        batches = []
        for piece, own in found.items():
            step = max(1, self.rows.max_tokens_per_batch // max(1, int(self.rows.lengths[piece])))
            batches += [np.asarray(own[start : start + step]) for start in range(0, len(own), step)]
        return batches

    def collated(self, parts: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """The piece once for each part, with the labels of that part only."""
        batch = self.rows.collated([self._origin[parts[0]]], device)
        batch = {key: value.expand(len(parts), *value.shape[1:]).contiguous() for key, value in batch.items()}
        batch["labels"] = only(batch["labels"], [self._positions[part] for part in parts])
        return batch


@dataclass(frozen=True)
class ScoredTokens:
    """A row's tokens and their scores.

    Attributes:
        ids: token ids, as the row was trained on; of packed pieces one after another.
        scores: float32 `[queries, tokens]`; 0 for tokens that were no labels.
    """

    ids: list[int]
    scores: np.ndarray


def row_token_scores(
    attributor: "SourceAttributor", queries: Queries, stage: StageRecord, numbers: Sequence[int]
) -> list[ScoredTokens]:
    """Scores of every label token of some rows of a stage; they add up to the rows' scores.

    Each token is scored with a pass of its row, so this takes as many passes as rows have label tokens: ask for the
    rows that matter.

    Args:
        attributor: of method `source` or `fast-source`.
        queries: encoded.
        stage: whose rows.
        numbers: of the rows wanted; one that never trained has no tokens.

    Raises:
        UnsupportedError: if tokens have no score of their own: for another method, an ensemble or an index, or rows
            that are no text of a decoder.
    """
    refuse_tokens(attributor, [stage])
    attributor.record.require_complete()
    targets = {
        other.name: RowTokens(attributor.rows(other), numbers if other is stage else [])
        for other in attributor.record.stages
    }
    wanted = targets[stage.name]
    found = np.zeros((len(queries), 0), dtype=np.float32)
    if wanted.count:
        method = Method(partial(_walk_tokens, stage=stage, targets=targets))
        found = dict((done.name, scores) for done, scores in in_chunks(attributor, queries, method))[stage.name]
    return [_of_row(wanted.parts[int(number)], found) for number in numbers]


def rows_of(attributor: "SourceAttributor", stage: StageRecord, dataset: Dataset | None) -> tuple[Dataset, np.ndarray]:
    """A dataset, which may be some rows of the stage's with their `source_row`, and the numbers of its rows.

    Raises:
        DataError: if a row is not the one of its number.
    """
    names = getattr(dataset, "column_names", None) or []
    if dataset is None or ROW not in names or len(dataset) >= attributor.rows(stage).numbers.size:
        rows = attributor.rows(stage) if dataset is None else attributor.set_dataset(stage.name, dataset)
        return rows.given, rows.numbers
    rows, numbers = attributor.rows(stage), np.asarray(dataset.with_format(None)[ROW], dtype=np.int64)
    places = {int(number): place for place, number in enumerate(rows.numbers)}
    unknown = [number for number in numbers.tolist() if number not in places]
    if unknown:
        raise DataError(f"Stage {stage.name!r} has no row {unknown[0]}: pass rows that `attribute` numbered.")
    known = rows.given.with_format(None).select([places[number] for number in numbers.tolist()])
    for column in set(_CONTENT) & set(names) & set(known.column_names):
        for number, ours, theirs in zip(numbers, known[column], dataset.with_format(None)[column], strict=True):
            if ours != theirs:
                raise DataError(
                    f"Row {number} has another {column!r} than in stage {stage.name!r}: pass rows of the dataset that "
                    "was trained on, unchanged."
                )
    return dataset, numbers


def _walk_tokens(
    attributor: "SourceAttributor", queries: Queries, stage: StageRecord, targets: dict[str, RowTokens]
) -> Scores:
    settings = replace(
        attributor.walk_settings(),
        checkpoints=getattr(attributor.options, "checkpoints", False),
        targets=targets,
        work=attributor.work(queries, tokens=[stage.name, sorted(targets[stage.name].parts)]),
    )
    gradients = partial(_query_gradients, attributor, queries)
    for done, scores in walk(
        attributor.record.stages, attributor.all_rows(), gradients, settings, attributor.build_model
    ):
        if done is stage:
            yield done, attributor.total(torch.as_tensor(scores, device=attributor.device)).cpu().numpy()
            return


def _query_gradients(attributor: "SourceAttributor", queries: Queries, gradients: RowGradients):
    return attributor.query_gradients(gradients, queries)


def _of_row(pieces: list[tuple[list[int], list[list[int]], list[int]]], scores: np.ndarray) -> ScoredTokens:
    """A row's tokens with scores, from its pieces."""
    ids, columns = [], []
    for tokens, places, numbers in pieces:
        own = np.zeros((len(scores), len(tokens)), dtype=np.float32)
        own[:, [place for part in places for place in part]] = scores[:, numbers]
        ids += tokens
        columns.append(own)
    return ScoredTokens(ids, np.concatenate(columns, axis=1) if columns else np.zeros((len(scores), 0), np.float32))


def refuse_tokens(attributor: "SourceAttributor", stages: Sequence[StageRecord]) -> None:
    """Raise `UnsupportedError` if the rows of some stages cannot be scored token by token."""
    reason = ""
    if attributor.method not in ("source", "fast-source"):
        reason = f"method={attributor.method!r} scores rows as a whole: use 'source' or 'fast-source'"
    elif attributor.ensemble is not None:
        reason = "an ensemble scores rows as a whole: use one of its records alone"
    elif attributor.index is not None:
        reason = "an index keeps rows as a whole: open the record without it"
    elif not all(isinstance(attributor.task_of(stage), CausalLMTask) for stage in stages):
        reason = "only rows of decoder language models are made of tokens"
    if reason:
        raise UnsupportedError(f"Tokens have no influence of their own here: {reason}.")


def only(labels: torch.Tensor, positions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Labels `[rows, tokens]` of which each row keeps its positions."""
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for row, places in enumerate(positions):
        kept[row, torch.as_tensor(places, device=labels.device)] = True
    return labels.masked_fill(~kept, IGNORE_INDEX)
