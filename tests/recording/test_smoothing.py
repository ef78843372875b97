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
"""Label smoothing: the loss that trained is the loss in the record, in replay and in attribution."""

import pytest
import torch
from cases import config, distance, random_rows, tiny_gpt2, tiny_llama, train

from hf_source import Queries, SourceAttributor
from hf_source.curvature import FisherSample
from hf_source.errors import UnsupportedError
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.recording import SourceTrainer, TrainingRecord, replay


EPSILON = 0.2


class MeanLossLlama(type(tiny_llama())):
    """Takes no number of items, so that the Trainer divides by the micro-batch's own."""

    accepts_loss_kwargs = False


MeanLossLlama.__name__ = "LlamaForCausalLM"  # the Trainer shifts labels by this name


def mean_loss_llama(dtype=torch.float32):
    torch.manual_seed(0)
    return MeanLossLlama(tiny_llama().config).to(dtype)


def row_loss(model, row) -> torch.Tensor:
    """From the definition: cross-entropy with `1 - epsilon` on the label and `epsilon` over the whole vocabulary."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
    wanted = torch.full_like(log_probabilities, EPSILON / log_probabilities.shape[-1])
    wanted[torch.arange(len(labels)), labels.clamp(min=0)] += 1 - EPSILON
    return -(wanted * log_probabilities).sum(-1)[labels != -100].sum()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, mean_loss_llama])
def test_normalizers_are_what_the_smoothed_loss_was_divided_by(tmp_path, make):
    losses = []

    class Spy(SourceTrainer):
        def compute_loss(self, *args, **kwargs):
            losses.append(super().compute_loss(*args, **kwargs))
            return losses[-1]

    model, rows = make(dtype=torch.float64), random_rows()
    settings = {"learning_rate": 0.0, "label_smoothing_factor": EPSILON}
    Spy(model, config(tmp_path, **settings), train_dataset=rows).train()
    stage = TrainingRecord.load(tmp_path / "record").stage()
    assert stage.loss["label_smoothing"] == EPSILON
    assert stage.loss["normalization"] == ("micro_batch_mean" if make is mean_loss_llama else "tokens")
    steps = stage.steps().micro_batches
    assert sum(len(step) for step in steps) == len(losses)
    with torch.no_grad():
        by_row = [float(row_loss(model, row)) for row in rows]
    for batch, loss in zip((batch for step in steps for batch in step), losses, strict=True):
        # Where the model takes no count, the division by the number of micro-batches comes after.
        divided_by = batch.items if make is mean_loss_llama else batch.normalizer
        assert sum(by_row[row] for row in batch.rows) / divided_by == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, mean_loss_llama])
@pytest.mark.parametrize("settings", [{}, {"optim": "sgd", "learning_rate": 0.05}], ids=["adamw", "sgd"])
def test_a_smoothed_run_replays(tmp_path, make, settings):
    model = make(dtype=torch.float64)
    _, record = train(tmp_path, model, label_smoothing_factor=EPSILON, **settings)
    stage = record.stage()
    final = stage.weights("final")
    again = replay(stage, random_rows(), model=make(dtype=torch.float64) if make is mean_loss_llama else None)
    moved = distance(stage.weights("initial"), final)
    assert moved > 0.03 and distance(dict(again.named_parameters()), final) <= 1e-9 * moved
    stage.loss["label_smoothing"] = 0.0
    again = replay(stage, random_rows(), model=make(dtype=torch.float64) if make is mean_loss_llama else None)
    assert distance(dict(again.named_parameters()), final) > 1e-3 * moved


def test_a_smoothed_run_in_bfloat16_replays(tmp_path):
    _, record = train(tmp_path, tiny_llama(), label_smoothing_factor=EPSILON, bf16=True)
    stage = record.stage()
    again, final = dict(replay(stage, random_rows()).named_parameters()), stage.weights("final")
    assert distance(again, final) <= 1e-4 * distance(stage.weights("initial"), final)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_rows_are_scored_by_the_smoothed_loss_and_queries_by_the_plain_one(tmp_path, make):
    _, record = train(tmp_path, make(dtype=torch.float64), label_smoothing_factor=EPSILON, num_segments=1)
    stage, rows = record.stage(), random_rows()
    attributor = SourceAttributor(record, num_samples=8, progress=False, dtype=torch.float64, curvature="identity")
    queries = Queries.from_dataset(random_rows(2, seed=9))
    assert attributor.task_of(stage).label_smoothing == EPSILON
    assert attributor.measurement(queries).label_smoothing == 0
    scores = attributor.scores(None, queries)

    model = stage.build_model()
    names = stage.trainable
    plain = torch.autograd.grad(query_loss(model, random_rows(2, seed=9)[0]), list(model.parameters()))
    plain = dict(zip([name for name, _ in model.named_parameters()], plain, strict=True))
    segment = stage.segments[0]
    stage.load_weights(model, 0)
    scale, decay, s = segment.preconditioner(), segment.decay(), segment.effective_learning_rate_sum
    weights = segment.applied_weights()
    for index in (0, 7):
        grads = torch.autograd.grad(row_loss(model, rows[index]), list(model.parameters()))
        grads = dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))
        by_hand = 0.0
        for name in names:
            x = scale[name] * plain[name] * decayed(s * decay[name])  # F_r without curvature, per unit of s
            by_hand += float((x * grads[name]).sum())
        assert scores[0, index] == pytest.approx(weights[index] * by_hand, rel=1e-3)


def query_loss(model, row):
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="sum")


def decayed(x):
    """`(1 - exp(-x)) / x`."""
    return torch.where(x > 0, -torch.expm1(-x) / x.clamp_min(1e-300), torch.ones_like(x))


def test_the_curvature_is_that_of_the_plain_loss():
    """Cross-entropy with any targets has the Hessian `diag(p) - p p^T` in the logits; labels are drawn for it."""
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 3]])
    task = CausalLMTask(label_smoothing=EPSILON)

    def loss(given, task):
        return task.row_losses(given.view_as(logits), labels).sum()

    for one in (task, task.unsmoothed()):
        hessian = torch.func.hessian(loss)(logits.flatten(), one)[:5, :5]
        p = logits[0, 0].softmax(-1)
        torch.testing.assert_close(hessian, torch.diag(p) - p[:, None] * p, rtol=1e-6, atol=1e-8)
    sample = FisherSample(RowGradients(tiny_llama(), task, ["lm_head.weight"]), [])
    assert sample.gradients.task.label_smoothing == 0


def test_a_loss_function_of_ones_own_is_not_smoothed(tmp_path):
    """Trainer calls it in the smoother's place, so the record says 0."""

    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    settings = {"label_smoothing_factor": EPSILON, "max_steps": 2, "num_segments": 1}
    _, record = train(tmp_path, tiny_llama(), trainer={"compute_loss_func": loss}, **settings)
    assert record.stage().loss["label_smoothing"] == 0.0


def test_models_that_the_trainer_does_not_shift_are_refused(tmp_path):
    """Trainer knows causal language models by the name of their class, and compares others' tokens with themselves."""

    class Own(type(tiny_llama())):
        pass

    with pytest.raises(UnsupportedError, match=r"does not know Own as a causal.*label_smoothing_factor=0"):
        train(tmp_path, Own(tiny_llama().config), label_smoothing_factor=EPSILON)
    assert not (tmp_path / "record").exists()
