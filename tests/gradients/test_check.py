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
"""`RowGradients.check` finds every rule that does not hold, and the fallback is exact."""

import logging
from types import SimpleNamespace

import oracles
import pytest
import torch
from torch import nn

from hf_source.errors import UnsupportedError
from hf_source.gradients import CausalLMTask, RowGradients

from .compared import engine, worst_error


class Around(nn.Module):
    """A language model around one layer under test."""

    def __init__(self, layer: nn.Module, hidden: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(oracles.VOCAB, hidden)
        self.layer = layer
        self.head = nn.Linear(hidden, oracles.VOCAB)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.tokens(input_ids)
        return SimpleNamespace(logits=self.head(x + self.layer(x.cumsum(dim=1))))


def test_wrong_rules_move_to_the_fallback_and_right_ones_do_not(caplog):
    model = oracles.odd()
    gradients = engine(model)
    # Before the check only parameters without a module are there.
    assert gradients.fallback == {"scale", "gain"}
    batch = oracles.make_batch(oracles.LENGTHS)
    assert worst_error(gradients, batch) > 1e-2
    with caplog.at_level(logging.WARNING, logger="hf_source"):
        gradients.check(batch)
    # What is never called may go either way: there is nothing to compare.
    assert gradients.fallback - {"idle.weight", "idle.bias", "borrowed.bias"} == oracles.ODD_FALLBACK
    assert gradients.around == {"exponential_norm.weight": "exponential_norm"}
    assert "sideways.weight" in caplog.text
    assert worst_error(gradients, batch) < 1e-10


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-tied", "lora-gpt2"])
def test_no_rule_of_a_known_model_is_rejected(kind):
    """The fallback costs one backward pass per row: known architectures may not end there."""
    for dtype in (torch.float64, torch.float32):
        model = oracles.MODELS[kind]().to(dtype)
        gradients = RowGradients(model, CausalLMTask(), oracles.all_names(model))
        gradients.check(oracles.make_batch((4, 6)))
        assert not gradients.fallback and not gradients.around


class Folded(nn.Module):
    """Calls its Linear on rows and tokens folded into one axis the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x.transpose(0, 1).reshape(-1, 4)).view(x.shape[1], x.shape[0], 4).transpose(0, 1)


class Pooled(nn.Module):
    """Calls its Linear on the first token only: fewer positions than tokens, which the rule can do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x[:, :1]).expand_as(x)


class GatedRMSNorm(nn.Module):
    """A norm that takes a second input: its rule cannot even call it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, gate):
        return self.weight * torch.sigmoid(gate) * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = GatedRMSNorm()

    def forward(self, x):
        return self.norm(x, x)


class ResidualRMSNorm(nn.Module):
    """A norm with two outputs, as fused residual norms have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt(), x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ResidualRMSNorm()

    def forward(self, x):
        normed, x = self.norm(x)
        return normed + x


class Borrowed(nn.Module):
    """Uses the weight of an embedding without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(4, 4)

    def forward(self, x):
        return x @ self.inner.weight


class TwoInputs(nn.Module):
    """Around a module that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.inner(x, torch.tanh(x))


@pytest.mark.parametrize(
    "layer, around",
    [
        (lambda: nn.Linear(4, 4), {}),
        (Pooled, {}),
        (Folded, {"layer.inner.weight": "layer", "layer.inner.bias": "layer"}),
        (Borrowed, {"layer.inner.weight": "layer"}),
        (Gated, {"layer.norm.weight": "layer.norm"}),
        (Residual, {"layer.norm.weight": "layer.norm"}),
        (TwoInputs, {"layer.inner.weight": "layer.inner", "layer.inner.bias": "layer.inner"}),
    ],
    ids=["Linear", "Pooled", "Folded", "Borrowed", "Gated", "Residual", "TwoInputs"],
)
def test_layers_that_break_a_rules_assumption(layer, around):
    """The smallest module whose inputs can be taken apart by row is run again."""
    gradients = engine(Around(layer()))
    batch = oracles.make_batch((4, 6, 5))
    gradients.check(batch)
    assert gradients.fallback == set() and gradients.around == around
    assert worst_error(gradients, batch) < 1e-10


class Experts(nn.Module):
    """Each token goes through one of two Linear layers, by the sign of a feature: calls see a part of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        out = torch.zeros_like(x)
        here = x[..., 0] > 0
        for expert, chosen in ((self.first, here), (self.second, ~here)):
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return out


def test_experts_that_see_a_part_of_the_tokens():
    gradients = engine(Around(Experts()))
    batch = oracles.make_batch(oracles.LENGTHS)
    gradients.check(batch)
    assert worst_error(gradients, batch) < 1e-10


@pytest.mark.parametrize("rows", [4, 5])
def test_a_module_idle_in_the_checked_rows_is_not_trusted_later(rows):
    """Expert `second` sees no token of the rows that were checked: its rule, which is wrong, was not tested there.

    Later it sees 5 tokens, all of one row; with 5 rows that could be taken for one token of each.
    """
    model = Around(Experts())
    with torch.no_grad():  # the first feature, cumulated, tells rows apart: positive for tokens below 6
        model.tokens.weight[:, 0] = torch.where(torch.arange(oracles.VOCAB) < 6, 1.0, -1.0)
    gradients = engine(model)
    batch = oracles.make_batch((4, 4, 5, 3, 4)[:rows])
    batch["input_ids"] %= 6
    gradients.check({key: value[:2].clone() for key, value in batch.items()})
    batch["input_ids"][1] += 6
    assert worst_error(gradients, batch) < 1e-10


@pytest.mark.parametrize("length", [1, 5], ids=["one token", "nothing asked"])
def test_a_first_row_without_loss_items_is_not_what_is_checked(length):
    """The shortest row of a data set may have no loss item: agreement on zeros may not pass for agreement."""
    model = oracles.odd()
    gradients = engine(model)
    batch = oracles.make_batch((length, 6))
    batch["labels"][0] = oracles.IGNORE
    gradients.check(batch)
    assert worst_error(gradients, oracles.make_batch(oracles.LENGTHS)) < 1e-10


def test_a_gradient_that_is_not_finite_is_refused():
    model = oracles.gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(UnsupportedError, match="not finite"):
        engine(model).check(oracles.make_batch((4, 6)))


def test_check_restores_flags():
    model = oracles.lora_gpt2()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    engine(model).check(oracles.make_batch((4, 6)))
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
