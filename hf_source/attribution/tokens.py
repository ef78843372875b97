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
"""Influence between tokens: from each label token of a few training rows to each token of an answer.

Source is linear in the gradient of the query and in that of the row, and both are sums over tokens: the score of a row
is the sum of what its label tokens contribute to the tokens of the answer. One more walk gives all of these terms for
the few rows that are shown, in which each answer token is a query and each label token of a row is scored alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from ..budget import queries_at_once
from ..data import IGNORE_INDEX
from ..errors import UnsupportedError
from ..recording import StageRecord
from ..source import walk
from .queries import Queries
from .row_tokens import RowTokens, only, refuse_tokens


if TYPE_CHECKING:
    from .attributor import SourceAttributor


MAX_PARTS = 64
"""Parts that the label tokens of a row, and of an answer, are cut into at most."""

END = "\N{END OF PROOF}"
"""Shown for the token that ends a text."""

Tokens = list[tuple[str, float | None]]
"""Pieces of a text in its order, with the influence of each; `None` where nothing was trained or asked."""


@dataclass
class TokenInfluence:
    """Texts cut into tokens, with the influence of each.

    Attributes:
        answers: query -> its completion; what the shown rows together contribute to each token.
        rows: `(query, stage, row)` -> the row's text; what each token contributes to the whole answer.
    """

    answers: dict[str, Tokens] = field(default_factory=dict)
    rows: dict[tuple[str, str, int], Tokens] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.answers or self.rows)


def token_influence(
    attributor: "SourceAttributor", queries: Queries, top: Dataset, max_parts: int = MAX_PARTS
) -> TokenInfluence:
    """Influence of every label token of the strongest rows on every token of the answers: one walk.

    Answers are cut into no more parts than the query vectors of the walk leave room for in `memory_budget`; the last
    ones are left out where there is no room for one part of each.

    Args:
        attributor: of method `source` or `fast-source`.
        queries: answers wanted.
        top: the rows, from `SourceAttributor.top`; those of other queries are left aside.
        max_parts: of an answer and of a row.

    Raises:
        UnsupportedError: if tokens have no influence of their own: for another method, an ensemble, a measurement
            other than the loss, or rows that are no text of a decoder.
    """
    return TokenWalk(attributor, queries, len(queries), max_parts).influence(top)


class TokenWalk:
    """A walk for answers that takes the tokens of the first of them along.

    Scores of the rows come out of it as of any walk (`scores`). What it scored rows with is kept, if there is room, so
    that the tokens of the strongest rows are scored afterwards without drawing a sample of the curvature again.

    Args:
        attributor, queries, max_parts: see `token_influence`.
        num_cut: answers that are cut into tokens.

    Raises:
        UnsupportedError: see `token_influence`.
    """

    def __init__(
        self, attributor: "SourceAttributor", queries: Queries, num_cut: int, max_parts: int = MAX_PARTS
    ) -> None:
        _refuse(attributor, queries)
        self.attributor, self.max_parts = attributor, max_parts
        self.queries = attributor.encode(queries)
        room = max(1, attributor.memory_budget // (3 * _vector_bytes(attributor)))
        self.cut = self.queries.select(range(min(num_cut, len(queries), room)))
        self.cuts = _cut_answers(attributor, self.cut, max_parts)
        self.parts = Queries(
            [
                f"{name}/{part}"
                for name, parts in zip(self.cut.names, self.cuts, strict=True)
                for part in range(len(parts))
            ],
            *([""] * sum(map(len, self.cuts)),) * 2,
            [
                {**row, "labels": only(torch.tensor([row["labels"]]), [part])[0].tolist()}
                for row, parts in zip(self.cut.rows, self.cuts, strict=True)
                for part in parts
            ],
        )
        self._curvature: _Keeping | None = None

    @property
    def takes_rows_along(self) -> bool:
        """Whether there is room for the answers and their tokens at once, and nothing is to be kept on disk."""
        attributor, count = self.attributor, len(self.queries) + len(self.parts)
        sizes = (attributor.query_budget, _vector_bytes(attributor), 1, count)
        return attributor.cache_dir is None and queries_at_once(*sizes) == count

    def scores(self) -> Iterator[tuple[StageRecord, np.ndarray]]:
        """Scores of the queries, as methods give them; see `attribution/methods/base.py`."""
        count, attributor = len(self.queries), self.attributor
        asked = _joined(self.queries, self.parts)
        segments = sum(len(stage.segments) for stage in attributor.record.stages)
        fits = segments * len(self.parts) * _vector_bytes(attributor) <= attributor.memory_budget
        self._curvature = _Keeping(attributor.curvature, count) if fits else None
        for stage, scores in self._walk(asked, {} if self._curvature is None else {"curvature": self._curvature}):
            yield stage, scores[:count]

    def influence(self, top: Dataset) -> TokenInfluence:
        """Influence of the tokens of the rows in a table of strongest rows."""
        shown = [row for row in top if row["query"] in self.cut.names]
        targets = {
            stage.name: RowTokens(
                self.attributor.rows(stage),
                sorted({row["row"] for row in shown if row["stage"] == stage.name}),
                self.max_parts,
            )
            for stage in self.attributor.record.stages
        }
        scores = self._token_scores(targets)
        found = TokenInfluence()
        ends = np.cumsum([0, *map(len, self.cuts)])
        for position, name in enumerate(self.cut.names):
            own = slice(ends[position], ends[position + 1])
            received = np.zeros(len(self.cuts[position]))
            for row in (row for row in shown if row["query"] == name):
                tokens: Tokens = []
                for ids, parts, numbers in targets[row["stage"]].parts[row["row"]]:
                    part_scores = scores[row["stage"]][own][:, numbers]
                    received += part_scores.sum(axis=1)
                    tokens += _texts(self.attributor.processing_class, ids, parts, part_scores.sum(axis=0))
                found.rows[name, row["stage"], row["row"]] = tokens
            if len(received) > 1:
                ids = self.cut.rows[position]["input_ids"]
                pieces = _texts(self.attributor.processing_class, ids, self.cuts[position], received)
                found.answers[name] = [piece for piece in pieces if piece[1] is not None]
        return found

    def _token_scores(self, targets: Mapping[str, RowTokens]) -> dict[str, np.ndarray]:
        """Scores of the tokens of every stage that has some, float32 `[answer parts, row parts]`."""
        attributor = self.attributor
        wanted = [stage.name for stage in attributor.record.stages if targets[stage.name].count]
        settings: dict[str, Any] = {"targets": targets}
        if self._curvature is not None:  # nothing is drawn again
            settings |= {"curvature": _Replaying(self._curvature.kept), "num_samples": 1}
        found = {}
        for stage, scores in self._walk(self.parts, settings) if wanted else ():
            found[stage.name] = attributor.total(torch.as_tensor(scores, device=attributor.device)).cpu().numpy()
            if stage.name == wanted[0]:  # no row of an earlier stage is shown
                break
        return found

    def _walk(self, queries: Queries, settings: Mapping[str, Any]) -> Iterator[tuple[StageRecord, np.ndarray]]:
        attributor = self.attributor
        checkpoints = getattr(attributor.options, "checkpoints", False)
        return walk(
            attributor.record.stages,
            attributor.all_rows(),
            lambda gradients: attributor.query_gradients(gradients, queries),
            replace(attributor.walk_settings(), checkpoints=checkpoints, **settings),
            attributor.build_model,
        )


class _Keeping:
    """A curvature that keeps what rows of each segment are scored with, for the vectors from `first` on."""

    def __init__(self, curvature: Any, first: int) -> None:
        self.curvature, self.first = curvature, first
        self.kept: list[dict[str, torch.Tensor]] = []

    def propagate(self, vectors: Any, flow: Any, sample: Any) -> Any:
        scoring, vectors = self.curvature.propagate(vectors, flow, sample)
        self.kept.append({name: vector[self.first :].clone() for name, vector in scoring.items()})
        return scoring, vectors


class _Replaying:
    """A curvature that gives what was kept, segment after segment."""

    def __init__(self, kept: list[dict[str, torch.Tensor]]) -> None:
        self._kept = iter(kept)

    def propagate(self, vectors: Any, flow: Any, sample: Any) -> Any:
        return next(self._kept), vectors


def _joined(one: Queries, other: Queries) -> Queries:
    return Queries(
        [*one.names, *(f"/{name}" for name in other.names)],
        one.prompts + other.prompts,
        one.completions + other.completions,
        one.rows + other.rows,
    )


def _refuse(attributor: "SourceAttributor", queries: Queries) -> None:
    refuse_tokens(attributor, attributor.record.stages)
    reason = ""
    if "measurement" in attributor.settings():
        reason = "a measurement other than the loss is no sum over tokens: leave `measurement=` out"
    elif queries.are_rows or attributor.processing_class is None:
        reason = "the queries are rows, not text: ask with `Queries.from_text` and a tokenizer"
    if reason:
        raise UnsupportedError(f"Tokens have no influence of their own here: {reason}.")


def _cut_answers(attributor: "SourceAttributor", queries: Queries, max_parts: int) -> list[list[list[int]]]:
    """Label positions of each part of each answer."""
    # A walk holds query vectors about three times.
    room = attributor.memory_budget // (3 * _vector_bytes(attributor)) // len(queries)
    cuts = []
    for row in queries.rows:
        first = 0 if getattr(attributor.task_of(attributor.record.stages[-1]), "virtual_tokens", 0) else 1
        asked = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX and place >= first]
        count = min(len(asked), max_parts, max(1, room))
        cuts.append([part.tolist() for part in np.array_split(asked, count)])
    return cuts


def _vector_bytes(attributor: "SourceAttributor") -> int:
    """Size of one query's vector."""
    size = max(
        sum(int(np.prod(stage.tensor_info[name]["shape"])) for name in stage.trainable)
        for stage in attributor.record.stages
    )
    return size * torch.finfo(attributor.dtype).bits // 8


def _texts(processing_class: Any, ids: list[int], parts: list[list[int]], scores: np.ndarray) -> Tokens:
    """The text of some tokens, cut where parts begin and end, with the parts' scores.

    A letter may be spread over several tokens; they then stay together.
    """
    part_of = {place: number for number, part in enumerate(parts) for place in part}
    keys = [part_of.get(place) for place in range(len(ids))]
    ends = [place + 1 for place in range(len(ids)) if place + 1 == len(ids) or keys[place + 1] != keys[place]]
    decode = lambda some: processing_class.decode(some, skip_special_tokens=False)  # noqa: E731
    ends_text = len(ids) > 1 and ids[-1] == processing_class.eos_token_id
    found, text, start = [], "", 0
    pending: list[int] = []
    used: set[int] = set()  # a part whose tokens are not neighbours counts where it begins
    for end in ends:
        key = keys[end - 1]
        if key is not None and key not in used:
            pending.append(key)
            used.add(key)
        now = decode(ids[:end])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        new = now[len(text) :] if now.startswith(text) else decode(ids[start:end])
        new = END if ends_text and start == len(ids) - 1 else new
        found.append((new, float(sum(scores[key] for key in pending)) if pending else None))
        text, pending, start = now, [], end
    return found
