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
"""Learning-rate-weighted averages of the running segment, taken while training runs."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import RecordError
from .optimizers import GroupDescription, InverseRootRule, OptimizerDescription
from .sharding import as_sharded, is_sharded, local, part_of


# Entries handled at once, per device type: on a CPU what stays in the cache (measured 2 against 23 ns an entry for
# whole 10M-entry tensors), on a GPU what fills it without a third copy of a large model.
_CHUNK = {"cpu": 1 << 17}
_CHUNK_ELSEWHERE = 1 << 26


class SegmentAccumulator:
    """Sums `eta c theta` and `eta_g c P` over the steps of the running segment, and, if asked for, `eta c g`.

    Args:
        parameters: trainable parameters by name.
        optimizer: the torch optimizer that trains them.
        description: its description; says which group a parameter is in.
        on_cpu: keep the sums in CPU memory.
        gradient_mean: sum up `eta c g` too, the gradients as the optimizer gets them.

    The sums are float32 for half-precision parameters (a bfloat16 sum stops growing after a few hundred steps) and of
    the parameters' dtype otherwise. Of sharded parameters (FSDP2, ZeRO) each process sums its own shard.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        description: OptimizerDescription,
        on_cpu: bool = False,
        gradient_mean: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.description = description
        self.device = torch.device("cpu") if on_cpu else None
        self.group_of = {name: g for g, group in enumerate(description.groups) for name in group.parameters}
        self.theta = {name: self._zeros(p) for name, p in self.parameters.items()}
        self.sides = {n: self._group(n).how.side(p.shape) for n, p in self.parameters.items()}
        self.sides = {name: side for name, side in self.sides.items() if side is not None}
        self.scale = {n: self._zeros_of_scale(n) for n in self.parameters if not self._group(n).how.scalar}
        self.gradients = {name: self._zeros(p) for name, p in self.parameters.items()} if gradient_mean else {}
        # Read once: with fused optimizers on a GPU the counter lives there, and reading it at every step would wait.
        self._updates = {name: self._updates_made(name) for name in self.scale}
        self._bins = list(self._make_bins())
        self._sampled = [name for name in self.scale if self._group(name).how.every > 1]
        self._one_by_one = [n for n in self.scale if not isinstance(self._group(n).how, InverseRootRule)]
        self._noted = [name for name in self.scale if self._group(name).how.notes]
        self._before: dict[str, Any] = {}
        self._gradient_weight = 0.0
        self.reset()

    def reset(self) -> None:
        """Start an empty segment."""
        num_groups = len(self.description.groups)
        self.learning_rate_sum = 0.0
        self.effective_learning_rate_sum = 0.0
        self.learning_rate_sum_per_group = [0.0] * num_groups
        self.effective_learning_rate_sum_per_group = [0.0] * num_groups
        # By name, where not every update is looked at: the weight of all updates, and of those looked at.
        self.sampled_weights: dict[str, list[float]] = {}
        self.missed_learning_rates: dict[str, list[float]] = {}
        for tensor in (*self.theta.values(), *self.scale.values(), *self.gradients.values()):
            tensor.zero_()

    @torch.no_grad()
    def before_update(self, learning_rate: float, clip_factor: float) -> None:
        """Add the weights at which this step's gradients were taken."""
        weight = learning_rate * clip_factor
        if weight == 0:
            return
        values = [local(p.detach()) for p in self.parameters.values()]
        if self.device is not None:
            values = [value.to(self.device) for value in values]
        torch._foreach_add_(list(self.theta.values()), values, alpha=weight)
        for name in self._noted:
            parameter = self.parameters[name]
            rate = float(self.optimizer.param_groups[self.group_of[name]]["lr"] or 0.0)
            state = self.optimizer.state.get(parameter, {})
            self._before[name] = self._group(name).how.before_update(parameter, state, rate)

    @torch.no_grad()
    def add_gradients(self, weight: float) -> None:
        """Add the (clipped) gradients before the update, if their mean is wanted; they must be finite."""
        self._gradient_weight = weight
        names = [name for name in self.gradients if self.parameters[name].grad is not None]
        if names and weight != 0:
            sums = [self.gradients[name] for name in names]
            values = [local(self.parameters[name].grad) for name in names]
            torch._foreach_add_(
                sums, [value.to(total) for value, total in zip(values, sums, strict=True)], alpha=weight
            )

    @torch.no_grad()
    def after_update(
        self, learning_rate: float, learning_rates: Sequence[float], clip_factor: float, skipped: bool
    ) -> None:
        """Add the preconditioner of the update just made, and the step's learning rates.

        Args:
            learning_rate: the step's reference learning rate.
            learning_rates: learning rate of each group.
            clip_factor: factor by which the gradient was clipped.
            skipped: whether the optimizer left the weights as they were.
        """
        if skipped:
            # The weights are still those that `before_update` added: take them out again.
            self.before_update(learning_rate, -clip_factor)
            self.add_gradients(-self._gradient_weight)
            self._gradient_weight = 0.0
            return
        self._gradient_weight = 0.0
        self.learning_rate_sum += learning_rate
        self.effective_learning_rate_sum += learning_rate * clip_factor
        for group, value in enumerate(learning_rates):
            self.learning_rate_sum_per_group[group] += value
            self.effective_learning_rate_sum_per_group[group] += value * clip_factor
        self._add_missed(learning_rates, clip_factor)
        updated = {name for name in self.scale if self.parameters[name].grad is not None}
        for name in updated:
            self._updates[name] += 1
        for group, pieces in self._bins:
            weight = learning_rates[group] * clip_factor
            self._add_inverse_roots(group, [piece for piece in pieces if piece[0] in updated], weight)
        for name in self._one_by_one:
            weight = learning_rates[self.group_of[name]] * clip_factor
            if name in updated and weight != 0:
                self._add_one(name, weight)
        self._before = {}

    def _add_one(self, name: str, weight: float) -> None:
        every = self._group(name).how.every
        if every > 1:
            weights = self.sampled_weights.setdefault(name, [0.0, 0.0])
            weights[0] += weight
            if weights[1] != 0 and self._updates[name] % every != 0:
                return
            weights[1] += weight
        self.scale[name].add_(self._preconditioner(name).to(self.scale[name]), alpha=weight)

    def _add_missed(self, learning_rates: Sequence[float], clip_factor: float) -> None:
        """Parameters without a gradient (frozen, or unused) are left alone by the optimizer, decay included."""
        for name in [name for name, parameter in self.parameters.items() if parameter.grad is None]:
            rate = learning_rates[self.group_of[name]]
            missed, effective = self.missed_learning_rates.get(name, (0.0, 0.0))
            self.missed_learning_rates[name] = [missed + rate, effective + rate * clip_factor]

    def _preconditioner(self, name: str) -> torch.Tensor:
        group, parameter = self._group(name), local(self.parameters[name])
        before = self._before.get(name)
        return group.how.preconditioner(parameter, self._state(name), group.constants, self._updates[name], before)

    def _add_inverse_roots(self, group: int, pieces: Sequence[tuple[str, int, int]], weight: float) -> None:
        """`sum += weight * scale * sign(v) / (sqrt(v) + eps)`: `InverseRootRule.preconditioner` of many tensors."""
        if not pieces or weight == 0:
            return
        rule, constants = self.description.groups[group].how, self.description.groups[group].constants
        second, sums, weights, epsilons = [], [], [], []
        for name, start, stop in pieces:
            total = _piece(self.scale[name], start, stop)
            scale, eps = rule.scale_and_eps(constants, self._updates[name])
            if eps is None:
                total.add_(weight * scale)
                continue
            parameter, state = local(self.parameters[name]), self._state(name)
            piece = None if stop - start == parameter.numel() else slice(start, stop)
            moment = rule.second_moment(parameter, state, constants, piece, self._before.get(name))
            second.append(moment.to(total.dtype))
            sums.append(total)
            weights.append(weight * scale)
            epsilons.append(eps)
        if not second:
            return
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, epsilons)
        indicator = torch._foreach_sign(second)  # 1, or 0 where no gradient ever came: see `InverseRootRule`
        if self.device is not None:
            torch._foreach_div_(indicator, denominator)
            torch._foreach_mul_(indicator, weights)
            torch._foreach_add_(sums, [value.to(self.device) for value in indicator])
        else:
            torch._foreach_addcdiv_(sums, indicator, denominator, weights)

    @torch.no_grad()
    def close(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Turn the sums into the segment's averages, in place: weights, and preconditioner. `reset` afterwards.

        A segment whose learning rates were all 0 has not moved: its weights are the present ones, `P` is 0.
        """
        total = self.effective_learning_rate_sum
        if total == 0:
            for name, parameter in self.parameters.items():
                self.theta[name].copy_(local(parameter))
            total = 1.0
        else:
            torch._foreach_div_(list(self.theta.values()), total)
        if self.scale:
            torch._foreach_div_(list(self.scale.values()), total)
        for name, (weight, sampled) in self.sampled_weights.items():
            if sampled != weight:
                self.scale[name].mul_(weight / sampled)
        scale = {name: self.scale.get(name, self._scalar(name, total)) for name in self.theta}
        return self._as_parameters(self.theta), self._as_parameters(scale)

    @torch.no_grad()
    def close_gradient_mean(self) -> dict[str, torch.Tensor]:
        """Turn the sum of the gradients into their average, in place; empty if it was not asked for."""
        if self.gradients and self.learning_rate_sum:
            torch._foreach_div_(list(self.gradients.values()), self.learning_rate_sum)
        return self._as_parameters(self.gradients)

    def _as_parameters(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums of a sharded parameter's shards, as tensors that know of the other processes' shards."""
        return {name: as_sharded(tensor, self.parameters[name]) for name, tensor in tensors.items()}

    def _scalar(self, name: str, total: float) -> torch.Tensor | None:
        group, effective = self._group(name), self.effective_learning_rate_sum_per_group[self.group_of[name]]
        if not group.how.scalar:
            return None
        effective -= self.missed_learning_rates.get(name, (0.0, 0.0))[1]
        value = group.how.scalar_preconditioner(group.constants) * effective / total
        return torch.tensor(value, dtype=self.theta[name].dtype)

    def scalars(self) -> dict[str, Any]:
        """The segment's learning-rate sums, as they are stored, and what its preconditioners are."""
        return {
            **({"matrix_sides": dict(self.sides)} if self.sides else {}),
            "learning_rate_sum": self.learning_rate_sum,
            "effective_learning_rate_sum": self.effective_learning_rate_sum,
            "learning_rate_sum_per_group": list(self.learning_rate_sum_per_group),
            "effective_learning_rate_sum_per_group": list(self.effective_learning_rate_sum_per_group),
            "missed_learning_rates": dict(self.missed_learning_rates),
        }

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and scalars that continue this segment elsewhere (see `load_state`)."""
        tensors = {f"parameters/{name}": value for name, value in self._as_parameters(self.theta).items()}
        tensors |= {f"preconditioner/{name}": value for name, value in self._as_parameters(self.scale).items()}
        tensors |= {f"gradient_mean/{name}": value for name, value in self._as_parameters(self.gradients).items()}
        if not self._sampled:
            return tensors, self.scalars()
        # Muon does not count its updates.
        updates = {name: self._updates[name] for name in self._sampled}
        return tensors, self.scalars() | {"sampled_weights": copy.deepcopy(self.sampled_weights), "updates": updates}

    def load_state(self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> None:
        """Continue a segment from `state`. Of sharded parameters, the first process gives whole tensors to all.

        Raises:
            RecordError: if the gradients were not summed up until then.
        """
        if self.gradients and tensors and not any(name.startswith("gradient_mean/") for name in tensors):
            raise RecordError(
                "The checkpoint was saved with record_gradient_mean=False, so the mean gradient of its segment is not "
                "known. Resume with record_gradient_mean=False."
            )
        sums_by_prefix = {"parameters": self.theta, "preconditioner": self.scale, "gradient_mean": self.gradients}
        for prefix, sums in sums_by_prefix.items():
            for name, value in sums.items():
                whole, parameter = tensors.get(f"{prefix}/{name}"), self.parameters[name]
                value.copy_(part_of(whole, value.dtype, parameter) if is_sharded(parameter) else whole)
        self._updates |= scalars.get("updates", {})
        for key in set(scalars) - {"matrix_sides", "updates"}:
            setattr(self, key, copy.deepcopy(scalars[key]))

    def _zeros(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        dtype = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
        return torch.zeros_like(local(parameter), dtype=dtype, device=self.device, requires_grad=False)

    def _state(self, name: str) -> dict[str, Any]:
        state = self.optimizer.state[self.parameters[name]]
        if not is_sharded(self.parameters[name]):
            return state
        return {key: local(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}

    def _zeros_of_scale(self, name: str) -> torch.Tensor:
        if name not in self.sides:
            return self._zeros(self.parameters[name])
        short = min(self.parameters[name].shape)
        return self._zeros(self.parameters[name][:short, :short]).contiguous()

    def _group(self, name: str) -> GroupDescription:
        return self.description.groups[self.group_of[name]]

    def _updates_made(self, name: str) -> int:
        return self._group(name).how.updates_made(self.optimizer.state.get(self.parameters[name], {}))

    def _make_bins(self) -> Iterator[tuple[int, list[tuple[str, int, int]]]]:
        """Pieces (name, first entry, end entry) of parameters, gathered per group into bins of about one chunk."""
        for index, group in enumerate(self.description.groups):
            if not isinstance(group.how, InverseRootRule):
                continue
            pieces: list[tuple[str, int, int]] = []
            filled = 0
            for name in group.parameters:
                parameter = local(self.parameters[name])
                chunk = _CHUNK.get(parameter.device.type, _CHUNK_ELSEWHERE)
                # Only contiguous memory can be cut by entry number.
                size = chunk if parameter.is_contiguous() else max(parameter.numel(), 1)
                for start in range(0, parameter.numel(), size):
                    stop = min(start + size, parameter.numel())
                    if pieces and filled + stop - start > chunk:
                        yield index, pieces
                        pieces, filled = [], 0
                    pieces.append((name, start, stop))
                    filled += stop - start
            if pieces:
                yield index, pieces


class NoSums(SegmentAccumulator):
    """Stands in for the accumulator on a process whose weights another process sums up: it keeps no tensor."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        description: OptimizerDescription,
        on_cpu: bool = False,
        gradient_mean: bool = False,
    ) -> None:
        nothing = replace(description, groups=[replace(group, parameters=[]) for group in description.groups])
        super().__init__({}, optimizer, nothing, on_cpu)
        self.description = description

    def before_update(self, learning_rate: float, clip_factor: float) -> None:
        """Nothing."""

    def close(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """No tensors."""
        return {}, {}

    def close_gradient_mean(self) -> dict[str, torch.Tensor]:
        """No tensors."""
        return {}


def _piece(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if stop - start == tensor.numel():
        return tensor
    return tensor.view(-1)[start:stop]
