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
"""Whether query vectors could be held in low rank: what scores become if each parameter's is cut to its leading ones.

The Llama-type model of 9 M parameters of `bench_scale.py`, one segment. For each rank: the part of a vector that is
left out (median over parameters with two sides above the rank, by length), the correlation of all scores with those of
the whole vectors, and the mean over queries of the share of the ten highest rows that stay among them.

    OMP_NUM_THREADS=1 python benchmarks/bench_rank.py --folder build/scale          # writes benchmarks/rank.json
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
import transformers
from bench_scale import LINES, queries_of, recorded

from hf_source import SourceAttributor


LINE, RANKS, HIGHEST = "llama 9M full, L=1", (4, 8, 16, 32, 64, 128), 10


def cut(vectors: torch.Tensor, rank: int) -> tuple[torch.Tensor, float | None]:
    """Vectors `[queries, m, k]` in a rank, and the share of their length that is left out; `None` if none can be."""
    if vectors.dim() != 3 or min(vectors.shape[1:]) <= rank:
        return vectors, None
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    kept = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    return kept, float((vectors - kept).norm() / vectors.norm())


def scores_in_ranks(
    attributor: SourceAttributor, queries: Any
) -> tuple[dict[int, np.ndarray], dict[int, list[float]]]:
    """Scores `[queries, rows]` with vectors of each rank (0: whole), and what each parameter's vectors lose."""
    walk = importlib.import_module("hf_source.source.walk")
    original, held, lost = walk.score_rows, {}, {}
    batches = {rank: [] for rank in (0, *RANKS)}

    def score(gradients, batch, vectors, parts=None):
        if not held:
            for rank in RANKS:
                found = {name: cut(each, rank) for name, each in vectors.items()}
                held[rank] = {name: each for name, (each, _) in found.items()}
                lost[rank] = [share for _, share in found.values() if share is not None]
        whole = original(gradients, batch, vectors, parts)
        batches[0].append(whole.sum(dim=0))
        for rank in RANKS:
            batches[rank].append(original(gradients, batch, held[rank], parts).sum(dim=0))
        return whole

    walk.score_rows = score
    try:
        attributor.scores(None, queries)
    finally:
        walk.score_rows = original
    return {rank: torch.cat(found, dim=1).numpy() for rank, found in batches.items()}, lost


def agreement(found: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Of scores `[queries, rows]`."""
    highest = [set(np.argsort(-scores)[:HIGHEST]) for scores in found]
    expected = [set(np.argsort(-scores)[:HIGHEST]) for scores in whole]
    shared = [len(one & other) / HIGHEST for one, other in zip(highest, expected, strict=True)]
    return {
        "correlation": round(float(np.corrcoef(found.ravel(), whole.ravel())[0, 1]), 4),
        "highest": round(float(np.mean(shared)), 3),
    }


def main() -> None:
    """Measure and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--folder", type=Path, default=Path("build/scale"), help="keeps weights and records")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    report = results_file.section({"line": LINE, "highest": HIGHEST}, results_file.load(options.out))
    target = recorded(LINES[LINE], options.folder)
    attributor = SourceAttributor.from_record(
        target / "record", num_samples=LINES[LINE]["samples"], progress=False, max_tokens_per_batch=2048
    )
    scores, lost = scores_in_ranks(attributor, queries_of(LINES[LINE]))
    for rank in RANKS:
        left_out = {"left_out": round(float(np.median(lost[rank])), 3)}
        report["results"][str(rank)] = left_out | agreement(scores[rank], scores[0])
        print(rank, report["results"][str(rank)], flush=True)
    results_file.saver(options.out, report)()


if __name__ == "__main__":
    main()
