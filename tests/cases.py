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
"""Small models, rows and recorded runs that the tests share. Everything is made here: no network, no files."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_source.recording import SourceConfig, SourceTrainer, TrainingRecord


VOCABULARY = 48


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> GPT2LMHeadModel:
    """GPT-2 with 2 layers of width 16 and a head tied to the embedding (8 k parameters); no dropout."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes | off | {"bos_token_id": 0, "eos_token_id": 0} | config)).to(dtype)


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """Llama with 2 layers of width 16, grouped attention and its own head."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | {"bos_token_id": 0, "eos_token_id": 0} | config)).to(dtype)


def random_rows(num_rows: int = 22, seed: int = 0, shortest: int = 4, longest: int = 12) -> Dataset:
    """Rows of random tokens, of random lengths, with labels; every third row has its first half masked."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num_rows,), generator=generator).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    labels = [
        [-100] * (len(row) // 2) + row[len(row) // 2 :] if index % 3 == 0 else row for index, row in enumerate(ids)
    ]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; end of sequence is token 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def config(folder: Path, **settings: Any) -> SourceConfig:
    """Settings of a short, quiet run: 9 optimizer steps on 22 rows, record in `<folder>/record`."""
    defaults = {
        "output_dir": str(folder / "out"),
        "record_dir": str(folder / "record"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.7,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SourceConfig(**defaults | settings)


def train(
    folder: Path,
    model: PreTrainedModel,
    dataset: Any = None,
    *,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[SourceTrainer, TrainingRecord]:
    """Train and record a run; `trainer` holds further arguments of `SourceTrainer`."""
    dataset = random_rows() if dataset is None else dataset
    run = SourceTrainer(model, config(folder, **settings), train_dataset=dataset, **(trainer or {}))
    run.train()
    return run, TrainingRecord.load(folder / "record")


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Euclidean distance between two sets of named tensors."""
    assert first.keys() == second.keys()
    squares = [(first[n].detach().double() - second[n].detach().double()).square().sum() for n in first]
    return float(torch.stack(squares).sum().sqrt())
