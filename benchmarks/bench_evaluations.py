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
"""What several methods are worth by every evaluation, on the small facts model of `bench_lm_lds.py`.

512 short sentences about countries, 64 AdamW steps from a pretrained model, 24 queries (12 of them finetuned rows).
Every retraining has the run's own order and is kept, so that an interrupted run goes on.

* subset removal: rise of a query's loss without its top 1 and 5 rows, and without its lowest 5, beside random rows and
  random rows of the same relations (capital, currency, ...) as the top ones,
* tail patch: gain of one AdamW step on the top 10 rows,
* leave one out: 4 top, 4 random and 4 bottom rows (of `stepwise`) of 5 queries, predicted against real nats,
* agreement with the exact derivative (`unrolled`), over all rows of 5 queries,
* mislabelled rows: 10 % of the rows end in the answer of another row of the same relation; self-influence and loss.

    OMP_NUM_THREADS=1 nice -n 15 python benchmarks/bench_evaluations.py --keep runs/evaluations
    python benchmarks/bench_evaluations.py --keep runs/evaluations --only "tail patch"    # parts, by name

writes `benchmarks/evaluations.json`, part by part, and goes on from the records and retrainings that it keeps. A part
that is run again replaces its own figures and leaves the others. `seconds` are of the machine as busy as it was.
"""

import argparse
import copy
import random
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import transformers
from bench_lm_lds import BATCH_SIZE, NUM_ROWS, PRETRAINING, QUIET, SHORT, pretrained
from datasets import Dataset

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord
from hf_source.attribution import METHODS
from hf_source.demo import load_facts, train_tokenizer
from hf_source.evaluation import (
    Report,
    StackedRetraining,
    agreement,
    corrupt_labels,
    find_mislabelled,
    leave_one_out,
    subset_removal,
    tail_patch,
)
from hf_source.evaluation.entries import (
    agreement_entries,
    leave_one_out_entries,
    mislabelled_entries,
    removal_entries,
    tail_patch_entries,
)


LABELLED = {
    "source joint": {},
    "stepwise": {"method": "stepwise"},
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "influence joint": {"method": "influence", "curvature": "joint"},
    "grad-dot": {"method": "grad-dot"},
    "grad-cos": {"method": "grad-cos"},
    "tracin": {"method": "tracin"},
    "trak": {"method": "trak"},
    "bm25": {"method": "bm25"},
    "unrolled": {"method": "unrolled"},
}
NATS = [label for label, settings in LABELLED.items() if METHODS[settings.get("method", "source")].nats]
SEGMENTS, WRONG, FEW = 3, 0.1, [0, 5, 10, 15, 20]


class Run:
    """The finetuning run, recorded; a part of its rows may be wrong.

    Args:
        folder: for records.
        start: makes the pretrained model.
        tokenizer: its own.
        rows: texts.
        name: of the record.
    """

    def __init__(self, folder: Path, start, tokenizer, rows: Dataset, name: str) -> None:
        args = SourceConfig(
            output_dir=str(folder / "out"),
            record_dir=str(folder / name),
            num_segments=SEGMENTS,
            per_device_train_batch_size=BATCH_SIZE,
            weight_decay=0.01,
            **SHORT,
            **QUIET,
        )
        if not Path(args.record_dir, "record.json").exists():
            texts = rows.select_columns("text")
            SourceTrainer(copy.deepcopy(start()), args, train_dataset=texts, processing_class=tokenizer).train()
        self.record = TrainingRecord.load(args.record_dir)

    def attributor(self, **settings) -> SourceAttributor:
        """Reads the record."""
        return SourceAttributor(self.record, num_samples=1024, memory_budget=2**32, progress=False, **settings)


def facts() -> tuple[list, list, list]:
    """Facts to pretrain on, to finetune on, and queries, in the order of `bench_lm_lds.py`."""
    shuffler, sampler, found = random.Random(0), random.Random(1), load_facts()
    shuffler.shuffle(found)
    before, after = found[:-NUM_ROWS], found[-NUM_ROWS:]
    return before, after, sampler.sample(after, 12) + sampler.sample(before, 12)


def rows_of(chosen: list) -> Dataset:
    """Statements and completions, with the relation that a fact is about."""
    return Dataset.from_dict(
        {
            "prompt": [fact.statement for fact in chosen],
            "completion": [fact.completion for fact in chosen],
            "relation": [fact.relation for fact in chosen],
        }
    )


def with_text(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"text": row["prompt"] + row["completion"]})


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts to run, by a piece of the name; others are kept"
    )
    parser.add_argument("--methods", nargs="+", default=[""], help="methods, by a piece of the name")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 5], help="rows that subset removal removes")
    parser.add_argument("--removal-queries", type=int, default=24, help="queries of subset removal")
    parser.add_argument(
        "--controls",
        nargs="*",
        default=[""],
        help="methods of which lowest and matched rows are removed too, by a piece",
    )
    parser.add_argument("--keep", type=Path, help="folder of records and finished retrainings, to go on from")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("evaluations.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {
        "rows": NUM_ROWS, "queries": 24, "segments": SEGMENTS, "batch_size": BATCH_SIZE, "num_samples": 1024,
        "pretraining": PRETRAINING["facts"], "finetuning": SHORT, "methods": LABELLED,
    }  # fmt: skip
    report = Report.from_json(args.out) if args.out.exists() else Report("Evaluations of the facts model", settings)

    def wanted(part: str) -> bool:
        if not any(text in part for text in args.only):
            return False
        report.entries = [entry for entry in report.entries if entry.evaluation != part]
        return True

    def save(entries: list) -> None:
        for entry in entries:
            report.add(entry)
            print(entry.evaluation, "|", entry.method, "|", entry.measure, "|", entry.interval, flush=True)
        report.to_json(args.out)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        before, after, asked = facts()
        tokenizer = train_tokenizer([f.statement + f.completion for f in before[:3000] + after], 512)
        start = cache(lambda: pretrained("facts", tokenizer, [f.statement + f.completion for f in before], folder))
        rows = with_text(rows_of(after))
        run = Run(folder, start, tokenizer, rows, "facts")
        queries = Queries.from_text([f.statement for f in asked], [f.completion for f in asked]).encode(tokenizer)
        places = list(range(0, 24, 24 // args.removal_queries))
        few, some = queries.select(FEW), queries.select(places)
        retraining = {
            name: StackedRetraining(run.record, own, chunk=32, cache=folder / "cache", progress=False)
            for name, own in (("some", some), ("few", few))
        }
        scores, few_scores, seconds = {}, {}, {}
        for label, chosen in LABELLED.items():
            if not any(text in label for text in args.methods):
                continue
            begun = time.perf_counter()
            scores[label] = run.attributor(**chosen).scores(None, queries)
            seconds[label] = round(time.perf_counter() - begun, 1)
            few_scores[label] = scores[label][FEW]
        if wanted("tail patch"):
            found = tail_patch(run.attributor(), queries, scores, k=(1, 10))
            save(tail_patch_entries(found, queries.names, "", seconds))
        left, agreed = wanted("leave one out"), wanted("agreement with unrolled")
        if left or agreed:
            begun = time.perf_counter()
            exact = run.attributor(method="unrolled").scores(None, few)
            taken = {**seconds, "unrolled": round(time.perf_counter() - begun, 1)}
        if left:
            judge = "stepwise" if "stepwise" in few_scores else None
            found = leave_one_out(retraining["few"], {**few_scores, "unrolled": exact}, chosen_by=judge)
            save(leave_one_out_entries(found, few.names, "", taken, NATS))
        if agreed:
            judged = {label: own for label, own in few_scores.items() if label != "unrolled"}
            each = {label: agreement(own, exact, k=(10,)) for label, own in judged.items()}
            save(agreement_entries(each, few.names, "", seconds, NATS))
        if wanted("mislabelled rows"):
            broken = with_text(corrupt_labels(rows_of(after), WRONG, column="completion", within="relation"))
            wrong = Run(folder, start, tokenizer, broken, "wrong")
            lists, taken = {}, {}
            for curvature in ("joint", "ekfac", "identity"):
                begun = time.perf_counter()
                lists[f"self-influence {curvature}"] = wrong.attributor(curvature=curvature).self_influence()
                taken[f"self-influence {curvature}"] = round(time.perf_counter() - begun, 1)
            begun = time.perf_counter()
            lists["loss"] = wrong.attributor().row_losses()
            taken["loss"] = round(time.perf_counter() - begun, 1)
            lists["random"] = np.random.default_rng(0).random(NUM_ROWS)
            known = np.array(broken["is_corrupted"])
            judged = {name: find_mislabelled(own, known, k=(10, 50)) for name, own in lists.items()}
            save(mislabelled_entries(judged, "", taken))
        if wanted("subset removal"):
            asked = {label: own[places] for label, own in scores.items()}
            found = subset_removal(retraining["some"], asked, k=args.sizes, bottom=False)
            save(removal_entries(found, some.names, "", seconds))
            chosen = {label: own for label, own in asked.items() if any(text in label for text in args.controls)}
            if chosen:
                relation = {"column": rows["relation"], "num_matched": 1}
                found = subset_removal(retraining["some"], chosen, k=args.sizes[-1:], **relation)
                found = [one for one in found if one.direction in ("bottom", "matched")]
                save(removal_entries(found, some.names, "", seconds))


if __name__ == "__main__":
    main()
