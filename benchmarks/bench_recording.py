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
"""What recording costs: time of an optimizer step with and without it.

Two trainers, a plain `Trainer` and a `SourceTrainer`, train the same model on the same rows in one process and take
turns after every optimizer step, so that whatever else the machine does meets both alike. Medians are compared: of
the thread's CPU time on a CPU, where other programs would lengthen the wall clock's, and of wall time on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_recording.py

Writes `benchmarks/recording.json`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_source.data import CausalLMCollator
from hf_source.recording import SourceConfig, SourceTrainer


SMALL = {"model": "gpt2", "n_layer": 2, "n_embd": 96, "vocab_size": 1024, "batch": 32, "tokens": 64}
MIDDLE = {"model": "gpt2", "n_layer": 6, "n_embd": 320, "vocab_size": 8192, "batch": 8, "tokens": 64}
# The shape of SmolLM2-135M.
LARGE = {"model": "llama", "vocab_size": 49152, "batch": 8, "tokens": 64, "steps": 14, "runs": 3}
CASES = {
    "GPT-2, 0.33M parameters, adamw_torch": SMALL,
    "GPT-2, 0.33M parameters, sgd": SMALL | {"optim": "sgd"},
    "GPT-2, 10M parameters, adamw_torch": MIDDLE,
    "GPT-2, 10M parameters, sgd": MIDDLE | {"optim": "sgd"},
    "Llama, 135M parameters, full": LARGE,
    "Llama, 135M parameters, LoRA r=16": LARGE | {"lora": 16},
}
WARMUP_STEPS = 3  # first steps allocate moments and sums


def now() -> float:
    """Seconds on the clock that fits the device."""
    if not torch.cuda.is_available():
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Turns(TrainerCallback):
    """Lets one of two trainers run at a time, and times its steps."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore) -> None:
        self.mine, self.others = mine, others
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Wait for the first turn."""
        self.mine.acquire()
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        """Hand over and wait."""
        self.times.append(now() - self.start)
        self.others.release()
        self.mine.acquire()
        self.start = now()

    def on_train_end(self, args, state, control, **kwargs):
        """Hand over for good."""
        self.others.release()


def make_model(case: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    if case["model"] == "llama":
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        shape |= {"num_key_value_heads": 3, "vocab_size": case["vocab_size"], "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        sizes = {name: case[name] for name in ("n_layer", "n_embd", "vocab_size")}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(n_head=4, n_positions=case["tokens"], **sizes, **off))
    if "lora" not in case:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=case["lora"], target_modules="all-linear", task_type="CAUSAL_LM"))


def make_trainer(recorded: bool, case: dict, folder: str, steps: int, turns: Turns) -> Trainer:
    model = make_model(case)
    rows = torch.randint(1, case["vocab_size"], (4 * case["batch"], case["tokens"])).tolist()
    args = SourceConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=case["batch"],
        optim=case.get("optim", "adamw_torch"),
        num_segments=1,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    kind = SourceTrainer if recorded else Trainer
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return kind(model, args, CausalLMCollator(), dataset, callbacks=[turns])


class CountCopies(TrainerCallback):
    """Notes how many numbers the recorder holds on to, for each number that trains."""

    def __init__(self) -> None:
        self.copies = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Look at the sums of the running segment."""
        held = sum(tensor.numel() for tensor in self.trainer._recorder.accumulator.state()[0].values())
        self.copies = max(self.copies, held / sum(p.numel() for p in model.parameters() if p.requires_grad))


def take_turns(case: dict, steps: int, recorded_first: bool) -> dict:
    """Step times of both trainers in one run."""
    plain_turn, recorded_turn = threading.Semaphore(not recorded_first), threading.Semaphore(recorded_first)
    plain, recorded = Turns(plain_turn, recorded_turn), Turns(recorded_turn, plain_turn)
    order = ((True, recorded), (False, plain)) if recorded_first else ((False, plain), (True, recorded))
    counter = CountCopies()
    with tempfile.TemporaryDirectory() as folder:
        trainers = [make_trainer(on, case, f"{folder}/{on}", steps, turns) for on, turns in order]
        counter.trainer = trainers[0 if recorded_first else 1]
        counter.trainer.add_callback(counter)  # after `Turns`: outside the time it measures
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        record = sum(file.stat().st_size for file in Path(folder, "True", "record").rglob("*") if file.is_file())
        parameters = [p for p in trainers[0].model.parameters()]
    # The last step also writes the segment: a cost per segment, not per step.
    return {
        "without": statistics.median(plain.times[WARMUP_STEPS:-1]),
        "with": statistics.median(recorded.times[WARMUP_STEPS:-1]),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "copies": counter.copies,
        "record_megabytes": round(record / 1e6, 2),
    }


def measure(case: dict, steps: int, runs: int) -> dict:
    """Median over several runs: where a model lies in memory changes its speed by a few per cent, recorded or not."""
    found = [take_turns(case, steps, recorded_first=bool(run % 2)) for run in range(runs)]
    ratios = sorted(run["with"] / run["without"] for run in found)
    return {
        "parameters": found[0]["parameters"],
        "trainable_parameters": found[0]["trainable"],
        "batch_size": case["batch"],
        "tokens_per_row": case["tokens"],
        "optimizer": case.get("optim", "adamw_torch"),
        "runs": runs,
        "steps_per_run": steps,
        "median_step_without_ms": round(1e3 * statistics.median(run["without"] for run in found), 3),
        "median_step_with_ms": round(1e3 * statistics.median(run["with"] for run in found), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_of_each_run": [round(ratio, 4) for ratio in ratios],
        "copies_of_trainable_parameters": round(max(run["copies"] for run in found), 3),
        "record_megabytes": found[0]["record_megabytes"],
    }


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--only", default="", help="cases whose name holds this text; the others keep their results")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("recording.json"))
    options = parser.parse_args()
    # Trainer seeds the global generator; two threads would disturb each other's only in dropout, which is off.
    results = json.loads(options.out.read_text())["results"] if options.only and options.out.is_file() else {}
    for name, case in CASES.items():
        if options.only in name:
            results[name] = found = measure(case, case.get("steps", options.steps), case.get("runs", options.runs))
            print(f"{name}: {found['ratio']:.3f} x ({found['median_step_without_ms']:.1f} ms)")
    settings = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "clock": "wall" if torch.cuda.is_available() else "thread CPU time",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    options.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
