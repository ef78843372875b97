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
"""Digests that say whether two things are of the same training."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .reading.record import TrainingRecord
    from .reading.stage import StageRecord


def digest(content: Any) -> str:
    """SHA-256 of JSON-able content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def record_digest(record: "TrainingRecord", first: "StageRecord | None" = None) -> str:
    """Digest of what stages were: their settings, and the content of every file; not when or where they ran.

    Args:
        record: the record.
        first: leave out the stages before this one.
    """
    stages = record.stages[first.index if first is not None else 0 :]
    return digest([{key: value for key, value in stage.data.items() if key != "run_id"} for stage in stages])


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
