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
"""The benchmarks write what is committed, and keep the lines that are not measured again."""

import importlib
import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(params=["retrieval", "two_stages", "lm_lds"])
def committed(request):
    """Name of a benchmark, and what its committed file holds."""
    return request.param, json.loads((BENCHMARKS / f"{request.param}.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a benchmark that measures one line, called `new`, of everything; what its file then holds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_main(name, *words):
        bench, out = importlib.import_module(f"bench_{name}"), tmp_path / "out.json"

        def one_line(*given):
            *_, report, save = given
            report.get("results", report)["new"] = {"seconds": 1.0}
            save()

        monkeypatch.setattr(bench, "run", one_line)
        monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", "--out", str(out), *words])
        bench.main()
        return json.loads(out.read_text(encoding="utf-8"))

    return run_main


def sections(report):
    """A file is one section, or several by name."""
    return [report] if "results" in report else list(report.values())


def test_files_are_as_those_committed(committed, run):
    name, there = committed
    for found, was in zip(sections(run(name)), sections(there), strict=True):
        assert list(found) == list(was)
        assert list(found["machine"]) == list(was["machine"]) and list(found["versions"]) == list(was["versions"])
        assert list(found["results"]) == ["new"]


def test_settings_are_those_of_the_committed_figures(committed, run):
    name, there = committed
    found = run(name)
    for key, section in [(None, there)] if "results" in there else there.items():
        assert (found if key is None else found[key])["settings"] == section["settings"]


def test_other_lines_are_kept_only_with_only(committed, run, tmp_path):
    name, there = committed
    (tmp_path / "out.json").write_text(json.dumps(there), encoding="utf-8")
    for found, was in zip(sections(run(name, "--only", "new")), sections(there), strict=True):
        assert found["results"] == was["results"] | {"new": {"seconds": 1.0}}
    assert all(list(found["results"]) == ["new"] for found in sections(run(name)))


def test_a_benchmark_writes_beside_itself(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results_file = importlib.import_module("results_file")
    given = results_file.parser("What it does.", str(BENCHMARKS / "bench_new.py")).parse_args([])
    assert given.out == BENCHMARKS / "new.json" and given.only == [""]
