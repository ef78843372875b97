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
"""`Seq2SeqTrainer`: labels are not shifted, and T5 and BART average over the micro-batch, told a count or not."""

import numpy as np
import pytest
import torch
from cases import VOCABULARY, byte_tokenizer, config
from datasets import Dataset
from received import Received, largest_error
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_source import Queries, RecordingMixin, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.recording import replay


class SourceSeq2SeqTrainer(RecordingMixin, Seq2SeqTrainer):
    pass


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **ends, dropout_rate=0.0))


def tiny_bart():
    torch.manual_seed(0)
    sides = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")]
    sizes = dict(zip(sides, (1, 2, 24) * 2, strict=True)) | {"d_model": 16, "vocab_size": VOCABULARY}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(**sizes, **ends, **off)).double()


def pairs(num_rows=13):
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: torch.randint(low, high, (1,), generator=generator).item()  # noqa: E731
    ids = [torch.randint(2, VOCABULARY, (draw(3, 9),), generator=generator).tolist() for _ in range(num_rows)]
    labels = [torch.randint(2, VOCABULARY, (draw(1, 7),), generator=generator).tolist() for _ in range(num_rows)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def row_loss_of(dataset):
    def row_loss(model, row):
        ids, labels = (torch.tensor([dataset[row][key]]) for key in ("input_ids", "labels"))
        shifted = torch.cat([torch.full((1, 1), model.config.decoder_start_token_id), labels[:, :-1]], dim=1)
        logits = model(input_ids=ids, decoder_input_ids=shifted).logits
        return -logits.log_softmax(-1).gather(-1, labels[..., None]).sum()

    return row_loss


def recorded(folder, make, **settings):
    """A run of 13 rows: micro-batches of 3, two to a step, the last of an epoch alone."""
    dataset, received, model = pairs(), Received(), make()
    given = config(folder).to_dict()
    names = ("output_dir", "weight_decay", "warmup_steps", "lr_scheduler_type", "save_strategy", "logging_strategy")
    args = Seq2SeqTrainingArguments(
        **{name: given[name] for name in names},
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    collator = DataCollatorForSeq2Seq(byte_tokenizer(), model=model)
    trainer = SourceSeq2SeqTrainer(model, args, collator, dataset, callbacks=[received])
    trainer.train()
    return TrainingRecord.load(folder / "out" / "record"), dataset, received, collator


@pytest.fixture(scope="module", params=[tiny_t5, tiny_bart])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    return recorded(folder, request.param, optim="sgd"), request.param


def test_the_record_explains_every_gradient(run):
    """T5's norms compute in float32, so its error is float32's."""
    (record, dataset, received, _), make = run
    stage = record.stage()
    assert stage.loss["kind"] == "seq2seq_lm" and stage.loss["normalization"] == "micro_batch_mean"
    error = largest_error(received, stage, make(), row_loss_of(dataset))
    assert error < (1e-5 if make is tiny_t5 else 1e-9)
    items = {row: len(labels) for row, labels in enumerate(dataset["labels"])}
    assert all(b.items == sum(items[r] for r in b.rows) for step in stage.steps().micro_batches for b in step)


def test_scores_are_products_of_row_gradients(run):
    (record, dataset, _, _), make = run
    attributor = SourceAttributor(record, method="grad-dot", dtype=torch.float64, progress=False)
    scores = attributor.attribute(dataset, Queries.from_rows(dataset.select([4, 9])), return_scores=True)
    model = record.stage().build_model(torch.float64)
    loss, parameters = row_loss_of(dataset), [p for p in model.parameters() if p.requires_grad]
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, row), parameters, materialize_grads=True)])
        for row in range(len(dataset))
    ]
    expected = torch.stack([grads[4], grads[9]]) @ torch.stack(grads).T
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_scores_predict_training_without_a_row(run):
    """One segment of small steps of SGD: first order is nearly all there is."""
    (record, dataset, _, collator), make = run
    stage = record.stage()
    loss = row_loss_of(dataset)
    final = replay(stage, dataset, data_collator=collator)
    for name, weight in stage.weights("final").items():
        torch.testing.assert_close(final.get_parameter(name).detach(), weight, rtol=1e-4, atol=1e-6)
    attributor = SourceAttributor(record, curvature="identity", progress=False)
    scores = attributor.scores(None, Queries.from_rows(dataset.select([4])))[0]
    for row in (int(scores.argmax()), int(scores.argmin())):
        keep = np.arange(len(dataset)) != row
        without = replay(stage, dataset, data_collator=collator, row_mask=keep)
        with torch.no_grad():
            change = float(loss(without, 4) - loss(final, 4))
        assert scores[row] == pytest.approx(change, rel=0.15), row


def test_text_is_generated_and_explained(tmp_path):
    texts = Dataset.from_dict(
        {"question": ["Peru?", "Cuba?", "Fiji?", "Oman?"], "answer": ["Lima", "Hav", "Suva", "Mus"]}
    )
    tokenizer = byte_tokenizer()
    rows = texts.map(
        lambda row: {
            "input_ids": tokenizer(row["question"])["input_ids"],
            "labels": [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id],
        }
    )
    torch.manual_seed(0)
    settings = T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    args = config(tmp_path, max_steps=6)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = SourceTrainer(T5ForConditionalGeneration(settings), args, collator, rows, processing_class=tokenizer)
    trainer.train()
    attributor = SourceAttributor.from_record(tmp_path / "record", num_samples=8, progress=False)
    queries = attributor.generate(["Peru?", "A longer question"], max_new_tokens=4)
    assert [len(row["input_ids"]) for row in queries.rows] == [5, 17]
    assert all(1 <= len(row["labels"]) <= 4 for row in queries.rows)
    asked = Queries.from_text(["Peru?"], ["Lima"])
    assert attributor.encode(asked).rows == [{"input_ids": rows[0]["input_ids"], "labels": rows[0]["labels"][:-1]}]
    scored = attributor.attribute(rows, asked)
    assert np.isfinite(scored["source_q0"]).all() and np.abs(scored["source_q0"]).max() > 0
