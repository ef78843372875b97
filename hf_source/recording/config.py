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
"""What a person can set about recording: a `TrainingArguments` with a few fields more."""

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError


_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RecordingOptions:
    """The recording settings of a run, validated. `SourceConfig` documents each of them."""

    record_dir: str
    stage: str = "train"
    num_segments: int = 3
    segment_boundaries: tuple[int, ...] | tuple[float, ...] | None = None
    checkpoints_per_segment: int = 0
    record_averages_on_cpu: bool = False
    record_gradient_mean: bool = False
    record_frozen_weights: bool = True
    record_rows: bool = True
    record_columns: tuple[str, ...] | None = None
    max_length: int | None = None
    overwrite_stage: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.stage, str) or not _STAGE_NAME.fullmatch(self.stage):
            raise ConfigError(
                f"stage={self.stage!r} cannot name a folder: use letters, digits, `.`, `_` and `-`, such as "
                "'pretrain'."
            )
        if isinstance(self.num_segments, bool) or not isinstance(self.num_segments, int) or self.num_segments < 1:
            raise ConfigError(f"num_segments={self.num_segments!r} must be a whole number of at least 1 (3 is usual).")
        count = self.checkpoints_per_segment
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(
                f"checkpoints_per_segment={count!r} must be a whole number: 0 for none (averages are always stored), "
                "2 as in the Source paper."
            )
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ConfigError(
                f"max_length={self.max_length!r} must be at least 2 tokens (one to read, one to predict), or None."
            )
        if self.record_columns is not None:
            object.__setattr__(self, "record_columns", _checked_columns(self.record_columns, self.record_rows))
        if self.segment_boundaries is not None:
            object.__setattr__(self, "segment_boundaries", _checked_boundaries(self.segment_boundaries))

    @classmethod
    def from_args(cls, args: TrainingArguments) -> "RecordingOptions":
        """Settings of a `SourceConfig`, or the defaults of any other arguments.

        `record_dir` is `<output_dir>/record` where it is not set.
        """
        given = {option.name: getattr(args, option.name) for option in fields(cls) if hasattr(args, option.name)}
        if given.get("record_dir") is None:
            given["record_dir"] = os.path.join(args.output_dir, "record")
        return cls(**given)


def _checked_columns(columns: Any, record_rows: bool) -> tuple[str, ...]:
    if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) for name in columns):
        raise ConfigError(f"record_columns={columns!r} must be a list of column names, such as ['source', 'label'].")
    if columns and not record_rows:
        raise ConfigError("record_columns are kept beside the rows: leave record_rows at True, or leave them out.")
    return tuple(columns)


def _checked_boundaries(boundaries: Any) -> tuple[int, ...] | tuple[float, ...]:
    values = list(boundaries) if isinstance(boundaries, (list, tuple)) else None
    if values is None or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ConfigError(
            f"segment_boundaries={boundaries!r} must be a list of numbers: optimizer steps at which a new segment "
            "starts ([100, 200]), or shares of the summed learning rate ([0.5, 0.8])."
        )
    steps = [v for v in values if float(v).is_integer() and v >= 1]
    shares = [v for v in values if 0 < v < 1]
    if steps and shares:
        raise ConfigError(
            f"segment_boundaries={boundaries!r} mixes optimizer steps and shares of the summed learning rate: give "
            "only whole numbers (steps) or only fractions between 0 and 1 (shares)."
        )
    if len(steps) + len(shares) != len(values):
        raise ConfigError(
            f"segment_boundaries={boundaries!r} holds a number that is neither an optimizer step (1, 2, ...) nor a "
            "share between 0 and 1. The first segment starts at step 0 by itself: leave 0 and 1.0 out."
        )
    if any(later <= earlier for earlier, later in zip(values, values[1:], strict=False)):
        raise ConfigError(f"segment_boundaries={boundaries!r} must increase from one to the next.")
    return tuple(int(v) for v in steps) if steps else tuple(float(v) for v in shares)


@dataclass
class SourceConfig(TrainingArguments):
    """`TrainingArguments` plus what `SourceTrainer` records, and where.

    Args:
        record_dir (`str`, *optional*):
            Folder of the training record, shared by the stages of one model's life (pretraining, finetuning, ...).
            Default: `<output_dir>/record`.
        stage (`str`, defaults to `"train"`):
            Name of this stage. Stages are appended to the record in the order in which they train.
        num_segments (`int`, defaults to 3):
            Number of segments that the stage is cut into, with equal shares of the summed learning rate. Inside one
            segment, weights and preconditioner are represented by their averages. A stage of fewer steps has a segment
            per step.
        segment_boundaries (`list`, *optional*):
            Own cuts instead of equal shares: optimizer steps at which a new segment starts (`[100, 200]`), or shares
            of the summed learning rate (`[0.5, 0.8]`). Overrides `num_segments`.
        checkpoints_per_segment (`int`, defaults to 0):
            Also store the weights themselves at so many steps of each segment, evenly spaced in summed learning rate.
            `method="source"` then averages gradients over them, as the Source paper does with 2 a segment, instead of
            taking them at the average weights. Each costs the size of the trainable parameters on disk, and a pass
            over the rows when they are scored.
        record_averages_on_cpu (`bool`, defaults to `False`):
            Keep the two running averages (each the size of the trainable parameters) in CPU memory. Slower.
        record_gradient_mean (`bool`, defaults to `False`):
            Store a third average, the learning-rate-weighted mean of the (clipped, normalised) gradients of each
            segment: what a removed row does to Adam's second moment, `d v_k = -2 (1 - beta2) sum over j of
            beta2^(k - j) g_j * delta g_j`, needs the gradient over a long horizon. Costs a third copy of the trainable
            parameters.
        record_frozen_weights (`bool`, defaults to `True`):
            Store parameters that do not train, unless the stage before ended with the same ones. Without them the
            model cannot be rebuilt from the record alone.
        record_rows (`bool`, defaults to `True`):
            Store the rows (token ids, and their text where they have one) in the record, so that attribution finds
            them. Without them every attribution must be given the datasets of all stages.
        record_columns (`list[str]`, *optional*):
            Which other columns of the dataset (label, source, contributor, ...) are kept beside the rows, so that
            scores can be summed by them. By default all that hold numbers, truth values, dates or texts of at most 500
            characters on average; `[]` for none. They take about their size as Parquet. A stream has none.
        max_length (`int`, *optional*):
            Rows of raw text are cut to this many tokens. Tokenised rows are taken as they are.
        overwrite_stage (`bool`, defaults to `False`):
            Replace a stage of the same name, and remove every stage after it.

    Raises:
        ConfigError: if a value is impossible; the message names the fix.
    """

    record_dir: str | None = field(default=None, metadata={"help": "Folder of the training record."})
    stage: str = field(default="train", metadata={"help": "Name of this training stage in the record."})
    num_segments: int = field(default=3, metadata={"help": "Segments of equal summed learning rate."})
    segment_boundaries: list[float] | None = field(
        default=None, metadata={"help": "Own cuts: optimizer steps, or shares of the summed learning rate."}
    )
    checkpoints_per_segment: int = field(
        default=0, metadata={"help": "Weights stored along each segment, beside their average; 0 for none."}
    )
    record_averages_on_cpu: bool = field(default=False, metadata={"help": "Keep running averages in CPU memory."})
    record_gradient_mean: bool = field(default=False, metadata={"help": "Store the mean gradient of segments too."})
    record_frozen_weights: bool = field(default=True, metadata={"help": "Store parameters that do not train."})
    record_rows: bool = field(default=True, metadata={"help": "Store the rows in the record."})
    record_columns: list[str] | None = field(
        default=None, metadata={"help": "Other columns kept beside the rows; default all of short values."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Cut rows of raw text to this many tokens."})
    overwrite_stage: bool = field(default=False, metadata={"help": "Replace a stage of this name and later ones."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.record_dir = RecordingOptions.from_args(self).record_dir
