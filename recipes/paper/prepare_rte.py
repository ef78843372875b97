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
"""RTE as rows that `trainer: classification` reads: the premise as `text`, the hypothesis as `text_pair`, `label`."""

import argparse
from pathlib import Path

import datasets


def main() -> None:
    """Write the rows of one split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a .jsonl file")
    parser.add_argument("--dataset", default="nyu-mll/glue", help="on the Hub, or a .jsonl file with its columns")
    parser.add_argument("--split", default="train")
    parser.add_argument("--rows", type=int, help="the first ones only")
    args = parser.parse_args()
    if args.dataset.endswith(".jsonl"):
        rows = datasets.load_dataset("json", data_files=args.dataset, split="train")
    else:
        rows = datasets.load_dataset(args.dataset, "rte", split=args.split)
    rows = rows.rename_columns({"sentence1": "text", "sentence2": "text_pair"})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows.select(range(min(len(rows), args.rows or len(rows)))).to_json(args.out)


if __name__ == "__main__":
    main()
