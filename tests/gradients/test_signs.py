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
"""Random signs in the place of labels: their covariance, their noise, and that they come again in a later pass."""

import oracles
import pytest
import torch
from oracles import make_batch, relative_error

from hf_source.gradients import (
    CausalLMTask,
    ClassificationTask,
    RegressionTask,
    RowGradients,
    SignedTask,
    curvature_task,
)
from hf_source.gradients.signs import directions, signs


class Weighted(CausalLMTask):
    """Another loss than a softmax's cross-entropy."""

    def row_losses(self, outputs, labels):
        return 2 * super().row_losses(outputs, labels)


@pytest.mark.parametrize("classes", [2, 7, 50])
def test_signs_of_classes_are_uncorrelated(classes):
    codes = torch.randint(0, 2**62, (40_000,), generator=torch.Generator().manual_seed(3))
    found = signs(codes, classes).double()
    assert found.shape == (40_000, classes) and set(found.unique().tolist()) == {-1.0, 1.0}
    # Five standard deviations of a mean of so many signs.
    assert (found.T @ found / len(codes) - torch.eye(classes)).abs().max() < 5 / len(codes) ** 0.5
    assert found.mean(dim=0).abs().max() < 5 / len(codes) ** 0.5


def test_signs_of_a_real_vocabulary_are_distinct():
    """No two classes have the same mask, or their signs would always agree."""
    codes = torch.randint(0, 2**62, (64,), generator=torch.Generator().manual_seed(3))
    assert len(signs(codes, 20_000).T.unique(dim=0)) == 20_000


def test_directions_have_the_covariance_of_a_label_s_gradient_and_less_noise():
    """`z = diag(s) (1 - s s^T) x` by dense matrices, and its fourth moment where the model is nearly sure."""
    logits = torch.tensor([6.0, 0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    codes = torch.randint(0, 2**62, (20_000,), generator=torch.Generator().manual_seed(5))
    found = directions(logits.expand(len(codes), 5), -101 - codes)
    p = logits.softmax(0)
    root = p.sqrt()
    dense = root.diag() @ (torch.eye(5) - root[:, None] * root)
    assert relative_error(found.numpy(), (signs(codes, 5).double() @ dense.T).numpy()) < 1e-12
    hessian = p.diag() - p[:, None] * p
    assert relative_error((dense @ dense.T).numpy(), hessian.numpy()) < 1e-12
    labels = torch.eye(5, dtype=torch.float64) - p  # each with probability p
    assert relative_error((labels.T @ (p[:, None] * labels)).numpy(), hessian.numpy()) < 1e-12
    of_labels = (p * labels.square().sum(dim=1).square()).sum()
    assert found.square().sum(dim=1).square().mean() < 0.05 * of_labels


def test_codes_are_masked_like_labels_and_come_again():
    task, model = curvature_task(CausalLMTask(label_smoothing=0.2), "signs"), oracles.SMALL_MODELS["gpt2"]()
    batch = make_batch((5, 8, 3))
    gradients = RowGradients(model, task, oracles.all_names(model))
    done = gradients.run(batch, generator=torch.Generator().manual_seed(1))
    asked = batch["labels"] != -100
    assert (done.labels[asked] < -100).all() and (done.labels[~asked] == -100).all()
    assert task.num_items(done.labels).tolist() == CausalLMTask().num_items(batch["labels"]).tolist()
    again = gradients.run(batch, labels=done.labels)
    other = gradients.run(batch, generator=torch.Generator().manual_seed(2))
    grads = [{name: part for name, _, part in gradients.blocks(each)} for each in (done, again, other)]
    for name, part in grads[0].items():
        assert torch.equal(part, grads[1][name])
    assert any(not torch.equal(part, grads[2][name]) for name, part in grads[0].items())
    gradients.check(make_batch((8, 7)))  # the signed loss by its rules and by autograd


def test_only_a_softmax_has_signs():
    for task in (CausalLMTask(), ClassificationTask()):
        assert isinstance(curvature_task(task, "signs"), SignedTask)
        assert curvature_task(task, "labels") is task
    for task in (RegressionTask(), Weighted()):
        assert curvature_task(task, "signs") is task
