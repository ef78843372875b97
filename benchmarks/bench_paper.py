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
"""The Source paper's benchmarks (Bae et al. 2024, arXiv 2405.12186): do scores predict training on half of the rows?

A small network is trained with `SourceTrainer` by the paper's settings. Then 100 random halves of its rows are left
out, and the whole training is made again on the other half alone with fresh initialisation and order, several seeds a
half. The linear datamodelling score (LDS) is the rank correlation over halves of the summed scores of the missing rows
with what was really measured (mean over seeds), averaged over 100 test rows, with its 95 % interval. Measured is the
margin of the right class, or the absolute error.

    python benchmarks/bench_paper.py concrete digits            # minutes; see benchmarks/paper/data.py for the data
    python benchmarks/bench_paper.py fashion fashion-n          # half an hour of retraining each, once
    python benchmarks/bench_paper.py fashion-rotated            # two stages: LDS of the rows of each

Retrainings and scores are kept in `--cache`, so that a broken run goes on where it was, and more seeds cost no scores;
`--again` computes scores anew, which a change of the library asks for. `ceiling` is about what a perfect prediction of
the expected measurement would reach with so few seeds. `members` are the LDS of an ensemble's single models, whose
scores are averaged; a line of one model is the first of them. With `--same-order`, rows are also left out of the very
run that was recorded (2 % and halves, same start and order): what a derivative of that run is about. The seconds in
`paper.json` are of a busy machine. Lines with checkpoints are the paper's Source: gradients at sets of weights stored
along each segment (`--checkpoints`), six in all; the other lines of Source take the segments' average weights.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import transformers
from paper.data import BENCHMARKS, Benchmark, Problem
from paper.halves import Halves, measured
from paper.model import MEASUREMENTS, empty_model, record_run, rows_of
from scipy.stats import rankdata

from hf_source import Queries, SourceAttributor, TrainingRecord, __version__
from hf_source.evaluation import StackedRetraining, linear_datamodelling_score, removal_masks


Scores = dict[str, np.ndarray]  # stage -> [queries, rows]

AVERAGES = {"checkpoints": False}  # gradients at the segments' average weights
METHODS: dict[str, dict[str, Any]] = {
    "grad-dot": {"method": "grad-dot"},
    "grad-cos": {"method": "grad-cos"},
    "tracin": {"method": "tracin"},
    "trak": {"method": "trak", "projection_dim": 512, "measurement": "loss"},  # it takes the margin by itself
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "influence joint": {"method": "influence", "curvature": "joint"},
    "source identity": {"curvature": "identity", **AVERAGES},
    "source ekfac": {"curvature": "ekfac", **AVERAGES},
    "source joint": {**AVERAGES},
    "source joint, no tail": {"tail": False, **AVERAGES},
    "source joint, signs": {"probes": "signs", **AVERAGES},
    "source ekfac, checkpoints": {"curvature": "ekfac"},
    "source joint, checkpoints": {},
    "unrolled": {"method": "unrolled"},
}
SLOW = ("unrolled",)  # only on the small networks
OF_VALUES = {"trak": {"output": "loss", "measurement": "absolute-error"}}  # there are no log-odds
NUM_SAMPLES = 1024  # other numbers are said in the label
ALL_SEGMENTS = ("source ekfac", "source joint")
ENSEMBLES = ("source ekfac", "source joint", "source ekfac, checkpoints", "influence ekfac")


class Runs:
    """Recorded runs of one benchmark, made when asked for, and the scores of their rows.

    Args:
        benchmark, problem: what is trained.
        folder: for records.
        num_samples: of `SourceAttributor`.
        cache: folder for scores.
        again: do not take scores from there.
        checkpoints: stored along each segment.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        problem: Problem,
        folder: Path,
        num_samples: int,
        cache: Path,
        again: bool = False,
        checkpoints: int = 2,
    ) -> None:
        self.benchmark, self.problem, self.folder, self.num_samples = benchmark, problem, folder, num_samples
        self.checkpoints = checkpoints
        key = [benchmark.settings.to_dict(), num_samples, problem.digest(), __version__]
        self.cache = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.again = again
        self._made: set[Path] = set()
        self._records: dict[tuple[int, int], TrainingRecord] = {}

    def record(self, segments: int, member: int) -> TrainingRecord:
        """The run with seed `member`, cut into so many segments per stage."""
        key = (segments, member)
        if key not in self._records:
            folder = self.folder / f"{segments}-{member}"
            self._records[key] = record_run(
                self.problem.stages, self.benchmark.settings, folder, segments, member, self.checkpoints
            )
        return self._records[key]

    def scores(self, method: str, segments: int, member: int) -> tuple[Scores, float]:
        """Scores of every stage's rows, and the seconds they took."""
        number = f"-{self.checkpoints}" if "checkpoints" in method and self.checkpoints != 2 else ""
        file = self.cache / f"{method.replace(' ', '-').replace(',', '')}{number}-{segments}-{member}.npz"
        if (self.again and file not in self._made) or not file.exists():
            scores, seconds = self._attribute(method, segments, member)
            self.cache.mkdir(parents=True, exist_ok=True)
            np.savez(file.with_suffix(".part.npz"), seconds=np.asarray(seconds), **scores)
            file.with_suffix(".part.npz").rename(file)
            self._made.add(file)
        with np.load(file, allow_pickle=False) as held:
            return {stage.name: held[stage.name] for stage in self.problem.stages}, float(held["seconds"])

    def _attribute(self, method: str, segments: int, member: int) -> tuple[Scores, float]:
        start = time.perf_counter()
        attributor, record = self.attributor(method, segments, member), self.record(segments, member)
        found = {stage.name: attributor.scores(None, self.queries, stage.name) for stage in reversed(record.stages)}
        return found, time.perf_counter() - start

    @property
    def queries(self) -> Queries:
        """The test rows."""
        return Queries.from_rows(rows_of(self.problem.queries))

    def attributor(self, method: str, segments: int, member: int) -> SourceAttributor:
        """Of a run, asked for the paper's measurement."""
        settings = self.benchmark.settings
        options = {"measurement": MEASUREMENTS[settings.kind], **METHODS[method]}
        if settings.kind == "value":
            options |= OF_VALUES.get(method, {})
        return SourceAttributor(
            self.record(segments, member),
            model=lambda stage: empty_model(settings),
            num_samples=self.num_samples,
            memory_budget=2**32,
            progress=False,
            **options,
        )

    def ensemble(self, method: str, segments: int, members: int) -> tuple[list[Scores], float]:
        """Scores of several runs, and the seconds of all."""
        found = [self.scores(method, segments, member) for member in range(members)]
        return [scores for scores, _ in found], sum(seconds for _, seconds in found)


class Truth:
    """What was measured without each half, for every stage."""

    def __init__(self, name: str, problem: Problem, options: argparse.Namespace) -> None:
        settings = BENCHMARKS[name].settings
        copies = 4 if settings.sizes[0] > 100 else 50  # larger networks leave the processor's cache
        self.removed, self.values = {}, {}
        for position, stage in enumerate(problem.stages):
            removed = removal_masks(len(stage.targets), options.halves, 0.5, seed=position)
            halves = Halves(problem, settings, removed, position, options.cache, copies)
            note = lambda text, stage=stage: print(name, stage.name, text, flush=True)  # noqa: E731
            outputs = halves.outputs(options.seeds, note)
            self.removed[stage.name] = removed
            self.values[stage.name] = measured(outputs, problem.queries.targets, settings.kind)

    def entry(self, members: list[Scores]) -> dict[str, Any]:
        """One line of the table: of the mean scores; by stage if there are several."""
        parts = {stage: self._of_stage(stage, [scores[stage] for scores in members]) for stage in self.removed}
        return parts if len(parts) > 1 else next(iter(parts.values()))

    def _of_stage(self, stage: str, members: list[np.ndarray]) -> dict[str, Any]:
        def lds(scores: np.ndarray, draws: int) -> Any:
            return linear_datamodelling_score(scores, self.removed[stage], self.values[stage].mean(axis=0), draws)

        found = lds(np.mean(members, axis=0), 1000)
        entry = {"lds": round(found.mean, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
        if len(members) > 1:
            entry["members"] = [round(lds(scores, 0).mean, 4) for scores in members]
        return entry

    def ceilings(self) -> dict[str, float]:
        """By stage, see `ceiling`."""
        return {stage: round(ceiling(values), 4) for stage, values in self.values.items()}


def same_order(runs: Runs, segments: int, methods: list[str], cache: Path) -> dict[str, dict[str, Any]]:
    """LDS of the first run's scores where rows are left out of that very run, by the share left out.

    Args:
        runs: of a benchmark of one stage.
        segments: of the run.
        methods: names in `METHODS`.
        cache: folder for the retrainings.
    """
    settings, attributor = runs.benchmark.settings, runs.attributor("source joint", segments, 0)
    retraining = StackedRetraining(
        attributor.record,
        runs.queries,
        measurement=attributor.measurement(runs.queries),
        model=lambda stage: empty_model(settings),
        progress=False,
        cache=cache,
    )
    found: dict[str, dict[str, Any]] = {}
    for share in (0.02, 0.5):
        removed = removal_masks(retraining.num_rows, 64, share)
        losses = retraining.losses(~removed)
        for method in methods:
            scores = runs.scores(method, segments, 0)[0][retraining.stage.name]
            lds = linear_datamodelling_score(scores, removed, losses)
            part = {"lds": round(lds.mean, 4), "low": round(lds.low, 4), "high": round(lds.high, 4)}
            found.setdefault(f"{share:.0%} left out", {})[method] = part
    return found


def ceiling(values: np.ndarray) -> float:
    """About the correlation of the seeds' mean with the mean over all seeds there could be.

    The square root of the reliability of the mean of `k` seeds, `k r / (1 + (k - 1) r)` with `r` the rank correlation
    of two single seeds (Spearman-Brown); mean over queries.

    Args:
        values: `[seeds, halves, queries]`.
    """
    count = len(values)
    if count < 2:
        return float("nan")
    ranks = rankdata(values, axis=1)
    ranks = (ranks - ranks.mean(axis=1, keepdims=True)) / ranks.std(axis=1, keepdims=True).clip(1e-12)
    products = np.einsum("shq,thq->stq", ranks, ranks) / values.shape[1]
    single = (products.sum(axis=(0, 1)) - count) / (count * (count - 1))
    return float(np.sqrt((count * single / (1 + (count - 1) * single)).clip(0)).mean())


def lines(options: argparse.Namespace, large: bool) -> list[tuple[str, str, int, int]]:
    """Label, method, number of segments and of models of every line wanted; a large network has fewer."""
    found = []
    for method in [method for method in METHODS if not (large and method in SLOW)]:
        for segments in options.segments:
            if segments != options.segments[0] and method not in ALL_SEGMENTS:
                continue
            name = method.replace("checkpoints", f"{options.checkpoints} checkpoints a segment")
            label = f"{name}, L={segments}" if method.startswith("source") else method
            if options.num_samples != NUM_SAMPLES and ("ekfac" in method or "joint" in method):
                label += f", {options.num_samples} samples"
            found.append((label, method, segments, 1))
            if method in ENSEMBLES and segments == options.segments[0] and options.members > 1:
                found.append((f"{label}, {options.members} models", method, segments, options.members))
    return [line for line in found if any(text in line[0] for text in options.only)]


def run(name: str, options: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Every line of one benchmark; the report is saved after each."""
    benchmark = BENCHMARKS[name]
    problem = benchmark.load()
    entry = report.setdefault(name, {"results": {}})
    truth = Truth(name, problem, options)
    entry |= {
        "settings": settings_of(benchmark, problem, options),
        "ceiling": truth.ceilings(),
        "versions": results_file.versions(),
    }
    entry["paper"] = benchmark.paper
    save()
    with tempfile.TemporaryDirectory() as folder:
        own = {"cache": options.cache / "scores", "again": options.again, "checkpoints": options.checkpoints}
        runs = Runs(benchmark, problem, Path(folder), options.num_samples, **own)
        wanted = lines(options, benchmark.settings.sizes[0] > 100)
        for label, method, segments, members in wanted:
            scores, seconds = runs.ensemble(method, segments, members)
            entry["results"][label] = truth.entry(scores) | {"seconds": round(seconds, 1)}
            save()
            print(name, label, entry["results"][label], flush=True)
        if options.same_order:
            methods = [method for method in METHODS if method in {line[1] for line in wanted}]
            entry["same order"] = same_order(runs, options.segments[0], methods, options.cache / "same-order")
            save()
            print(name, entry["same order"], flush=True)


def settings_of(benchmark: Benchmark, problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of."""
    return benchmark.settings.to_dict() | {
        "rows": {stage.name: len(stage.targets) for stage in problem.stages},
        "queries": len(problem.queries.targets),
        "halves": options.halves,
        "seeds_per_half": options.seeds,
        "num_samples": NUM_SAMPLES,
        "machine": results_file.machine(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["concrete", "digits"], metavar="|".join(BENCHMARKS))
    parser.add_argument("--segments", type=int, nargs="+", default=[3, 1, 6], help="the first one for every method")
    parser.add_argument("--members", type=int, default=5, help="models of an ensemble")
    parser.add_argument(
        "--num-samples", type=int, default=NUM_SAMPLES, help="of the curvature; the paper takes every row"
    )
    parser.add_argument("--checkpoints", type=int, default=2, help="a segment, for the lines with checkpoints")
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5, help="retrainings of a half")
    parser.add_argument("--only", nargs="+", default=[""], help="lines to run, by a part of the label")
    parser.add_argument("--same-order", action="store_true", help="leave rows out of the recorded run itself, too")
    parser.add_argument("--again", action="store_true", help="compute scores that the cache holds already")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "hf_source_paper"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("paper.json"))
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"{unknown.pop()} is none of {', '.join(BENCHMARKS)}")
    transformers.logging.set_verbosity_error()
    report = results_file.load(options.out)
    for name in options.names:
        run(name, options, report, results_file.saver(options.out, report))


if __name__ == "__main__":
    main()
