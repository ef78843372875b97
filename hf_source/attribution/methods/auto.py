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
"""`auto`: the most accurate of `unrolled`, `stepwise` and `source` that this record, these rows and queries allow."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from ...errors import ConfigError, UnsupportedError
from ...logs import get_logger
from ...source import refuse_other_runs
from ..queries import Queries
from .base import Scores, in_chunks


if TYPE_CHECKING:
    from ..attributor import SourceAttributor

logger = get_logger(__name__)


@dataclass(frozen=True)
class AutoOptions:
    """Settings of `auto`.

    Attributes:
        max_cost: how many times the predicted time of `source` a more accurate method may take. Its memory may be as
            many times that of `source`, or the memory budget.
    """

    max_cost: float = 3.0

    def __post_init__(self) -> None:
        if not self.max_cost > 0:
            raise ConfigError(f"max_cost={self.max_cost}: give a positive number of times the cost of 'source'.")


def auto(attributor: "SourceAttributor", queries: Queries) -> Scores:
    """`unrolled` or `stepwise` where the run can be replayed and that is not too expensive, else `source`; nats.

    Which one it is comes from what `plan()` predicts (`attribution/advice.py`), and is said in the log, in
    `settings()` and with the results; name that method to have it on any machine. If a replay does not end at the
    recorded weights, `source` is taken instead.
    """
    from ..advice import advise, variant  # plans are made of methods
    from ..plan import measure
    from . import METHODS

    advice = advise(attributor, measure(attributor, queries, attributor.record.stages[0]))
    # Each process measures for itself; the first one decides.
    best, reason = broadcast_object_list([advice.best, advice.reason])
    scores = None
    if best.method != advice.default.method:
        try:
            scores = _replayed(_take(attributor, variant(attributor, best), best.name, reason), queries, METHODS)
        except (UnsupportedError, RuntimeError) as error:  # such as an operation without a second derivative
            reason = f"{best.name} failed: {error}"
            logger.warning("method='auto' goes on with `source`: %s", reason)
    if scores is None:
        taken = _take(attributor, variant(attributor, advice.default), advice.default.name, reason)
        scores = in_chunks(taken, queries, METHODS[taken.method])
    yield from scores


def _take(attributor: "SourceAttributor", taken: "SourceAttributor", name: str, reason: str) -> "SourceAttributor":
    attributor.taken = (taken, f"method='auto' took {name}: {reason}")
    logger.info(attributor.taken[1])
    return taken


def _replayed(taken: "SourceAttributor", queries: Queries, methods: dict) -> Scores:
    """Scores of a method that replays, once it is known that every stage ends where it did."""
    stages = taken.record.stages
    # The last stage is replayed first, and its scores are made before anything is given out.
    refuse_other_runs(stages[:-1], taken.all_rows(), taken.walk_settings(), taken.build_model)
    scores = in_chunks(taken, queries, methods[taken.method])
    first = next(scores)

    def all_of_them() -> Scores:
        yield first
        yield from scores

    return all_of_them()
