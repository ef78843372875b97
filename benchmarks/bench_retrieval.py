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
"""Does the row that states the fact come out on top? Every method on the demo's run.

`hf-source demo` (which this runs first, unless its folder is there) trains a GPT-2 of 0.33 M parameters on facts about
countries and then on questions about half of the capitals. For each right answer exactly one row of each stage states
the fact. `stepwise` and `unrolled` are left out: they would repeat 29,000 visits of rows for the pretraining stage.

    python benchmarks/bench_retrieval.py --demo runs/demo    # writes benchmarks/retrieval.json
"""

import argparse
import time
from pathlib import Path

import results_file
import transformers

from hf_source import SourceAttributor
from hf_source.demo.facts import is_right, load_facts, queries
from hf_source.demo.run import MAX_QUERIES, run_demo
from hf_source.evaluation import retrieval


STAGES = ("pretrain", "sft")
METHODS = {
    "source joint": {},
    "source ekfac": {"curvature": "ekfac"},
    "source ekfac-hybrid": {"curvature": "ekfac-hybrid"},
    "source diagonal": {"curvature": "diagonal"},
    "source identity": {"curvature": "identity"},
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "influence joint": {"method": "influence", "curvature": "joint"},
    "trak": {"method": "trak"},
    "trackstar": {"method": "trackstar"},
    "logra": {"method": "logra"},
    "tracin": {"method": "tracin"},
    "grad-dot": {"method": "grad-dot"},
    "grad-cos": {"method": "grad-cos"},
    "bm25": {"method": "bm25"},
}


def run(options: argparse.Namespace, report: dict, save) -> None:
    """Every method; `report` is saved after every line."""
    if not (options.demo / "record").exists():
        run_demo(options.demo)
    asked = queries(load_facts())
    answering = SourceAttributor.from_record(options.demo / "record", progress=False)
    said = answering.generate(asked["prompt"], max_new_tokens=16, names=asked["name"])
    right = [i for i, text in enumerate(said.completions) if is_right(text, asked[i]["answer"])][:MAX_QUERIES]
    answers, truth = said.select(right), asked.select(right)
    for name, settings in METHODS.items():
        if not any(text in name for text in options.only):
            continue
        attributor = SourceAttributor.from_record(
            options.demo / "record", num_samples=512, max_tokens_per_batch=1024, progress=False, **settings
        )
        start, line = time.perf_counter(), {}
        for stage in reversed(STAGES):
            found = retrieval(attributor.scores(None, answers, stage), truth[f"{stage}_row"])
            line[stage] = {
                key: {"value": round(e.value, 4), "low": round(e.low, 4), "high": round(e.high, 4)}
                for key, e in found.estimates().items()
            } | {"num_queries": found.num_queries}
        report["results"][name] = line | {"seconds": round(time.perf_counter() - start, 1)}
        save()
        print(name, {stage: line[stage]["recall@1"]["value"] for stage in STAGES}, flush=True)


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of the demo")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {"queries": MAX_QUERIES, "num_samples": 512, "command": "python benchmarks/bench_retrieval.py"}
    report = results_file.section(settings, None if args.only == [""] else results_file.load(args.out))
    run(args, report, results_file.saver(args.out, report))


if __name__ == "__main__":
    main()
