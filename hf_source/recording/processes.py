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
"""Many processes, one record: what each process saw is gathered, the main process writes, and all fail together.

Gathering happens where a record is written (a full shard of steps, the end of a segment, a checkpoint, the end), which
is after the same optimizer step on every process.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from .. import errors
from ..errors import RecordError


Result = TypeVar("Result")


class Processes:
    """The processes that train together; one process alone needs no communication.

    Attributes:
        count: how many there are.
        index: number of this one.
        is_main: whether this one writes.
    """

    def __init__(self) -> None:
        state = PartialState()
        self.count: int = state.num_processes
        self.index: int = state.process_index
        self.is_main: bool = state.is_main_process

    def agree(self, work: Callable[[], Result], main_only: bool = False) -> Result:
        """Do something on every process, or on the main one; if it fails on one, every process raises.

        Nothing in `work` may wait for other processes.

        Args:
            work: what to do.
            main_only: only the main process does it, the others wait for it.

        Returns:
            The process's own result, or the main process's with `main_only`.

        Raises:
            Exception: what `work` raised here; on the other processes an error of the same class and message.
        """
        if self.count == 1:
            return work()
        result = failure = None
        if self.is_main or not main_only:
            try:
                result = work()
            except Exception as error:
                failure = error
        told = None if failure is None else (type(failure).__name__, str(failure))
        found = gather_object([(told, result if main_only else None)])
        if failure is not None:
            raise failure
        for told, _ in found:
            if told is not None:
                raise _error_of_another_process(*told)
        return found[0][1] if main_only else result

    def refuse_differences(self, value: Any, message: str) -> None:
        """Raise `RecordError` on every process unless all have the same value."""
        if self.count > 1 and len({repr(other) for other in gather_object([value])}) > 1:
            raise RecordError(message)

    def gather_steps(self, steps: Sequence[Mapping[str, Any]], merge: bool) -> list[dict[str, Any]]:
        """The optimizer steps with the micro-batches of all processes, in the order of processes.

        Args:
            steps: this process's steps, with plain numbers.
            merge: join the micro-batches that ran at the same time into one; they must have one normalizer, as they
                have where loss items are counted over all processes. Otherwise each keeps its own.

        Raises:
            RecordError: if processes are not at the same step.
        """
        steps = [dict(step) for step in steps]
        if self.count == 1:
            return steps
        own = [(step["step"], step["micro_batches"]) for step in steps]
        found = gather_object([own])
        if len({tuple(number for number, _ in other) for other in found}) > 1:
            raise RecordError(
                "The processes have made different numbers of optimizer steps, so their rows cannot be put together. "
                "Save checkpoints and stop training after the same step on every process."
            )
        for place, step in enumerate(steps):
            together = zip_longest(*(other[place][1] for other in found))
            batches = [[batch for batch in same_time if batch is not None] for same_time in together]
            step["micro_batches"] = [b for same in batches for b in (_merged(same) if merge else same)]
        return steps


def _merged(batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One micro-batch of those that ran at the same time, if their losses were divided by the same number."""
    if len({batch["normalizer"] for batch in batches}) > 1:
        return list(batches)
    first = dict(batches[0])
    for batch in batches[1:]:
        first = {key: first[key] if key == "normalizer" else first[key] + batch[key] for key in first}
    return [first]


def _error_of_another_process(name: str, message: str) -> Exception:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.HFSourceError):
        return kind(message)
    return RuntimeError(f"Another process stopped with {name}: {message}")
