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
"""Parameters that callbacks freeze and unfreeze while a stage trains.

An optimizer leaves a parameter without a gradient alone: no update, no weight decay, no step of its moments. So what a
step updated is seen at its gradients, whatever the reason (`requires_grad`, or a part of the model that the step did
not use). The record notes it where it changes: `stage["trainable_changes"] = [{"step", "frozen": names}]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError
from ..logs import get_logger
from .names import named_parameters


logger = get_logger(__name__)


def recorded_names(model: torch.nn.Module) -> dict[torch.nn.Parameter, str | None]:
    """Name of every parameter that an optimizer may train, and `None` for the frozen base under an adapter.

    Elsewhere a parameter that is frozen now may be unfrozen later, and is recorded from the start if the optimizer has
    it. The base of a PEFT model is as large as the model, and stays frozen.
    """
    keep_all = not hasattr(model, "peft_config")
    return {p: name if keep_all or p.requires_grad else None for name, p in named_parameters(model)}


class UpdateWatch:
    """Sees which parameters the steps of a stage update.

    Args:
        names: from `recorded_names`.
        recorded: names of the parameters that the record follows.
        optimizer: what trains them.
    """

    def __init__(
        self, names: Mapping[torch.nn.Parameter, str | None], recorded: set[str], optimizer: torch.optim.Optimizer
    ) -> None:
        self.optimizer = optimizer
        self.parameters = {name: p for p, name in names.items() if name in recorded}
        self._outside = [p for p, name in names.items() if name not in recorded]
        self._count = self._optimized()
        self._flags: list[bool] | None = None
        self._warned = False

    def _optimized(self) -> int:
        return sum(len(group["params"]) for group in self.optimizer.param_groups)

    def micro_batch(self, step: int, first: bool) -> None:
        """A micro-batch begins, the first one of the step or another.

        Raises:
            UnsupportedError: if other parameters train than in the step's micro-batches before it.
        """
        flags = [parameter.requires_grad for parameter in self.parameters.values()]
        if first or self._flags is None:
            self._flags = flags
        elif flags != self._flags:
            pairs = zip(self.parameters, self._flags, flags, strict=True)
            changed = [name for name, before, now in pairs if before != now]
            raise UnsupportedError(
                f"`{changed[0]}` ({len(changed)} in all) was frozen or unfrozen between two micro-batches of "
                f"optimizer step {step}, so its gradient is of some of the step's rows only. Set requires_grad "
                "between steps: in on_epoch_begin, on_step_begin or on_step_end."
            )

    def without_update(self, step: int) -> list[str]:
        """Names of the recorded parameters that the step, whose gradients are complete, will not update.

        Raises:
            UnsupportedError: if the optimizer trains something that the record does not follow.
        """
        if self._optimized() != self._count:
            raise UnsupportedError(
                f"Parameters were added to the optimizer (or taken from it) before step {step}. A record holds one "
                "list of parameters per stage: give the optimizer all of them from the start and set requires_grad, "
                "or train a new stage (another `stage=`) with the new ones."
            )
        if any(parameter.grad is not None for parameter in self._outside):
            self._unexpected(step)
        return [name for name, parameter in self.parameters.items() if parameter.grad is None]

    def _unexpected(self, step: int) -> None:
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if any(p.grad is not None and id(p) in optimized for p in self._outside):
            raise UnsupportedError(
                f"Weights under an adapter were unfrozen before step {step}, which the record does not follow. "
                "Unfreeze them before train() begins, or in a new stage (another `stage=`)."
            )
        if not self._warned:
            logger.warning(
                f"Parameters that the optimizer does not hold have a gradient in step {step}: they were unfrozen "
                "after it was made, and do not train. Unfreeze them before train(), and freeze them in on_train_begin."
            )
            self._warned = True


def note_frozen(changes: list[dict[str, Any]], step: int, frozen: Sequence[str]) -> None:
    """Add a step's frozen parameters to the changes, if they are others than before it."""
    if list(frozen) != (changes[-1]["frozen"] if changes else []):
        changes.append({"step": step, "frozen": list(frozen)})


def frozen_at(changes: Sequence[Mapping[str, Any]], step: int) -> frozenset[str]:
    """Trainable parameters that a step did not update."""
    frozen: Sequence[str] = ()
    for change in changes:
        if change["step"] > step:
            break
        frozen = change["frozen"]
    return frozenset(frozen)
