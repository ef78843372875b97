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
"""Train a task of the Source paper that is no text, stage after stage, and say which rows its answers come from.

    python recipes/paper/task.py recipes/paper/mnist.yaml training.num_train_epochs=5
    python recipes/paper/task.py recipes/paper/mnist.yaml --evaluate source influence tracin

Writes `record/`, `top.parquet` (the strongest rows of every test row), `report.html` and, with `--evaluate`,
`lds_<stage>/`: the paper's protocol, training again on random halves of a stage.

A file has `network` (see `networks.py`), `data` and for every stage and for `queries` what differs from it (see
`rows.py`), `attribution` (settings of `SourceAttributor`) and `training` (of `SourceConfig`, for every stage, and
`momentum`).
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from networks import network
from rows import rows_of

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer
from hf_source.evaluation import evaluate
from hf_source.recipes import apply_override, read_settings


def datasets_of(settings: dict[str, Any]) -> tuple[dict[str, Dataset], Dataset]:
    """Rows of every stage, and the test rows."""
    stages, scale = {}, None
    for name, own in settings["stages"].items():
        stages[name], scale = rows_of({**settings["data"], **own}, scale)
    return stages, rows_of({**settings["data"], **settings["queries"]}, scale)[0]


def train(settings: dict[str, Any], model: torch.nn.Module, stages: dict[str, Dataset]) -> Path:
    """Train and record every stage; the folder of the record."""
    given = {"report_to": "none", **settings["training"]}
    momentum = given.pop("momentum", 0.0)
    record = Path(given["output_dir"], "record")
    for name, rows in stages.items():
        args = SourceConfig(stage=name, record_dir=str(record), overwrite_stage=True, **given)
        optimizer = (torch.optim.SGD, {"lr": args.learning_rate, "momentum": momentum})
        own = {"optimizer_cls_and_kwargs": optimizer} if args.optim == "sgd" else {}
        SourceTrainer(model, args, train_dataset=rows, **own).train()
    return record


def main() -> None:
    """Train, attribute, and evaluate if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a YAML file")
    parser.add_argument("overrides", nargs="*", help="such as training.learning_rate=1e-2")
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="METHOD", help="the LDS of some methods")
    parser.add_argument("--subsets", type=int, default=100, help="random halves of each stage")
    parser.add_argument("--seeds", type=int, default=5, help="retrainings of each half")
    options = parser.parse_intermixed_args()
    settings = read_settings(options.file)
    for override in options.overrides:
        apply_override(settings, override)
    stages, asked = datasets_of(settings)
    classes = 0 if "target" in settings["data"] else 1 + max(max(rows["label"]) for rows in (*stages.values(), asked))
    seed = settings["training"].get("seed", 42)
    make = partial(network, settings["network"], asked, classes)
    record = train(settings, make(seed), stages)
    attributor = SourceAttributor.from_record(record, model=lambda stage: make(seed), **settings["attribution"])
    queries = Queries.from_rows(asked)
    attributor.top(queries).to_parquet(record.parent / "top.parquet")
    attributor.report(record.parent / "report.html", queries)
    for stage in stages if options.evaluate else ():
        report = evaluate(
            attributor, queries, protocols=["halves"], methods=options.evaluate, stage=stage,
            num_subsets=options.subsets, num_seeds=options.seeds,
        )  # fmt: skip
        report.write(record.parent / f"lds_{stage}")


if __name__ == "__main__":
    main()
