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
"""`ensemble="independent"`: models trained on the same rows with other seeds, each from its own record.

The "naive independent ensemble" of Deng et al. 2024 (arXiv 2405.17293, section 3.1), which the others stand in for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError
from ...recording import StageRecord, TrainingRecord
from .base import Members


if TYPE_CHECKING:
    from ..attributor import SourceAttributor


@dataclass(frozen=True)
class NoEnsembleOptions:
    """Settings of `independent`: none."""


def independent_members(single: "SourceAttributor", options: NoEnsembleOptions, numbers: range) -> Members:
    """The record's own model."""
    yield single


def check_agreement(records: Sequence[TrainingRecord]) -> None:
    """Raise unless all records are runs of the same stages on the same rows.

    Raises:
        ConfigError: if a record comes twice, or models, stages or tokenizers differ.
        DataError: if a stage was trained on other rows.
    """
    first = records[0]
    runs: dict[Any, Any] = {}
    for record in records:
        ends = tuple(stage.data["run_id"] for stage in record.stages)
        if ends in runs:
            raise ConfigError(f"{record.path} is the same run as {runs[ends]}: an ensemble needs runs of other seeds.")
        runs[ends] = record.path
    for other in records[1:]:
        if [stage.name for stage in other.stages] != [stage.name for stage in first.stages]:
            raise ConfigError(
                f"{other.path} has the stages {_names(other)}, but {first.path} has {_names(first)}: an ensemble "
                "takes runs of the same stages."
            )
        for mine, theirs in zip(first.stages, other.stages, strict=True):
            _check_stage(mine, theirs)
        if _vocabulary(first) != _vocabulary(other):
            raise ConfigError(
                f"The tokenizers of {first.path} and {other.path} differ, so a query is not the same to both: train "
                "every member with one tokenizer."
            )


def _check_stage(mine: StageRecord, theirs: StageRecord) -> None:
    where = f"stage {mine.name!r} of {theirs.record.path}"
    if (mine.num_rows, _rows_of(mine)) != (theirs.num_rows, _rows_of(theirs)):
        raise DataError(
            f"The rows of {where} are not those of {mine.record.path}, or stand in another order: scores are averaged "
            "row by row. Train every member on the same dataset (the Trainer's `seed` shuffles it)."
        )
    for what, same in (
        ("loss", _loss_of(mine) == _loss_of(theirs)),
        ("model class", mine.model["class"] == theirs.model["class"]),
        ("trained parameters", mine.data["trainable"].keys() == theirs.data["trainable"].keys()),
    ):
        if not same:
            raise ConfigError(
                f"The {what} of {where} differs from that of {mine.record.path}: an ensemble takes runs that differ "
                "in their seeds only."
            )


def _rows_of(stage: StageRecord) -> Any:
    """What tells a training set: the digest of the set as it was given, or the fingerprint of what it became."""
    given = stage.dataset.get("given")
    return given["digest"] if given else stage.dataset["fingerprint"]


def _loss_of(stage: StageRecord) -> dict[str, Any]:
    return {key: value for key, value in stage.loss.items() if key != "first_micro_batch"}


def _vocabulary(record: TrainingRecord) -> dict[str, int] | None:
    processing_class = record.processing_class()
    return processing_class.get_vocab() if processing_class is not None else None


def _names(record: TrainingRecord) -> list[str]:
    return [stage.name for stage in record.stages]
