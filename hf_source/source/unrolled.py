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

    h = d f_q / d g_k            through clipping, moments and bias correction: autograd through torch's own optimizer
    score(q, m) -= <h, grad l_m(theta_k)> / N_k
    a <- (d step / d theta)^T (a, b) + H_k h,     b <- (d step / d state)^T (a, b)

with `H_k` the Hessian of the step's objective. Nothing is averaged or approximated, so this is what any other method
is measured against; what remains is only that a row's removal is not infinitesimal. States are kept at every
`sqrt(steps)`-th step and replayed in between. Cost per step: three gradients of the batch, the rows' dot products, and
a Hessian-vector product per query.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UnsupportedError
from ..gradients import RowGradients, task_labels
from ..recording import StageRecord
from ..recording.optimizers import OptimizerDescription, build_optimizer
from ..recording.reading.assumed import require_recorded_visits
from ..recording.warm import load_optimizer_state
from .products import ExactProducts, Products
from .stages import Vectors, WalkSettings, open_stage
from .walk import enter_epochs, score_rows


State = dict[str, dict[str, torch.Tensor]]
"""State of the optimizer: parameter name -> key -> tensor."""

# Rounding of a replay in float32 is far below this (2e-5 where it was measured); noise of any kind is above.
_MOST_MISSED = 0.05

DIFFERENTIABLE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")


@dataclass
class Snapshot:
    """Everything the next step depends on."""

    weights: dict[str, torch.Tensor]
    state: State = field(default_factory=dict)


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
    for position in range(len(stages) - 1, -1, -1):
        stage = stages[position]
        opened = open_stage(stages, position, rows, query_gradients, settings, unfused(models), vectors)
        gradients, names, vectors = opened
        run = RecordedRun(stage, rows[stage.name], gradients, settings, products or ExactProducts())
        scores, vectors = run.backward(vectors)
        vectors = {names[name]: vector for name, vector in vectors.items()}
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
        self.description = OptimizerDescription.from_dict(stage.optimizer)
        self.trained = {name: gradients.parameters[name] for name in stage.trainable}
        self.max_norm = float(stage.training["max_grad_norm"])
        self.stride = max(1, math.isqrt(len(self.steps)))

    def backward(self, vectors: Vectors) -> tuple[np.ndarray, Vectors]:
        """Scores of the stage's rows, `[queries, rows]`, and the query vectors at its initial weights."""
        scores = np.zeros((len(next(iter(vectors.values()))), self.stage.num_rows))
        adjoint, moments = dict(vectors), None
        checkpoints = self.replay()
        title = f"unrolling {self.stage.name}"
        last = len(self.steps) - 1
        trajectory: dict[int, Snapshot] = {}
        for step in self.settings.progress(range(last, -1, -1), title):
            if step not in trajectory:
                start = step // self.stride * self.stride
                trajectory = self._replay(checkpoints.pop(start), start, step)
            if not self.steps.skipped[step]:
                adjoint, moments = self.step_back(step, trajectory.pop(step), adjoint, moments, scores)
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
        optimizer = build_optimizer(self.description, self.trained)
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
            return self._update(snapshot, clipped, self.steps.learning_rate[step])

    def _load(self, snapshot: Snapshot) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(snapshot.weights[name])

    def micro_batches(self, step: int) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor], float]]:
        """Numbers of the rows, the batch and the normalizer of each micro-batch of a step."""
        enter_epochs(self.gradients, self.stage, range(step, step + 1))
        for batch in self.steps.micro_batches[step]:
            pieces = self.rows.pieces_of(batch.rows)
            yield self.rows.row[pieces], self.rows.collated(pieces, self.settings.device), batch.normalizer

    def _gradient(self, step: int, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """The step's gradient before clipping; parameters that it leaves alone are missing."""
        self._load(snapshot)
        frozen = self.stage.frozen_at(step)
        updated = {name: parameter for name, parameter in self.trained.items() if name not in frozen}
        total: dict[str, torch.Tensor] = {}
        for _, batch, normalizer in self.micro_batches(step):
            for name, part in self._differentiate(batch, updated, normalizer).items():
                total[name] = total[name] + part if name in total else part
        return total

    def _differentiate(
        self, batch: Mapping[str, torch.Tensor], wanted: Mapping[str, nn.Parameter], normalizer: float
    ) -> dict[str, torch.Tensor]:
        """Gradient of the batch's summed loss over the normalizer."""
        gradients, task = self.gradients, self.gradients.task
        with gradients._requiring_grad(list(wanted.values())), torch.enable_grad():
            loss = task.row_losses(task.forward(gradients.model, batch), task_labels(task, batch)).sum() / normalizer
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}

    def _update(self, snapshot: Snapshot, gradient: Mapping[str, torch.Tensor], rates: Sequence[float]) -> Snapshot:
        """One step of torch's own optimizer on clipped gradients; differentiable where its inputs are."""
        leaves = {name: nn.Parameter(weight) for name, weight in snapshot.weights.items()}
        optimizer = build_optimizer(self.description, leaves)
        optimizer.defaults["differentiable"] = torch.is_grad_enabled()
        for group, described, rate in zip(optimizer.param_groups, self.description.groups, rates, strict=True):
            group |= {"lr": float(rate), "differentiable": torch.is_grad_enabled(), "foreach": False, "fused": False}
            group["params"] = [snapshot.weights[name].clone() for name in described.parameters]
            for name, weight in zip(described.parameters, group["params"], strict=True):
                if name in snapshot.state:
                    optimizer.state[weight] = {key: value.clone() for key, value in snapshot.state[name].items()}
        made = {
            name: weight
            for group, described in zip(optimizer.param_groups, self.description.groups, strict=True)
            for name, weight in zip(described.parameters, group["params"], strict=True)
        }
        for name, part in gradient.items():
            made[name].grad = part
        if torch.is_grad_enabled() and isinstance(optimizer, torch.optim.SGD):
            _start_buffers(optimizer)
        optimizer.step()
        return Snapshot(made, {name: dict(optimizer.state[weight]) for name, weight in made.items()})

    def _clip(self, step: int, gradient: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Clip factor `c = limit / (norm + 1e-6)` of a gradient, and `dc / dnorm / norm`; 1 and 0 if not clipped."""
        if not gradient or self.steps.clip_factor[step] == 1.0:
            return 1.0, 0.0
        norm = float(torch.stack([part.square().sum() for part in gradient.values()]).sum().sqrt())
        factor = self.max_norm / (norm + 1e-6)
        return factor, -factor / (norm + 1e-6) / norm

    # ---- backwards ----

    def step_back(
        self, step: int, snapshot: Snapshot, adjoint: Vectors, moments: dict | None, scores: np.ndarray
    ) -> tuple[Vectors, dict]:
        """Through one step: adds to the scores, and returns the adjoints of the state before it."""
        gradient = self._gradient(step, snapshot)
        factor, slope = self._clip(step, gradient)
        clipped = {name: part * factor for name, part in gradient.items()}
        before, moments, forces, step_sizes = self._through_update(step, snapshot, clipped, adjoint, moments)
        if slope:
            along = sum((force * gradient[name]).flatten(1).sum(dim=1) for name, force in forces.items())
            forces = {
                name: factor * force + slope * along.view(-1, *[1] * gradient[name].dim()) * gradient[name]
                for name, force in forces.items()
            }
            step_sizes = {name: factor * size for name, size in step_sizes.items()}
        adjoint = {name: before.get(name, vector) for name, vector in adjoint.items()}
        self._load(snapshot)
        flowing = forces
        mine, count = self.settings.share
        for position, (numbers, batch, normalizer) in enumerate(self.micro_batches(step)):
            if position % count == mine:
                dots = score_rows(self.gradients, batch, forces).double().numpy()
                np.subtract.at(scores, (slice(None), numbers), dots / normalizer)
            seed = self.settings.seed + 7919 * step + 31 * position
            found = self.products(self.gradients, batch, flowing, normalizer, step_sizes, seed)
            for name, part in found.items():
                adjoint[name] = adjoint[name] + part
            if not self.products.exact:  # a flow through one micro-batch after the other
                flowing = {n: h - step_sizes[n] * found[n] if n in found else h for n, h in flowing.items()}
        return adjoint, moments

    def _through_update(self, step, snapshot, gradient, adjoint, moments):
        """Adjoints of the weights, the state and the clipped gradient of an update, for all queries at once."""
        weights = {name: value.detach().clone().requires_grad_() for name, value in snapshot.weights.items()}
        forces = {name: value.detach().clone().requires_grad_() for name, value in gradient.items()}
        state = {name: {key: _leaf(value) for key, value in own.items()} for name, own in snapshot.state.items()}
        with torch.enable_grad():
            # With learning rate 1, as torch's differentiable Adam divides by it: an update is linear in it.
            after = self._update(Snapshot(weights, state), forces, [1.0] * len(self.description.groups))
        rates = {
            name: float(rate)
            for group, rate in zip(self.description.groups, self.steps.learning_rate[step], strict=True)
            for name in group.parameters
        }
        outputs, cotangents = list(after.weights.values()), [rates[name] * adjoint[name] for name in after.weights]
        for name, own in (moments or {}).items():
            for key, vector in own.items():
                if after.state[name][key].requires_grad:
                    outputs.append(after.state[name][key])
                    cotangents.append(vector)
        slots = [(name, key) for name, own in state.items() for key, value in own.items() if value.requires_grad]
        inputs = [*weights.values(), *forces.values(), *(state[name][key] for name, key in slots)]
        found = torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, allow_unused=True)
        count = len(cotangents[0])
        found = [
            value.new_zeros((count, *value.shape)) if part is None else part
            for value, part in zip(inputs, found, strict=True)
        ]
        before = {name: part + (1 - rates[name]) * adjoint[name] for name, part in zip(weights, found, strict=False)}
        pulled = {
            name: _zero_where_untouched(part, gradient[name])
            for name, part in zip(forces, found[len(weights) :], strict=False)
        }
        earlier: dict[str, dict[str, torch.Tensor]] = {}
        for (name, key), part in zip(slots, found[len(weights) + len(forces) :], strict=True):
            earlier.setdefault(name, {})[key] = _zero_where_untouched(part, gradient.get(name))
        return before, earlier, pulled, self._step_sizes(after, rates)

    def _step_sizes(self, after: Snapshot, rates: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """`eta P` of an update by name, 0-dim or of the parameter's shape; moments held fixed."""
        sizes = {}
        for group in self.description.groups:
            for name in group.parameters:
                state = {key: value.detach() for key, value in after.state[name].items() if value is not None}
                weight, made = after.weights[name].detach(), group.how.updates_made(state)
                sizes[name] = rates[name] * group.how.preconditioner(weight, state, group.constants, made)
        return sizes


def _start_buffers(optimizer: torch.optim.SGD) -> None:
    """Momentum buffers before a parameter's first step.

    torch starts a buffer with the first gradient, detached; `(dampening / momentum) g` leads to the same buffer and
    keeps the derivative.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if group["momentum"] and weight.grad is not None and "momentum_buffer" not in optimizer.state[weight]:
                share = group["dampening"] / group["momentum"]
                optimizer.state[weight]["momentum_buffer"] = share * weight.grad


def _zero_where_untouched(part: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """The root of a second moment that is still 0 has no derivative; no row of the step touches such an entry."""
    return part if gradient is None else part.masked_fill_((gradient == 0) & part.isnan(), 0.0)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """A copy to differentiate with respect to; the step counter stays a number."""
    value = value.detach().clone()
    return value.requires_grad_() if value.dim() and value.is_floating_point() else value
