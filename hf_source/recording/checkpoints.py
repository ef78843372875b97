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
"""Which checkpoint a killed run can go on from.

A process may die while the Trainer writes or deletes a checkpoint. `trainer_state.json` is written last (and one
that is there before is removed first), so a folder that has it and whose other files are whole is complete.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import RecordError
from ..logs import get_logger
from .recorder import SIDECAR, read_sidecar


logger = get_logger(__name__)

_TRAINER_STATE = "trainer_state.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")
_OPTIMIZER = ("optimizer*", "global_step*")


def last_checkpoint(output_dir: str | Path, stages: Sequence[Mapping[str, Any]], stage: str) -> Path:
    """The newest complete checkpoint of a stage; warns about newer ones that are of no use, and leaves them alone.

    Args:
        output_dir: where the Trainer saves.
        stages: stages of `record.json`.
        stage: name of the stage to continue.

    Raises:
        RecordError: if there is none; says what is wrong with those that are there.
    """
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) >= 0]
    reasons = []
    for folder in sorted(found, key=_step, reverse=True):
        try:
            check_checkpoint(folder)
            check_history(folder, stages, stage)
        except RecordError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning(f"Resuming from {folder.name}, since a newer checkpoint is of no use: {reason}")
        return folder
    raise RecordError(
        f"There is no checkpoint in {output_dir} to resume from. Start the stage again: set overwrite_stage=True and "
        "leave resume_from_checkpoint out." + "".join(f"\n- {reason}" for reason in reasons)
    )


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() and folder.is_dir() else -1


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint that was not recorded, or was not written to its end.

    Raises:
        RecordError: naming the file.
    """
    read_sidecar(folder)
    file = folder / _TRAINER_STATE
    try:
        step = json.loads(file.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _incomplete(file, f"cannot be read ({type(error).__name__})") from error
    if _step(folder) not in (step, -1):
        raise _incomplete(file, f"is of step {step}")
    for patterns in (_WEIGHTS, _OPTIMIZER):
        if not any(path for pattern in patterns for path in folder.glob(pattern) if path.stem != SIDECAR):
            raise _incomplete(folder / patterns[0], "is missing")
    if not any(folder.glob("global_step*")):  # DeepSpeed may keep these in its own files
        for name in ("scheduler.pt", "rng_state*.pth"):
            if not any(folder.glob(name)):
                raise _incomplete(folder / name, "is missing")
    for path in sorted(folder.rglob("*")):
        _check_file(path)


def forget_checkpoint(folder: Path) -> None:
    """Before a checkpoint is written where there is one of an earlier run: no mixture of both may seem complete."""
    for name in (_TRAINER_STATE, f"{SIDECAR}.json"):
        (folder / name).unlink(missing_ok=True)


def _check_file(path: Path) -> None:
    """A cheap look at the structure: both formats say at their end or start how long they are."""
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        raise _incomplete(path, "is torn")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _incomplete(path, f"is torn ({error})") from error
    if path.name.endswith(".safetensors.index.json"):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise _incomplete(path, f"cannot be read ({type(error).__name__})") from error
        for shard in sorted(shards):
            if not (path.parent / shard).is_file():
                raise _incomplete(path.parent / shard, "is missing")


def _incomplete(path: Path, reason: str) -> RecordError:
    return RecordError(
        f"The checkpoint {path.parent} is not complete: {path.name} {reason}. Resume from an earlier checkpoint "
        "(resume_from_checkpoint=True finds the newest complete one)."
    )


def check_history(folder: Path, stages: Sequence[Mapping[str, Any]], stage: str) -> Mapping[str, Any]:
    """The recorded stage that a checkpoint is a moment of.

    Raises:
        RecordError: if it belongs to another run or stage, or to steps that the record has since forgotten.
    """
    sidecar = read_sidecar(folder)
    entry = next((entry for entry in stages if entry["run_id"] == sidecar["run_id"]), None)
    if entry is None:
        raise RecordError(
            f"The checkpoint {folder} belongs to a run of stage '{sidecar['stage']}' that is not in the record. Set "
            "record_dir to that run's record, or train the stage from the beginning."
        )
    if entry["name"] != stage:
        raise RecordError(
            f"The checkpoint {folder} is of stage '{entry['name']}', the config says '{stage}'. Set "
            f"stage='{entry['name']}', or do not resume."
        )
    attempts = entry.get("attempts", [])
    # Each time a run went back, what an earlier attempt did beyond that step ceased to be part of its history.
    known = [attempt["id"] for attempt in attempts]
    later = known.index(sidecar["attempt"]) + 1 if sidecar.get("attempt") in known else 0
    forgotten = [attempt["first_step"] for attempt in attempts[later:] if attempt["first_step"] < sidecar["step"]]
    if forgotten or entry["num_steps"] < sidecar["step"]:
        cut = min([*forgotten, entry["num_steps"]])
        raise RecordError(
            f"The checkpoint {folder} is of step {sidecar['step']}, but the run has gone back to step {cut} since: "
            "what led to it is no longer in the record. Resume from a checkpoint of the present run "
            "(resume_from_checkpoint=True finds the newest)."
        )
    return entry
