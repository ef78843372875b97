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
"""The recipes do what their README says: its very commands are run here, with fewer steps and samples."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_source import TrainingRecord
from hf_source.cli import app
from hf_source.demo import STAGES, build_model, load_facts, pretrain_rows, queries, sft_rows
from hf_source.recipes import load_model, read_recipe


pytest.importorskip("countryinfo", reason='the demo\'s facts come from `pip install "hf_source[demo]"`')

RECIPES = Path(__file__).parents[1] / "recipes"
FEWER = {
    "train": [
        "training.max_steps=6",
        "training.warmup_steps=0",
        "training.use_cpu=true",
        "training.disable_tqdm=true",
    ],
    "plan": ["--num-samples", "8"],
    "attribute": ["--num-samples", "8"],
    "top": ["--num-samples", "8"],
}


def commands(story: str) -> list[list[str]]:
    """The `hf-source` commands of a recipe's README, as words."""
    text = (RECIPES / story / "README.md").read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    # bash reads $'a\nb' as two lines; shlex does not know that form.
    lines = [re.sub(r"\$'(.*?)'", r"'\1'", line) for line in script.splitlines() if line.startswith("hf-source ")]
    return [[word.replace("\\n", "\n") for word in shlex.split(line)[1:]] for line in lines]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with the recipes in it."""
    (tmp_path / "recipes").symlink_to(RECIPES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs" / "capitals"


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_export_writes_what_the_demo_uses(folder):
    said = run("demo", "--export", str(folder / "data"))
    assert {path.name for path in (folder / "data").iterdir()} == {
        "pretrain.jsonl",
        "sft.jsonl",
        "queries.jsonl",
        "tokenizer",
    }
    assert str(folder / "data" / "queries.jsonl") in said
    facts = load_facts()
    for name, rows in (("pretrain", pretrain_rows(facts)), ("sft", sft_rows(facts)), ("queries", queries(facts))):
        read = load_dataset("json", data_files=str(folder / "data" / f"{name}.jsonl"), split="train")
        assert read.to_dict() == rows.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.decode(tokenizer("The capital of Åland is Mariehamn.")["input_ids"]) == (
        "The capital of Åland is Mariehamn."
    )
    assert not (folder / "record").exists()


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_capitals_trains_as_the_demo_does(stage):
    training = read_recipe(RECIPES / "capitals" / f"{stage}.yaml")["training"]
    assert {key: training[key] for key in STAGES[stage]} == STAGES[stage]
    assert training["stage"] == stage


def test_capitals_has_the_model_of_the_demo(folder):
    run("demo", "--export", "runs/capitals/data")
    model, tokenizer = load_model(read_recipe("recipes/capitals/pretrain.yaml"))
    expected = build_model(tokenizer).config.to_dict()
    # Neither starts a row with a token of its own.
    assert model.config.to_dict() == expected | {"bos_token_id": tokenizer.bos_token_id}


def test_the_readme_of_capitals(folder):
    done = commands("capitals")
    assert [words[0] for words in done] == ["demo", "train", "train", "generate", "plan", "attribute", "top", "train"]
    assert done[3][-1] == "Q: What is the capital of Fiji?\nA:"
    for words in done[:-1]:
        run(*words, *FEWER.get(words[0], []))
    record = TrainingRecord.load(folder / "record")
    assert [(stage.name, stage.num_rows) for stage in record.stages] == [("pretrain", 975), ("sft", 124)]
    scored = load_dataset("parquet", data_files=str(folder / "pretrain_scored.parquet"), split="train")
    assert {"text", "source_row", "source_q0", "source_q1"} <= set(scored.column_names)
    assert len(scored) == 975
    assert (folder / "index.html").read_text(encoding="utf-8").count("<details") == 2
    before = record.stage("sft").steps().learning_rate.max()
    run(*done[-1], *FEWER["train"])
    sft = TrainingRecord.load(folder / "record").stage("sft")
    assert before == pytest.approx(3e-4) and sft.steps().learning_rate.max() == pytest.approx(1e-3)


def test_every_recipe_is_in_the_index():
    index = (RECIPES / "README.md").read_text(encoding="utf-8")
    files = sorted(path.relative_to(RECIPES) for path in RECIPES.glob("*/*.yaml"))
    assert files
    for path in files:
        assert f"({path.as_posix()})" in index
        assert isinstance(yaml.safe_load((RECIPES / path).read_text(encoding="utf-8")), dict)
        assert str(path) in (RECIPES / path.parent / "README.md").read_text(encoding="utf-8")
