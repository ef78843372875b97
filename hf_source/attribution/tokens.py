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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from ..data import IGNORE_INDEX
from ..errors import UnsupportedError
from ..gradients import CausalLMTask
from ..source import walk
from .queries import Queries
from .rows import StageRows


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


class RowTokens:
    """The label tokens of some rows, in place of the rows: what a walk scores.

    Args:
        rows: of the stage.
        numbers: of the rows wanted; some may never have trained.
        max_parts: longer rows are cut into parts of several tokens.

    Attributes:
        count: parts there are.
        row: int64 `[parts]`, the part's own number, in whose place its score goes.
        example: int64 `[parts]`, see `StageRows`.
        parts: of each wanted row, `(token ids, [label positions of a part], [numbers of the parts])` for each of its
            pieces.
    """

    def __init__(self, rows: StageRows, numbers: Sequence[int], max_parts: int = MAX_PARTS) -> None:
        self.rows = rows
        self._origin: list[int] = []
        self._positions: list[np.ndarray] = []
        self.parts: dict[int, list[tuple[list[int], list[list[int]], list[int]]]] = {}
        first = 0 if getattr(rows.task, "virtual_tokens", 0) else 1
        for number in map(int, numbers):
            self.parts[number] = []
            for piece in np.flatnonzero(rows.row == number):
                if piece in rows.trained and rows.items[piece]:
                    self._add(number, int(piece), first, max_parts)
        self.count = len(self._origin)
        self.row = np.arange(self.count)
        self.example = rows.example[np.asarray(self._origin, dtype=np.int64)]

    def _add(self, number: int, piece: int, first: int, max_parts: int) -> None:
        batch = self.rows.collated([piece], torch.device("cpu"))
        asked = [place for place in np.flatnonzero(batch["labels"][0] != IGNORE_INDEX) if place >= first]
        parts = np.array_split(asked, min(len(asked), max_parts))
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
        batch["labels"] = _only(batch["labels"], [self._positions[part] for part in parts])
        return batch


def token_influence(
    attributor: "SourceAttributor", queries: Queries, top: Dataset, max_parts: int = MAX_PARTS
) -> TokenInfluence:
    """Influence of every label token of the strongest rows on every token of the answers: one walk.

    An answer is cut into no more parts than the query vectors of the walk leave room for in `memory_budget`.

    Args:
        attributor: of method `source` or `fast-source`.
        queries: answers wanted.
        top: the rows, from `SourceAttributor.top`; those of other queries are left aside.
        max_parts: of an answer and of a row.

    Raises:
        UnsupportedError: if tokens have no influence of their own: for another method, an ensemble, a measurement
            other than the loss, or rows that are no text of a decoder.
    """
    _refuse(attributor, queries)
    encoded = attributor.encode(queries)
    cuts = _cut_answers(attributor, encoded, max_parts)
    asked = Queries(
        [f"{name}/{part}" for name, parts in zip(encoded.names, cuts, strict=True) for part in range(len(parts))],
        *([""] * sum(map(len, cuts)),) * 2,
        [
            {**row, "labels": _only(torch.tensor([row["labels"]]), [part])[0].tolist()}
            for row, parts in zip(encoded.rows, cuts, strict=True)
            for part in parts
        ],
    )
    shown = [row for row in top if row["query"] in encoded.names]
    targets = {
        stage.name: RowTokens(
            attributor.rows(stage), sorted({row["row"] for row in shown if row["stage"] == stage.name}), max_parts
        )
        for stage in attributor.record.stages
    }
    scores = _walked(attributor, asked, targets)
    found = TokenInfluence()
    ends = np.cumsum([0, *map(len, cuts)])
    for position, name in enumerate(encoded.names):
        own = slice(ends[position], ends[position + 1])
        received = np.zeros(len(cuts[position]))
        for row in (row for row in shown if row["query"] == name):
            tokens: Tokens = []
            for ids, parts, numbers in targets[row["stage"]].parts[row["row"]]:
                part_scores = scores[row["stage"]][own][:, numbers]
                received += part_scores.sum(axis=1)
                tokens += _texts(attributor.processing_class, ids, parts, part_scores.sum(axis=0))
            found.rows[name, row["stage"], row["row"]] = tokens
        if len(received) > 1:
            ids = encoded.rows[position]["input_ids"]
            pieces = _texts(attributor.processing_class, ids, cuts[position], received)
            found.answers[name] = [piece for piece in pieces if piece[1] is not None]
    return found


def _refuse(attributor: "SourceAttributor", queries: Queries) -> None:
    reason = ""
    if attributor.method not in ("source", "fast-source"):
        reason = f"method={attributor.method!r} scores rows as a whole: use 'source' or 'fast-source'"
    elif attributor.ensemble is not None:
        reason = "an ensemble scores rows as a whole: use one of its records alone"
    elif attributor.index is not None:
        reason = "an index keeps rows as a whole: open the record without it"
    elif "measurement" in attributor.settings():
        reason = "a measurement other than the loss is no sum over tokens: leave `measurement=` out"
    elif queries.are_rows or attributor.processing_class is None:
        reason = "the queries are rows, not text: ask with `Queries.from_text` and a tokenizer"
    elif not all(isinstance(attributor.task_of(stage), CausalLMTask) for stage in attributor.record.stages):
        reason = "only rows of decoder language models are made of tokens"
    if reason:
        raise UnsupportedError(f"Tokens have no influence of their own here: {reason}.")


def _cut_answers(attributor: "SourceAttributor", queries: Queries, max_parts: int) -> list[list[list[int]]]:
    """Label positions of each part of each answer."""
    size = max(
        sum(int(np.prod(stage.tensor_info[name]["shape"])) for name in stage.trainable)
        for stage in attributor.record.stages
    )
    # A walk holds query vectors about three times.
    room = attributor.memory_budget // (3 * size * torch.finfo(attributor.dtype).bits // 8) // len(queries)
    cuts = []
    for row in queries.rows:
        first = 0 if getattr(attributor.task_of(attributor.record.stages[-1]), "virtual_tokens", 0) else 1
        asked = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX and place >= first]
        count = min(len(asked), max_parts, max(1, room))
        cuts.append([part.tolist() for part in np.array_split(asked, count)])
    return cuts


def _only(labels: torch.Tensor, positions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Labels `[rows, tokens]` of which each row keeps its positions."""
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for row, places in enumerate(positions):
        kept[row, torch.as_tensor(places, device=labels.device)] = True
    return labels.masked_fill(~kept, IGNORE_INDEX)


def _walked(
    attributor: "SourceAttributor", queries: Queries, targets: Mapping[str, RowTokens]
) -> dict[str, np.ndarray]:
    """Scores of the tokens of every stage that has some, float32 `[answer parts, row parts]`."""
    last = next(i for i, stage in enumerate(attributor.record.stages) if targets[stage.name].count)
    checkpoints = getattr(attributor.options, "checkpoints", False)
    found = {}
    for stage, scores in walk(
        attributor.record.stages,
        attributor.all_rows(),
        lambda gradients: attributor.query_gradients(gradients, queries),
        replace(attributor.walk_settings(), checkpoints=checkpoints, targets=targets),
        attributor.build_model,
    ):
        found[stage.name] = attributor.total(torch.as_tensor(scores, device=attributor.device)).cpu().numpy()
        if stage.name == attributor.record.stages[last].name:  # no row of an earlier stage is shown
            break
    return found


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
