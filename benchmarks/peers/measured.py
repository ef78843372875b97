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
"""What every `run_*.py` of this folder shares: read the export, measure one method, write its scores.

A script runs in its own package's environment, so that nothing here imports this repository or a peer. It is called as

    python run_NAME.py EXPORT WORK --methods METHOD ...

and leaves, for the n-th method, `n.npy` (scores `[queries, rows]`, larger = the row supports the query more) and
`n.json` (cost) in `WORK`. Every run is a process of its own, forked after the imports, and measured from there: a long
import is no fault of a method. Linux only. `passes` counts the tokens that went
through the model's embedding, in units of all tokens of the rows (queries and padding included; inside `torch.func` a
batch counts as one row).
"""

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Export:
    """What the driver exported.

    Attributes:
        folder: of the export.
        about: its `export.json`.
    """

    folder: Path
    about: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Export":
        """Read an export."""
        return cls(folder.resolve(), json.loads((folder / "export.json").read_text(encoding="utf-8")))

    def checkpoint(self, step: int) -> Path:
        """Folder of the Hugging Face checkpoint after so many steps."""
        return self.folder / "checkpoints" / f"checkpoint-{step}"

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that a method with several of them gets, oldest first."""
        return [self.checkpoint(step) for step in self.about["checkpoints"]]

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.checkpoints[-1]

    def rows(self, kind: str) -> list[dict[str, list[int]]]:
        """`rows` or `queries`: token rows with `input_ids` and `labels` (-100 = not asked)."""
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / kind)).to_list()

    def padded(self, kind: str) -> dict[str, torch.Tensor]:
        """The same as right-padded tensors `[rows, tokens]`: `input_ids`, `labels`, `attention_mask`."""
        rows = self.rows(kind)
        longest = max(len(row["input_ids"]) for row in rows)
        fill = lambda values, value: values + [value] * (longest - len(values))  # noqa: E731
        pad = self.about["pad_token_id"]
        return {
            "input_ids": torch.tensor([fill(row["input_ids"], pad) for row in rows]),
            "labels": torch.tensor([fill(row["labels"], -100) for row in rows]),
            "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
        }

    def segment_rates(self, segments: int) -> list[float]:
        """Sum of the learning rates between the checkpoints of each segment."""
        steps = self.about["checkpoints"]
        each = len(steps) // segments
        ends = [0, *steps[each - 1 :: each]]
        rates = self.about["learning_rates"]
        return [sum(rates[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)]


Method = Callable[[Export, Path], np.ndarray]


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of a batch of token rows, as a causal language model's rows are recorded."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


class Passes:
    """Count the tokens that enter embeddings of the model's vocabulary, whoever calls the model."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.tokens = vocabulary, 0
        self.handle = torch.nn.modules.module.register_module_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == self.vocabulary and args:
            self.tokens += args[0].numel()


def _memory(field: str) -> int:
    """Bytes of this process's memory now (`VmRSS`) or at most (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _populate() -> None:
    """Map every page of the loaded libraries, so that reading code does not count as a method's memory."""
    populate_read = 22
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        where, access, *_, path = [*line.split(maxsplit=5), ""][:6]
        if access.startswith("r") and path.startswith("/"):
            start, end = (int(part, 16) for part in where.split("-"))
            libc.madvise(start, end - start, populate_read)


def cost_of(call: Callable[[], np.ndarray], vocabulary: int) -> tuple[np.ndarray, dict[str, float]]:
    """Call something, in a process that has done little else.

    Args:
        call: gives scores.
        vocabulary: of the model, whose embedding's tokens are counted.

    Returns:
        The scores, and `seconds` of the clock, `cpu_seconds` of the processor, `memory` (bytes at the peak, above
        those before the call) and `tokens` that went through the model.
    """
    passes = Passes(vocabulary)
    gc.collect()
    _populate()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of the imports
    before, start, used = _memory("VmRSS"), time.perf_counter(), time.process_time()
    scores = np.asarray(call())
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = _memory("VmHWM")
    passes.handle.remove()
    return scores, {"seconds": seconds, "cpu_seconds": used, "memory": peak - before, "tokens": passes.tokens}


def _measure(method: Method, export: Export, work: Path) -> dict[str, Any]:
    """Run a method here and write its scores."""
    work.mkdir(parents=True)
    os.chdir(work)
    torch.manual_seed(0)
    scores, cost = cost_of(lambda: method(export, work), export.about["vocab_size"])
    written = _size(work)
    expected = (export.about["num_queries"], export.about["num_rows"])
    if scores.shape != expected or not np.isfinite(scores).all():
        raise ValueError(f"scores of shape {scores.shape} (expected {expected}), or not finite")
    np.save(work / "scores.npy", scores.astype(np.float64))
    return cost | {"disk": written, "passes": cost.pop("tokens") / export.about["num_tokens"]}


def _forked(method: Method, export: Export, work: Path) -> dict[str, Any]:
    """The same in a process of its own, which has imported what this one has and nothing else."""
    process = os.fork()
    if process == 0:
        try:
            cost = _measure(method, export, work)
        except BaseException as error:
            traceback.print_exc()
            cost = {"failed": f"{type(error).__name__}: {error}"}
        (work / "cost.json").write_text(json.dumps(cost), encoding="utf-8")
        sys.stderr.flush()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    cost = work / "cost.json"
    return json.loads(cost.read_text(encoding="utf-8")) if status == 0 else {"failed": f"ended with status {status}"}


def _best(method: Method, export: Export, work: Path, repeats: int, enough: float) -> dict[str, Any]:
    """The lowest cost of several runs; once they took `enough` seconds together, there is no further one."""
    best: dict[str, Any] = {}
    used = 0.0
    for repeat in range(repeats):
        if repeat and used > enough:
            break
        shutil.rmtree(work, ignore_errors=True)
        cost = _forked(method, export, work)
        if "failed" in cost:
            return cost
        used += cost["cpu_seconds"]
        best = {key: min(best.get(key, value), value) for key, value in cost.items()}
        best["repeats"] = repeat + 1
    return best


def main(methods: dict[str, Method], packages: list[str]) -> None:
    """Run methods on an export; of each, write what it gave and cost, and say on standard output that it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--methods", nargs="+", required=True, choices=sorted(methods))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--enough", type=float, default=0.0, help="seconds after which a method is not run again")
    args = parser.parse_args()
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print is none of the driver's business
    torch.set_num_threads(1)
    export, work = Export.read(args.export), args.work.resolve()
    for number, name in enumerate(args.methods):
        cost = _best(methods[name], export, work / str(number), args.repeats, args.enough)
        cost["versions"] = {package: version(package) for package in packages}
        if "failed" not in cost:
            shutil.copy(work / str(number) / "scores.npy", work / f"{number}.npy")
        (work / f"{number}.json").write_text(json.dumps(cost), encoding="utf-8")
        shutil.rmtree(work / str(number), ignore_errors=True)
        print("done", number, file=said, flush=True)
