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
"""One segment of training on a tiny model, with its dense references."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_source.curvature import FisherSample, Flow
from hf_source.gradients import CausalLMTask, RowGradients


@dataclass
class Segment:
    """A tiny model, the engine and sample on it, a flow, and the dense matrices that describe them.

    Attributes:
        kind: key of `oracles.SMALL_MODELS`.
        preconditioner: `"sgd"` or `"adam"`, with `"+frozen"` for parameters the segment does not train.
        decay: `"none"`, `"equal"`, `"by parameter"` or `"elementwise"`.
        length: `s`; with `P` and `H` as they are here `s P H` spans 0 to about 30, so that `exp(-s x)` is neither 1
            nor 0 throughout.
        size: rows of the sample.
    """

    kind: str = "gpt2"
    preconditioner: str = "adam"
    decay: str = "none"
    length: float = 0.1
    size: int = 8

    def __post_init__(self) -> None:
        self.model = oracles.SMALL_MODELS[self.kind]()
        self.names = oracles.all_names(self.model)
        lengths = (oracles.LENGTHS * 10)[: self.size]
        self.batches = [oracles.make_batch(lengths[at : at + 5], seed=at) for at in range(0, self.size, 5)]
        self.gradients = RowGradients(self.model, CausalLMTask(), self.names)
        self.gradients.check(oracles.make_batch((8, 7)))
        self.sample = FisherSample(self.gradients, self.batches, seed=1)
        self.q = _queries(self.kind)
        constants, _, freezing = self.preconditioner.partition("+")
        self.frozen = self._frozen() if freezing else []
        self.P = {"sgd": oracles.sgd_like, "adam": oracles.adam_like}[constants](self.model, self.names)
        self.P = oracles.freeze(self.P, self.frozen)
        self.Lambda = {
            "none": lambda: oracles.equal_decay(self.model, self.names, 0.0),
            "equal": lambda: oracles.equal_decay(self.model, self.names, 2.0),
            "by parameter": lambda: oracles.decay_by_parameter(self.model, self.names),
            # Coupled decay under Adam: proportional to P, so it differs between entries.
            "elementwise": lambda: {name: 0.1 * value for name, value in self.P.items()},
        }[self.decay]()
        if self.decay != "elementwise":  # half of what stands still decays all the same, as unused parameters do
            self.Lambda = oracles.freeze(self.Lambda, self.frozen[::2])
        self.flow = Flow(self.length, self.P, self.Lambda)

    def _frozen(self) -> list[str]:
        """The base weights under LoRA; elsewhere every third parameter."""
        adapters = [name for name in self.names if "lora_" in name]
        return [name for name in self.names if name not in adapters] if adapters else self.names[::3]

    @property
    def trained(self) -> list[str]:
        return [name for name in self.names if name not in self.frozen]

    @cached_property
    def labels(self) -> list[torch.Tensor]:
        """The labels that were drawn, batch by batch."""
        return [done.labels for _, done in self.sample.passes(self.names[:1])]

    @cached_property
    def S(self) -> np.ndarray:
        """The sample matrix by autograd on one row at a time, `[n, p]`."""
        rows = [
            oracles.row_gradients(oracles.trainable(self.model), self.names, batch, labels)
            for batch, labels in zip(self.batches, self.labels, strict=True)
        ]
        return np.concatenate(rows) / np.sqrt(sum(oracles.num_items(batch) for batch in self.batches))

    @property
    def H(self) -> np.ndarray:
        """Gauss-Newton matrix of the sample's rows by enumerating labels, `[p, p]`."""
        return _gauss_newton(self.kind, self.size)

    @property
    def flat_q(self) -> np.ndarray:
        return oracles.flat(self.q, self.names)

    @property
    def flat_P(self) -> np.ndarray:
        return oracles.flat_constant(self.P, self.model, self.names)

    @property
    def flat_Lambda(self) -> np.ndarray:
        return oracles.flat_constant(self.Lambda, self.model, self.names)

    def dense(self, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`F_r^T q` and `q'` for a given `H`, all parameters at once."""
        return oracles.dense_source(hessian, self.flat_P, self.flat_Lambda, self.length, self.flat_q)

    def errors(self, got: tuple[dict, dict], expected: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        """Errors of the scoring vector (on trained parameters, the only ones it may name) and of the carried one."""
        scoring, carried = got
        assert set(scoring) == set(self.trained)
        assert set(carried) == set(self.names)
        columns = dict(zip(self.names, oracles.split(expected[0], self.model, self.names).values(), strict=True))
        on_trained = np.concatenate([columns[name] for name in self.trained], axis=1)
        return (
            oracles.worst_error(scoring, on_trained, self.model, self.trained),
            oracles.worst_error(carried, expected[1], self.model, self.names),
        )

    def is_kronecker(self, name: str) -> bool:
        """Whether the parameter is the weight of a Linear, a Conv1D or a convolution, used only there."""
        if self.kind == "odd" and name in oracles.ODD_FALLBACK:
            return False
        if name in oracles.embedding_names(self.model, self.names):
            return False  # a head tied to it included
        return name.endswith("weight") and isinstance(self.owner(name), nn.Linear | Conv1D | nn.Conv1d)

    def bases(self, name: str, whitened: np.ndarray, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`L`, `R` by definition: covariances of scaled output gradients and inputs, or moments of gradients."""
        if not self.is_kronecker(name):
            return oracles.gradient_bases(whitened, name in oracles.embedding_names(self.model, self.names))
        traffic = [
            oracles.layer_traffic(oracles.trainable(self.model), self.owner(name), batch, labels)
            for batch, labels in zip(self.batches, self.labels, strict=True)
        ] if name.partition(".")[0] != "idle" else []  # fmt: skip
        if not traffic:
            return np.eye(whitened.shape[1]), np.eye(whitened.shape[2])
        inputs, grads = (np.concatenate(side) for side in zip(*traffic, strict=True))
        by_row, by_column = P.mean(axis=1), P.mean(axis=0)  # P ~ u v^T up to a factor, which no eigenvector sees
        if isinstance(self.owner(name), Conv1D):  # its weight is [in, out]
            sides = inputs, grads
        else:
            sides = grads, inputs
        scaled = sides[0] * np.sqrt(by_row), sides[1] * np.sqrt(by_column)
        return tuple(oracles.eigenbasis(side.T @ side) for side in scaled)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.gradients.parameters[name].shape)

    def owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


@lru_cache
def _queries(kind: str) -> dict[str, torch.Tensor]:
    """Gradients of two completions, which lie where curvature is, and noise, which does not."""
    model = oracles.trainable(oracles.SMALL_MODELS[kind]())
    names = oracles.all_names(model)
    noise = oracles.queries_for(model, names)
    grads = oracles.split(oracles.row_gradients(model, names, oracles.make_batch((7, 8), seed=77)), model, names)
    return {name: torch.from_numpy(grads[name]).view_as(noise[name]) + 0.1 * noise[name] for name in names}


@lru_cache
def _gauss_newton(kind: str, size: int) -> np.ndarray:
    segment = Segment(kind, size=size)
    model = oracles.trainable(segment.model)
    items = [oracles.num_items(batch) for batch in segment.batches]
    parts = [oracles.gauss_newton(model, segment.names, batch) for batch in segment.batches]
    return sum(part * count for part, count in zip(parts, items, strict=True)) / sum(items)


@pytest.fixture
def segment() -> type[Segment]:
    """The class: tests make the segments they need."""
    return Segment
