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
"""The influence of tokens that goes along with scores, so that they can be shaded where the model is not at hand."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import pyarrow as pa
from datasets import Dataset

from ..attribution.queries import Queries, same_queries
from ..attribution.tokens import TokenInfluence, TokenWalk
from ..errors import ConfigError, DataError, UnsupportedError


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor

_SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("stage", pa.string()),
        ("row", pa.int64()),
        ("pieces", pa.list_(pa.string())),
        ("influence", pa.list_(pa.float64())),
    ]
)


class Shading:
    """Tokens of the answers that are about to be attributed, and of their strongest rows.

    Args:
        attributor: that has scores, or will compute them.
        queries: encoded.
        shaded: answers whose tokens are wanted, the first ones; `None` for what was computed of these queries before.

    Attributes:
        remark: why tokens, or some of them, are not shaded.

    Raises:
        ConfigError: if `shaded` is negative.
    """

    def __init__(self, attributor: "SourceAttributor", queries: Queries, shaded: int | None) -> None:
        if shaded is not None and shaded < 0:
            raise ConfigError(f"shaded={shaded}: give the number of answers whose tokens are shaded, or 0 for none.")
        self.attributor, self.queries, self.remark = attributor, queries, ""
        self._reused = shaded is None
        self._along: TokenWalk | None = None
        if not shaded:
            return
        try:
            along = TokenWalk(attributor, queries, shaded)
        except UnsupportedError as error:
            self.remark = str(error)
            return
        if along.takes_rows_along and not attributor.is_followed(queries):  # else tokens take a walk of their own
            attributor.follow(along.queries, along.scores())
        if len(along.cut) < len(queries):
            self.remark = f"Tokens of the first {len(along.cut)} answers are shaded (`shaded=`, `memory_budget=`)."
        self._along = along

    def of(self, top: Dataset, stages: Collection[str]) -> TokenInfluence:
        """Influence of the tokens of the answers, and of their strongest rows in some stages.

        Args:
            top: the strongest rows; to be asked for once their scores were computed.
            stages: whose texts may be seen.
        """
        found = TokenInfluence()
        if self._along is not None:
            found = self._along.influence(top)
            self.attributor.shading = (self.queries, found, self.remark)
        elif self._reused and self.attributor.shading is not None:
            queries, kept, remark = self.attributor.shading
            if same_queries(queries, self.queries):
                found, self.remark = kept, remark
        shown = {(row["query"], row["stage"], row["row"]) for row in top if row["stage"] in stages}
        return TokenInfluence(found.answers, {key: tokens for key, tokens in found.rows.items() if key in shown})


def token_table(tokens: TokenInfluence) -> Dataset:
    """One line for every text: its pieces, and the influence of each; `stage` and `row` are null for an answer."""
    keyed = [((query, None, None), pieces) for query, pieces in tokens.answers.items()] + list(tokens.rows.items())
    lines = [
        (*key, [text for text, _ in pieces], [None if score is None else float(score) for _, score in pieces])
        for key, pieces in keyed
    ]
    columns = list(zip(*lines, strict=True)) or [[]] * len(_SCHEMA)
    arrays = [pa.array(list(values), field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
    return Dataset(pa.table(arrays, schema=_SCHEMA))


def read_tokens(table: Dataset) -> TokenInfluence:
    """What `token_table` made a table of.

    Raises:
        DataError: if the table is something else.
    """
    found = TokenInfluence()
    try:
        for line in table:
            pieces = list(zip(map(str, line["pieces"]), line["influence"], strict=True))
            if line["stage"] is None:
                found.answers[line["query"]] = pieces
            else:
                found.rows[line["query"], line["stage"], line["row"]] = pieces
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"The influence of tokens is damaged ({error!r}): copy the whole repository again.") from error
    return found
