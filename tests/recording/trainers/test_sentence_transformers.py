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
"""sentence-transformers' trainer: recorded; losses of pairs are attributed by a task, losses between rows refused."""

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, config
from datasets import Dataset
from received import Received, largest_error
from transformers import BertConfig, BertModel

from hf_source import Queries, RecordingMixin, RowLossTask, SourceAttributor, TrainingRecord
from hf_source.errors import UnsupportedError


pytest.importorskip("sentence_transformers")
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses  # noqa: E402


class SourceEmbeddingTrainer(RecordingMixin, SentenceTransformerTrainer):
    pass


class CosineTask(RowLossTask):
    """What a user writes for CosineSimilarityLoss: the squared error of the cosine."""

    def forward(self, model, batch):
        sides = [
            model({key: batch[f"{side}_{key}"] for key in ("input_ids", "attention_mask")})["sentence_embedding"]
            for side in ("first", "second")
        ]
        return torch.cosine_similarity(*sides)

    def row_losses(self, outputs, labels):
        return (outputs - labels).square()


def embedder(folder):
    """BERT over bytes, its token vectors averaged."""
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, **off, intermediate_size=24, pad_token_id=0)).save_pretrained(folder / "bert")
    byte_tokenizer().save_pretrained(folder / "bert")
    transformer = modules.Transformer(str(folder / "bert"), max_seq_length=24)
    return SentenceTransformer(modules=[transformer, modules.Pooling(16, "mean")], device="cpu")


def pairs():
    first = ["Peru", "Cuba", "Fiji", "Oman", "Mali", "Togo", "Chad"]
    second = ["Lima", "a longer text", "Suva", "Muscat", "x", "Lome", "no"]
    return Dataset.from_dict({"first": first, "second": second, "score": [1.0, 0.1, 0.9, 0.8, 0.0, 0.7, 0.2]})


def trained(folder, loss, rows):
    model, received = embedder(folder), Received()
    given = config(folder).to_dict()
    names = ("output_dir", "gradient_accumulation_steps", "use_cpu", "lr_scheduler_type", "warmup_steps", "optim_args")
    names += ("weight_decay", "save_strategy", "logging_strategy", "disable_tqdm")
    args = SentenceTransformerTrainingArguments(
        **{name: given[name] for name in names},
        per_device_train_batch_size=2,
        num_train_epochs=2,
        learning_rate=0.01,
        max_grad_norm=0.0,
        optim="sgd",
    )
    trainer = SourceEmbeddingTrainer(
        model=model, args=args, train_dataset=rows, loss=loss(model), callbacks=[received]
    )
    trainer.train()
    return TrainingRecord.load(folder / "out" / "record"), received, trainer


@pytest.fixture(scope="module")
def cosine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosine")
    return folder, *trained(folder, losses.CosineSimilarityLoss, pairs())


def row_loss(model, row):
    """Of one pair alone, from its texts."""
    row = pairs()[row]
    vectors = []
    for text in (row["first"], row["second"]):
        ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
        vectors.append(model[0].model(input_ids=ids).last_hidden_state.mean(dim=1))
    return (torch.cosine_similarity(*vectors)[0] - row["score"]) ** 2


def test_the_record_explains_every_gradient(cosine):
    folder, record, received, _ = cosine
    stage = record.stage()
    assert stage.num_rows == 7 and stage.loss["normalization"] == "micro_batch_mean"
    assert largest_error(received, stage, embedder(folder), row_loss) < 1e-5


def test_a_loss_of_pairs_is_attributed_by_a_task(cosine):
    folder, record, _, trainer = cosine
    settings = {"model": lambda stage: embedder(folder), "data_collator": trainer.data_collator.collator}
    with pytest.raises(UnsupportedError, match="sentence-transformers' CosineSimilarityLoss.*RowLossTask"):
        try:
            SourceAttributor(record, progress=False, **settings).scores(pairs(), Queries.from_rows(pairs()))
        except UnsupportedError as error:
            raise UnsupportedError(str(error).replace("\n", " ")) from error
    settings |= {"task": CosineTask(), "progress": False}
    queries = Queries.from_rows(pairs().select([0, 1]))
    scored = SourceAttributor(record, num_samples=8, **settings).attribute(pairs(), queries)
    assert scored.column_names == [*pairs().column_names, "source_row", "source_q0", "source_q1"]
    dots = SourceAttributor(record, method="grad-dot", **settings)
    model = embedder(folder)
    record.stage().load_weights(model, "final")
    parameters = [p for name, p in model.named_parameters() if name in record.stage().trainable]
    grads = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(row_loss(model, row), parameters, materialize_grads=True)]
            )
            for row in range(7)
        ]
    )
    expected = (grads[:2] @ grads.T).numpy()
    np.testing.assert_allclose(dots.scores(None, queries), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_loss_between_rows_is_recorded_and_refused(tmp_path):
    record, _, _ = trained(tmp_path, losses.MultipleNegativesRankingLoss, pairs().remove_columns("score"))
    stage = record.stage()
    assert stage.loss["kind"] == "in_batch"
    assert np.bincount(stage.steps().visits()["row"]).tolist() == [2] * 7
    assert stage.rows()["first"][:] == pairs()["first"][:]
    attributor = SourceAttributor(record, progress=False)
    with pytest.raises(UnsupportedError, match="MultipleNegativesRankingLoss compares each row with the others"):
        attributor.scores(None, Queries.from_rows(pairs()))
