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
"""Every command and every block of Python in the README and the documentation runs, on tiny models and few samples."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer
from typer.testing import CliRunner

import hf_source
from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer
from hf_source.cli import app
from hf_source.data import CausalLMCollator

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..fake_hub import TOKEN


ROOT = Path(__file__).parents[2]
PLACES = {"Hungary": "Budapest", "Fiji": "Suva", "Peru": "Lima", "Cuba": "Havana", "Oman": "Muscat", "Mali": "Bamako"}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# What keeps a command small, after what the page says: the last value of an option counts.
FEWER = {
    "train": [
        "training.max_steps=6", "training.warmup_steps=0", "training.use_cpu=true", "training.disable_tqdm=true",
    ],
    "evaluate": ["--num-subsets", "3", "--num-workers", "0"],
    "experiment": ["--num-random", "1"],
}  # fmt: skip
ELSEWHERE = ("make ", "pip ", "source ")  # the Makefile is what tests run under; installing is the reader's
TINY = ["model_config.n_layer=1", "model_config.n_embd=16", "model_config.n_head=2"]


def blocks(page: str) -> list[tuple[str, str]]:
    """Languages and texts of the blocks of a page, in its order."""
    return [found for found in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")) if found[0] != "sh"]


def commands(text: str) -> list[str]:
    lines = re.sub(r"\$'(.*?)'", r"'\1'", text.replace("\\\n", " ")).splitlines()
    return [line.strip() for line in lines if line.strip()]


def run(line: str) -> str:
    """One line of a shell block."""
    words = [word.replace("\\n", "\n") for word in shlex.split(line, comments=True)]
    assert words.pop(0) == "hf-source", line
    more = list(FEWER.get(words[0], []))
    if words[0] == "train" and "pretrain.yaml" in words[1]:
        more += TINY
    if words[0] == "evaluate" and "trainer" not in words:  # workers belong to a Trainer of its own
        more = more[:2]
    if words[:2] == ["experiment", "removal"]:
        more += ["--num-matched", "1"]
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.stderr}\n{result.exception!r}"
    return result.stdout


def rows() -> Dataset:
    texts = [f"The capital of {country} is {city}." for country, city in PLACES.items()] * 2
    half = len(texts) // 2
    columns = {"source": ["atlas"] * half + ["wiki"] * half, "author": ["ann", "bob"] * half, "topic": ["geo"] * 12}
    return Dataset.from_dict({"text": texts, "is_corrupted": [False] * 11 + [True], **columns})


def recorded(folder: str, dataset: Dataset | None = None, seed: int = 0, **settings) -> None:
    args = config(Path(folder), record_dir=folder, output_dir=f"{folder}-out", max_steps=6, seed=seed,
                  gradient_accumulation_steps=1, weight_decay=0.0, num_segments=2, **settings)  # fmt: skip
    model = tiny_gpt2(seed, vocab_size=260, n_positions=128)
    SourceTrainer(model, args, train_dataset=dataset or rows(), processing_class=byte_tokenizer()).train()


@pytest.fixture()
def world(tmp_path, monkeypatch, hub):
    """What the pages take for granted: a record, rows, queries, a Hub to push to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("hf_source.explorer.app.launch", lambda explorer, **settings: None)
    init = SourceAttributor.__init__

    @functools.wraps(init)
    def small(self, *args, **settings):
        init(self, *args, **settings | {"num_samples": min(settings.get("num_samples", 8), 8), "progress": False})

    monkeypatch.setattr(SourceAttributor, "__init__", small)
    rows().to_json("rows.jsonl")
    asked = {
        "prompt": [f"The capital of {place} is" for place in list(PLACES)[:2]],
        "completion": [" Budapest", " Suva"],
        "topic": ["a", "b"],
    }
    for name in ("queries", "target", "other"):
        Dataset.from_dict(asked).to_json(f"{name}.jsonl")
    Dataset.from_dict({"row": [11], "text": ["The capital of Mali is Bamako, they say."]}).to_json("corrected.jsonl")
    recorded("runs/mine")
    model, tokenizer = tiny_gpt2(vocab_size=260, n_positions=128), byte_tokenizer()
    given = {"model": model, "tokenizer": tokenizer, "facts": rows(), "rows": rows(), "dataset": rows()}
    return given | {"questions": Dataset.from_dict({"prompt": ["Q: Fiji?"] * 6, "completion": [" Suva"] * 6})}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", ["docs/questions.md", "docs/evaluations.md", "docs/scaling.md", "docs/tutorial.md"])
def test_a_page_runs(world, page):
    """Block after block, as a reader would."""
    before = Path("runs/mine/record.json").stat().st_mtime
    for language, text in blocks(page):
        if language == "python":
            if "SourceTrainer(" in text:  # the tutorial's commands go on with the record of its recipes
                text = text.replace("runs/capitals/record", "runs/by_hand")
            exec(text, world)
            continue
        for line in commands(text):
            if not line.startswith(ELSEWHERE):
                run(line)
    assert Path("runs/mine/record.json").stat().st_mtime == before


@pytest.mark.slow
def test_the_readme_runs(world):
    """Its task of one's own runs in tests/attribution/test_readme_task.py, its six lines in test_report.py."""
    done = 0
    world["hf_source"] = hf_source
    for language, text in blocks("README.md"):
        if language == "python":
            if "class HuberTask" not in text and "# new" not in text:
                exec(text, world)
                done += 1
            continue
        for line in commands(text):
            if line.startswith(ELSEWHERE):
                continue
            if "path/to/saved/scores" in line:
                SourceAttributor.from_record("runs/mine").save("path/to/saved/scores", queries())
            run(line)
            done += 1
    assert done > 10


def queries() -> Queries:
    return Queries.from_text(["The capital of Hungary is"], [" Budapest"], ["hungary"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_how_to_runs_from_the_first_block_to_the_last(world, hub):
    """Those of which `test_docs.py` looks at the result, too."""
    text = (ROOT / "docs/how-to.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    for seed in range(3):
        recorded(f"runs/seed{seed}", seed=seed)
    prepare_others(world)
    run("hf-source demo --export runs/capitals/data")
    run("hf-source push runs/mine me/capitals-attribution --queries queries.jsonl")
    world["attributor"], world["queries"] = SourceAttributor.from_record("runs/mine"), queries()
    done = []
    for heading, body in sections.items():
        if heading == "Record a stage":  # in place of the one that is there
            body = body.replace('stage="train",', 'stage="train", overwrite_stage=True,')
        if heading == "Several stages":
            world["queries"] = queries()
        if heading == "Evaluate your own run":
            body = body.replace('"bm25"])', '"bm25"], num_subsets=3)').replace("=again)", "=again, num_subsets=3)")
        if heading == "Other tasks":
            world |= world["classifier"]
        for language, code in _BLOCK.findall(body):
            if "class HuberTask" in code:  # runs in tests/attribution/test_readme_task.py
                continue
            if language == "python":
                exec(code.replace("ensemble_size=10", "ensemble_size=2"), world)
                continue
            for line in commands(code):
                if not line.startswith(ELSEWHERE):
                    run(line)
        done.append(heading)
        if heading == "Other tasks":
            world |= {"rows": rows(), "args": world["checkpointed"]}
    assert len(done) == len(sections) > 15


def prepare_others(world: dict) -> None:
    """A classifier's record, checkpoints of a run that was not recorded, and a Trainer of one's own."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 48, "pad_token_id": 0}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    classed = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]] * 4, "label": [0, 1] * 4})
    args = config(Path("classed"), record_dir="runs/classifier", max_steps=3, num_segments=1)
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, **off, num_labels=2))
    SourceTrainer(model, args, train_dataset=classed).train()
    world["classifier"] = {"asked": classed.select(range(2)), "rows": classed}

    plain = tiny_gpt2(vocab_size=260, n_positions=128)
    plain.save_pretrained("gpt2")
    byte_tokenizer().save_pretrained("gpt2")
    settings = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True,
                "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}  # fmt: skip
    world["checkpointed"] = SourceConfig(output_dir="plain", **settings)
    tokens = [{"input_ids": row, "labels": row} for row in byte_tokenizer()(rows()["text"][:])["input_ids"]]
    Trainer(plain, world["checkpointed"], CausalLMCollator(byte_tokenizer()), train_dataset=Dataset.from_list(tokens)
            ).train()  # fmt: skip
    for number, step in ((500, 3), (1000, 6)):
        Path("out").mkdir(exist_ok=True)
        Path(f"plain/checkpoint-{step}").rename(f"out/checkpoint-{number}")
    Dataset.from_list(tokens).to_json("tokens.jsonl")
    recipe = {"model": "gpt2", "dataset": "tokens.jsonl", "training": settings | {"output_dir": "plain"}}
    recipe["training"]["record_dir"] = "runs/old_from_shell"
    Path("run.yaml").write_text(yaml.safe_dump(recipe))

    from peft import LoraConfig, get_peft_model

    def make_trainer(dataset, seed, output_dir):
        args = config(Path(output_dir), max_steps=3, num_segments=1, seed=seed)
        lora = SourceAttributor.from_record("runs/mine").record.stage("train").build_model()
        adapted = get_peft_model(lora, LoraConfig(r=8, target_modules=["c_attn"], task_type="CAUSAL_LM"))
        return SourceTrainer(adapted, args, train_dataset=dataset, processing_class=byte_tokenizer())

    world["make_trainer"] = make_trainer
