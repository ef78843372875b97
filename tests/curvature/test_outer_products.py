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
"""Networks whose rows are one vector: gradients of their linear layers are outer products, and are never made."""

from types import SimpleNamespace

import oracles
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_source import RowLossTask
from hf_source.curvature import EKFACCurvature, FisherSample, Flow, JointCurvature, factored, joint
from hf_source.curvature.columns import Columns, column_bytes
from hf_source.gradients import RowGradients, contraction


ROUNDING = 1e-9  # of float64 sums in another order, divided by small eigenvalues
LENGTH = 3.0


class Network(nn.Module):
    """Two kinds of linear layers, wider than long rows are, and one that a row goes through twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(9, 8), Conv1D(8, 8), nn.Linear(8, 3)
        self.twice = twice

    def forward(self, features):
        hidden = torch.tanh(self.first(features))
        for _ in range(1 + self.twice):
            hidden = torch.tanh(self.second(hidden))
        return self.head(hidden)


class Classes(RowLossTask):
    """One of three classes."""

    def forward(self, model, batch):
        return model(batch["features"])

    def row_losses(self, outputs, labels):
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    def sample_labels(self, outputs, labels, generator):
        return torch.multinomial(outputs.softmax(-1), 1, generator=generator)[:, 0]


def made(twice: bool = False, rows: int = 14) -> SimpleNamespace:
    torch.manual_seed(0)
    model = Network(twice).double()
    model.requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    batches = [
        {"features": torch.randn(count, 9, dtype=torch.float64), "labels": torch.arange(count) % 3}
        for count in (5, rows - 5)
    ]
    gradients = RowGradients(model, Classes(), names)
    gradients.check(batches[0])
    q = {name: torch.randn(2, *parameter.shape, dtype=torch.float64) for name, parameter in model.named_parameters()}
    constant = {name: torch.tensor(0.3 + 0.1 * i, dtype=torch.float64) for i, name in enumerate(names)}
    decay = {name: torch.tensor(0.05 * (i % 2), dtype=torch.float64) for i, name in enumerate(names)}
    return SimpleNamespace(
        model=model, names=names, q=q, constant=constant, decay=decay,
        sample=FisherSample(gradients, batches, seed=1),
        flow=Flow(LENGTH, constant, decay),
        # The same numbers, entry by entry: then nothing is known of the factors of whitened gradients.
        spread=Flow(LENGTH, {n: c.expand(q[n].shape[1:]).clone() for n, c in constant.items()}, decay),
    )  # fmt: skip


@pytest.fixture
def used(monkeypatch):
    """How often gradients were found to be outer products."""
    found = []

    def outer_products(columns):
        pair = factored_outer_products(columns)
        found.append(pair is not None)
        return pair

    factored_outer_products = factored.outer_products
    for module in (factored, joint):
        monkeypatch.setattr(module, "outer_products", outer_products)
    return found


def worst(got, expected) -> float:
    assert all(set(one) == set(other) for one, other in zip(got, expected, strict=True))
    scale = max(float(vectors.abs().max()) for vectors in expected[0].values())
    return max(
        float((one[name] - other[name]).abs().max())
        for one, other in zip(got, expected, strict=True)
        for name in other
    ) / scale  # fmt: skip


CURVATURES = {
    "joint": lambda: JointCurvature(),
    "no tail": lambda: JointCurvature(tail=False),
    "groups": lambda: JointCurvature(memory_budget=1),
    "ekfac": lambda: EKFACCurvature(),
}


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", CURVATURES)
def test_the_flow_is_that_of_gradients_that_are_made(used, kind, twice):
    case = made(twice)
    got = CURVATURES[kind]().propagate(dict(case.q), case.flow, case.sample)
    assert used.count(True) >= 2 + (not twice)
    expected = CURVATURES[kind]().propagate(dict(case.q), case.spread, case.sample)
    assert worst(got, expected) < ROUNDING
    assert worst([case.q], [expected[1]]) > 0.02  # the segment does something


def test_joint_without_tail_is_the_matrix_exponential_of_the_samples():
    case = made()
    got = JointCurvature(tail=False).propagate(dict(case.q), case.flow, case.sample)
    matrices = case.sample.matrices(case.names)
    S = torch.cat([matrices[name].flatten(1) for name in case.names], dim=1).numpy()
    P, decay = (oracles.flat_constant(constants, case.model, case.names) for constants in (case.constant, case.decay))
    expected = oracles.dense_source(S.T @ S, P, decay, LENGTH, oracles.flat(case.q, case.names))
    for vectors, dense in zip(got, expected, strict=True):
        assert oracles.worst_error(vectors, dense, case.model, case.names) < ROUNDING


@pytest.mark.parametrize("twice, passes", [(False, 1), (True, 4)])
def test_what_is_held_of_the_sample_is_known_beforehand(twice, passes):
    """Held as outer products, all of it takes 7,056 bytes; with the gradients of the layer used twice 12,432."""
    case = made(twice)
    layers = {"first", "head"} | ({"second"} if not twice else set())
    assert case.sample.gradients.single == {name for name in case.names if name.split(".")[0] in layers}
    sizes = [
        column_bytes(parameter, case.sample.size, case.sample.tokens_of(name), case.sample.gradients.rules(name))
        for name, parameter in case.sample.gradients.parameters.items()
    ]
    curvature = JointCurvature(memory_budget=8000)
    curvature.propagate(dict(case.q), case.flow, case.sample)
    assert case.sample.num_passes == curvature.num_passes(sizes) == passes


@pytest.mark.parametrize("length", [LENGTH, 1e-4], ids=["moving", "hardly moving"])
def test_narrow_vectors_take_the_same_way(length):
    """In bfloat16, whose rounding is half a percent; of a segment that is short, no direction of a block moves."""
    case = made()
    case.model.float()
    gradients = RowGradients(case.model, Classes(), case.names)
    batches = [{**batch, "features": batch["features"].float()} for batch in case.sample.batches]
    gradients.check(batches[0])
    flow = Flow(length, *({n: c.float() for n, c in each.items()} for each in (case.constant, case.decay)))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q = {name: vectors.to(dtype) for name, vectors in case.q.items()}
        sample = FisherSample(gradients, batches, seed=1, dtype=dtype)
        parameters = gradients.parameters.items()
        sizes = [column_bytes(p, sample.size, sample.tokens_of(n), gradients.rules(n), dtype) for n, p in parameters]
        results.append(JointCurvature(memory_budget=sum(sizes)).propagate(q, flow, sample))
        assert sample.num_passes == 1  # what is held is counted as it is held
    for expected, got in zip(*results, strict=True):
        assert all(got[name].dtype == torch.bfloat16 for name in expected)
        errors = {name: (got[name].float() - own).norm() / own.norm() for name, own in expected.items()}
        assert max(errors.values()) < 0.02


def test_columns_with_samples_that_no_call_has_are_zero_there():
    case = made()
    columns = case.sample.columns(["first.weight"])["first.weight"]
    some = Columns(columns.size + 3, columns.like, columns.scale, columns.piece_bytes, parts=columns.parts)
    left, right = factored.outer_products(some)
    torch.testing.assert_close(
        left[:, :, None] * right[:, None], torch.cat([columns.whole(), 0 * columns.whole()[:3]])
    )


def test_weighted_sums_of_one_token_rows_make_no_gradients(monkeypatch):
    case = made()
    expected = {name: 2.0 * total for name, total in case.sample.combine(coefficients(case)).items()}
    monkeypatch.setattr(contraction, "pieces", None)
    for name in ("first.weight", "second.weight"):
        total = torch.zeros_like(expected[name])
        start = 0
        for _, done in case.sample.passes([name]):
            ((rule, call),) = case.sample.gradients.calls(name, done)
            own = coefficients(case)[name][start : start + done.num_rows] * case.sample.scale
            contraction.add_combined(rule, call, done.num_rows, 2.0 * own, total)
            start += done.num_rows
        torch.testing.assert_close(total, expected[name])


def coefficients(case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(case.sample.size, 3, dtype=torch.float64, generator=generator) for name in case.names}
