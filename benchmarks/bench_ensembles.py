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
"""Do ensembles predict retraining better than one model? LDS of removing random halves, averaged over seeds.

A GPT-2 of 63 k parameters learns 384 facts from scratch (96 AdamW steps), recorded five times with other seeds: other
initial weights, another order. Half of the rows, drawn at random, are left out 48 times, and the training is made
again with three further seeds each; the truth is the mean over those. For 24 queries, half of them about rows that
were trained on, the summed scores of the missing rows are correlated with the mean change of the query's loss.

    python benchmarks/bench_ensembles.py        # writes benchmarks/ensembles.json, a quarter of an hour on one core

`one model` is the mean over the five models of their own figures; its interval is the mean of their intervals. The
line `5 independent` averages the scores of the same five. Dropout and LoRA members are made of the first model alone,
so they are compared with `first model`. `gain` is the LDS of the line minus that of the first model, with the 95 %
interval over paired draws of queries and subsets. Seconds are those of a busy machine. Runs, retrainings and lines
that are there already are kept (`--runs FOLDER`; `--anew` forgets the lines).
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import results_file
import torch
import transformers
from bench_lm_lds import QUIET
from datasets import Dataset
from scipy.stats import rankdata
from transformers import GPT2Config, GPT2LMHeadModel

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord
from hf_source.demo import load_facts, train_tokenizer
from hf_source.evaluation import StackedRetraining, removal_masks


NUM_ROWS, NUM_RUNS, NUM_SUBSETS, FRACTION, TRUTH_SEEDS = 384, 5, 48, 0.5, (101, 102, 103)
SETTINGS = {
    "rows": NUM_ROWS,
    "runs": NUM_RUNS,
    "subsets": NUM_SUBSETS,
    "fraction": FRACTION,
    "seeds of the truth": len(TRUTH_SEEDS),
    "queries": 24,
    "training": {"max_steps": 96, "learning_rate": 3e-3, "warmup_steps": 8, "per_device_train_batch_size": 32},
    "segments": 3,
    "num_samples": 384,
}
METHODS = {
    "grad-dot": {"method": "grad-dot"},
    "source": {},
    "influence": {"method": "influence", "curvature": "ekfac"},
}
ENSEMBLES = {
    "dropout .1": {"ensemble": "dropout", "dropout": 0.1},
    "lora": {"ensemble": "lora"},
    "lora, all gradients": {"ensemble": "lora", "lora_gradients": "all"},
}
SIZES = {"dropout .1": (5, 10), "lora": (3,), "lora, all gradients": (3,)}


def rows_and_queries() -> tuple[list[str], list[tuple[str, str]]]:
    """Facts to learn, and facts to ask about: half of them learnt."""
    facts = load_facts()
    random.Random(0).shuffle(facts)
    sampler = random.Random(1)
    chosen = sampler.sample(facts[:NUM_ROWS], 12) + sampler.sample(facts[NUM_ROWS:], 12)
    return [fact.statement + fact.completion for fact in facts[:NUM_ROWS]], [
        (fact.statement, fact.completion) for fact in chosen
    ]


def recorded(seed: int, rows: list[str], tokenizer, folder: Path) -> TrainingRecord:
    """One run, with weights and order of its own seed; the one that is there, if it is."""
    if (folder / str(seed) / "record.json").exists():
        return TrainingRecord.load(folder / str(seed))
    torch.manual_seed(seed)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": 2, "n_embd": 40, "n_head": 4, "vocab_size": len(tokenizer), "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    args = SourceConfig(
        output_dir=str(folder / "out"), record_dir=str(folder / str(seed)), num_segments=SETTINGS["segments"],
        weight_decay=0.01, seed=seed, **SETTINGS["training"], **QUIET,
    )  # fmt: skip
    SourceTrainer(model, args, train_dataset=Dataset.from_dict({"text": rows}), processing_class=tokenizer).train()
    return TrainingRecord.load(args.record_dir)


def truth(record: TrainingRecord, queries: Queries, removed: np.ndarray) -> np.ndarray:
    """Mean losses of the queries over seeds, after retraining without each subset: `[subsets, queries]`."""
    again = StackedRetraining(record, queries, fresh=True, progress=False)
    return np.mean([again.losses(~removed, seed=seed) for seed in TRUTH_SEEDS], axis=0)


class Lines:
    """The table, written after every line."""

    def __init__(self, file: Path, anew: bool, removed: np.ndarray, losses: np.ndarray) -> None:
        self.removed, self.losses = removed, losses
        self.report = results_file.section(SETTINGS, None if anew else results_file.load(file))
        self.save = results_file.saver(file, self.report)

    def draws(self, scores: np.ndarray) -> np.ndarray:
        """LDS, and then that of 1,000 draws of subsets and queries, which are the same for all scores."""
        predicted = self.removed.astype(np.float64) @ scores.astype(np.float64).T
        generator, found = np.random.default_rng(0), [_spearman(predicted, self.losses)]
        for _ in range(1000):
            subsets = generator.integers(len(self.losses), size=(len(self.losses), 1))
            asked = generator.integers(self.losses.shape[1], size=self.losses.shape[1])
            found.append(_spearman(predicted[subsets, asked], self.losses[subsets, asked]))
        return np.asarray(found)

    def add(self, label: str, scores: list[np.ndarray], seconds: float, base: np.ndarray | None = None) -> None:
        """A line: of one array, or the mean of several arrays' own figures; `base` is what it is compared with."""
        found = np.stack([self.draws(each) for each in scores])
        line = {
            "lds": round(float(found[:, 0].mean()), 4),
            "low": round(float(np.quantile(found[:, 1:], 0.025, axis=1).mean()), 4),
            "high": round(float(np.quantile(found[:, 1:], 0.975, axis=1).mean()), 4),
            "seconds": round(seconds, 1),
        }
        if len(scores) > 1:
            line["each"] = [round(float(value), 4) for value in found[:, 0]]
        if base is not None:
            gain = found[0] - self.draws(base)
            line["gain"] = [round(float(v), 4) for v in (gain[0], *np.quantile(gain[1:], [0.025, 0.975]))]
        self.report["results"][label] = line
        self.save()
        print(label, line, flush=True)  # noqa: T201


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over columns of their rank correlation."""
    first, second = (rankdata(each, axis=0) - (len(each) + 1) / 2 for each in (first, second))
    norms = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return float(((first * second).sum(axis=0) / norms).mean())


def members(records: list[TrainingRecord], queries: Queries, **settings) -> tuple[list[np.ndarray], float]:
    """Scores of each member of an ensemble (their mean is what the attributor gives), and seconds of one."""
    attributor = SourceAttributor(records, num_samples=SETTINGS["num_samples"], progress=False, **settings)
    start = time.perf_counter()
    found = [member.scores(None, queries) for member in attributor.ensemble.members()]
    return found, (time.perf_counter() - start) / len(found)


def compare(name: str, settings: dict, records: list[TrainingRecord], queries: Queries, lines: Lines) -> None:
    """Every line of one method."""
    single, each = members(records, queries, **settings)
    lines.add(f"{name}, one model", single, each)
    lines.add(f"{name}, first model", single[:1], each)
    lines.add(f"{name}, {NUM_RUNS} independent", [np.mean(single, axis=0)], NUM_RUNS * each, single[0])
    for kind, own in ENSEMBLES.items():
        if name == "source" and "lora_gradients" in own:
            continue  # as it is by default
        found, each = members(records[:1], queries, **settings, **own, ensemble_size=max(SIZES[kind]))
        for size in SIZES[kind]:
            lines.add(f"{name}, {size} {kind}", [np.mean(found[:size], axis=0)], size * each, single[0])


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="forget the lines that are there")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_ensembles"), help="recorded runs, kept there")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("ensembles.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows, asked = rows_and_queries()
    tokenizer = train_tokenizer(rows, 512)
    records = [recorded(seed, rows, tokenizer, args.runs) for seed in range(NUM_RUNS)]
    queries = Queries.from_text(*zip(*asked, strict=True)).encode(tokenizer)
    removed = removal_masks(NUM_ROWS, NUM_SUBSETS, FRACTION)
    lines = Lines(args.out, args.anew, removed, truth(records[0], queries, removed))
    for name, settings in METHODS.items():
        if not any(label.startswith(f"{name}, 3 lora") for label in lines.report["results"]):
            compare(name, settings, records, queries, lines)


if __name__ == "__main__":
    main()
