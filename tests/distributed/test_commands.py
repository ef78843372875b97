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
"""Commands that several processes run: their answer is that of one, told and written once."""

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from hf_source.cli import app

from .launching import launch


ASKED = ["-p", "Peru:", "-c", " Lima", "--num-samples", "8"]
FEW = ["--num-top", "1", "--num-bottom", "1", "--num-random", "2"]


def alone(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("more", [[], ["--num-segments", "1"]], ids=["as recorded", "one segment"])
def test_two_processes_speak_and_write_once(story, tmp_path, more):
    words = ["attribute", story.path, *ASKED, *more, "--stage", "pretrain", "--out"]
    expected = alone(*words, tmp_path / "one.parquet")
    said = launch("commands.py", *words, tmp_path / "two.parquet")
    assert said == expected.replace("one.parquet", "two.parquet")
    one, two = (Dataset.from_parquet(str(tmp_path / f"{name}.parquet")) for name in ("one", "two"))
    assert one.column_names == two.column_names
    np.testing.assert_allclose(two["source_q0"], one["source_q0"], rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "two.parquet.work").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_processes_than_the_main_one_are_silent(story, tmp_path, monkeypatch, rank):
    """Every command that prints a table, or writes a file that is not already one process's."""
    monkeypatch.setenv("RANK", rank)
    asked, main = [*ASKED, "--method", "bm25"], rank == "0"
    commands = {
        "page.html": ["top", story.path, *asked],
        "queries.jsonl": ["generate", story.path, "-p", "Peru:", "--max-new-tokens", 2],
        "why": ["ask", "groups", story.path, *asked, "--stage", "pretrain", "--by", "label_of_mine"],
        "report": ["experiment", "leave-one-out", story.path, *ASKED[:4], "-m", "bm25", "--stage", "sft", *FEW],
    }
    for name, words in commands.items():
        said = alone(*words, "--out", tmp_path / name)
        assert bool(said) == main and (tmp_path / name).exists() == main, (name, said)
