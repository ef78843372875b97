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
"""How much memory an attribution may take, and what is done when it takes too much after all."""

import ctypes
import functools
import gc
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from .errors import ConfigError, HFSourceError


Items, Result = TypeVar("Items"), TypeVar("Result")

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = 2**30

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(size: int | str | None) -> int:
    """Bytes of `"2GiB"`, `"500 MB"` or a number; `DEFAULT_BUDGET` for `None`.

    Units are binary, with or without the `i`: `"2GB"` is `"2GiB"`.

    Raises:
        ConfigError: for anything else.
    """
    if size is None:
        return DEFAULT_BUDGET
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)i?B?\s*", str(size), re.IGNORECASE)
    try:
        number = int(float(found[1]) * _UNITS[found[2].upper()])
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"memory_budget={size!r}: give bytes, or a size such as '2GiB'.")
    return number


def queries_at_once(
    budget: int | None, num_parameters: int, element_size: int, num_queries: int, each: int = 2
) -> int:
    """Queries whose vectors fit the budget: two each, or one where none are carried on. All without a budget."""
    if budget is None:
        return num_queries
    return int(min(num_queries, max(1, budget // (each * num_parameters * element_size))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


class NotEnoughMemoryError(HFSourceError, torch.OutOfMemoryError):
    """An allocation failed, and smaller batches do not help; the message says what will."""


def why_out_of_memory(error: BaseException) -> str | None:
    """What an error says if an allocation failed and less at once may do; `None` for any other."""
    if isinstance(error, NotEnoughMemoryError) or not is_out_of_memory(error):
        return None
    return next(iter(str(error).splitlines()), type(error).__name__)


class Parts:
    """Computes batches whole, or in parts where memory runs out; later batches then come in as many parts.

    Batches hold about as many tokens each, so what did not suffice for one would not for the next.

    Attributes:
        number: of parts that a batch is cut into.
    """

    def __init__(self) -> None:
        self.number = 1

    def __call__(self, compute: Callable[[Items], Result], items: Items) -> Iterator[tuple[Items, Result]]:
        """`compute` of the items, or of parts of them, in order.

        Args:
            compute: of some of the items. It must leave nothing behind when it fails.
            items: a sequence or an array.

        Yields:
            Some of the items, and what came of them.

        Raises:
            NotEnoughMemoryError: if memory does not suffice for one item.
        """
        start = 0
        while start < len(items):
            some, failed = items[start : start + -(-len(items) // self.number)], None
            try:
                found = compute(some)
            except Exception as error:
                failed = why_out_of_memory(error)
                if failed is None:
                    raise
            if failed is not None:
                # Outside the handler, which holds on to the frames of the failed call and so to its memory.
                self.halve(len(some), failed)
                continue
            start += len(some)
            yield some, found
            del found  # not held while the next is computed

    def halve(self, count: int, why: str) -> None:
        """Twice as many parts from now on.

        Args:
            count: items of a part that did not fit.
            why: what the failed allocation said.

        Raises:
            NotEnoughMemoryError: if it was one.
        """
        free_memory()
        if count < 2:
            raise NotEnoughMemoryError(f"Out of memory with one row at a time ({why}). {_FIXES}")
        self.number *= 2
        logger.warning("out of memory with %d rows at once (%s): going on with half of them", count, why)


def free_memory() -> None:
    """Let go what a failed call left."""
    gc.collect(1)  # what is young, which takes no time: graphs with hooks are cycles
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_GROWTH = 2**27
"""Memory that a process may keep unused, where it is looked after often."""

_held = 0  # after the last time


def give_back(now: bool = True) -> None:
    """Return what was freed to the system, before a phase that takes memory of other sizes.

    glibc keeps freed blocks of less than 32 MiB, which is all of a small model's: a phase's peak would come on top of
    what the phases before it took, and fragments of every batch on top of each other. Elsewhere this does nothing.

    Args:
        now: otherwise only if the process has grown by much since the last time.
    """
    global _held
    trim = _malloc_trim()
    if trim is None or not (now or held_by_process() - _held > _GROWTH):
        return
    trim(0)
    _held = held_by_process()


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


_FIXES = (
    "Lower memory_budget= (the sample and the query vectors held at once), set vector_dtype='bfloat16', or lower "
    "max_tokens_per_batch=. What was computed is kept in cache_dir=, if there is one, and not computed again."
)


@contextmanager
def naming_the_fix() -> Iterator[None]:
    """Raise `NotEnoughMemoryError`, which says what to set, where an allocation fails that no smaller batch helps."""
    try:
        yield
    except Exception as error:
        if (why := why_out_of_memory(error)) is None:
            raise
        raise NotEnoughMemoryError(f"Out of memory ({why}). {_FIXES}") from error


def held_by_process() -> int:
    """Bytes of memory that the process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def clock(device: torch.device) -> float:
    """Seconds that a calibration reads before and after: on a CPU, those that this thread really had.

    What else a busy machine does then does not make a calibration longer than the work that it stands for.
    """
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
