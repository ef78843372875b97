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
"""Several optimizers as one, for those that train only some parameters."""

import torch


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters that step together: Muon for matrices and AdamW for the rest, say.

    Their parameter groups follow each other, so a learning-rate schedule scales each group's own rate.

    Args:
        optimizers: each with parameters of its own.

    Raises:
        ValueError: if two of them share a parameter, or one loads its state in its own way (bitsandbytes).

    Example:
        >>> muon = torch.optim.Muon(matrices, lr=0.02)  # doctest: +SKIP
        >>> adamw = torch.optim.AdamW(others, lr=1e-3)  # doctest: +SKIP
        >>> SourceTrainer(model, args, optimizers=(CombinedOptimizer(muon, adamw), None))  # doctest: +SKIP
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
                raise ValueError(
                    f"{type(optimizer).__name__} cannot be combined: its state is loaded in a way of its own. Use an "
                    "optimizer of torch or transformers."
                )
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        self._share()

    def _share(self) -> None:
        """Let every optimizer work on this one's groups and state."""
        start = 0
        for optimizer in self.optimizers:
            stop = start + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[start:stop]
            optimizer.state = self.state
            start = stop

    def step(self, closure=None):
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict):
        """See `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._share()
