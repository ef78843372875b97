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
"""What really happens without half of the rows: the paper's ground truth.

Random halves of a stage's rows are left out, and the whole training made again on the other half alone: same number of
epochs, another initialisation and another order each time, several times a half. A few copies train at once, their
weights stacked. Every finished piece is a file, seeds outermost, so that a broken run goes on where it was and can be
used with the seeds that it has.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .data import Problem, Settings, Stage


VERSION = 1  # of what a cached file means
Weights = list[torch.Tensor]


class Halves:
    """Outputs of the queries after training without random halves of a stage.

    Args:
        problem, settings: what is trained, and how.
        removed: bool `[halves, rows]` of the stage.
        stage: position of the stage that loses rows.
        cache: folder for finished pieces.
        copies: trained at once.
    """

    def __init__(
        self, problem: Problem, settings: Settings, removed: np.ndarray, stage: int, cache: Path, copies: int
    ) -> None:
        self.problem, self.settings, self.removed, self.stage, self.copies = problem, settings, removed, stage, copies
        digest = hashlib.sha256(json.dumps([VERSION, stage, settings.to_dict()], sort_keys=True).encode())
        for part in [*problem.stages, problem.queries]:
            digest.update(part.inputs.tobytes() + part.targets.tobytes())
        digest.update(removed.tobytes())
        self.folder = cache / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def outputs(self, num_seeds: int, note: Callable[[str], None] = lambda text: None) -> np.ndarray:
        """Outputs, float32 `[seeds, halves, queries, outputs]`; what is missing is trained."""
        return np.stack([self._seed(seed, note) for seed in range(num_seeds)])

    def finished_seeds(self) -> int:
        """Seeds that need no more training."""
        chunks = len(range(0, len(self.removed), self.copies))
        return next(s for s in range(10**6) if len(list(self.folder.glob(f"{s}-*.npy"))) < chunks)

    def _seed(self, seed: int, note: Callable[[str], None]) -> np.ndarray:
        found = []
        for start in range(0, len(self.removed), self.copies):
            file = self.folder / f"{seed}-{start}.npy"
            if not file.exists():
                began = time.process_time()
                self._save(file, self._train(seed, start))
                note(f"seed {seed}, halves from {start}: {time.process_time() - began:.1f} s")
            found.append(np.load(file, allow_pickle=False))
        return np.concatenate(found)

    @staticmethod
    def _save(file: Path, outputs: np.ndarray) -> None:
        with file.with_suffix(".part").open("wb") as stream:
            np.save(stream, outputs)
        file.with_suffix(".part").rename(file)

    def _train(self, seed: int, start: int) -> np.ndarray:
        keep = ~self.removed[start : start + self.copies]
        weights = None
        for position, stage in enumerate(self.problem.stages):
            kept = keep if position == self.stage else np.ones((len(keep), len(stage.targets)), dtype=bool)
            seeds = [10_000_000 * position + 10_000 * (seed + 1) + start + copy for copy in range(len(keep))]
            weights = train_copies(stage, self.settings, kept, seeds, weights)
        with torch.no_grad():
            inputs = torch.as_tensor(self.problem.queries.inputs).expand(len(keep), -1, -1)
            return forward(weights, inputs).numpy()


def train_copies(
    stage: Stage, settings: Settings, keep: np.ndarray, seeds: list[int], start: Weights | None = None
) -> Weights:
    """Train one network per mask.

    Args:
        stage: rows.
        settings: of training.
        keep: bool `[copies, rows]`, equally many rows each.
        seeds: of each copy's initialisation and order.
        start: weights to go on from instead of an initialisation.

    Returns:
        `W [copies, in, out], b [copies, 1, out]` of one layer after another.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    weights = initial(settings.sizes, generators) if start is None else [w.detach().clone() for w in start]
    for weight in weights:
        weight.requires_grad_(True)
    groups = [
        {"params": weights[::2], "weight_decay": settings.weight_decay},
        {"params": weights[1::2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
    inputs, targets = torch.as_tensor(stage.inputs), torch.as_tensor(stage.targets)
    kept = [torch.as_tensor(np.flatnonzero(mask)) for mask in keep]
    for _ in range(settings.epochs):
        order = torch.stack([k[torch.randperm(len(k), generator=g)] for k, g in zip(kept, generators, strict=True)])
        for rows in order.split(settings.batch_size, dim=1):  # (copies, batch)
            loss = row_losses(forward(weights, inputs[rows]), targets[rows], settings.kind).sum() / rows.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [weight.detach() for weight in weights]


def initial(sizes: tuple[int, ...], generators: list[torch.Generator]) -> Weights:
    """The initialisation of `torch.nn.Linear`, a copy for each generator."""
    copies = []
    for generator in generators:
        layers = []
        for inside, outside in zip(sizes, sizes[1:], strict=False):
            drawn = torch.rand(inside + 1, outside, generator=generator) * 2 - 1
            layers += [drawn[:inside] / inside**0.5, drawn[inside:] / inside**0.5]
        copies.append(layers)
    return [torch.stack(layer) for layer in zip(*copies, strict=True)]


def forward(weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    """Outputs `[copies, rows, outputs]` for inputs `[copies, rows, features]`."""
    hidden = inputs
    for position in range(0, len(weights), 2):
        hidden = hidden.relu() if position else hidden
        hidden = torch.baddbmm(weights[position + 1], hidden, weights[position])
    return hidden


def row_losses(outputs: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss of each row of each copy, flat."""
    if kind == "value":
        return (outputs[..., 0] - targets).square().flatten()
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")


def measured(outputs: np.ndarray, targets: np.ndarray, kind: str) -> np.ndarray:
    """The paper's measurement, as something that grows when the network gets worse: `[..., queries]`.

    Absolute error, or minus the margin of the right class `log p - log(1 - p)`.
    """
    if kind == "value":
        return np.abs(outputs[..., 0] - targets)
    logits = torch.as_tensor(outputs).double()
    right = torch.as_tensor(targets).expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, right, float("-inf")).logsumexp(dim=-1)
    return (others - logits.gather(-1, right)[..., 0]).numpy()
