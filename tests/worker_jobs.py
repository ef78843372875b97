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
"""Work for other processes, which import it by name; see `evaluation/test_trained.py`."""

import os
from functools import partial
from pathlib import Path

from transformers import Trainer, TrainingArguments


def doubling():
    """A worker that doubles."""
    return lambda job: 2 * job


def broken():
    raise OSError("nothing opens")


def fragile(folder: Path):
    """A worker that dies at job 1 the first time, at job 2 always, and raises at job 3."""
    return partial(_fragile, folder)


def _fragile(folder: Path, job: int) -> int:
    seen = folder / f"seen-{job}"
    first = not seen.exists()
    seen.touch()
    if (job == 1 and first) or job == 2:
        os._exit(7)
    if job == 3:
        raise ValueError("no threes")
    return 10 * job


def arguments(output_dir: str, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        seed=seed,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.7,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    )


def own_trainer(dataset, seed: int, output_dir: str) -> Trainer:
    """The run of the tests, as a user would write it."""
    from cases import tiny_gpt2

    from hf_source.data import CausalLMCollator

    return Trainer(tiny_gpt2(), arguments(output_dir, seed), train_dataset=dataset, data_collator=CausalLMCollator())


def failing_trainer(dataset, seed: int, output_dir: str) -> Trainer:
    """Trains, but not without the first row."""
    if dataset[0]["input_ids"] != FIRST:
        raise RuntimeError("the first row is gone")
    return own_trainer(dataset, seed, output_dir)


FIRST: list[int] = []
