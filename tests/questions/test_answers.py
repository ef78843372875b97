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
"""What an answer shows, what it writes, how far it says to trust it, and the commands."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from typer.testing import CliRunner

from hf_source import SourceAttributor, questions
from hf_source.cli import app
from hf_source.errors import ConfigError
from hf_source.evaluation import evaluate
from hf_source.questions import Answer, Check

from .conftest import PROMPTS, RIGHT, WRONG, rows


HOSTILE = "\x1b[31m<script>alert(1)</script> | [x](javascript:1)\n# head"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_an_answer_obeys_no_text():
    table = Dataset.from_dict({"text": [HOSTILE], "total": [1.5], "share": [0.25], "row": [3], "sure": [True]})
    answer = Answer(HOSTILE, table, {"text": HOSTILE}, [HOSTILE], "Nobody knows.")
    assert "\x1b" not in str(answer) and "+1.5000" in str(answer) and "0.2500" in str(answer)
    page = answer.to_markdown()
    assert "<script>" not in page and "[x](" not in page and "\n# head" not in page
    assert page.count("\n|") == 3  # heading, rule, one line


def test_what_is_written_can_be_read(attributor, queries, tmp_path):
    answer = questions.groups(attributor, queries, by="source", verify=True)
    folder = answer.write(tmp_path / "answer")
    again = load_dataset("parquet", data_files=str(folder / "answer.parquet"), split="train")
    assert again.to_dict() == answer.table.to_dict()
    content = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    assert content["findings"] == list(answer.findings) and content["trust"] == answer.trust
    assert content["check"]["pearson"] == pytest.approx(answer.check.pearson)
    assert content["settings"]["scores"] == attributor.settings()
    assert content["settings"]["question"]["queries"] == queries.names
    assert "measured" in (folder / "answer.md").read_text(encoding="utf-8")


def test_a_check_has_figures():
    predicted = np.array([[1.0, 2.0], [2.0, 3.0], [-1.0, -2.0]])
    check = Check(["a", "b", "c"], predicted, 2 * predicted, "again")
    assert (check.pearson, check.spearman, check.pearson_of_queries, check.same_sign) == pytest.approx((1, 1, 1, 1))
    assert "the predicted sign in 3 of them, Pearson 1.00" in str(check)
    few = Check(["a"], predicted[:1], -predicted[:1])
    assert np.isnan(few.pearson) and few.to_dict()["pearson"] is None and few.same_sign == 0
    assert "predicted +1.500, measured -1.500" in str(few)


def test_trust_says_what_was_measured(told, queries, tmp_path):
    """On a copy of the record, as a figure stays beside it."""
    path = shutil.copytree(told.path, tmp_path / "record")
    attributor = SourceAttributor.from_record(path, num_samples=32, progress=False)
    attributor.set_dataset(None, rows())
    before = questions.trust(attributor)
    assert len(before.table) == 0 and "Nobody has measured" in before.trust
    evaluate(attributor, queries, num_subsets=4, fraction=0.2, progress=False)
    after = questions.trust(attributor)
    (line,) = after.table
    assert (line["evaluation"], line["measure"], line["same_settings"]) == ("removal", "LDS", True)
    assert (line["num_queries"], line["num_subsets"]) == (2, 4)
    assert "Measured on this run" in after.trust and "are few" in " ".join(after.findings)
    other = questions.trust(attributor.like(num_samples=16))
    assert "none of them with these settings" in other.findings[0] and "Nobody has measured" in other.trust
    assert "Measured on this run" in str(questions.groups(attributor, queries, by="source"))
    with pytest.raises(ConfigError, match="holds no scores"):
        questions.trust(told)


# ---- commands ------------------------------------------------------------------------------------------------------


def run(*words) -> str:
    result = CliRunner().invoke(app, ["ask", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def refused(*words) -> str:
    result = CliRunner().invoke(app, ["ask", *map(str, words)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    return result.stderr


@pytest.fixture()
def files(told, queries, tmp_path):
    """The record, its rows with their columns, queries, and what else commands read."""
    data = told.path.parent / "rows.jsonl"
    asked = queries.to_dataset().add_column("topic", ["colour", "number"])
    asked.to_json(str(tmp_path / "asked.jsonl"))
    Dataset.from_dict({"row": [8, 9], "text": ["red:hue"] * 2}).to_json(str(tmp_path / "right.jsonl"))
    return told.path, ["--num-samples", 16, "--dataset", data], ["--queries", tmp_path / "asked.jsonl"], tmp_path


def test_why(files):
    record, settings, _, folder = files
    asked = [word for p, r, w in zip(PROMPTS, RIGHT, WRONG, strict=True)
             for word in ("--prompt", p, "--right", r, "--wrong", w)]  # fmt: skip
    said = run("why", record, *asked, "-k", 2, "--verify", *settings, "--out", folder / "out")
    assert "push towards the wrong answer" in said and "Trained again" in said
    assert {path.name for path in (folder / "out").iterdir()} == {"answer.md", "answer.parquet", "answer.json"}
    own = SourceAttributor.from_record(record, num_samples=16, progress=False)
    expected = questions.why(own, PROMPTS, RIGHT, WRONG, k=2)
    table = load_dataset("parquet", data_files=str(folder / "out" / "answer.parquet"), split="train")
    assert table["row"][:] == expected.table["row"][:]
    assert "the model says" not in said
    assert "give one of each per prompt" in refused("why", record, "--prompt", "a", "--right", "b", "--wrong", "c",
                                                    "--wrong", "d")  # fmt: skip


def test_groups_and_credit(files):
    record, settings, asked, _ = files
    assert "measured" in run("groups", record, *asked, "--by", "source", "--verify", *settings)
    assert "red" in run("groups", record, *asked, "--clusters", 3, *settings)
    said = run("credit", record, *asked, "--rule", "rows", "--curvature", "identity", *settings)
    assert "Who deserves credit" in said and "sum to one" in said
    assert "a column 'source'" in refused("credit", record, *asked, "--num-samples", 16)
    assert "Say what makes a group" in refused("groups", record, *asked, "--num-samples", 16)


def test_missing_and_actions(files):
    record, settings, asked, folder = files
    said = run("missing", record, *asked, "--by", "topic", *settings)
    assert "queries are missing" in said
    assert "it has" in refused("missing", record, *asked, "--by", "theme", *settings)
    said = run("actions", record, *asked, "--by", "source", "-k", 1, "-k", 3, "--relabel", folder / "right.jsonl",
               "--kind", "relabel", "--kind", "drop rows", *settings)  # fmt: skip
    assert "relabel" in said and "repeat" not in said
    assert "choose from" in refused("actions", record, *asked, "--kind", "eat", *settings)
    Dataset.from_dict({"text": ["x"]}).to_json(str(folder / "bad.jsonl"))
    assert "needs a column `row`" in refused("actions", record, *asked, "--relabel", folder / "bad.jsonl")


def test_rows_and_trust(files):
    record, settings, asked, folder = files
    assert "AUROC" in run("mislabelled", record, *asked, "--known", "is_corrupted", "-k", 3, *settings)
    assert "by loss" in run("mislabelled", record, "--order", "loss", *settings)
    assert "sets of the same text" in run("duplicates", record, "--threshold", 1, "--dataset", settings[-1])
    assert "cosine" in run("duplicates", record, "--by", "gradient", "--threshold", 0.99)
    judged = run(
        "keep", record, *asked, "--budget", 0.5, "--judge", asked[1], "--verify", "--num-random", 2, *settings
    )
    assert "Keep 8 of 16 rows" in judged and "of 2 draws" in judged
    assert "Keep 3 of 16 rows" in run("keep", record, *asked, "--budget", 3, *settings)
    assert "Can I trust these scores?" in run("trust", record)


def test_shared_scores(files, attributor, queries, tmp_path):
    record, settings, asked, _ = files
    attributor.save(tmp_path / "shared", queries)
    said = run("groups", tmp_path / "shared", "--by", "source")
    expected = questions.groups(attributor, queries, by="source")
    assert f"{expected.table['total'][0]:+.4f}" in said
    assert "Can I trust" in run("trust", tmp_path / "shared")
    assert "cannot generate" in refused("groups", tmp_path / "shared", "--by", "source", "--prompt", "red:")
    assert "leave the options for them out" in refused("groups", tmp_path / "shared", "--num-samples", 3)
    given = run("groups", tmp_path / "shared", "--by", "source", "--prompt", "red:", "--completion", "hue")
    assert "+" in given


def test_a_dataset_of_one_of_two_stages(story, tmp_path):
    from ..story import facts

    facts().add_column("source", ["x", "y"] * 4).to_json(str(tmp_path / "facts.jsonl"))
    asked = ["--prompt", "Peru:", "--completion", " Lima", "--num-samples", 16]
    said = run("groups", story.path, *asked, "--by", "source", "--dataset", f"pretrain={tmp_path / 'facts.jsonl'}")
    assert "pretrain" in said and "sft" not in said.split("total:")[0]
