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
"""Models with heads, from a real training run to scores: compared with training again without each row."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from hf_source import Queries, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.errors import ConfigError, UnsupportedError
from hf_source.evaluation import losses_of, retrain, retrain_in_chunks
from hf_source.gradients import task_for
from hf_source.recording import replay

from ..cases import byte_tokenizer, config
from ..heads import HEADS, Perceptron, tiny_bert, train_head


def maker(name):
    """`model=` for stages that transformers cannot rebuild."""
    return (lambda stage: HEADS[name].model(torch.float32)) if HEADS[name].own else None


def attributor(record, name, **settings):
    return SourceAttributor(record, model=maker(name), num_samples=256, progress=False, **settings)


def truth(record, name, rows, measurement="loss", share=1.0):
    """Change of each query's measurement when a share of each row is left out, per row: `[queries, rows]`."""
    stage = record.stages[0]
    keep = np.concatenate([np.ones((1, 12)), 1 - share * np.eye(12)])
    found = retrain_in_chunks(stage, stage.rows(), keep, rows, measurement=measurement, model=maker(name))
    return (found[1:] - found[:1]).T / share


def agreement(scores, actual):
    """Mean Spearman over queries, and the share of equal signs among the larger half of the changes."""
    large = np.abs(actual) > np.median(np.abs(actual))
    same = (np.sign(scores) == np.sign(actual))[large].mean()
    return np.mean([spearmanr(*pair).statistic for pair in zip(scores, actual, strict=True)]), same


@pytest.mark.parametrize("name", [name for name in HEADS if name != "masked"])
def test_scores_agree_with_leaving_rows_out(tmp_path, name):
    record = train_head(tmp_path, name)
    stage = record.stages[0]
    assert stage.loss["kind"] == HEADS[name].kind
    queries = Queries.from_rows(HEADS[name].rows().select(range(4)))
    scores = attributor(record, name).scores(None, queries)
    rank, sign = agreement(scores, truth(record, name, queries.rows))
    assert rank > 0.85 and sign > 0.9, (rank, sign)
    given = attributor(record, name).scores(HEADS[name].rows(), queries)
    np.testing.assert_array_equal(scores, given)


def test_masked_words_have_the_derivative_of_their_training(tmp_path):
    """This run bends too much for any derivative to tell what a whole row does (the exact one ranks with .44).

    So a hundredth of a row is left out, which the exact derivative must tell, and Source the sign of.
    """
    record = train_head(tmp_path, "masked")
    queries = Queries.from_rows(HEADS["masked"].rows().select(range(4)))
    actual = truth(record, "masked", queries.rows, share=0.01)
    rank, sign = agreement(attributor(record, "masked", method="unrolled").scores(None, queries), actual)
    assert rank > 0.98 and sign > 0.95, (rank, sign)
    rank, sign = agreement(attributor(record, "masked").scores(None, queries), actual)
    assert rank > 0.5 and sign > 0.85, (rank, sign)


@pytest.mark.parametrize("name", HEADS)
def test_a_replay_reaches_the_recorded_weights(tmp_path, name):
    """So rows, normalisation and loss are the trained ones, also over micro-batches of different size."""
    record = train_head(tmp_path, name, gradient_accumulation_steps=2, per_device_train_batch_size=5)
    stage = record.stages[0]
    made = replay(stage, model=HEADS[name].model(torch.float32))
    start, final = stage.weights("initial"), stage.weights("final")
    own = dict(made.named_parameters())
    off = torch.cat([(own[n] - final[n]).flatten() for n in final]).norm()
    assert off < 1e-4 * torch.cat([(start[n] - final[n]).flatten() for n in final]).norm()


@pytest.mark.parametrize(
    ("name", "measurement"),
    [("single", "margin"), ("single", "logit-difference"), ("multi", "margin"), ("own-regression", "absolute-error")],
)
def test_measurements_agree_with_leaving_rows_out(tmp_path, name, measurement):
    record = train_head(tmp_path, name)
    queries = Queries.from_rows(HEADS[name].rows().select(range(4)))
    scores = attributor(record, name, measurement=measurement).scores(None, queries)
    rank, sign = agreement(scores, truth(record, name, queries.rows, measurement))
    assert rank > 0.85 and sign > 0.9, (rank, sign)
    assert not np.allclose(scores, attributor(record, name).scores(None, queries), rtol=0.05)


@pytest.mark.parametrize(
    "name, settings, few",
    [
        ("own-classes", {}, True),
        ("own-classes", {"curvature": "ekfac"}, True),
        ("own-classes", {"num_samples": 6}, False),
        ("own-classes", {"curvature": "identity"}, False),
        ("own-classes", {"method": "tracin"}, False),
        ("own-regression", {}, False),
        ("masked", {}, False),
    ],
)
def test_plan_tells_a_classifier_of_which_few_rows_are_in_the_sample(tmp_path, name, settings, few):
    record = train_head(tmp_path, name, max_steps=4)
    own = SourceAttributor(record, **{"model": maker(name), "num_samples": 4, "progress": False, **settings})
    plan = own.plan(None, Queries.from_rows(HEADS[name].rows().select(range(2))))
    assert plan.few_samples == (("train",) if few else ())
    assert ("samples: 'train' classifies rows" in str(plan)) == few


def test_retraining_without_removals_reproduces_the_run(tmp_path):
    record = train_head(tmp_path, "multi")
    stage = record.stages[0]
    model, copies = retrain(stage, stage.rows(), np.ones((1, 12), dtype=bool))
    final = stage.weights("final")
    assert max(float((copies[n][0] - final[n]).abs().max()) for n in final) < 1e-5
    rows = Queries.from_rows(HEADS["multi"].rows()).rows
    losses = losses_of(model, copies, rows, task_for(stage))
    built = stage.build_model()
    ids, labels = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        assert losses.mean() / 3 == pytest.approx(float(built(input_ids=ids, labels=labels).loss), rel=1e-4)


def test_measurement_of_another_task_is_refused(tmp_path):
    record = train_head(tmp_path, "regression")
    queries = Queries.from_rows(HEADS["regression"].rows().select(range(2)))
    with pytest.raises(ConfigError, match="Margin is a measurement of classes or tokens, which RegressionTask"):
        attributor(record, "regression", measurement="margin").scores(None, queries)
    with pytest.raises(ConfigError, match="measurement='entropy' is unknown"):
        attributor(record, "regression", measurement="entropy")


def test_a_head_with_a_loss_of_its_own_is_refused(tmp_path, caplog):
    """Weights of classes: the mean is over weights, which no known loss has."""
    weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    args = config(tmp_path)
    rows = HEADS["own-classes"].rows()
    SourceTrainer(Perceptron(3, weighted), args, train_dataset=rows).train()
    assert "Perceptron computes its loss itself" in caplog.text
    record = TrainingRecord.load(tmp_path / "record")
    with pytest.raises(UnsupportedError, match="The loss of a row in stage .* is not known (?s:.*)RowLossTask"):
        attributor(record, "own-classes").scores(rows, Queries.from_rows(rows))


def test_masks_that_are_drawn_at_each_visit_are_refused(tmp_path):
    """The record does not hold which words were masked; the refusal says to mask each row once."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True)
    rows = HEADS["masked"].rows().remove_columns("labels")
    model = tiny_bert(BertForMaskedLM, vocab_size=300)
    SourceTrainer(model, config(tmp_path), train_dataset=rows, data_collator=collator).train()
    record = TrainingRecord.load(tmp_path / "record")
    with pytest.raises(UnsupportedError, match="masks other tokens of a row at each visit.*Mask each row once"):
        attributor(record, "masked").scores(None, Queries.from_rows(HEADS["masked"].rows()))
