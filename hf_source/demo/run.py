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
"""The demo from end to end.

Train two recorded stages, let the model answer, show the rows behind each answer, and measure how often the row that
states the fact comes out on top.
"""

import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers.utils import logging as transformers_logging

from ..attribution import Queries, SourceAttributor
from ..evaluation import retrieval
from ..outputs.page import Curve, write_page
from ..outputs.tables import describe_columns, print_top, retrieval_table
from ..recording import SourceConfig, SourceTrainer, TrainingRecord
from .facts import build_model, is_right, load_facts, pretrain_rows, queries, row_texts, sft_rows, train_tokenizer
from .recipe import STAGES


METHODS = ("source", "grad-cos", "bm25")
"""What is compared: ours, a gradient method without curvature, and no model at all."""

MAX_QUERIES = 110
"""Right answers that are attributed: enough for figures in steps of a percent, few enough for a few minutes."""

MEMORY_BUDGET = 128 * 2**20


def run_demo(out: Path, num_samples: int = 512, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: folder for the record, the scored datasets, the page and `summary.json`.
        num_samples: sampled gradients per segment.
        seed: of the initial weights, the order of the rows and the sampled labels.
        console: where to print.

    Returns:
        The content of `summary.json`: `{method: {stage: {"recall@1", "recall@5", "mrr", "num_queries"}}}`.
    """
    console = console or Console()
    transformers_logging.set_verbosity_error()
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    facts = load_facts()
    datasets = {"pretrain": pretrain_rows(facts), "sft": sft_rows(facts)}

    console.rule("1. Train in two recorded stages")
    curves = train_stages(out, datasets, seed, console)

    console.rule("2. Let the model answer")
    attributor = make_attributor(out, "source", num_samples, seed)
    asked = queries(facts)
    said = attributor.generate(asked["prompt"], max_new_tokens=16, names=asked["name"])
    right = [i for i, text in enumerate(said.completions) if is_right(text, asked[i]["answer"])]
    in_sft = [i for i, row in enumerate(asked["sft_row"]) if row is not None]
    right_in_sft = len(set(right) & set(in_sft))
    console.print(
        f"{len(asked)} questions, {len(right)} right answers: {right_in_sft} of the {len(in_sft)} countries that "
        f"finetuning asks about, {len(right) - right_in_sft} of the {len(asked) - len(in_sft)} that it does not"
    )
    num_right = min(len(right), MAX_QUERIES)
    chosen = [*right[:num_right], *[i for i in range(len(asked)) if i not in right][:1]]
    answers, truth = said.select(chosen), asked.select(chosen)
    console.print(str(attributor.plan(None, answers, "pretrain")), style="dim", highlight=False)

    console.rule("3. Which rows made it say so?")
    top = attributor.top(answers, k=3)
    marked = right_rows(truth)
    shown = pick_shown(truth, num_right if len(chosen) > num_right else None)
    print_top(console, answers.select(shown), top, marked=marked)
    for stage, dataset in datasets.items():
        scored = attributor.attribute(dataset, answers, stage)
        file = out / f"{stage}_scored.parquet"
        scored.to_parquet(file)
        console.print(f"\n{file}: {describe_columns(scored, answers.names)}", highlight=False)

    console.rule("4. Is the row that states the fact found?")
    summary = evaluate(attributor, answers, truth, num_right, out)
    console.print(retrieval_table(summary, f"{num_right} right answers"))
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    settings = {"queries": len(chosen), "samples per segment": num_samples, "curvature": "joint", "seed": seed}
    order = [*shown, *[i for i in range(len(chosen)) if i not in shown]]
    page = write_page(
        out / "index.html",
        "Which rows taught it the capitals?",
        answers.select(order),
        top,
        marked=marked,
        summary=summary,
        curves=curves,
        settings=settings,
    )
    console.print(f"Wrote {page} and {out / 'summary.json'} in {time.perf_counter() - start:.0f} s.", highlight=False)
    return summary


def train_stages(out: Path, datasets: dict[str, Dataset], seed: int, console: Console) -> list[Curve]:
    """Train and record both stages; returns their loss curves."""
    tokenizer = train_tokenizer(row_texts(datasets["pretrain"], datasets["sft"]))
    model = build_model(tokenizer, seed)
    curves = []
    for name, settings in STAGES.items():
        args = SourceConfig(
            output_dir=str(out / "checkpoints" / name),
            record_dir=str(out / "record"),
            stage=name,
            overwrite_stage=True,
            save_strategy="no",
            logging_steps=10,
            logging_strategy="steps",
            use_cpu=True,
            **{**settings, "seed": seed},
        )
        trainer = SourceTrainer(model, args, train_dataset=datasets[name], processing_class=tokenizer)
        trainer.remove_callback(_printer())
        trainer.train()
        points = [(entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
        stage = TrainingRecord.load(out / "record").stage(name)
        curves.append(Curve(name, points, [segment.first_step for segment in stage.segments[1:]]))
        console.print(
            f"{name}: {stage.num_rows} rows, {stage.num_steps} steps, loss {points[0][1]:.2f} to {points[-1][1]:.2f}, "
            f"{len(stage.segments)} segments"
        )
    return curves


def _printer() -> type:
    """The Trainer's callback that prints every log entry: the demo draws the curve instead."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def make_attributor(out: Path, method: str, num_samples: int, seed: int) -> SourceAttributor:
    """An attributor of the demo's record that stays within 2 GB."""
    return SourceAttributor.from_record(
        out / "record",
        method=method,
        num_samples=num_samples,
        seed=seed,
        memory_budget=MEMORY_BUDGET,
        max_tokens_per_batch=1024,
    )


def right_rows(truth: Dataset) -> dict[tuple[str, str, int], str]:
    """The rows that state each answer, to mark them."""
    marked = {}
    for row in truth:
        for stage in ("pretrain", "sft"):
            if row[f"{stage}_row"] is not None:
                marked[row["name"], stage, row[f"{stage}_row"]] = "states it"
    return marked


def pick_shown(truth: Dataset, wrong: int | None) -> list[int]:
    """Two answers that both stages state, one that only pretraining states, and one wrong answer if there is one."""
    both = [i for i, row in enumerate(truth["sft_row"]) if row is not None and i != wrong]
    only = [i for i, row in enumerate(truth["sft_row"]) if row is None and i != wrong]
    # From the middle of the alphabet: countries that people know.
    chosen = [both[len(both) // 3], both[2 * len(both) // 3], *only[len(only) // 2 :][:1]]
    return chosen if wrong is None else [*chosen, wrong]


def evaluate(
    attributor: SourceAttributor, answers: Queries, truth: Dataset, num_right: int, out: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Retrieval figures of every method on the right answers, which come first."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for method in METHODS:
        if method != "source":
            attributor = make_attributor(out, method, attributor.num_samples, attributor.seed)
        summary[method] = {}
        for stage in ("sft", "pretrain"):
            scores = attributor.scores(None, answers, stage)[:num_right]
            found = retrieval(scores, truth[f"{stage}_row"][:num_right])
            summary[method][stage] = found.to_dict()
        summary[method] = dict(reversed(summary[method].items()))
    return summary
