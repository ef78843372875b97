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
"""Exact unrolling: reverse-mode differentiation through every recorded optimizer step.

The run is the function `(theta, state)_{k+1} = step_k((theta, state)_k, g_k)`, `g_k = sum_m grad l_m(theta_k) / N_k`
of the recorded batches (Maclaurin et al. 2015, arXiv 1502.03492; Bae et al. 2024, arXiv 2405.12186, equation 5). Going
backwards with the adjoints `a = d f_q / d theta_k` and `b = d f_q / d state_k`:

    h = d f_q / d g_k            through clipping, moments and bias correction (`updates.py`)
    score(q, m) -= <h, grad l_m(theta_k)> / N_k
    a <- (d step / d theta)^T (a, b) + H_k h,     b <- (d step / d state)^T (a, b)

with `H_k` the Hessian of the step's objective. Nothing is averaged or approximated, so this is what any other method
is measured against; what remains is only that a row's removal is not infinitesimal. States of long runs are kept at
every `sqrt(steps)`-th step and replayed in between. Cost per step: two or three gradients of the batch and a
Hessian-vector product per query, which tells the rows' dot products too: `H h` and `<h, grad l_m>` are derivatives
of one gradient.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..budget import Parts
from ..errors import UnsupportedError
from ..gradients import RowGradients, task_labels
from ..gradients.task import batch_rows
from ..recording import StageRecord
from ..recording.optimizers import OptimizerDescription, build_optimizer
from ..recording.reading.assumed import require_recorded_visits
from ..recording.warm import load_optimizer_state
from .products import ExactProducts, Objective, Products
from .resume import StepsDone
from .stages import Vectors, WalkSettings, open_stage
from .updates import Snapshot, State, Update
from .walk import enter_epochs, score_rows


# Rounding of a replay in float32 is far below this (2e-5 where it was measured); noise of any kind is above.
_MOST_MISSED = 0.05

_FEW_BYTES = 2**27
"""States of a run up to this size are all kept."""

_BATCH_TOKENS = 64
"""What a batch costs beside its tokens, in tokens."""

DIFFERENTIABLE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")


def unroll(
    stages: Sequence[StageRecord],
    rows: Mapping[str, Any],
    query_gradients: Callable[[RowGradients], Vectors],
    settings: WalkSettings,
    models: Callable[[StageRecord], nn.Module],
    products: Products | None = None,
) -> Iterator[tuple[StageRecord, np.ndarray]]:
    """Score the rows of one stage after another, from the last to the first; takes what `walk` takes.

    Args:
        stages, rows, query_gradients, settings, models: see `walk`.
        products: `ExactProducts` (the default) or `SampledProducts`: how vectors are multiplied by a step's curvature.

    Yields:
        The stage and its scores, float32 `[queries, rows]`: this process's share (zeros elsewhere).

    Raises:
        UnsupportedError: if a stage cannot be replayed exactly (dropout, an optimizer torch cannot differentiate), or
            does not start from the weights the one before it ended with.
    """
    for stage in stages:
        refuse_inexact(stage)

    vectors: Vectors | None = None
    work = settings.work
    for position in range(len(stages) - 1, -1, -1):
        stage, known = stages[position], work.load(f"{position}.done")
        if known is not None:
            vectors = work.load(f"{position}.carried", settings.device)
            yield stage, known["scores"].numpy()
            continue
        done = StepsDone(work, position, settings.device)
        ask = (lambda gradients: {}) if done else query_gradients
        gradients, names, vectors = open_stage(stages, position, rows, ask, settings, unfused(models), vectors)
        run = RecordedRun(stage, rows[stage.name], gradients, settings, products or ExactProducts())
        scores, vectors = run.backward(vectors, done)
        vectors = {names[name]: vector for name, vector in vectors.items()}
        if position:
            work.save(f"{position}.carried", vectors)
        work.save(f"{position}.done", {"scores": torch.from_numpy(scores)})
        work.drop(f"{position + 1}.carried")
        done.drop()
        del gradients, run
        yield stage, scores


def unfused(models: Callable[[StageRecord], nn.Module]) -> Callable[[StageRecord], nn.Module]:
    """Models whose attention is not fused, which has no second derivative."""

    def make(stage: StageRecord) -> nn.Module:
        model = models(stage)
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        return model

    return make


def refuse_inexact(stage: StageRecord) -> None:
    """Raise if the stage's steps cannot be repeated exactly, or not be differentiated."""
    require_recorded_visits(stage, "unrolled")
    if stage.training.get("dropout"):
        raise UnsupportedError(
            f"Stage {stage.name!r} trained with dropout, whose masks the record does not hold, so its steps cannot be "
            "repeated. Use method='source', or train with dropout 0."
        )
    if stage.training.get("neftune_noise_alpha"):
        raise UnsupportedError(
            f"Stage {stage.name!r} trained with NEFTune, whose noise the record does not hold, so its steps cannot be "
            "repeated. Use method='source', or train without `neftune_noise_alpha`."
        )
    rules = {group["rule"] for group in stage.optimizer["groups"] if group["parameters"]}
    if len(rules) > 1 or not rules <= set(DIFFERENTIABLE):
        raise UnsupportedError(
            f"Stage {stage.name!r} trained with {' and '.join(sorted(rules))}, which cannot be differentiated: "
            f"a replay knows one of {', '.join(DIFFERENTIABLE)}. Use method='source'."
        )


def refuse_other_runs(
    stages: Sequence[StageRecord],
    rows: Mapping[str, Any],
    settings: WalkSettings,
    models: Callable[[StageRecord], nn.Module],
) -> None:
    """Repeat the steps of some stages, which are the first of a run, and raise if they do not lead to its weights.

    Args:
        stages, rows, settings, models: see `walk`.

    Raises:
        UnsupportedError: if the replay ends elsewhere.
    """
    for stage in stages:
        refuse_inexact(stage)
        model = models(stage).to(settings.device, settings.dtype).eval()
        gradients = RowGradients(model, rows[stage.name].task, list(stage.trainable))
        rows[stage.name].prepare(gradients)
        RecordedRun(stage, rows[stage.name], gradients, settings, None).replay()


def by_length(pieces: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut pieces into batches of similar lengths where that saves more padding than a batch costs."""
    order = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[order]
    ends = [*(np.flatnonzero(np.diff(sorted_lengths)) + 1).tolist(), len(order)]
    best = {0: (0, 0)}  # number of the shortest pieces -> cost of batches of them, and where the last one starts
    for end in ends:
        longest = int(sorted_lengths[end - 1])
        best[end] = min((cost + (end - start) * longest + _BATCH_TOKENS, start) for start, (cost, _) in best.items())
    found, end = [], len(order)
    while end:
        start = best[end][1]
        found.append(pieces[order[start:end]])
        end = start
    return found[::-1]


def state_stride(num_steps: int, weight_bytes: int) -> int:
    """At which steps states are kept: all of them if that is little, or else every `sqrt(steps)`-th."""
    return 1 if num_steps * 3 * weight_bytes <= _FEW_BYTES else max(1, math.isqrt(num_steps))


class RecordedRun:
    """One stage, to be repeated forwards and differentiated backwards.

    Args:
        stage: what was recorded.
        rows: its `StageRows`.
        gradients: engine over the wanted parameters (trained here, or in an earlier stage).
        settings: of the walk.
        products: how vectors are multiplied by a step's curvature.
    """

    def __init__(
        self, stage: StageRecord, rows: Any, gradients: RowGradients, settings: WalkSettings, products: Any
    ) -> None:
        self.stage, self.rows, self.gradients, self.settings = stage, rows, gradients, settings
        self.products = products
        self.steps = stage.steps()
        self.update = Update(OptimizerDescription.from_dict(stage.optimizer))
        self.trained = {name: gradients.parameters[name] for name in stage.trainable}
        self.max_norm = float(stage.training["max_grad_norm"])
        size = sum(p.numel() * p.element_size() for p in self.trained.values())
        self.stride = state_stride(len(self.steps), size)
        self._parts = Parts()

    def backward(self, vectors: Vectors, done: StepsDone) -> tuple[np.ndarray, Vectors]:
        """Scores of the stage's rows, `[queries, rows]`, and the query vectors at its initial weights.

        Args:
            vectors: query vectors at the stage's end; not needed where some steps are done.
            done: keeps how far it is.
        """
        if done:
            last, adjoint, moments, scores = done.load()
        else:
            scores = np.zeros((len(next(iter(vectors.values()))), self.stage.num_rows))
            # Copies, as they are changed in place.
            adjoint, moments = {name: vector.clone() for name, vector in vectors.items()}, {}
            last = len(self.steps)
        checkpoints = self.replay()
        title = f"unrolling {self.stage.name}"
        trajectory: dict[int, Snapshot] = {}
        for step in self.settings.progress(range(last - 1, -1, -1), title):
            if step not in trajectory:
                start = step // self.stride * self.stride
                trajectory = self._replay(checkpoints.pop(start), start, step)
            if not self.steps.skipped[step]:
                self.step_back(step, trajectory.pop(step), adjoint, moments, scores)
                done.save(step, adjoint, moments, scores)
        return scores.astype(np.float32), adjoint

    # ---- forwards ----

    def replay(self) -> dict[int, Snapshot]:
        """The state before every `stride`-th step, in CPU memory.

        Raises:
            UnsupportedError: if the steps do not end at the recorded weights.
        """
        self.stage.load_weights(self.gradients.model, "initial")
        weights = {name: p.detach().clone() for name, p in self.trained.items()}
        found, snapshot = {}, Snapshot(weights, self.first_state())
        title = f"replaying {self.stage.name}"
        for step in self.settings.progress(range(len(self.steps)), title):
            if step % self.stride == 0:
                found[step] = snapshot
            snapshot = self.next(step, snapshot)
        self._refuse_another_run(snapshot)
        return found

    def _refuse_another_run(self, end: Snapshot) -> None:
        """Raise if the steps did not lead to the recorded weights: then it is not this run that is differentiated."""
        start, final = self.stage.weights("initial"), self.stage.weights("final")
        reached = {name: weight.cpu() for name, weight in end.weights.items()}
        missed, moved = (
            sum(float((weights[name].double() - final[name].double()).square().sum()) for name in final)
            for weights in (reached, start)
        )
        if missed > _MOST_MISSED**2 * moved:
            share = np.sqrt(missed / max(moved, 1e-300))
            raise UnsupportedError(
                f"Replaying stage {self.stage.name!r} ended {share:.0%} of the distance "
                "trained away from its recorded weights (noise in training, such as NEFTune, a router loss, or half "
                "precision), so its steps cannot be followed. Use method='source', which does not replay."
            )

    def first_state(self) -> State:
        """What the optimizer brought from earlier training."""
        optimizer = build_optimizer(self.update.description, self.trained)
        load_optimizer_state(self.stage, optimizer, self.trained)
        return {name: dict(optimizer.state[p]) for name, p in self.trained.items() if optimizer.state[p]}

    def _replay(self, snapshot: Snapshot, first: int, last: int) -> dict[int, Snapshot]:
        """The states before the steps `first` to `last`."""
        found = {}
        for step in range(first, last + 1):
            found[step] = snapshot
            if step < last:
                snapshot = self.next(step, snapshot)
        return found

    def next(self, step: int, snapshot: Snapshot) -> Snapshot:
        """The state after a step."""
        if self.steps.skipped[step]:
            return snapshot
        with torch.no_grad():
            gradient = self._gradient(step, snapshot)
            factor = self._clip(step, gradient)[0]
            clipped = {name: part * factor for name, part in gradient.items()}
            return self.update.forward(snapshot, clipped, self.steps.learning_rate[step])

    def _load(self, snapshot: Snapshot) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(snapshot.weights[name])

    def micro_batches(
        self, step: int, padded: bool = True
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor], float]]:
        """Pieces, batch and normalizer of each micro-batch of a step.

        Args:
            step: number of the step.
            padded: otherwise pieces of similar lengths make batches of their own, which are cheaper.
        """
        enter_epochs(self.gradients, self.stage, range(step, step + 1))
        for batch in self.steps.micro_batches[step]:
            pieces = self.rows.pieces_of(batch.rows)
            for part in [pieces] if padded else by_length(pieces, self.rows.lengths[pieces]):
                yield part, self.rows.collated(part, self.settings.device), batch.normalizer

    def _gradient(self, step: int, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """The step's gradient before clipping; parameters that it leaves alone are missing."""
        self._load(snapshot)
        frozen = self.stage.frozen_at(step)
        updated = {name: parameter for name, parameter in self.trained.items() if name not in frozen}
        total: dict[str, torch.Tensor] = {}
        for pieces, batch, normalizer in self.micro_batches(step):
            own = partial(self._differentiate, batch, updated, normalizer)
            for _, found in self._parts(own, range(len(pieces))):
                for name, part in found.items():
                    total[name] = total[name] + part if name in total else part
        return total

    def _differentiate(
        self, batch: Mapping[str, torch.Tensor], wanted: Mapping[str, nn.Parameter], normalizer: float, rows: range
    ) -> dict[str, torch.Tensor]:
        """Gradient of the summed loss of some rows of a batch over the normalizer."""
        gradients, task, batch = self.gradients, self.gradients.task, batch_rows(batch, rows)
        with gradients._requiring_grad(list(wanted.values())), torch.enable_grad():
            loss = task.row_losses(task.forward(gradients.model, batch), task_labels(task, batch)).sum() / normalizer
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}

    def _clip(self, step: int, gradient: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Clip factor `c = limit / (norm + 1e-6)` of a gradient, and `dc / dnorm / norm`; 1 and 0 if not clipped."""
        if not gradient or self.steps.clip_factor[step] == 1.0:
            return 1.0, 0.0
        norm = float(torch.stack([part.square().sum() for part in gradient.values()]).sum().sqrt())
        factor = self.max_norm / (norm + 1e-6)
        return factor, -factor / (norm + 1e-6) / norm

    # ---- backwards ----

    def step_back(self, step: int, snapshot: Snapshot, adjoint: Vectors, moments: State, scores: np.ndarray) -> None:
        """Through one step, for all queries.

        Args:
            step, snapshot: the step, and the state before it.
            adjoint, moments: of the weights and the state after it, changed in place to those before it.
            scores: `[queries, rows]`, added to.
        """
        exact = isinstance(self.products, ExactProducts)
        # Several micro-batches are there for want of memory: then one after the other, once the forces are known.
        once = exact and len(self.steps.micro_batches[step]) == 1
        objectives = list(self._objectives(step, snapshot)) if once else []
        gradient = self._sum(step, objectives) if once else self._gradient(step, snapshot)
        factor, slope = self._clip(step, gradient)
        clipped = {name: part * factor for name, part in gradient.items()}
        rates = self.steps.learning_rate[step]
        forces, step_sizes = self.update.backward(snapshot, clipped, rates, adjoint, moments)
        if slope:
            along = sum((force * gradient[name]).flatten(1).sum(dim=1) for name, force in forces.items())
            for name, force in forces.items():
                spread = slope * along.view(-1, *[1] * gradient[name].dim())
                forces[name] = force.mul_(factor).addcmul_(spread, gradient[name])
            step_sizes = {name: factor * size for name, size in step_sizes.items()}
        if exact:
            made = (objectives.pop(0) for _ in range(len(objectives))) if once else self._objectives(step, snapshot)
            self._exactly(made, forces, adjoint, scores)
        else:
            self._load(snapshot)
            self._by_products(step, forces, step_sizes, adjoint, scores)

    def _objectives(self, step: int, snapshot: Snapshot) -> Iterator[tuple[int, np.ndarray, float, Objective]]:
        """Number, pieces, normalizer and loss of the batches of a step, ready to be differentiated twice.

        A batch for which memory does not suffice comes in parts, which have its number: other processes may have
        room for it.
        """
        self._load(snapshot)
        for number, (pieces, batch, normalizer) in enumerate(self.micro_batches(step, padded=False)):
            own = partial(self._objective, batch, normalizer)
            for rows, found in self._parts(own, range(len(pieces))):
                yield number, pieces[rows.start : rows.stop], normalizer, found

    def _objective(self, batch: Mapping[str, torch.Tensor], normalizer: float, rows: range) -> Objective:
        return Objective(self.gradients, batch_rows(batch, rows), normalizer)

    def _sum(self, step: int, objectives: list[tuple[int, np.ndarray, float, Objective]]) -> dict[str, torch.Tensor]:
        """The step's gradient before clipping."""
        frozen, total = self.stage.frozen_at(step), {}
        for *_, objective in objectives:
            for name in self.trained:
                if name in objective.gradient and name not in frozen:
                    part = objective.gradient[name]
                    total[name] = total[name] + part if name in total else part
        return total

    def _exactly(self, objectives: Iterator, forces: Vectors, adjoint: Vectors, scores: np.ndarray) -> None:
        """Rows' scores and `H h`, both of one derivative along the forces."""
        mine, count = self.settings.together.index, self.settings.together.count
        for position, pieces, normalizer, objective in objectives:
            for queries, found, dots in objective.along(forces):
                for name, part in found.items():
                    adjoint[name][queries] += part
                if position % count == mine:
                    rows = self.rows.row[pieces]
                    np.subtract.at(scores[queries], (slice(None), rows), dots.double().cpu().numpy() / normalizer)

    def _by_products(self, step, forces, step_sizes, adjoint, scores) -> None:
        # Forces themselves still score the rows of later micro-batches.
        several = len(self.steps.micro_batches[step]) > 1
        flowing = {name: force.clone() for name, force in forces.items()} if several else forces
        mine, count = self.settings.together.index, self.settings.together.count
        for position, (pieces, batch, normalizer) in enumerate(self.micro_batches(step)):
            if position % count == mine:
                dots = score_rows(self.gradients, batch, forces).double().numpy()
                np.subtract.at(scores, (slice(None), self.rows.row[pieces]), dots / normalizer)
            seed = self.settings.seed + 7919 * step + 31 * position
            found = self.products(self.gradients, batch, flowing, normalizer, step_sizes, seed)
            for name, part in found.items():
                adjoint[name] += part
                if several and not self.products.exact and name in flowing:  # a flow through one after the other
                    flowing[name].addcmul_(step_sizes[name].to(part), part, value=-1)
