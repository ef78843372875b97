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
"""Influence of groups of rows: of stages, and of the values of a column such as a source or a label."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from ..data import ROW
from ..errors import DataError
from .columns import PREFIX


MOST = 12
"""Groups shown of one column; the others are one group more."""

_LONGEST = 60  # characters: longer values are texts, not labels
_TEXTS = ("text", "prompt", "completion")
OTHERS = "all others"
NONE = "(none)"


@dataclass(frozen=True)
class Group:
    """Scores of some rows, added up.

    Attributes:
        name: of the stage, or the column's value.
        num_rows: rows that are in it.
        supporting: sum of the positive scores.
        opposing: sum of the negative ones.
    """

    name: str
    num_rows: int
    supporting: float
    opposing: float

    @property
    def net(self) -> float:
        """Score of the group: the predicted change had none of its rows been trained on."""
        return self.supporting + self.opposing


def group_of(name: str, scores: np.ndarray) -> Group:
    """All rows of some scores as one group."""
    scores = scores.astype(np.float64)
    return Group(name, len(scores), float(scores[scores > 0].sum()), float(scores[scores < 0].sum()))


def grouping_columns(rows: Dataset, columns: Iterable[str] | None = None) -> list[str]:
    """Columns whose values make groups: those asked for, or all that look like a label, a source or a kind.

    Raises:
        DataError: if a column that was asked for cannot be.
    """
    if columns is not None:
        return [column for column in columns if column in rows.column_names and _values(rows, column, True)]
    own = [name for name in rows.column_names if name != ROW and name not in _TEXTS and not name.startswith(PREFIX)]
    return [name for name in own if _values(rows, name, False) is not None]


def column_values(rows: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """The group of each row, int `[rows]`, and the groups' names.

    Raises:
        DataError: if the column's values make no groups.
    """
    return _values(rows, column, True) or (np.zeros(0, dtype=np.int64), [])


def column_groups(rows: Dataset, column: str, scores: np.ndarray) -> list[Group]:
    """Groups by the values of a column, of the largest effect first.

    Args:
        rows: of a stage.
        column: its name.
        scores: `[rows]` in the order of the rows.
    """
    codes, names = column_values(rows, column)
    groups = [group_of(name, scores[codes == code]) for code, name in enumerate(names)]
    order = sorted(range(len(groups)), key=lambda code: -abs(groups[code].net))
    if len(groups) <= MOST + 1:
        return [groups[code] for code in order]
    rest = group_of(OTHERS, scores[np.isin(codes, order[MOST:])])
    return [*(groups[code] for code in order[:MOST]), rest]


def _values(rows: Dataset, column: str, asked: bool) -> tuple[np.ndarray, list[str]] | None:
    """Code of each row, and what each code stands for; `None` if the column makes no groups."""
    if not len(rows):
        return None
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
    if not any(kind(values.type) for kind in plain):
        if asked:
            raise DataError(f"Column {column!r} makes no groups: its values are {values.type}, not labels or numbers.")
        return None
    encoded = values.dictionary_encode()
    codes = np.asarray(pc.fill_null(encoded.indices, len(encoded.dictionary)))
    names = [_name(value, rows.features[column]) for value in encoded.dictionary.to_pylist()]
    if values.null_count:
        names.append(NONE)
    if not asked and (not 1 < len(names) <= max(MOST, len(rows) // 5) or len(names) == len(rows)):
        return None
    if not asked and max(map(len, names)) > _LONGEST:
        return None
    return codes, names


def _name(value: object, feature: object) -> str:
    if isinstance(feature, ClassLabel):  # -1 stands for an unknown label
        return feature.names[value] if 0 <= value < len(feature.names) else NONE
    return str(value)
