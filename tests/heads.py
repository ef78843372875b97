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
"""Tiny models with heads, and rows for them, that tests of several areas share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_source import SourceTrainer, TrainingRecord

from .cases import config, tiny_gpt2


def tiny_bert(cls: type = BertForSequenceClassification, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A BERT of one layer of width 8, without dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    words = {"vocab_size": 20, "max_position_embeddings": 12, "pad_token_id": 0}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    return cls(BertConfig(**sizes | words | off | settings)).to(dtype)


def tiny_bart(dtype: torch.dtype = torch.float32) -> BartForConditionalGeneration:
    """An encoder and a decoder of one layer of width 8, without dropout."""
    torch.manual_seed(0)
    sides = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")]
    sizes = dict(zip(sides, (1, 2, 12) * 2, strict=True)) | {"d_model": 8, "vocab_size": 20, "init_std": 0.3}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 12}
    fast = {"attn_implementation": "eager"}  # which vmap batches
    return BartForConditionalGeneration(BartConfig(**sizes, **ends, **off, **fast)).to(dtype)


def tiny_vit(dtype: torch.dtype = torch.float32) -> ViTForImageClassification:
    """A vision transformer of one layer for images of 4 by 4 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    image = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    return ViTForImageClassification(ViTConfig(**sizes | image | off)).to(dtype)


def tiny_wav2vec2(dtype: torch.dtype = torch.float32, reduction: str = "sum") -> Wav2Vec2ForCTC:
    """A speech model of one convolution and one layer for 80 samples, without dropout or masking."""
    torch.manual_seed(0)
    conv = {"conv_dim": (8,), "conv_stride": (8,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    places = ("hidden", "activation", "attention", "feat_proj", "final")
    off = {f"{place}_dropout": 0.0 for place in places} | {"layerdrop": 0.0, "mask_time_prob": 0.0}
    words = {"vocab_size": 5, "pad_token_id": 0, "ctc_loss_reduction": reduction, "initializer_range": 0.3}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**conv | position | sizes | off | words)).to(dtype)


class Perceptron(nn.Module):
    """A model of one's own, which knows nothing of transformers; its loss is the head's."""

    def __init__(self, outputs: int = 1, loss: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs))
        self.loss = loss or nn.MSELoss()

    def forward(self, features, labels=None):
        predictions = self.layers(features)
        predictions = predictions.squeeze(-1) if predictions.shape[-1] == 1 else predictions
        return (predictions,) if labels is None else (self.loss(predictions, labels), predictions)


class Experts(nn.Module):
    """Two experts, stacked into one parameter, of which every place takes a share."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x, shares):
        return torch.einsum("rpe,eoi,rpi->rpo", shares, self.weight, x)


class Mixed(nn.Module):
    """Convolutions, a channel norm, attention in one matrix and stacked experts, for images of 4 by 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(1, 8, 2, stride=2)
        self.mixed = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate = nn.Linear(8, 2)
        self.experts = Experts()
        self.up = nn.ConvTranspose2d(8, 2, 2, stride=2)
        self.head = nn.Linear(2 * 16, 3)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, pixel_values, labels=None):
        x = self.down(pixel_values)
        x = torch.tanh(self.norm(x + self.mixed(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = x + self.experts(x, self.gate(x).softmax(dim=-1))
        logits = self.head(torch.tanh(self.up(x.transpose(1, 2).unflatten(2, (2, 2)))).flatten(1))
        return (logits,) if labels is None else (self.loss(logits, labels), logits)


def texts(labels: Callable[[torch.Tensor], Any], num_rows: int = 12) -> Dataset:
    """Rows of five tokens; `labels` makes a row's label of them, every fifth one is wrong."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 20, (num_rows, 5), generator=generator)
    source = [ids[(i + 1) % num_rows] if i % 5 == 0 else row for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": [labels(row) for row in source]})


def _images() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(12, 1, 4, 4, generator=generator)
    labels = [int(image.sum() > 0) + int(image[0, 0, 0] > 1) for image in pixels]
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": labels})


def _points(labels: Callable[[torch.Tensor], Any]) -> Dataset:
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"features": features.tolist(), "labels": [labels(row) for row in features]})


def _tokens() -> Dataset:
    rows = texts(lambda r: 0).remove_columns("labels")
    return rows.add_column("labels", [[-100, *(int(t > 9) for t in r[1:])] for r in rows["input_ids"]])


def _completions() -> Dataset:
    """Rows whose first two tokens are a prompt."""
    rows = texts(lambda r: 0).remove_columns("labels")
    return rows.add_column("labels", [[-100, -100, *r[2:]] for r in rows["input_ids"]])


def _translations() -> Dataset:
    """The first three tokens, each with its successor; every fifth row has another one's."""
    return texts(lambda r: [(int(t) % 19) + 1 for t in r[:3]])


def _masked() -> Dataset:
    """Rows masked once, as the refusal of random masks asks for."""
    rows = texts(lambda r: 0).remove_columns("labels")
    shown = [[19 if i in (1, 3) else t for i, t in enumerate(r)] for r in rows["input_ids"]]
    asked = [[t if i in (1, 3) else -100 for i, t in enumerate(r)] for r in rows["input_ids"]]
    return Dataset.from_dict({"input_ids": shown, "labels": asked})


def _choices() -> Dataset:
    ids = torch.randint(1, 20, (12, 3, 5), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids[:, :, 0].argmax(dim=1).tolist()})


def _answers() -> Dataset:
    ids = torch.tensor(texts(lambda r: 0)["input_ids"])
    starts = ids.argmax(dim=1)
    ends = torch.maximum(starts, ids.argmin(dim=1))
    starts[4] = ends[4] = 50  # cut off
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "start_positions": starts.tolist(), "end_positions": ends.tolist()}
    )


def _speech() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    sounds = torch.randn(12, 80, generator=generator)
    words = torch.randint(1, 5, (12, 3), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_values": sounds.tolist(), "labels": [w if i % 3 else [*w[:2], -100] for i, w in enumerate(words)]}
    )


@dataclass(frozen=True)
class Head:
    """A model, its rows, and the kind that the recorder must find."""

    model: Callable[[torch.dtype], nn.Module]
    rows: Callable[[], Dataset]
    kind: str
    own: bool = False


HEADS = {
    "causal": Head(
        lambda d: tiny_gpt2(dtype=d, n_layer=1, n_embd=8, vocab_size=20, initializer_range=0.3),
        _completions,
        "causal_lm",
    ),
    "seq2seq": Head(tiny_bart, _translations, "seq2seq_lm"),
    "single": Head(
        lambda d: tiny_bert(dtype=d, num_labels=3), lambda: texts(lambda r: int(r[0]) % 3), "classification"
    ),
    "multi": Head(
        lambda d: tiny_bert(dtype=d, num_labels=3, problem_type="multi_label_classification"),
        lambda: texts(lambda r: [float(r[0] > 9), float(r[1] > 9), float(r[2] > 9)]),
        "multi_label",
    ),
    "regression": Head(
        lambda d: tiny_bert(dtype=d, num_labels=1), lambda: texts(lambda r: float(r[0]) / 9), "regression"
    ),
    "tokens": Head(lambda d: tiny_bert(BertForTokenClassification, d, num_labels=2), _tokens, "classification"),
    "masked": Head(lambda d: tiny_bert(BertForMaskedLM, d), _masked, "classification"),
    "choices": Head(lambda d: tiny_bert(BertForMultipleChoice, d), _choices, "classification"),
    "answers": Head(lambda d: tiny_bert(BertForQuestionAnswering, d), _answers, "question_answering"),
    "speech": Head(tiny_wav2vec2, _speech, "ctc"),
    "speech-mean": Head(lambda d: tiny_wav2vec2(d, "mean"), _speech, "ctc"),
    "image": Head(tiny_vit, _images, "classification"),
    "own-images": Head(lambda d: Mixed().to(d), _images, "classification", own=True),
    "own-regression": Head(
        lambda d: Perceptron().to(d), lambda: _points(lambda r: float(r[0] * r[1])), "regression", own=True
    ),
    "own-classes": Head(
        lambda d: Perceptron(3, nn.CrossEntropyLoss()).to(d),
        lambda: _points(lambda r: int(r[0] > 0) + int(r[1] > 0)),
        "classification",
        own=True,
    ),
}


def train_head(folder: Path, name: str, **settings: Any) -> TrainingRecord:
    """Train a tiny model with the named head by a real `SourceTrainer`, 24 steps of SGD on 12 rows."""
    head = HEADS[name]
    common = {"per_device_train_batch_size": 4, "num_train_epochs": 8, "gradient_accumulation_steps": 1}
    plain = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0, "max_grad_norm": 0.0, "num_segments": 4}
    trainer = SourceTrainer(
        head.model(torch.float32), config(folder, **common | plain | settings), train_dataset=head.rows()
    )
    trainer.train()
    return TrainingRecord.load(folder / "record")
