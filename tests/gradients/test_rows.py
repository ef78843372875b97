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
"""Per-row gradients of every parameter against autograd on one row at a time, without padding."""

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from hf_source.errors import UnsupportedError
from hf_source.gradients import CausalLMTask, RowGradients


# Float64 rounding of a forward and backward pass is about 1e-15; sums over tokens in another order, and the float32
# intermediates that Llama's norm keeps, add some. A wrong rule is wrong by order one.
EXACT = 1e-10


def engine(model: nn.Module, names=None, **settings) -> RowGradients:
    return RowGradients(model, CausalLMTask(), names or oracles.all_names(model), **settings)


def collect(gradients: RowGradients, done, names=None) -> dict[str, np.ndarray]:
    """Blocks put together: name -> `[rows, size]`. A row given twice or not at all would show as NaN or a sum."""
    result = {}
    for name, rows, block in gradients.blocks(done, names):
        parameter = gradients.parameters[name]
        assert block.shape == (rows.stop - rows.start, *parameter.shape)
        whole = result.setdefault(name, np.full((done.num_rows, parameter.numel()), np.nan))
        assert np.isnan(whole[rows]).all()
        whole[rows] = block.reshape(len(block), -1).numpy()
    return result


def expected(model, names, batch, labels=None) -> dict[str, np.ndarray]:
    """The reference, from a copy of requires_grad flags that it is free to change."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    matrix = oracles.row_gradients(oracles.trainable(model), names, batch, labels)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return oracles.split(matrix, model, names)


def assert_equal(got, reference, tolerance) -> None:
    """Every row of every parameter, relative to the row's whole gradient (some parameters' gradients are 0)."""
    assert list(got) != [] and set(got) == set(reference)
    scale = np.sqrt(sum(np.square(block).sum(axis=1) for block in reference.values()))
    for name, block in reference.items():
        error = np.linalg.norm(got[name] - block, axis=1)
        # Against its own size where it is not tiny, so that small parameters are tested as sharply as large ones.
        own = np.maximum(np.linalg.norm(block, axis=1), 1e-4 * scale)
        assert (error <= tolerance * own).all(), (name, error / own)


@pytest.mark.parametrize("kind", oracles.MODELS)
@pytest.mark.parametrize("checked", [False, True], ids=["as built", "after check"])
def test_every_parameter_of_every_model(kind, checked):
    model = oracles.MODELS[kind]()
    names = oracles.all_names(model)
    batch = oracles.make_batch(oracles.LENGTHS)
    gradients = engine(model)
    if checked or kind == "odd":  # whose wrong rules only check() can find
        gradients.check(batch)
    done = gradients.run(batch)
    reference = expected(model, names, batch)
    assert_equal(collect(gradients, done), reference, EXACT)
    losses = [float(oracles.row_loss(model, *oracles.row_of(batch, row)).detach()) for row in range(8)]
    np.testing.assert_allclose(done.losses.numpy(), losses, rtol=EXACT)


def test_labels_that_are_not_asked_do_not_count():
    """Masks at the start, middle and end of rows, and a row with no loss item at all."""
    model = oracles.gpt2()
    batch = oracles.make_batch((6, 6, 6, 6))
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :4] = oracles.IGNORE
    batch["labels"][1, 3:] = oracles.IGNORE
    batch["labels"][2] = oracles.IGNORE
    gradients = engine(model)
    got = collect(gradients, gradients.run(batch))
    assert_equal(got, expected(model, oracles.all_names(model), batch), EXACT)
    assert all((block[2] == 0).all() for block in got.values())
    assert CausalLMTask().num_items(batch["labels"]).tolist() == [2, 2, 0, 5]


def test_given_labels_replace_the_batchs_own():
    model = oracles.gpt2()
    batch = oracles.make_batch((5, 7, 4))
    labels = torch.where(batch["labels"] == oracles.IGNORE, batch["labels"], (batch["labels"] + 3) % oracles.VOCAB)
    gradients = engine(model)
    got = collect(gradients, gradients.run(batch, labels=labels))
    assert_equal(got, expected(model, oracles.all_names(model), batch, labels), EXACT)


@pytest.mark.parametrize("kind", oracles.MODELS)
def test_float32_batch_of_one_and_of_eight_agree(kind):
    """Padding and batch-mates leave a row's gradient as it is, in float32 up to its rounding."""
    model = oracles.MODELS[kind]().float()
    batch = oracles.make_batch(oracles.LENGTHS)
    gradients = engine(model)
    gradients.check(batch)
    together = collect(gradients, gradients.run(batch))
    for row in range(len(oracles.LENGTHS)):
        tokens, labels = oracles.row_of(batch, row)
        alone = {"input_ids": tokens[None], "labels": labels[None], "attention_mask": torch.ones_like(tokens)[None]}
        one = collect(gradients, gradients.run(alone))
        difference = np.sqrt(sum(np.square(together[name][row] - one[name][0]).sum() for name in one))
        size = np.sqrt(sum(np.square(block).sum() for block in one.values()))
        assert size > 0
        assert difference <= 1e-5 * size  # about 100 roundings of 1e-7


@pytest.mark.parametrize("kind", ["gpt2", "llama", "odd"])
def test_slices_of_rows_make_the_same_blocks(kind):
    model = oracles.MODELS[kind]()
    names = oracles.all_names(model)
    batch = oracles.make_batch(oracles.LENGTHS)
    whole = engine(model)
    # The embedding (12 x 8 or less, float64) fits three times: 8 rows come as 3 + 3 + 2; one byte: row by row.
    largest = max(parameter.numel() for parameter in model.parameters()) * 8
    for limit in (3 * largest, 1):
        sliced = engine(model, max_block_bytes=limit)
        for gradients in (whole, sliced):
            gradients.check(batch)
        done = sliced.run(batch)
        sizes = {rows.stop - rows.start for _, rows, _ in sliced.blocks(done)}
        assert sizes == {1} if limit == 1 else max(sizes) > 1
        assert any(rows.start > 0 for _, rows, _ in sliced.blocks(done))
        assert_equal(collect(sliced, done), expected(model, names, batch), EXACT)


def test_blocks_are_given_for_the_names_asked_only():
    model = oracles.odd()
    names = ["norm.weight", "scale", "head.weight"]
    batch = oracles.make_batch((4, 6))
    gradients = engine(model)
    gradients.check(batch)
    done = gradients.run(batch, names)
    assert_equal(collect(gradients, done, names), expected(model, names, batch), EXACT)


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied"])
def test_a_tied_weight_has_one_gradient_with_both_uses(kind):
    model = oracles.MODELS[kind]()
    (tied,) = [name for name in oracles.all_names(model) if "wte" in name or "embed_tokens" in name]
    batch = oracles.make_batch((6, 4))
    gradients = engine(model)
    assert tied not in gradients.fallback and len(gradients.uses[tied]) == 2
    assert tied in gradients.vocabulary
    (got,) = collect(gradients, gradients.run(batch, [tied]), [tied]).values()
    got = got.reshape(2, oracles.VOCAB, -1)
    unused = sorted(set(range(oracles.VOCAB)) - set(batch["input_ids"][0].tolist()))
    # The head's use reaches every token of the vocabulary, the embedding's only those in the row.
    assert unused and (np.abs(got[0][unused]).sum(axis=1) > 0).all()
    reference = expected(model, [tied], batch)[tied].reshape(got.shape)
    assert oracles.relative_error(got, reference) < EXACT


def test_wanted_parameters_need_not_be_trainable_and_flags_come_back():
    model = oracles.lora_gpt2()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(set(flags.values())) == 2  # adapters train, the base does not
    frozen = [name for name, flag in flags.items() if not flag]
    batch = oracles.make_batch((6, 4, 5))
    gradients = engine(model, frozen)
    gradients.check(batch)
    done = gradients.run(batch)
    got = collect(gradients, done)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_equal(got, expected(model, frozen, batch), EXACT)


def test_a_failing_pass_leaves_the_model_as_it_was():
    model = oracles.lora_gpt2()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = engine(model)
    batch = oracles.make_batch((4, 4))
    batch["input_ids"][0, 0] = oracles.VOCAB + 5
    with pytest.raises((IndexError, RuntimeError)):
        gradients.run(batch)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_parameter_the_model_lacks_is_refused():
    with pytest.raises(UnsupportedError, match="no parameter 'nowhere.weight'"):
        engine(oracles.gpt2(), ["nowhere.weight"])
