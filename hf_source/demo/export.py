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
"""The demo's data as files, for `hf-source train` or a training script of one's own."""

from pathlib import Path

from .facts import (
    labelled_rows,
    load_facts,
    preference_rows,
    pretrain_rows,
    queries,
    row_texts,
    sft_rows,
    train_tokenizer,
)


def export_demo(folder: Path) -> list[Path]:
    """Write what the demo trains on and asks; nothing is trained.

    Args:
        folder: made if it is missing; files of the same names are replaced.

    Returns:
        The paths written: `pretrain.jsonl` (`text`), `sft.jsonl` (`prompt`, `completion`), `queries.jsonl` (`name`,
        `prompt`, `completion`: the right answer; `pretrain_row` and `sft_row`: the rows that state it),
        `preferences.jsonl` (`prompt`, `chosen`, `rejected`), `labelled.jsonl` (`text`, `label`, `is_corrupted`), and
        the folder `tokenizer`.

    Raises:
        UnsupportedError: if `countryinfo` is not installed.
    """
    facts = load_facts()
    pretrain, sft = pretrain_rows(facts), sft_rows(facts)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    made = {"pretrain": pretrain, "sft": sft, "queries": queries(facts)}
    made |= {"preferences": preference_rows(facts), "labelled": labelled_rows(facts)}
    for name, rows in made.items():
        paths.append(folder / f"{name}.jsonl")
        rows.to_json(paths[-1])
    paths.append(folder / "tokenizer")
    train_tokenizer(row_texts(pretrain, sft)).save_pretrained(paths[-1])
    return paths
