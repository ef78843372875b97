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

import logging
import re
import time
from collections.abc import Callable

import torch

from .errors import ConfigError


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


def with_smaller_batches(compute: Callable[[list], list], items: list) -> list:
    """`compute` of all items, or of halves of them where memory runs out.

    Args:
        compute: gives a result for each item, in order.
        items: what to compute.

    Raises:
        Exception: that of `compute`, if memory does not suffice for one item or something else is wrong.
    """
    try:
        return compute(items)
    except Exception as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
        said = str(error).splitlines()[:1]
    # Outside the handler, which holds on to the frames of the failed call and so to its memory.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("out of memory with %d rows at once (%s): going on with half of them", len(items), said)
    middle = len(items) // 2
    return [*with_smaller_batches(compute, items[:middle]), *with_smaller_batches(compute, items[middle:])]


def clock(device: torch.device) -> float:
    """Seconds that a calibration reads before and after: on a CPU, those that this thread really had.

    What else a busy machine does then does not make a calibration longer than the work that it stands for.
    """
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
