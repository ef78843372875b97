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
"""Tables that show what a training record holds."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..recording import StageRecord, TrainingRecord
from ..recording.rows.columns import COLUMNS_FILE
from ..recording.rows.stored import row_files
from .tables import shown


def print_record(console: Console, record: TrainingRecord) -> None:
    """Print stages, segments, optimizers, sizes and versions of a record."""
    total = sum(stage.num_bytes for stage in record.stages)
    versions = ", ".join(f"{name} {version}" for name, version in record.data["library_versions"].items())
    tokenizer = "with" if (record.path / "tokenizer").is_dir() else "without"
    _line(
        console, f"Training record {record.path}: {len(record.stages)} stages, {_size(total)}, {tokenizer} tokenizer"
    )
    _line(console, f"Format version {record.data['schema_version']}; {versions}")
    console.print(_stages(record))
    for name, error in record.left_out.items():
        _line(console, f"{name} is left out: {error}")
    for stage in record.stages:
        _line(console, f"{stage.name}: {_optimizer(stage)}; initial weights from {_origin(stage)}")
        if stage.data["visits"] != "recorded":
            _line(console, f"{stage.name}: visits are {stage.data['visits']}, not recorded. Assumed:")
            for assumption in stage.data.get("assumptions", []):
                _line(console, f"  - {assumption}")
        if attempts := stage.data.get("attempts"):
            steps = ", ".join(str(attempt["first_step"]) for attempt in attempts)
            _line(console, f"{stage.name}: resumed from step {steps}")
    console.print(_segments(record))


def _line(console: Console, text: str) -> None:
    console.print(Text(shown(text)), soft_wrap=True)


def _stages(record: TrainingRecord) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("stage", "status", "visits"):
        table.add_column(name)
    for name in ("steps", "rows", "rows stored", "trained", "frozen", "size"):
        table.add_column(name, justify="right")
    for stage in record.stages:
        trained = sum(_numel(stage.tensor_info[name]["shape"]) for name in stage.trainable)
        stored = any(path.name != COLUMNS_FILE for path in row_files(stage))
        table.add_row(
            Text(shown(stage.name)),
            Text(stage.status, "green" if stage.status == "complete" else "yellow"),
            Text(stage.data["visits"], "" if stage.data["visits"] == "recorded" else "yellow"),
            f"{stage.num_steps:,}",
            f"{stage.num_rows:,}",
            "yes" if stored else "no",
            f"{trained:,}",
            stage.data["frozen"],
            _size(stage.num_bytes),
        )
    return table


def _segments(record: TrainingRecord) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("segment of")
    for name in ("number", "steps", "sum of lr", "sum of lr x clip", "checkpoints"):
        table.add_column(name, justify="right")
    for stage in record.stages:
        for segment in stage.segments:
            table.add_row(
                Text(shown(stage.name)),
                str(segment.index),
                f"{segment.first_step}-{segment.end_step - 1}",
                f"{segment.learning_rate_sum:.6g}",
                f"{segment.effective_learning_rate_sum:.6g}",
                ", ".join(map(str, segment.checkpoint_steps)) or "-",
            )
    return table


def _optimizer(stage: StageRecord) -> str:
    groups = [group for group in stage.optimizer["groups"] if group["parameters"]]
    constants = ", ".join(f"{key} {value}" for key, value in groups[0].get("constants", {}).items())
    decays = " and ".join(sorted({f"{group['weight_decay']:g}" for group in groups}, reverse=True))
    schedule = stage.training.get("lr_scheduler_type", "unknown")
    return f"{stage.optimizer['name']} ({constants}), weight decay {decays}, schedule {schedule}"


def _origin(stage: StageRecord) -> str:
    if stage.parent is None:
        return "outside"
    return f"stage {stage.parent}" if stage.continues_parent else f"elsewhere, not from stage {stage.parent}"


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
