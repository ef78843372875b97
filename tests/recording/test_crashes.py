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
"""A handful of kills of the campaign in `benchmarks/bench_crashes.py`; `benchmarks/crashes.json` has a long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_crashes.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_killed_runs_end_in_the_record_of_an_uninterrupted_one(tmp_path):
    """In a process of its own, which may fork: it has started no threads."""
    command = [sys.executable, SCRIPT, "--kills", "3", "--out", tmp_path / "crashes.json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "crashes.json").read_text())["results"]
    assert [result["kills"] for result in results.values()] == [3, 3]
    assert all(result["runs_compared"] >= 1 for result in results.values())
