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
"""Which method is the better buy: Source, or one that replays the run and comes closer to its exact derivative.

`stepwise` and `unrolled` cost in proportion to the visits of rows, `source` to rows and segments; `unrolled` also to
the queries. So short runs are better replayed, and few queries exactly. What is compared is what the machine that asks
would take.
"""

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..source import refuse_inexact, replay_cost
from .methods.base import NoOptions
from .methods.source import SourceOptions, StepwiseOptions
from .plan import Measured, Plan, estimate, measure
from .queries import Queries


if TYPE_CHECKING:
    from ..recording import StageRecord
    from .attributor import SourceAttributor


DEFAULT = "source"
DRAWS = (4, 16)
"""Numbers of draws of `stepwise` that are weighed."""

MAX_COST = 3.0
"""How many times the time of `source` a better method may take by default."""

ADVISED = ("source", "fast-source", "stepwise", "unrolled", "auto")
"""Methods whose plan comes with advice; the others are there to compare with."""


@dataclass(frozen=True)
class Candidate:
    """A method that could be taken, and what it would cost.

    Attributes:
        method: name.
        options: its settings, as keyword arguments of `SourceAttributor`.
        seconds: predicted.
        memory: bytes at the peak, beside the interpreter and its libraries.
        passes: tokens that go forward and backward, in units of the tokens of all rows walked through.
    """

    method: str
    options: dict[str, Any]
    seconds: float
    memory: int
    passes: float

    @property
    def name(self) -> str:
        """As it is told."""
        draws = self.options.get("draws")
        return f"`{self.method}`" if draws is None else f"`{self.method}` with {draws} draws"

    def __str__(self) -> str:
        return f"{self.name} {_number(self.seconds)} s, {self.memory / 2**20:,.0f} MiB, {_number(self.passes)} passes"


@dataclass(frozen=True)
class Advice:
    """What the methods that replay the run would cost, and which one is the better buy.

    Attributes:
        default: Source with the attributor's settings.
        replays: the others, from the least to the most accurate; none if the run cannot be replayed.
        obstacle: why not.
        max_cost: how many times the default's time they may take.
        max_memory: bytes that they may hold.
        steps: that a replay repeats.
    """

    default: Candidate
    replays: tuple[Candidate, ...]
    obstacle: str
    max_cost: float
    max_memory: int
    steps: int

    @property
    def best(self) -> Candidate:
        """The most accurate one that is not too expensive."""
        fitting = [each for each in self.replays if self._fits(each)]
        return fitting[-1] if fitting else self.default

    def _fits(self, candidate: Candidate) -> bool:
        return self.times(candidate) <= self.max_cost and candidate.memory <= self.max_memory

    def times(self, candidate: Candidate) -> float:
        """How many times the default's time a candidate takes."""
        return candidate.seconds / max(self.default.seconds, 1e-12)

    @property
    def reason(self) -> str:
        """Why the best one is the best, a sentence."""
        best = self.best
        if self.obstacle:
            return f"the run cannot be replayed. {self.obstacle}"
        if best.method == DEFAULT:
            cheapest = min(self.replays, key=self.times)
            if self.times(cheapest) <= self.max_cost:
                held = f"{cheapest.memory / 2**20:,.0f} MiB, more than {self.max_memory / 2**20:,.0f}"
                return f"a replay of the {self.steps:,} steps holds {held}."
            times = f"{_number(self.times(cheapest))} times as long, more than {self.max_cost:g}"
            return f"a replay of the {self.steps:,} steps takes at least {times}."
        what = "the exact derivative" if best.method == "unrolled" else "follows every step"
        times = f"{_number(self.times(best))} times the time of `{DEFAULT}`, at most {self.max_cost:g}"
        return f"{what}, for {times}, if the replay ends at the recorded weights."

    def __str__(self) -> str:
        lines = [f"  better buy: {self.best.name}: {self.reason}"]
        if self.replays:
            lines.append("  compared: " + "; ".join(map(str, (self.default, *self.replays))))
        return "\n".join(lines)


def advised_plan(attributor: "SourceAttributor", queries: Queries, target: "StageRecord") -> Plan:
    """The plan of the attributor's method, or of what `method="auto"` takes, with advice where there is some."""
    measured = measure(attributor, queries, target)
    alone = attributor.ensemble is None and attributor.index is None and attributor.shards is None
    if attributor.method not in ADVISED or not alone:
        return estimate(attributor, measured)
    advice = advise(attributor, measured)
    taken = variant(attributor, advice.best) if attributor.method == "auto" else attributor
    plan = estimate(taken, measured)
    plan.one_segment, plan.advice = _with_one_segment(taken, measured), advice
    for each in advice.replays:  # whose steps were timed
        if each.method == taken.method and each.options == vars(taken.options):
            plan.seconds = each.seconds
    return plan


def _with_one_segment(attributor: "SourceAttributor", measured: Measured) -> Plan | None:
    """The plan with one segment for each stage; `None` if there are no more, or the method makes no use of them."""
    if attributor.method not in ("source", "fast-source") or all(len(each.segments) < 2 for each in measured.stages):
        return None
    found = copy.copy(attributor)
    found.record = attributor.record.merged(1)
    return estimate(found, replace(measured, stages=[each.merged(1) for each in measured.stages]))


def advise(attributor: "SourceAttributor", measured: Measured) -> Advice:
    """Estimate Source and the methods that replay; the attributor's `max_cost` decides, where it has one."""
    max_cost = getattr(attributor.options, "max_cost", MAX_COST)
    own = vars(attributor.options).copy() if attributor.method == DEFAULT else {}
    default = _candidate(attributor, measured, DEFAULT, own)
    # What the user allows to be held; a small model's walk holds less than that anyway.
    max_memory = max(attributor.memory_budget, int(max_cost * default.memory))
    obstacle = replay_obstacle(attributor.record.stages)
    limits = default.seconds * max_cost, max_memory, max(attributor.memory_budget, default.memory)
    replays = () if obstacle else _replays(attributor, measured, *limits)
    steps = sum(stage.num_steps for stage in measured.stages)
    return Advice(default, replays, obstacle, max_cost, max_memory, steps)


def _replays(attributor, measured: Measured, max_seconds: float, max_memory: int, room: int) -> tuple[Candidate, ...]:
    """The methods that replay; a step of the run is timed where they could be taken.

    Exact products only where they take no more memory than the default or what was allowed (`room`): a plan should
    not need more than what it plans.
    """
    draws = set(DRAWS) | ({attributor.options.draws} if attributor.method == "stepwise" else set())
    asked = [("stepwise", {"draws": number}) for number in sorted(draws)] + [("unrolled", {})]
    found = [_candidate(attributor, measured, method, options) for method, options in asked]
    # By tokens, a replay looks up to a few times as long as it is: its batches are small and share their forward pass.
    if found[0].seconds > 10 * max_seconds or found[0].memory > max_memory:
        return tuple(found)
    timed_exactly = found[-1].memory <= room
    cost = replay_cost(
        measured.stages,
        attributor.all_rows(),
        measured.num_queries,
        attributor.walk_settings(),
        attributor.build_model,
        timed_exactly,
    )
    tokens = _visited_tokens(attributor, measured.stages)
    timed = []
    for each in found:
        exact = each.method == "unrolled"
        if exact and not timed_exactly:
            timed.append(each)
            continue
        rate = cost.exact(measured.num_queries) if exact else cost.sampled(each.options["draws"])
        timed.append(replace(each, seconds=rate * tokens))
    return tuple(each for each in timed if each.seconds < float("inf"))


def _visited_tokens(attributor: "SourceAttributor", stages: "list[StageRecord]") -> int:
    """Tokens of all visits of rows."""
    rows = [attributor.rows(stage) for stage in stages]
    visits = [
        sum(part.num_visits()[own.example] for part in stage.segments) for stage, own in zip(stages, rows, strict=True)
    ]
    return sum(int((number * own.lengths).sum()) for number, own in zip(visits, rows, strict=True))


def replay_obstacle(stages: "list[StageRecord]") -> str:
    """Why `stepwise` and `unrolled` would refuse these stages before they start; empty if they would not."""
    for stage in stages:
        try:
            refuse_inexact(stage)
        except UnsupportedError as error:
            return str(error)
    return ""


def variant(attributor: "SourceAttributor", candidate: Candidate) -> "SourceAttributor":
    """The attributor with another method; it has walks of its own, and shares rows and settings."""
    found = copy.copy(attributor)
    kinds = {"source": SourceOptions, "stepwise": StepwiseOptions, "unrolled": NoOptions}
    found.method, found.options = candidate.method, kinds[candidate.method](**candidate.options)
    found._walked, found._walks, found.taken = {}, {}, None
    return found


def _candidate(attributor: "SourceAttributor", measured: Measured, method: str, options: dict) -> Candidate:
    plan = estimate(variant(attributor, Candidate(method, options, 0.0, 0, 0.0)), measured)
    rows = [attributor.rows(stage) for stage in measured.stages]
    tokens = sum(int(each.lengths[each.trained].sum()) for each in rows)
    passes = sum(stage.sample_tokens + stage.score_tokens for stage in plan.stages) / max(tokens, 1)
    return Candidate(method, options, plan.seconds, plan.peak_memory, passes)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
