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
"""Do scores predict retraining? LDS of every method on a small language model finetuned on real facts.

A GPT-2 of 108 k parameters is pretrained on half of the facts of `countryinfo` and finetuned, recorded, on 512
others. Random 2 % of the finetuning rows are then left out, 64 times, and the finetuning made again with the same seed
and order (many copies at once, `hf_source.evaluation.retrain`). For 24 queries, half about finetuned facts and half
about pretrained ones, the summed scores of the missing rows are correlated with the real change of the query's loss.

    python benchmarks/bench_lm_lds.py                      # writes benchmarks/lm_lds.json, a quarter of an hour
    python benchmarks/bench_lm_lds.py --regime short long  # with the longer run

`exact derivative` is the directional derivative of the very same training (moments, clipping and all): what any
first-order method could reach at most.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord, __version__
from hf_source.data import CausalLMCollator, prepare_rows
from hf_source.demo import load_facts, train_tokenizer
from hf_source.evaluation import linear_datamodelling_score, losses_of, removal_masks, retrain, retrain_in_chunks


REGIMES = {
    # 512 rows, batch 32: 4 epochs and 10 epochs of finetuning.
    "short": {"max_steps": 64, "learning_rate": 1e-3, "warmup_steps": 6},
    "long": {"max_steps": 160, "learning_rate": 5e-4, "warmup_steps": 16},
}
NUM_ROWS, NUM_SUBSETS, FRACTION, BATCH_SIZE = 512, 64, 0.02, 32
METHODS = {
    "grad-dot": {"method": "grad-dot"},
    "grad-cos": {"method": "grad-cos"},
    "source identity": {"curvature": "identity"},
    "source ekfac": {"curvature": "ekfac"},
    "source joint, no tail": {"tail": False},
    "source joint": {},
    "source joint, visits without momentum": {"momentum": False},
}
SIZES = (512, 1024, 2048)
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def split_facts() -> tuple[list, list]:
    """Facts to pretrain on, and facts to finetune on."""
    facts = load_facts()
    random.Random(0).shuffle(facts)
    return facts[:-NUM_ROWS], facts[-NUM_ROWS:]


def sentence(fact) -> str:
    """The fact as a sentence."""
    return fact.statement + fact.completion


def pretrained(tokenizer, texts: list[str], folder: Path) -> GPT2LMHeadModel:
    """A model that knows the forms of the sentences and the pretraining facts."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=56, n_head=4, vocab_size=len(tokenizer), n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    args = TrainingArguments(
        str(folder / "pretrain"), learning_rate=3e-3, num_train_epochs=40, per_device_train_batch_size=32, **QUIET
    )
    rows = prepare_rows(Dataset.from_dict({"text": texts}), tokenizer)
    Trainer(model, args, train_dataset=rows, data_collator=CausalLMCollator(tokenizer)).train()
    return model


def finetune(regime: str, num_segments: int, folder: Path) -> TrainingRecord:
    """Record a finetuning run; the same run whatever the number of segments."""
    before, after = split_facts()
    texts = [sentence(fact) for fact in before], [sentence(fact) for fact in after]
    tokenizer = train_tokenizer(texts[0] + texts[1], 512)
    args = SourceConfig(
        output_dir=str(folder / "out"),
        record_dir=str(folder / f"{regime}-{num_segments}"),
        num_segments=num_segments,
        per_device_train_batch_size=BATCH_SIZE,
        weight_decay=0.01,
        **REGIMES[regime],
        **QUIET,
    )
    model = pretrained(tokenizer, texts[0], folder)
    rows = Dataset.from_dict({"text": texts[1]})
    SourceTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    return TrainingRecord.load(args.record_dir)


def make_queries() -> Queries:
    """Twelve facts of each kind, asked as the sentence's end."""
    before, after = split_facts()
    generator = random.Random(1)
    chosen = generator.sample(after, 12) + generator.sample(before, 12)
    return Queries.from_text([fact.statement for fact in chosen], [fact.completion for fact in chosen])


def ground_truth(record: TrainingRecord, queries: Queries, removed: np.ndarray) -> np.ndarray:
    """Losses of the queries after retraining without each subset: `[subsets, queries]`."""
    stage = record.stages[0]
    return retrain_in_chunks(stage, stage.rows(), ~removed, queries.rows, chunk=32)


def derivative(record: TrainingRecord, queries: Queries, removed: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Directional derivative of the whole training towards each subset's removal: `[subsets, queries]`."""
    stage, parts = record.stages[0], []
    for start in range(0, len(removed), 32):
        weights = np.concatenate([np.ones((1, NUM_ROWS)), 1 - step * removed[start : start + 32]])
        losses = losses_of(*retrain(stage, stage.rows(), weights, dtype=torch.float64), queries.rows)
        parts.append((losses[1:] - losses[0]) / step)
    return np.concatenate(parts)


def entry(scores: np.ndarray, removed: np.ndarray, losses: np.ndarray, seconds: float) -> dict:
    """One line of the table."""
    lds = linear_datamodelling_score(scores, removed, losses)
    return {
        "lds": round(lds.mean, 4),
        "low": round(lds.low, 4),
        "high": round(lds.high, 4),
        "seconds": round(seconds, 1),
    }


def sample_sizes(name: str) -> tuple[int, ...]:
    """Sample sizes tried: several for the default, and the largest one with many segments only."""
    if name != "source joint":
        return (1024,)
    return SIZES


def run_regime(regime: str, segments: list[int], folder: Path, results: dict, save: Callable[[], None]) -> None:
    """Every method on one finetuning run; `results` is filled, and saved after every line."""
    records = {number: finetune(regime, number, folder) for number in segments}
    record = records[segments[0]]
    queries = make_queries().encode(record.processing_class())
    removed = removal_masks(NUM_ROWS, NUM_SUBSETS, FRACTION)
    losses = ground_truth(record, queries, removed)
    start = time.perf_counter()
    slopes = derivative(record, queries, removed)
    # The derivative is one number per subset, not per row: correlate it as it is.
    results["exact derivative"] = entry(slopes.T, np.eye(NUM_SUBSETS, dtype=bool), losses, time.perf_counter() - start)
    for number, recorded in records.items():
        for name, settings in METHODS.items():
            if number != segments[0] and name != "source joint":
                continue
            for size in sample_sizes(name):
                start = time.perf_counter()
                attributor = SourceAttributor(
                    recorded, num_samples=size, memory_budget=2**32, progress=False, **settings
                )
                scores = attributor.scores(None, queries)
                label = name if not name.startswith("source") else f"{name}, L={number}, n={size}"
                results[label] = entry(scores, removed, losses, time.perf_counter() - start)
                save()
                print(regime, label, results[label], flush=True)  # noqa: T201


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", nargs="+", choices=sorted(REGIMES), default=["short"])
    parser.add_argument("--segments", type=int, nargs="+", default=[3, 12], help="numbers of segments compared")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("lm_lds.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {
        "rows": NUM_ROWS,
        "subsets": NUM_SUBSETS,
        "fraction": FRACTION,
        "batch_size": BATCH_SIZE,
        "queries": 24,
    }
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"hf_source": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine["threads"] = torch.get_num_threads()
    report = {
        "settings": {**settings, "regimes": {name: REGIMES[name] for name in args.regime}},
        "machine": machine,
        "versions": versions,
        "results": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for regime in args.regime:
            results = report["results"].setdefault(regime, {})
            save = lambda: args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # noqa: E731
            run_regime(regime, args.segments, Path(folder), results, save)


if __name__ == "__main__":
    main()
