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
"""TRL's `SFTTrainer` on tiny models: settings and rows for its tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import byte_tokenizer, config, tiny_llama
from datasets import Dataset
from received import Received

from hf_source import RecordingMixin, SourceConfig, TrainingRecord


pytest.importorskip("trl")
from trl import SFTConfig, SFTTrainer  # noqa: E402


class SourceSFTTrainer(RecordingMixin, SFTTrainer):
    pass


@dataclass
class SourceSFTConfig(SFTConfig, SourceConfig):
    pass


def chatty_tokenizer():
    """Bytes, and a chat template that marks what the assistant says."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}A:"
        "{% generation %}{{ message['content'] }}<eos>{% endgeneration %}"
        "{% else %}U:{{ message['content'] }};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    return tokenizer


def model(**settings: Any):
    """A Llama in float64 over bytes."""
    return tiny_llama(dtype=torch.float64, vocab_size=260, max_position_embeddings=64, **settings)


def sft(folder: Path, rows: Dataset, **settings: Any):
    """Train and record; returns the record, what the optimizer received, and the trainer."""
    defaults = {"max_grad_norm": 0.0, "num_train_epochs": 2, "max_length": 24, "bf16": False, "num_segments": 2}
    options = {"output_dir": str(folder / "out"), "activation_checkpointing": False}
    given = config(folder).to_dict()
    names = ("record_dir", "gradient_accumulation_steps", "per_device_train_batch_size", "learning_rate", "use_cpu")
    names += ("lr_scheduler_type", "warmup_steps", "weight_decay", "save_strategy", "logging_strategy", "disable_tqdm")
    args = SourceSFTConfig(**{name: given[name] for name in names} | options | defaults | settings)
    received = Received()
    trainer = SourceSFTTrainer(
        model(), args, train_dataset=rows, processing_class=chatty_tokenizer(), callbacks=[received]
    )
    trainer.train()
    return TrainingRecord.load(folder / "record"), received, trainer


def nll(model: torch.nn.Module, ids: list[int], asked: list[bool]) -> torch.Tensor:
    """Summed loss of the asked tokens of one row; the first is never predicted."""
    tokens = torch.tensor([ids])
    logits = model(tokens).logits[0, :-1].log_softmax(-1)
    losses = -logits.gather(-1, tokens[0, 1:, None])[:, 0]
    return (losses * torch.tensor(asked)[1:]).sum()
