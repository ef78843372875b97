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
"""Operations that are cheap to differentiate twice, against autograd's own; updates backwards, against autograd's."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL_MODELS, all_names, make_batch, queries_for
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.recording.optimizers import OptimizerDescription
from hf_source.source import products, score_rows
from hf_source.source.products import ExactProducts, Objective
from hf_source.source.twice import cheap_twice
from hf_source.source.unrolled import by_length
from hf_source.source.updates import Snapshot, Update


def second_derivatives(model, loss, directions, cheap):
    """Of `<gradient, direction>`, one direction at a time, or all at once with the cheap operations."""
    parameters = list(model.parameters())
    if not cheap:
        grads = torch.autograd.grad(loss(), parameters, create_graph=True)
        return [
            torch.autograd.grad(grads, parameters, own, retain_graph=True, materialize_grads=True)
            for own in zip(*directions, strict=True)
        ]
    with cheap_twice(model):
        made = loss()
    grads = torch.autograd.grad(made, parameters, create_graph=True)

    def along(*own):
        return torch.autograd.grad(grads, parameters, own, retain_graph=True, materialize_grads=True)

    return list(zip(*torch.vmap(along)(*directions), strict=True))


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attending(nn.Module):
    """Products of rows with each other, of which one side does not depend on parameters in the end."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        y = self.inner(x)[:, None]
        weights = F.softmax(torch.matmul(x[:, None], y.transpose(2, 3)), dim=-1)
        return torch.matmul(torch.matmul(weights, y).squeeze(1), torch.eye(5, dtype=x.dtype).expand(len(x), 5, 5))


LAYERS = {
    "attention": Attending,
    "linear": lambda: nn.Linear(5, 5),
    "no bias": lambda: nn.Linear(5, 5, bias=False),
    "conv1d": lambda: Conv1D(5, 5),
    "layer norm": lambda: nn.LayerNorm(5),
    "plain norm": lambda: nn.LayerNorm(5, elementwise_affine=False),
    "functional gelu": lambda: Functional(F.gelu),
    "in place": lambda: Functional(lambda x: F.silu(1.0 * x, inplace=True)),
    **{name: lambda name=name: copy.deepcopy(ACT2FN[name]) for name in ("gelu_new", "gelu", "silu", "tanh", "relu2")},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cheap_operations_have_the_second_derivatives_of_autograd(layer, smoothing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), LAYERS[layer](), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x, target = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0, 2, -100, 1, 1, 0])

    def loss():
        items = F.cross_entropy(model(x).flatten(0, 1), target, reduction="none", label_smoothing=smoothing)
        return (items * torch.arange(1.0, 7.0)).sum()

    directions = [torch.randn(3, *p.shape, dtype=torch.float64) for p in model.parameters()]
    expected, found = (second_derivatives(model, loss, directions, cheap) for cheap in (False, True))
    for own, others in zip(expected, found, strict=True):
        for one, other in zip(own, others, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_is_not_known_is_left_to_autograd():
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16))
    with cheap_twice(model):
        x = torch.ones(1, 2, dtype=torch.bfloat16)
        assert model(x).grad_fn.name() == "AddmmBackward0"  # of half precision
        assert F.cross_entropy(model(x), torch.tensor([1])).grad_fn.name() == "NllLossBackward0"  # of a mean


@pytest.fixture(scope="module")
def engine():
    model = SMALL_MODELS["gpt2"]()
    model.set_attn_implementation("eager")
    gradients = RowGradients(model, CausalLMTask(), all_names(model))
    gradients.check(make_batch((8, 7)))
    return gradients, make_batch((5, 8, 3)), queries_for(model, all_names(model))


def test_a_derivative_along_forces_holds_the_products_of_rows_too(engine):
    gradients, batch, forces = engine
    found = [dots for _, _, dots in Objective(gradients, batch, 7.0).along(forces)]
    assert torch.allclose(torch.cat(found), score_rows(gradients, batch, forces), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 10**12])
def test_directions_are_followed_some_at_a_time(engine, monkeypatch, size):
    gradients, batch, forces = engine
    expected = ExactProducts()(gradients, batch, forces, 7.0)
    monkeypatch.setattr(products, "DIRECTIONS_BYTES", size)
    objective = Objective(gradients, batch, 7.0)
    queries = [part for part, _, _ in objective.along(forces)]
    count = len(next(iter(forces.values())))
    assert len(queries) == (count if size == 1 else 1)
    found = ExactProducts()(gradients, batch, forces, 7.0)
    for name, part in expected.items():
        assert torch.allclose(found[name], part, rtol=1e-9, atol=1e-12)


class Stubborn(torch.autograd.Function):
    """The identity, whose derivative looks at numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1.0 if g.flatten()[0].item() < float("inf") else 0.0)


def test_operations_that_take_one_direction_at_a_time_get_them_so(engine, monkeypatch):
    gradients, batch, forces = engine
    expected = ExactProducts()(gradients, batch, forces, 7.0)
    forward = CausalLMTask.forward
    monkeypatch.setattr(
        CausalLMTask, "forward", lambda self, model, batch: Stubborn.apply(forward(self, model, batch))
    )
    found = ExactProducts()(gradients, batch, forces, 7.0)
    for name, part in expected.items():
        assert torch.allclose(found[name], part, rtol=1e-9, atol=1e-12)


UPDATES = {
    "AdamW": {"betas": [0.8, 0.9], "eps": 0.1, "amsgrad": False},
    "Adam": {"betas": [0.8, 0.9], "eps": 0.1, "amsgrad": False},
    "AMSGrad": {"betas": [0.8, 0.9], "eps": 0.1, "amsgrad": True},
    "SGD": {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    "momentum": {"momentum": 0.7, "dampening": 0.3, "nesterov": False},
    "nesterov": {"momentum": 0.7, "dampening": 0.0, "nesterov": True},
}
RULES = {"AMSGrad": "AdamW", "momentum": "SGD", "nesterov": "SGD"}


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("steps", [0, 3])
def test_updates_go_backwards_as_autograd_says(kind, steps):
    """From the first update and from a later one; a frozen parameter, and an entry that no row touched."""
    rule = RULES.get(kind, kind)
    groups = [
        {
            "rule": rule,
            "parameters": names,
            "weight_decay": decay,
            "decoupled_weight_decay": rule == "AdamW",
            "constants": UPDATES[kind],
        }
        for names, decay in ((["a", "frozen"], 0.1), (["b"], 0.0))
    ]
    description = OptimizerDescription.from_dict({"name": rule, "groups": groups})
    torch.manual_seed(0)
    like = {"a": (3, 2), "b": (4,), "frozen": (2,)}
    make = lambda *lead: {n: torch.randn(*lead, *size, dtype=torch.float64) for n, size in like.items()}  # noqa: E731

    def gradient():
        found = make()
        found.pop("frozen")
        found["b"][1] = 0.0
        return found

    by_hand, autograd = Update(description), Update(description, closed_form=False)
    assert by_hand.by_hand and not autograd.by_hand
    before = Snapshot(make())
    with torch.no_grad():
        for _ in range(steps):
            before = by_hand.forward(before, gradient(), [0.2, 0.3])
    adjoints, last, results = make(5), gradient(), []
    for update in (by_hand, autograd):
        adjoint, moments = {name: vector.clone() for name, vector in adjoints.items()}, {}
        # Twice, the second time with the moments that the first one left.
        for _ in range(2):
            forces, sizes = update.backward(before, last, [0.2, 0.3], adjoint, moments)
        results.append(
            {
                **forces,
                **{f"adjoint of {n}": v for n, v in adjoint.items()},
                **{f"eta P {n}": v for n, v in sizes.items()},
            }
        )
    assert results[0].keys() == results[1].keys() and "frozen" not in results[0]
    for name, expected in results[1].items():
        # torch's differentiable Adam corrects its moments by float32 numbers.
        assert torch.allclose(results[0][name], expected, rtol=1e-5, atol=1e-7), name


def test_pieces_of_similar_lengths_make_batches_where_that_saves_padding():
    lengths = np.array([200, 10, 11, 190, 10, 12])
    pieces = np.arange(10, 16)
    found = by_length(pieces, lengths)
    assert [sorted(part.tolist()) for part in found] == [[11, 12, 14, 15], [10, 13]]
    assert [part.tolist() for part in by_length(pieces, np.full(6, 9))] == [pieces.tolist()]
    assert len(by_length(pieces, np.array([8, 9, 10, 8, 9, 10]))) == 1  # a batch of its own costs more
