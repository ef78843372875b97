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
"""WikiText-2 as rows of equal length: its text in one piece, cut every `length` tokens, the rest left out."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer


def chunks(texts: Iterable[str], tokenizer: Any, length: int) -> datasets.Dataset:
    """Texts, one after the other, as rows of `length` tokens."""
    tokens = tokenizer("".join(texts))["input_ids"]
    rows = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return datasets.Dataset.from_dict({"input_ids": rows})


def main() -> None:
    """Write the rows of one split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a .jsonl file")
    parser.add_argument("--dataset", default="Salesforce/wikitext", help="on the Hub, or a .jsonl file with `text`")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokenizer", default="openai-community/gpt2")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    if args.dataset.endswith(".jsonl"):
        rows = datasets.load_dataset("json", data_files=args.dataset, split="train")
    else:
        rows = datasets.load_dataset(args.dataset, "wikitext-2-raw-v1", split=args.split)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chunks(rows["text"], AutoTokenizer.from_pretrained(args.tokenizer), args.length).to_json(args.out)


if __name__ == "__main__":
    main()
