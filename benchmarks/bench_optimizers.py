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
"""What recording costs with each optimizer: the recorder's own time beside that of a training step.

    OMP_NUM_THREADS=1 python benchmarks/bench_optimizers.py

The CPU time of the thread, so that other programs count little. Writes `benchmarks/optimizers.json`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from hf_source.recording.optimizers import CombinedOptimizer, describe_optimizer
from hf_source.recording.segments import SegmentAccumulator


RATE = 1e-3
BATCH, TOKENS, VOCABULARY = 8, 64, 8192


def make_model() -> GPT2LMHeadModel:
    """GPT-2 with 10 M parameters."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_layer=6, n_embd=320, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS, **off)
    )


def muon_and_adamw(model: GPT2LMHeadModel) -> CombinedOptimizer:
    """Muon for the matrices of the layers, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.ndim == 2 and ".h." in name}
    rest = [p for name, p in named.items() if name not in matrices]
    return CombinedOptimizer(torch.optim.Muon(matrices.values(), lr=RATE), torch.optim.AdamW(rest, lr=RATE))


OPTIMIZERS: dict[str, Callable[[GPT2LMHeadModel], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=RATE),
    "AMSGrad": lambda model: torch.optim.AdamW(model.parameters(), lr=RATE, amsgrad=True),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=RATE),
    "RAdam": lambda model: torch.optim.RAdam(model.parameters(), lr=RATE),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=RATE),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=RATE),
    "Adafactor of torch": lambda model: torch.optim.Adafactor(model.parameters(), lr=RATE),
    "Adafactor of transformers": lambda model: transformers.optimization.Adafactor(
        model.parameters(), lr=RATE, relative_step=False, scale_parameter=False
    ),
    "AdamW8bit of bitsandbytes": lambda model: bnb.optim.AdamW8bit(model.parameters(), lr=RATE),
    "Muon and AdamW": muon_and_adamw,
}


def measure(make: Callable[[GPT2LMHeadModel], torch.optim.Optimizer], steps: int, warmup: int = 3) -> dict:
    """Median milliseconds of a step, and mean ones of recording, of which not every step costs the same."""
    model = make_model()
    optimizer = make(model)
    named = dict(model.named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    description = describe_optimizer(optimizer, names)
    sums = SegmentAccumulator(named, optimizer, description)
    batch = torch.randint(1, VOCABULARY, (BATCH, TOKENS))
    training, recording = [], []
    for _ in range(warmup + steps):
        start = time.thread_time()
        model(input_ids=batch, labels=batch).loss.backward()
        ready = time.thread_time()
        sums.before_update(RATE, 1.0)
        describe_optimizer(optimizer, names)  # the recorder compares it at every step
        noted = time.thread_time()
        optimizer.step()
        stepped = time.thread_time()
        sums.after_update(RATE, [RATE] * len(description.groups), 1.0, skipped=False)
        summed = time.thread_time()
        optimizer.zero_grad()
        training.append((ready - start) + (stepped - noted))
        recording.append((noted - ready) + (summed - stepped))
    step, own = statistics.median(training[warmup:]), statistics.mean(recording[warmup:])
    held = sum(tensor.numel() for tensor in sums.state()[0].values())
    return {
        "step_ms": round(1e3 * step, 1),
        "recording_ms": round(1e3 * own, 1),
        "share": round(own / step, 3),
        "copies_held": round(held / sum(p.numel() for p in model.parameters()), 2),
    }


def main() -> None:
    """Measure every optimizer and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("optimizers.json"))
    options = parser.parse_args()
    results = {}
    for name, make in OPTIMIZERS.items():
        results[name] = measure(make, options.steps)
        print(f"{name}: {results[name]}")
    settings = {
        "model": "GPT-2, 10M parameters",
        "tokens_per_step": BATCH * TOKENS,
        "threads": torch.get_num_threads(),
        "device": f"{platform.machine()} CPU",
        "clock": "thread CPU time",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bnb.__version__,
    }
    options.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
