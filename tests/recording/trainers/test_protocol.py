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
"""A Trainer whose loss per row is not known: recorded, and attributed once two methods say what the loss is."""

import numpy as np
import pytest
import torch
from cases import config, random_rows, tiny_gpt2, tiny_llama, train
from received import Received, largest_error
from transformers import Trainer

from hf_source import CausalLMTask, Queries, RecordingMixin, RowLossTask, SourceAttributor, TrainingRecord
from hf_source.errors import UnsupportedError
from hf_source.recording.losses import divides_by_count


class FocalTrainer(Trainer):
    """Each row's loss is its mean over tokens, squared."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses = FocalTask().row_losses(outputs.logits, inputs["labels"])
        return losses.mean()

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return inputs


class SourceFocalTrainer(RecordingMixin, FocalTrainer):
    def count_items(self, inputs, num_rows):
        return num_rows


class FocalTask(RowLossTask):
    def forward(self, model, batch):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def row_losses(self, outputs, labels):
        losses = CausalLMTask().token_losses(outputs, labels)
        return (losses.sum(dim=1) / (labels[:, 1:] != -100).sum(dim=1)).square()

    def num_items(self, labels):
        return torch.ones(len(labels), dtype=torch.int64)

    def count_items(self, row):
        return 1


@pytest.fixture(scope="module")
def focal(tmp_path_factory):
    from hf_source.data import CausalLMCollator

    folder, received = tmp_path_factory.mktemp("focal"), Received()
    args = config(folder, max_steps=4, max_grad_norm=0.0, num_segments=1)
    SourceFocalTrainer(tiny_llama(), args, CausalLMCollator(), random_rows(), callbacks=[received]).train()
    return TrainingRecord.load(folder / "record"), received


def queries():
    return Queries.from_dataset(random_rows(3, seed=5))


def test_an_unknown_loss_is_refused_with_what_to_write(focal):
    record, _ = focal
    assert record.stage().loss["kind"] == "compute_loss"
    attributor = SourceAttributor(record, progress=False)
    with pytest.raises(UnsupportedError, match=r"FocalTrainer has its own compute_loss") as refused:
        attributor.scores(None, queries())
    # The lines of the message are the fix: they run, and make a task.
    lines = [line[4:] for line in str(refused.value).splitlines() if line.startswith("    ")]
    found = {}
    exec("\n".join(lines), found)  # noqa: S102
    assert issubclass(found["MyTask"], RowLossTask) and {"forward", "row_losses"} <= vars(found["MyTask"]).keys()


def test_two_methods_make_it_attributable(focal):
    record, received = focal
    rows = random_rows()

    def row_loss(model, row):
        ids, labels = torch.tensor([rows[row]["input_ids"]]), torch.tensor([rows[row]["labels"]])
        return FocalTask().row_losses(model(ids).logits, labels)[0]

    assert largest_error(received, record.stage(), tiny_llama(), row_loss) < 1e-5
    attributor = SourceAttributor(record, task=FocalTask(), num_samples=8, progress=False)
    assert np.isfinite(attributor.scores(None, queries())).all()
    dots = SourceAttributor(record, task=FocalTask(), method="grad-dot", dtype=torch.float64, progress=False)
    model = record.stage().build_model(torch.float64)
    parameters = list(model.parameters())
    asked = queries().rows[1]
    ids, labels = torch.tensor([asked["input_ids"]]), torch.tensor([asked["labels"]])
    of = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])  # noqa: E731
    measured = of(CausalLMTask().row_losses(model(ids).logits, labels).sum())  # text, whatever training minimised
    expected = [float(measured @ of(row_loss(model, row))) for row in range(len(rows))]
    np.testing.assert_allclose(dots.scores(None, queries())[1], expected, rtol=1e-4, atol=1e-6)


def test_a_task_that_training_did_not_minimise_is_refused(focal):
    class Halved(FocalTask):
        def row_losses(self, outputs, labels):
            return super().row_losses(outputs, labels) / 2

    record, _ = focal
    with pytest.raises(UnsupportedError, match="Halved, but training computed"):
        SourceAttributor(record, task=Halved(), progress=False).scores(None, queries())


@pytest.mark.parametrize("divides", [True, False])
def test_a_loss_function_of_ones_own(tmp_path, divides):
    """The function is called twice, on the first micro-batch, to see whether it divides by the count it is given."""

    def loss(outputs, labels, num_items_in_batch=None):
        summed = CausalLMTask().row_losses(outputs.logits, labels).sum()
        return summed / (num_items_in_batch if divides else (labels[:, 1:] != -100).sum())

    received, rows = Received(), random_rows()
    _, record = train(
        tmp_path, tiny_llama(), rows, trainer={"compute_loss_func": loss, "callbacks": [received]}, max_grad_norm=0.0
    )
    stage = record.stage()
    assert stage.loss["normalization"] == ("tokens" if divides else "micro_batch_mean")

    def row_loss(model, row):
        ids, labels = torch.tensor([rows[row]["input_ids"]]), torch.tensor([rows[row]["labels"]])
        return CausalLMTask().row_losses(model(ids).logits, labels)[0]

    assert largest_error(received, stage, tiny_llama(), row_loss) < 1e-5
    with pytest.raises(UnsupportedError, match="compute_loss_func"):
        SourceAttributor(record, progress=False).scores(None, queries())
    scores = SourceAttributor(record, task=CausalLMTask(), num_samples=4, progress=False).scores(None, queries())
    assert np.isfinite(scores).all() and np.abs(scores).max() > 0


def test_without_sampled_labels_the_curvature_is_the_empirical_fisher(focal):
    from hf_source.curvature import FisherSample
    from hf_source.data import CausalLMCollator
    from hf_source.gradients import RowGradients

    model = tiny_gpt2(dtype=torch.float64)
    batch = CausalLMCollator()(list(random_rows(4)))
    gradients = RowGradients(model, FocalTask(), [name for name, _ in model.named_parameters()])
    matrices = FisherSample(gradients, [batch]).matrices(["transformer.ln_f.bias"])
    losses = FocalTask().row_losses(FocalTask().forward(model, batch), batch["labels"])
    bias = model.transformer.ln_f.bias
    expected = torch.stack([torch.autograd.grad(loss, bias, retain_graph=True)[0] for loss in losses]) / 4**0.5
    torch.testing.assert_close(matrices["transformer.ln_f.bias"], expected)


@pytest.mark.parametrize(
    ("loss", "divides"),
    [
        (lambda inputs, count: inputs["sum"] / count, True),
        (lambda inputs, count: inputs["sum"] / 3, False),
        (lambda inputs, count: 0 * inputs["sum"] / count, None),
        (lambda inputs, count: inputs["sum"] * float("nan"), None),
    ],
)
def test_whether_a_loss_divides_by_the_count_it_is_told(loss, divides):
    assert divides_by_count(loss, {"sum": torch.tensor(6.0)}, torch.tensor(4)) is divides
