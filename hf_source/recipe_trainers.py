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
"""Trainers that a recipe can name, each with recording: `trainer: causal | sft | dpo | classification`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import ConfigError


TRAINERS = ("causal", "sft", "dpo", "classification")
"""`causal` (the default) takes `text`, or `prompt` and `completion`; `sft` what TRL's SFTTrainer takes, chats too;
`dpo` what TRL's DPOTrainer takes (`prompt`, `chosen`, `rejected`); `classification` `text`, `label` and, for pairs of
texts, `text_pair`."""


def kind_of(recipe: Mapping[str, Any]) -> str:
    """The trainer of a recipe.

    Raises:
        ConfigError: if there is no such trainer.
    """
    kind = recipe.get("trainer") or "causal"
    if kind not in TRAINERS:
        raise ConfigError(f"trainer: {kind!r} is unknown; choose one of {', '.join(TRAINERS)}.")
    return kind


@cache
def recorded(kind: str) -> tuple[type, type]:
    """The recording Trainer and its configuration.

    Raises:
        ConfigError: if TRL is needed and not installed.
    """
    from transformers import Trainer

    from .recording import RecordingMixin, SourceConfig, SourceTrainer

    if kind == "causal":
        return SourceTrainer, SourceConfig
    if kind == "classification":
        return type("SourceClassificationTrainer", (RecordingMixin, Trainer), {}), SourceConfig
    try:
        import trl
    except ImportError as error:
        raise ConfigError(f"trainer: {kind} needs TRL: pip install trl.") from error
    trainer, config = getattr(trl, f"{kind.upper()}Trainer"), getattr(trl, f"{kind.upper()}Config")
    own = dataclass(type(f"Source{config.__name__}", (config, SourceConfig), {}))
    return type(f"Source{trainer.__name__}", (RecordingMixin, trainer), {}), own


def count_labels(rows: Any) -> int:
    """How many labels a classifier needs.

    Raises:
        ConfigError: if a column is missing, or labels are not whole numbers from 0.
    """
    missing = {"text", "label"} - set(rows.column_names)
    if missing:
        raise ConfigError(f"trainer: classification needs a column {sorted(missing)[0]!r} of the dataset.")
    labels = rows.with_format(None)["label"][:]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ConfigError("trainer: classification needs whole numbers from 0 in the column `label`.")
    return max(labels) + 1


def labelled_rows(rows: Any, tokenizer: Any, max_length: int | None) -> Any:
    """Tokenised rows with all their columns, the `label` among them."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]

    def encode(batch: Mapping[str, list]) -> Mapping[str, list]:
        return tokenizer(*(batch[name] for name in columns), truncation=max_length is not None, max_length=max_length)

    return rows.map(encode, batched=True, desc="Tokenizing rows")
