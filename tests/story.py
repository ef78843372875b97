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
"""A two-stage story on a byte-level model, recorded once per test session: facts, then questions about them."""

from pathlib import Path

from datasets import Dataset

from hf_source import SourceTrainer, TrainingRecord

from .cases import byte_tokenizer, config, tiny_gpt2


CAPITALS = {"Peru": "Lima", "Cuba": "Havana", "Fiji": "Suva", "Oman": "Muscat", "Mali": "Bamako", "Togo": "Lome"}
STORY_STEPS = {"pretrain": 40, "sft": 20}


def facts() -> Dataset:
    """Raw text rows: what a user has."""
    texts = [f"{country}: {capital}." for country, capital in CAPITALS.items()] + ["An odd row.", "Another one."]
    return Dataset.from_dict({"text": texts, "label_of_mine": list(range(len(texts)))})


def chats() -> Dataset:
    """Prompt and completion rows."""
    return Dataset.from_dict(
        {
            "prompt": [f"Q {country}? A" for country in list(CAPITALS)[:4]],
            "completion": [f" {capital}" for capital in list(CAPITALS.values())[:4]],
        }
    )


def tell(folder: Path, **settings) -> TrainingRecord:
    """Train both stages into `<folder>/record`."""
    model = tiny_gpt2(vocab_size=260, n_positions=32)
    common = {"gradient_accumulation_steps": 1, "weight_decay": 0.01, "num_segments": 2} | settings
    for stage, dataset in (("pretrain", facts()), ("sft", chats())):
        args = config(folder, stage=stage, max_steps=STORY_STEPS[stage], **common)
        SourceTrainer(model, args, train_dataset=dataset, processing_class=byte_tokenizer()).train()
    return TrainingRecord.load(folder / "record")
