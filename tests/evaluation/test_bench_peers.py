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
"""The comparison with other packages in `benchmarks/bench_peers.py`, on a tiny run and without the others."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from hf_source import SourceAttributor


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 12


@pytest.fixture(scope="module")
def bench():
    """The benchmark's module, with a run of a dozen steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import bench_lm_lds
        import bench_peers

        short = {"max_steps": STEPS, "learning_rate": 1e-3}
        patch.setitem(bench_lm_lds.FINETUNING, "facts", short)
        patch.setattr(bench_peers, "SHORT", short)
        patch.setitem(bench_lm_lds.PRETRAINING, "facts", {"max_steps": 3})
        yield bench_peers


@pytest.fixture(scope="module")
def exported(bench, tmp_path_factory):
    """A record, queries, and the folder with the export."""
    folder = tmp_path_factory.mktemp("peers")
    record, queries = bench.recorded("facts", folder)
    return record, queries, folder, bench.export(record, queries, folder / "out", folder / "export")


def test_export_holds_the_run_as_it_was(exported, bench):
    record, queries, folder, about = exported
    stage, target = record.stages[0], folder / "export" / "checkpoints"
    assert about["checkpoints"] == [2, 4, 6, 8, 10, 12]
    assert {path.name for path in target.glob("checkpoint-*")} == {f"checkpoint-{s}" for s in range(0, 13, 2)}
    assert all((target / f"checkpoint-{step}" / "optimizer.pt").exists() for step in about["checkpoints"])
    # Linear decay from 1e-3 without warmup: what the steps used, the first one included.
    expected = [1e-3 * (STEPS - step) / STEPS for step in range(STEPS)]
    np.testing.assert_allclose(about["learning_rates"], expected, rtol=1e-9)
    history = json.loads((target / "log_history.json").read_text())
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert [line["learning_rate"] for line in history] == about["learning_rates"]
    rows = load_from_disk(folder / "export" / "rows")
    assert [list(row["input_ids"]) for row in stage.rows()] == [list(ids) for ids in rows["input_ids"]]
    assert sum(map(len, about["batches"])) == STEPS * bench.BATCH_SIZE
    asked = load_from_disk(folder / "export" / "queries")
    assert [row["labels"] for row in asked] == [list(row["labels"]) for row in queries.rows]


def test_a_method_runs_in_its_own_process_and_is_measured(exported, bench):
    record, queries, folder, about = exported
    line = bench.Line("hf_source", "grad-dot", "record")
    here, python = Path(os.path.relpath(folder)), os.path.relpath(sys.executable)  # as one writes them
    [(_, scores, cost)] = bench.run_lines([line], here, python)
    expected = SourceAttributor(record, method="grad-dot", progress=False).scores(None, queries)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert 1 <= cost["passes"] < 1.5  # every row once, the queries, and the check of two rows
    assert cost["disk"] == 0 and cost["memory"] > 0
    # Losses that are the scores' sums predict themselves perfectly, whatever the scores are.
    removed = np.random.default_rng(0).random((8, about["num_rows"])) < 0.05
    kept = bench.read_from_training(folder / "export", about, "record")
    found = bench.result(line, scores, cost, (removed, removed @ scores.T), kept)
    assert found["lds"] == 1.0
    assert found["kept_from_training_mb"] == round(kept / 2**20, 2) > 0


def test_what_a_method_reads_from_training_is_counted(exported, bench):
    _, _, folder, about = exported
    size = lambda reads: bench.read_from_training(folder / "export", about, reads)  # noqa: E731
    assert size("start") == size("final") and size("checkpoints") == 6 * size("final")
    # Adam keeps two numbers per weight.
    assert 2.9 * size("checkpoints") < size("states") < 3.2 * size("checkpoints")


FAKE = """
import sys, time
sys.path.insert(0, {peers!r})
import numpy as np
from measured import main

def good(export, work):
    print("noise on standard output")
    (work / "left").write_bytes(b"x" * 1000)
    held = np.ones(2**25 // 8)  # 32 MiB
    start = time.process_time()
    while time.process_time() < start + 0.2:
        held += 1
    return np.outer(np.arange(export.about["num_queries"]), np.arange(export.about["num_rows"]))

def bad(export, work):
    raise ValueError("no such rows")

def wrong_shape(export, work):
    return np.zeros((2, 2))

main({{"good": good, "bad": bad, "wrong shape": wrong_shape}}, ["numpy"])
"""


@pytest.fixture
def fake(bench, monkeypatch, tmp_path):
    """A package of three methods, by their names."""
    (tmp_path / "peers").mkdir()
    script = tmp_path / "peers" / "run_fake.py"
    script.write_text(FAKE.format(peers=str(BENCHMARKS / "peers")), encoding="utf-8")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    return [bench.Line("fake", name, "final") for name in ("bad", "good", "wrong shape")]


def test_cost_is_of_the_method_alone_and_a_failure_stops_no_other(exported, bench, fake):
    folder, about = exported[2:]
    bad, good, wrong = bench.run_lines(fake, folder, sys.executable, repeats=5, enough=0.39)
    assert bad[1] is None and bad[2]["failed"] == "ValueError: no such rows"
    assert wrong[1] is None and "scores of shape (2, 2)" in wrong[2]["failed"]
    _, scores, cost = good
    np.testing.assert_array_equal(scores, np.outer(np.arange(about["num_queries"]), np.arange(about["num_rows"])))
    assert cost["repeats"] == 2  # .2 s and .2 s are enough
    assert cost["cpu_seconds"] >= 0.2
    assert cost["disk"] == 1000
    # The array, and little else although numpy and torch are in the process; the kernel counts in batches of pages.
    assert abs(cost["memory"] - 2**25) < 2**23


def test_a_script_that_ends_early_says_why(exported, bench, fake):
    with pytest.raises(RuntimeError, match="invalid choice: 'nonsense'"):
        list(bench.run_lines([bench.Line("fake", "nonsense", "final")], exported[2], sys.executable))


def test_another_model_than_the_recorded_one_is_refused(exported, bench, tmp_path):
    record, queries, folder, _ = exported
    saved = folder / "export" / "checkpoints"
    shutil.copytree(saved / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    with pytest.raises(SystemExit, match="not that of the record"):
        bench.export(record, queries, tmp_path / "out", tmp_path / "export")


def test_missing_packages_are_named_with_the_command(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--out", str(tmp_path / "peers.json"), "--rows", "facts"])
    monkeypatch.setattr(bench, "has_peers", lambda python: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    said = str(stopped.value)
    assert "build/peers/bin/pip install --no-deps bergson==2.5.1 kronfluence==1.0.1" in said
    assert said.count("python3.11 -m venv") == 1 and "--packages hf_source" in said
    python = re.search("--peers-python (.*)", said)[1]  # the interpreter that the commands above it make
    assert f"{python.removesuffix('/bin/python')}\n" in said
    assert not (tmp_path / "peers.json").exists()


def test_an_interpreter_without_the_packages_is_noticed(bench, tmp_path):
    assert not bench.has_peers(str(tmp_path / "no-python"))


def test_the_table_compares_with_this_librarys_default(bench):
    cost = {
        "cpu_seconds": 8.0,
        "memory_mb": 100.0,
        "kept_from_training_mb": 3.0,
        "disk_written_mb": 1.0,
        "passes": 7.0,
    }
    ours = {"lds": 0.83, "low": 0.79, "high": 0.86, **cost}
    theirs = {"lds": 0.71, "low": 0.65, "high": 0.75, **cost, "cpu_seconds": 16.0, "memory_mb": 50.0}
    results = {"hf_source: source joint": ours, "bergson: source (recipe)": theirs, "trak: trak": {"failed": "why"}}
    lines = [{"package": label.split(": ")[0], "method": label.split(": ")[1]} for label in results]
    rows = bench.table({"lines": lines, "wiki": {"results": results}}).splitlines()
    assert rows[2] == "| hf_source: source joint | 0.83 [0.79, 0.86] | 8.0 (1.00x) | 100.0 (1.00x) | 4.0 | 7 |"
    assert rows[3] == "| bergson: source (recipe) | 0.71 [0.65, 0.75] | 16.0 (2.00x) | 50.0 (0.50x) | 4.0 | 7 |"
    assert rows[4] == "| trak: trak | - | - | - | - | - |"
