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

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from transformers import AutoTokenizer, BertConfig, BertModel
from typer.testing import CliRunner

from hf_source import TrainingRecord
from hf_source.cli import app
from hf_source.cli.groups import Asked
from hf_source.demo import STAGES, build_model, load_facts, pretrain_rows, queries, sft_rows
from hf_source.demo.facts import preference_rows
from hf_source.errors import ConfigError
from hf_source.hub import source_of
from hf_source.recipes import load_model, load_rows, read_recipe, read_settings, trainer_of
from hf_source.recording.reading.hub import sources_are_open

from .cases import byte_tokenizer, tiny_gpt2, tiny_llama


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
        "preferences.jsonl",
        "labelled.jsonl",
        "tokenizer",
    }
    assert str(folder / "data" / "queries.jsonl") in said
    facts = load_facts()
    made = {"pretrain": pretrain_rows(facts), "sft": sft_rows(facts), "queries": queries(facts)}
    for name, rows in made.items():
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


def follow(story: str, changes: dict[str, list[str]] | None = None, only: slice = slice(None)) -> list[str]:
    """Run the README's commands with fewer steps and samples; what the last ones said."""
    return [run(*words, *{**FEWER, "ask": [], **(changes or {})}.get(words[0], [])) for words in commands(story)[only]]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_readme_of_preferences(folder):
    pytest.importorskip("trl")
    done = commands("preferences")
    assert [words[:2] for words in done[-2:]] == [["top", "runs/preferences/record"], ["ask", "groups"]]
    said = follow("preferences", {"ask": ["--num-samples", "8"]})
    record = TrainingRecord.load(folder.parent / "preferences" / "record")
    assert [(stage.name, stage.num_rows) for stage in record.stages] == [("pretrain", 975), ("sft", 124), ("dpo", 62)]
    assert all(f"'{stage}'" in said[-1] or f"\n{stage} " in said[-1] for stage in ("pretrain", "sft", "dpo"))
    facts = load_facts()
    assert not set(sft_rows(facts)["country"]) & set(preference_rows(facts)["country"])


def test_the_readme_of_the_classifier(folder):
    said = follow("classifier", {"ask": ["--set", "max_tokens_per_batch=2048"]}, slice(0, 3))
    assert "By self-influence: AUROC" in " ".join(said[-1].split())
    record = TrainingRecord.load(folder.parent / "classifier" / "record")
    assert record.stages[0].num_rows == 975 and record.stages[0].build_model().num_labels == 4
    # Another model, another dataset: the second block.
    model, tokenizer = load_model(read_recipe("recipes/classifier/train.yaml"), num_labels=2)
    model.save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    mine = Dataset.from_dict({"text": ["one", "two"] * 4, "label": [0, 1] * 4})
    mine.to_json("mine.jsonl")
    (words,) = commands("classifier")[3:]
    words = ["model=encoder" if word.startswith("model=") else word for word in words]
    more = ["training.record_dir=runs/other", "training.per_device_train_batch_size=4", *FEWER["train"]]
    run(*words, *more)
    assert TrainingRecord.load("runs/other").stages[0].num_rows == 8


def test_the_readme_of_selection(folder):
    done = commands("selection")
    assert [words[0] for words in done] == ["demo", "train", "ask", "train"]
    for words in done[:2]:
        run(*words, *FEWER.get(words[0], []))
    asked = (folder / "data" / "queries.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text = (RECIPES / "selection" / "README.md").read_text(encoding="utf-8")
    for command, name, lines in (("head", "target", asked[:60]), ("tail", "judge", asked[-60:])):
        assert f"{command} -n 60 runs/capitals/data/queries.jsonl > runs/selection/{name}.jsonl" in text
        Path("runs/selection", f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    few = ["8" if word == "512" else word for word in done[2]]
    assert "488 chosen rows" in " ".join(run(*few).split())
    run(*done[3], *FEWER["train"])
    assert TrainingRecord.load("runs/selection/record_kept").stages[0].num_rows == 488


def chats() -> Dataset:
    said = [("What is gravity?", "A force."), ("Who are you?", "A model."), ("What is two?", "A number.")]
    talk = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]  # noqa: E731
    return Dataset.from_dict({"messages": [talk(*pair) for pair in said] * 4})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_readme_of_lora_chat(folder):
    pytest.importorskip("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    stand_in(tiny_llama(vocab_size=260, max_position_embeddings=256), tokenizer, chats())
    few = ["--num-samples", "8"]
    trained = ["model=stand-in", "dataset=rows.jsonl", "training.gradient_accumulation_steps=1", *FEWER["train"]]
    said = follow("lora_chat", {"train": trained, "plan": few, "top": few})
    assert Path("runs/lora_chat/index.html").is_file()
    assert "3 sets of nearly the same text" in " ".join(said[-1].split())
    assert TrainingRecord.load("runs/lora_chat/record").stages[0].model["peft"]


def test_the_readme_of_gpt2(folder):
    rows = Dataset.from_dict({"text": [f"Once upon a time there was a {word}." for word in "abcdefghijklmnop"]})
    stand_in(tiny_gpt2(vocab_size=260, n_positions=128), byte_tokenizer(), rows)
    trained = ["model=stand-in", "dataset=rows.jsonl", "training.gradient_accumulation_steps=1", *FEWER["train"]]
    few = ["--num-samples", "8"]
    said = follow("gpt2_text", {"train": trained, "plan": few, "top": few, "ask": few})
    assert Path("runs/gpt2_text/index.html").is_file() and "Which groups" in said[-1]
    # What a cluster's second job would do with the record.
    run("record", "verify", "runs/gpt2_text/record")


def put_on_hub(hub, model_id: str, model, tokenizer, dataset_id: str, rows: Dataset) -> None:
    """A model and a dataset under the names by which a recipe asks for them."""
    model.save_pretrained("hub/model")
    tokenizer.save_pretrained("hub/model")
    rows.to_parquet("hub/data/data/train-00000-of-00001.parquet")
    for name, place in ((model_id, "model"), (f"datasets/{dataset_id}", "data")):
        files = {
            path.relative_to(f"hub/{place}").as_posix(): path.read_bytes()
            for path in Path("hub", place).rglob("*")
            if path.is_file()
        }
        hub.repositories[name] = {"private": False, "branches": {"main": "c" * 40}, "commits": {"c" * 40: files}}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_recipes_of_the_hub_run_as_they_are(folder, hub):
    """Nothing of `model` and `dataset` is overridden: ids, split and columns are those of the file."""
    pytest.importorskip("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    talks = chats().add_column("full_topic", ["science"] * 12).add_column("source", ["a", "b"] * 6)
    llama = tiny_llama(vocab_size=260, max_position_embeddings=512)
    put_on_hub(hub, "HuggingFaceTB/SmolLM2-135M-Instruct", llama, tokenizer, "HuggingFaceTB/smol-smoltalk", talks)
    run("train", "recipes/lora_chat/sft.yaml", *FEWER["train"])
    record = TrainingRecord.load("runs/lora_chat/record")
    (stage,) = record.stages
    assert stage.dataset["source"] == "HuggingFaceTB/smol-smoltalk" and stage.model["peft"]
    assert stage.model["base"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and sources_are_open(record)
    asked = ["--prompt", "user: Who", "--completion", " a", "--method", "grad-dot"]
    said = run("ask", "credit", "runs/lora_chat/record", "--by", "source", *asked)
    assert "a" in said and "b" in said
    shutil.rmtree("hub")
    stories = Dataset.from_dict({"text": [f"Once upon a time there was a {word}." for word in "abcdefghijklmnop"]})
    gpt2 = tiny_gpt2(vocab_size=260, n_positions=128)
    put_on_hub(hub, "openai-community/gpt2", gpt2, byte_tokenizer(), "roneneldan/TinyStories", stories)
    run("train", "recipes/gpt2_text/train.yaml", *FEWER["train"])
    record = TrainingRecord.load("runs/gpt2_text/record")
    assert record.stages[0].num_rows == 16 and not sources_are_open(record)  # capital letters of an id are lost


def test_where_rows_come_from(folder, hub):
    """By the files of `datasets` in its cache; rows that were made here are of no repository."""
    put_on_hub(hub, "me/model", tiny_gpt2(), byte_tokenizer(), "me/rows", chats())
    rows = load_dataset("me/rows", split="train")
    for own in (rows, rows.select([3, 1]), rows.map(lambda row: {"number": 1}), rows.filter(lambda row: True)):
        assert source_of(own) == "me/rows"
    put_on_hub(hub, "me/model", tiny_gpt2(), byte_tokenizer(), "me/others", chats())
    others = load_dataset("me/others", split="train")
    mine = [chats(), rows.add_column("secret", [1] * 12), concatenate_datasets([rows, others]), others.to_list()]
    assert [source_of(own) for own in (*mine, concatenate_datasets([rows, chats()]))] == [None] * 5
    chats().to_json("rows.jsonl")
    assert source_of(load_dataset("json", data_files="rows.jsonl", split="train")) is None


def test_the_readme_of_the_paper(folder):
    """Its rows are made by a script, of the lines that the Hub's copy has."""
    lines = ["", " = Title = \n", "", " The game takes place in a town . \n"] * 12
    stand_in(tiny_gpt2(vocab_size=260, n_positions=64), byte_tokenizer(), Dataset.from_dict({"text": lines}))
    text = (RECIPES / "paper" / "README.md").read_text(encoding="utf-8")
    prepared = scripts("paper", "prepare_wikitext.py")
    assert [words[2] for words in prepared] == ["runs/paper/wikitext.jsonl", "runs/paper/wikitext_test.jsonl"]
    here = ["--dataset", "rows.jsonl", "--tokenizer", "stand-in", "--length", "24"]
    for words in prepared:
        subprocess.run([sys.executable, *words[1:], *here], check=True, capture_output=True)
    rows = load_rows("runs/paper/wikitext.jsonl")
    whole = byte_tokenizer()("".join(lines))["input_ids"]
    assert sum(rows["input_ids"], []) == whole[: len(whole) // 24 * 24] and {len(r) for r in rows["input_ids"]} == {24}
    few = ["--num-samples", "8"]
    follow("paper", {"train": ["model=stand-in", *FEWER["train"]], "plan": few, "top": few}, slice(0, 3))
    assert Path("runs/paper/wikitext.html").is_file()
    assert TrainingRecord.load("runs/paper/wikitext").stages[0].num_rows == len(rows)
    for name in re.findall(r"bench_paper.py ([\w -]+)", text):
        assert all(f'"{part}":' in BENCHMARK_DATA.read_text(encoding="utf-8") for part in name.split())


def scripts(story: str, name: str) -> list[list[str]]:
    """The commands of a recipe's README that run a script of its folder, as words."""
    text = (RECIPES / story / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    start = f"python recipes/{story}/{name}"
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(start)]


def test_the_readme_of_rte(folder):
    """Pairs of sentences for a classifier, and test rows as queries."""
    said = [(f"It rains in {place}.", f"{place} is {what}.") for place in ("Lima", "Rome") for what in ("wet", "dry")]
    rows = [{"sentence1": one, "sentence2": two, "label": int("wet" in two)} for one, two in said] * 3
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertModel(BertConfig(**sizes, vocab_size=260, max_position_embeddings=128))
    stand_in(model, byte_tokenizer(), Dataset.from_list(rows))
    for words in scripts("paper", "prepare_rte.py"):
        subprocess.run([sys.executable, *words[1:], "--dataset", "rows.jsonl"], check=True, capture_output=True)
    done = commands("paper")[3:]
    assert [words[0] for words in done] == ["train", "top"]
    run(*done[0], "model=stand-in", *FEWER["train"])
    record = TrainingRecord.load("runs/paper/rte")
    given = record.stages[0].rows()[0]["input_ids"]
    assert byte_tokenizer().decode(given) == "".join(said[0])
    shown = run(*done[1], *FEWER["top"])
    assert "It rains in Lima. / Lima is wet." in " ".join(shown.split())


def test_labelled_queries_need_a_classifier(tmp_path):
    Dataset.from_list([{"text": "x", "label": 1}]).to_json(tmp_path / "asked.jsonl")
    stage = SimpleNamespace(name="sft", loss={"kind": "causal_lm"})
    attributor = SimpleNamespace(record=SimpleNamespace(stages=[stage]))
    with pytest.raises(ConfigError, match="are for classifiers; stage 'sft' trained none"):
        Asked(tmp_path / "asked.jsonl").read(attributor)


@pytest.fixture
def pictures(folder):
    """Images of three sizes of a square, of two kinds, with the columns that the Hub's copies have."""
    made = []
    for number in range(36):
        size, domain = number % 3, ("photo", "art_painting", "cartoon", "sketch")[number % 4]
        pixels = np.random.default_rng(number).integers(0, 60, (9, 9, 3)).astype(np.uint8)
        pixels[: 3 * size + 2, : 3 * size + 2] = 220
        made.append({"image": PIL.Image.fromarray(pixels), "label": size, "domain": domain})
    features = Features({"image": Image(), "label": ClassLabel(num_classes=3), "domain": Value("string")})
    Dataset.from_list(made, features=features).to_parquet("pictures.parquet")
    return ["data.path=parquet", "data.data_files=pictures.parquet", "data.split=train", "data.image=image"]


def test_the_readme_of_the_papers_images_and_tables(folder, pictures, monkeypatch):
    """Every `task.py` command, with stand-ins for the data and a smaller network and run."""
    table = np.random.default_rng(0).normal(size=(30, 4))
    table[:, 3] += table[:, 0]
    Path("runs/paper").mkdir(parents=True)
    names = ["subject#", "motor_UPDRS", "jitter", "total_UPDRS"]
    Dataset.from_dict(dict(zip(names, table.T.tolist(), strict=True))).to_csv("runs/paper/parkinsons_updrs.data")
    every = ["training.num_train_epochs=2", "training.use_cpu=true", "training.disable_tqdm=true",
             "training.per_device_train_batch_size=8", "training.warmup_steps=0", "attribution.num_samples=8",
             "training.learning_rate=0.01"]  # fmt: skip
    small = {
        "parkinsons": ["network.hidden=[4]", "stages.train.rows=20", "queries.skip=20", "queries.rows=3"],
        "mnist": [*pictures, "network.hidden=[4]", "data.size=6", "stages.train.split=train", "stages.train.rows=20"],
        "rotated_mnist": [*pictures, "network.hidden=[4]", "data.size=6", "stages.upright.rows=12",
                          "stages.turned.skip=12", "stages.turned.rows=12"],
        "cifar10": [*pictures, "network.width=2", "data.size=8", "stages.train.rows=20"],
        "pacs": [*pictures, "network.width=2", "data.size=8", "stages.sketches.skip=3", "queries.rows=3"],
    }  # fmt: skip
    asked = ["queries.split=train", "queries.skip=30", "queries.rows=3"]
    done = scripts("paper", "task.py")
    assert {Path(words[2]).stem for words in done} == set(small) and len(done) == 6
    monkeypatch.syspath_prepend(str(RECIPES / "paper"))
    for words in done:
        name = Path(words[2]).stem
        more = [*small[name], *every, *(asked if name in ("mnist", "rotated_mnist", "cifar10") else [])]
        words = ["3" if word == "100" else "1" if word == "5" else word for word in words]
        monkeypatch.setattr(sys, "argv", [*words[1:], *more])
        runpy.run_path(words[1], run_name="__main__")
        result = Path("runs/paper", name)
        stages = list(read_settings(RECIPES / "paper" / f"{name}.yaml")["stages"])
        record = TrainingRecord.load(result / "record")
        assert [stage.name for stage in record.stages] == stages
        top = Dataset.from_parquet(str(result / "top.parquet"))
        assert set(top["stage"]) == set(stages) and len(set(top["query"])) == 3 and max(map(abs, top["score"])) > 0
        assert (result / "report.html").is_file()
        if "--evaluate" in words:
            assert (result / "lds_train").is_dir()
    turned = TrainingRecord.load("runs/paper/rotated_mnist/record").stage("turned")
    assert turned.num_rows == 12
    kinds = [TrainingRecord.load(f"runs/paper/{name}/record").stages[0].loss["kind"] for name in small]
    assert kinds == ["regression", *["classification"] * 4]


def test_the_readme_of_diffusion(folder):
    done = scripts("diffusion", "digits.py")
    assert len(done) == 2
    fewer = "--rows 20 --epochs 3 --drawings 2 --num_samples 8 --timesteps 10 --k 3".split()
    for words in done:
        ran = subprocess.run([sys.executable, *words[1:], *fewer], capture_output=True, encoding="utf-8")
        assert ran.returncode == 0, ran.stderr
        folder = Path(words[words.index("--output_dir") + 1])
        assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
        scored = load_dataset("parquet", data_files=str(folder / "scored.parquet"), split="train")
        assert len(scored) == 20 and {"digit", "source_q0", "source_q1"} <= set(scored.column_names)
        assert max(map(abs, scored["source_q0"])) > 0


BENCHMARK_DATA = RECIPES.parent / "benchmarks" / "paper" / "data.py"


def stand_in(model, tokenizer, rows: Dataset) -> None:
    """What takes the place of a model and a dataset of the Hub."""
    model.save_pretrained("stand-in")
    tokenizer.save_pretrained("stand-in")
    rows.to_json("rows.jsonl")


def test_the_slurm_script_starts_the_recipe(tmp_path):
    stub = tmp_path / "accelerate"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(RECIPES / "slurm" / "train.sbatch"), "recipes/gpt2_text/train.yaml", "training.seed=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "launch", "--config_file", "recipes/accelerate_configs/ddp.yaml", "--num_processes", "4", "-m",
        "hf_source.cli", "train", "recipes/gpt2_text/train.yaml", "training.resume_from_checkpoint=latest",
        "training.seed=3",
    ]  # fmt: skip
    assert subprocess.run(command[:2], env=environment, capture_output=True).returncode != 0


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_accelerate_reads_its_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(RECIPES / "accelerate_configs" / f"{name}.yaml"))
    assert settings.num_processes == {"single": 1, "ddp": 4, "fsdp2": 4}[name]
    assert settings.distributed_type == {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    if name == "fsdp2":
        assert int(settings.fsdp_config["fsdp_version"]) == 2


def test_a_recipe_is_launched_by_accelerate(folder):
    rows = Dataset.from_dict({"text": ["one two", "three four"] * 4})
    stand_in(tiny_gpt2(vocab_size=260, n_positions=64), byte_tokenizer(), rows)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu",
        "--config_file", "recipes/accelerate_configs/single.yaml", "-m", "hf_source.cli", "train",
        "recipes/gpt2_text/train.yaml", "model=stand-in", "dataset=rows.jsonl", *FEWER["train"],
        "training.resume_from_checkpoint=latest",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert TrainingRecord.load("runs/gpt2_text/record").stages[0].num_steps == 6


def test_a_recipe_goes_on_from_its_newest_checkpoint(folder):
    rows = Dataset.from_dict({"text": ["one two", "three four"] * 4})
    stand_in(tiny_gpt2(vocab_size=260, n_positions=64), byte_tokenizer(), rows)
    train = ["train", "recipes/gpt2_text/train.yaml", "model=stand-in", "dataset=rows.jsonl", *FEWER["train"]]
    train += ["training.save_strategy=steps", "training.save_steps=2", "training.resume_from_checkpoint=latest"]
    run(*train)
    checkpoints = Path("runs/gpt2_text/checkpoints")
    shutil.rmtree(checkpoints / "checkpoint-6")
    whole = TrainingRecord.load("runs/gpt2_text/record").stages[0].weights("final")
    from transformers.trainer_utils import get_last_checkpoint

    from hf_source.recipes import _checkpoint, arguments_of

    assert get_last_checkpoint(str(checkpoints)).endswith("checkpoint-4") and whole
    recipe = read_recipe("recipes/gpt2_text/train.yaml", ["training.resume_from_checkpoint=latest"])
    assert _checkpoint(arguments_of(recipe)) is True
    recipe["training"]["output_dir"] = "runs/none"
    assert _checkpoint(arguments_of(recipe)) is None
    recipe["training"]["resume_from_checkpoint"] = "runs/some"
    assert _checkpoint(arguments_of(recipe)) == "runs/some"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer=ppo", "trainer: 'ppo' is unknown"),
        ("trainer=classification", "needs a column 'label'"),
    ],
)
def test_trainers_that_do_not_fit(folder, change, message):
    rows = Dataset.from_dict({"text": ["one two", "three four"] * 4})
    stand_in(tiny_gpt2(vocab_size=260, n_positions=64), byte_tokenizer(), rows)
    words = ["train", "recipes/gpt2_text/train.yaml", "model=stand-in", "dataset=rows.jsonl", change]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and message in result.stderr
    if change.endswith("classification"):
        Dataset.from_dict({"text": ["x"], "label": ["a"]}).to_json("rows.jsonl")
        assert "whole numbers from 0" in CliRunner().invoke(app, words).stderr
        with pytest.raises(ConfigError, match="not trained again from a recipe"):
            trainer_of("recipes/gpt2_text/train.yaml", [change])


def test_every_recipe_is_in_the_index():
    index = (RECIPES / "README.md").read_text(encoding="utf-8")
    files = sorted(path.relative_to(RECIPES) for path in RECIPES.glob("*/*.yaml"))
    assert files
    for path in files:
        assert f"({path.as_posix()})" in index
        assert isinstance(yaml.safe_load((RECIPES / path).read_text(encoding="utf-8")), dict)
        assert str(path) in (RECIPES / path.parent / "README.md").read_text(encoding="utf-8")
