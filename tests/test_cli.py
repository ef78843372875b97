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
"""Every command of `hf-source`, and what it says when something is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.cli import app

from .cases import byte_tokenizer
from .story import chats, facts, tell


COMMANDS = ("demo", "train", "generate", "plan", "attribute", "top", "report", "explore", "index", "push", "evaluate",
            "record",
            "experiment")  # fmt: skip
FEW = ["--num-samples", "16"]
ASKED = ["--prompt", "Peru:", "--completion", " Lima"]


def run(*words) -> str:
    """Run a command that works; what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words) -> str:
    """Run a command that is refused with one clear line; that line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception  # anything else would print a traceback
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.rstrip().endswith(line)
    return line


@pytest.fixture
def record(story):
    return str(story.path)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


@pytest.fixture
def queries_file(tmp_path, queries):
    path = tmp_path / "asked.jsonl"
    queries.to_dataset().to_json(str(path))
    return path


@pytest.fixture(scope="module")
def scores(story, queries):
    return SourceAttributor.from_record(story.path, num_samples=16, progress=False).scores(None, queries, "pretrain")


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    out = run("--help")
    assert all(f" {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    out = run(command, "--help")
    assert f"hf-source {command}" in out or f" {command} " in out
    assert "--help" in out
    assert run(command, "-h") == out


def test_help_of_the_commands_in_a_group():
    for group, command in [("record", "verify"), ("experiment", "tail-patch")]:
        assert run(group, command, "-h") == run(group, command, "--help")


def test_no_command_shows_the_help():
    assert "attribute" in CliRunner().invoke(app, []).output


# ---- generate ------------------------------------------------------------------------------------------------------


def test_generate_writes_queries(record, story, tmp_path):
    (tmp_path / "prompts.txt").write_text("Q Cuba? A\n\nMali:\n", encoding="utf-8")
    out = tmp_path / "new" / "answers.jsonl"
    said = run("generate", record, "-p", "Peru:", "--prompts-file", tmp_path / "prompts.txt", "-o", out,
               "--max-new-tokens", 8)  # fmt: skip
    expected = SourceAttributor.from_record(story.path, progress=False).generate(
        ["Peru:", "Q Cuba? A", "Mali:"], max_new_tokens=8
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["completion"] for row in rows] == expected.completions
    assert [row["prompt"] for row in rows] == expected.prompts
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in expected.rows]
    assert f"Peru:{expected.completions[0]}" in said
    assert f"Wrote 3 queries to {out}." in said


def test_generate_without_a_prompt(record, tmp_path):
    assert "no prompt: give --prompt" in refused("generate", record, "-o", tmp_path / "a.jsonl")
    missing = tmp_path / "prompts.txt"
    assert f"no file {missing}" in refused("generate", record, "--prompts-file", missing, "-o", tmp_path / "a.jsonl")


def test_generate_to_what_queries_cannot_read(record, tmp_path):
    assert "end the name in .jsonl" in refused("generate", record, "-p", "Peru:", "-o", tmp_path / "answers.txt")


def test_generate_beyond_the_context(record, tmp_path):
    said = refused("generate", record, "-p", "Peru: " * 5, "-o", tmp_path / "answers.jsonl")
    assert "does not fit the context of 32" in said


# ---- plan ----------------------------------------------------------------------------------------------------------


def test_plan(record):
    out = run("plan", record, *ASKED, *FEW, "--stage", "pretrain")
    assert "walk and score 'sft': 4 rows" in out
    assert "walk and score 'pretrain': 8 rows" in out
    assert "source (joint): 1 queries" in out
    assert "peak memory" in out
    assert "better buy: `" in out


def test_fewer_segments_than_were_recorded(record):
    asked = ["plan", record, *ASKED, *FEW, "--stage", "pretrain"]
    whole = run(*asked)
    assert "8 rows, 2 segments, " in whole and "  with num_segments=1: about " in whole
    one = run(*asked, "--num-segments", 1)
    assert "8 rows, 1 segment, " in one and "with num_segments" not in one
    assert "can be read as 1 to 2" in refused(*asked, "--num-segments", 3)
    assert "with num_segments" not in run(*asked, "--method", "stepwise")


def test_auto(record):
    """Chosen from a shell; what was taken is told with the answer."""
    out = run("plan", record, *ASKED, *FEW, "--stage", "sft", "--method", "auto", "--set", "max_cost=1000000000")
    assert out.startswith("unrolled: 1 queries") and "better buy: `unrolled`" in out
    few = [*FEW, "--method", "auto", "--set", "max_cost=0.000001"]
    assert run("plan", record, *ASKED, *few, "--stage", "sft").startswith("source (joint)")
    assert "method='auto' took `source`: a replay of the" in run("top", record, *ASKED, *few, "-k", 1)
    assert "max_cost=0: give a positive number" in refused(
        "plan", record, *ASKED, "-s", "method=auto", "-s", "max_cost=0"
    )


def test_plan_takes_settings_from_recipe_options_and_set(record, tmp_path):
    recipe = tmp_path / "attribution.yaml"
    recipe.write_text("method: grad-dot\nnum_samples: 16\n", encoding="utf-8")
    assert "grad-dot" in run("plan", record, *ASKED, "--recipe", recipe)
    assert "source (ekfac)" in run(
        "plan", record, *ASKED, "--recipe", recipe, "--method", "source", "--curvature", "ekfac"
    )
    over = ["--set", "method=grad-cos", "-s", "max_tokens_per_batch=64"]
    assert "grad-cos" in run("plan", record, *ASKED, "--recipe", recipe, "--method", "source", *over)
    assert "source (joint)" in run("plan", record, *ASKED, *FEW, "--set", "vector_dtype=bfloat16")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("trak", ["projection_dim=64", "projection=normal", "output=loss", "checkpoints=segments", "damping=0.1"]),
        ("trackstar", ["projection_dim=16", "mix=0.5", "second_moment=false", "damping=0"]),
        ("logra", ["rank=8", "init=pca", "damping=0.2", "relatif=true"]),
        ("datainf", ["damping=0.2", "full_parameters=true"]),
    ],
)
def test_plan_takes_the_settings_of_projected_methods(record, method, settings):
    over = [part for setting in settings for part in ("--set", setting)]
    assert f"{method}: 1 queries" in run("plan", record, *ASKED, "--method", method, *over)


# ---- attribute -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_attribute_writes_columns(record, queries_file, scores, tmp_path, suffix):
    out = tmp_path / "new" / f"scored{suffix}"
    said = run("attribute", record, "-q", queries_file, "--stage", "pretrain", "-o", out, *FEW)
    assert f"Wrote {out}: 8 rows with source_row, source_lima, source_havana for 2 queries." in said
    kind = {".jsonl": "json"}.get(suffix, suffix[1:])
    written = load_dataset(kind, data_files=str(out), split="train")
    assert written["text"] == facts()["text"]
    assert written["source_row"] == list(range(8))
    got = np.stack([written["source_lima"], written["source_havana"]])
    np.testing.assert_allclose(got, scores, rtol=1e-4, atol=1e-6)


def test_attribute_the_dataset_itself(record, queries_file, scores, tmp_path):
    facts().to_csv(str(tmp_path / "facts.csv"))
    run("attribute", record, "-q", queries_file, "--stage", "pretrain", "--dataset", tmp_path / "facts.csv",
        "-o", tmp_path / "scored.parquet", *FEW)  # fmt: skip
    written = load_dataset("parquet", data_files=str(tmp_path / "scored.parquet"), split="train")
    assert written.column_names == ["text", "label_of_mine", "source_row", "source_lima", "source_havana"]
    np.testing.assert_allclose(written["source_lima"], scores[0], rtol=1e-4, atol=1e-6)


def test_attribute_parts(record, queries_file, scores, tmp_path):
    """Tokens of the rows that matter, and parts of the answers."""
    whole, best, tokens = (tmp_path / name for name in ("whole.parquet", "best.parquet", "tokens.parquet"))
    given = ["attribute", record, "-q", queries_file, "--stage", "pretrain"]
    run(*given, "-o", whole, *FEW)
    rows = load_dataset("parquet", data_files=str(whole), split="train")
    rows.sort("source_lima", reverse=True).select([0]).to_parquet(str(best))
    some = ["--dataset", best, "--granularity", "token", *FEW]
    said = run(*given, *some, "-o", tokens)
    assert "1 rows with source_row, source_lima, source_havana, ... (6 in all)" in said
    written = load_dataset("parquet", data_files=str(tokens), split="train")[0]
    assert "".join(written["source_tokens"][:-1]) == written["text"]
    np.testing.assert_allclose(sum(written["source_lima_tokens"]), scores[0].max(), rtol=1e-3)
    assert "pretrain': 1 rows" in run("plan", *given[1:], *some)

    asked = ["-p", "Peru:", "-c", " Lima", "--stage", "pretrain", *FEW]
    out = tmp_path / "parts.parquet"
    run("attribute", record, *asked, "--span", "Li", "--span", "a", "--query-granularity", "span", "-o", out)
    written = load_dataset("parquet", data_files=str(out), split="train")
    assert written.column_names[-2:] == ["source_q0_s0", "source_q0_s1"]
    run("attribute", record, *asked, "--query-granularity", "token", "-o", out)
    written = load_dataset("parquet", data_files=str(out), split="train")
    np.testing.assert_allclose(sum(np.array(written[f"source_q0_t{t}"]) for t in range(5)), scores[0], atol=1e-5)
    said = refused("attribute", record, *asked, "--span", "Rome", "-o", out)
    assert "The answer ' Lima' holds no 'Rome'" in said


@pytest.mark.parametrize("columns", [["name", "prompt", "completion"], ["name", "input_ids", "labels"]])
def test_queries_as_text_or_tokens(record, story, queries, scores, tmp_path, columns):
    encoded = queries.encode(story.processing_class()).to_dataset().select_columns(columns)
    encoded.to_parquet(str(tmp_path / "asked.parquet"))
    run(
        "attribute",
        record,
        "-q",
        tmp_path / "asked.parquet",
        "--stage",
        "pretrain",
        "-o",
        tmp_path / "s.parquet",
        *FEW,
    )
    written = load_dataset("parquet", data_files=str(tmp_path / "s.parquet"), split="train")
    np.testing.assert_allclose(written["source_havana"], scores[1], rtol=1e-4, atol=1e-6)


def test_attribute_with_a_generated_completion(record, story, tmp_path):
    out = tmp_path / "scored.parquet"
    method = ["--method", "grad-cos", "--stage", "sft"]
    run("attribute", record, "-p", "Q Cuba? A", "--max-new-tokens", 4, "-o", out, *method)
    written = load_dataset("parquet", data_files=str(out), split="train")
    attributor = SourceAttributor.from_record(story.path, method="grad-cos", progress=False)
    said = attributor.generate(["Q Cuba? A"], max_new_tokens=4)
    np.testing.assert_allclose(written["source_q0"], attributor.scores(None, said, "sft")[0], rtol=1e-4, atol=1e-6)


def test_attribute_refuses(record, queries_file, tmp_path):
    out = ["-o", tmp_path / "scored.parquet", *FEW]
    sft = ["--stage", "sft"]
    rows = tmp_path / "rows.jsonl"
    Dataset.from_dict({"question": ["a"] * 4}).to_json(str(rows))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"', encoding="utf-8")

    said = refused("attribute", record, *ASKED, *sft, "-o", tmp_path / "scored.xlsx")
    assert "scored.xlsx: end the name in .parquet, .csv, .jsonl" in said
    assert "either --queries FILE, or --prompt" in refused("attribute", record, *sft, *out)
    assert "either --queries FILE, or --prompt" in refused("attribute", record, "-q", rows, *ASKED, *sft, *out)
    assert "1 --prompt but 2 --completion" in refused("attribute", record, *ASKED, "-c", "x", *sft, *out)
    assert "has no column 'completion'" in refused("attribute", record, "-q", rows, *sft, *out)
    assert "There is no file" in refused("attribute", record, "-q", tmp_path / "none.jsonl", *sft, *out)
    assert "cannot be read" in refused("attribute", record, "-q", broken, *sft, *out)
    assert "has no stage 'dpo'" in refused("attribute", record, *ASKED, "--stage", "dpo", *out)
    assert "several stages: choose `stage=`" in refused("attribute", record, *ASKED, *out)
    assert "none of which hf_source can read" in refused("attribute", record, *ASKED, *sft, "--dataset", rows, *out)
    assert "no training record" in refused("attribute", tmp_path, *ASKED, *sft, *out)
    assert not (tmp_path / "scored.parquet").exists()


def test_a_column_that_is_there_is_refused(record, queries_file, tmp_path):
    facts().add_column("source_lima", [0.0] * 8).to_parquet(str(tmp_path / "facts.parquet"))
    said = refused("attribute", record, "-q", queries_file, "--stage", "pretrain", "--dataset",
                   tmp_path / "facts.parquet", "-o", tmp_path / "scored.parquet")  # fmt: skip
    assert "'source_lima', which the dataset has already: rename the query" in said


def test_settings_that_are_refused(record, tmp_path):
    plan = ["plan", record, *ASKED]
    said = refused(*plan, "--set", "nun_samples=3")
    assert "'nun_samples' is not a setting of SourceAttributor with this method; it has cache_dir, checkpoints" in said
    assert "Override 'seed' is not of the form key=value" in refused(*plan, "--set", "seed")
    assert "seed='x' should be of type int, e.g. 0" in refused(*plan, "--set", "seed=x")
    assert "tail=1 should be of type bool, e.g. True" in refused(*plan, "--set", "tail=1")
    assert "not valid YAML" in refused(*plan, "--set", "seed=[1")
    assert "draws=0: at least one draw" in refused(*plan, "--method", "stepwise", "--set", "draws=0")
    assert "shard_model=True belongs to" in refused(*plan, "--set", "shard_model=true")  # in one process
    assert "num_samples=0" in refused(*plan, "--num-samples", 0)
    assert "'dtype' is not a setting" in refused(*plan, "--set", "dtype=float16")
    assert "There is no recipe" in refused(*plan, "--recipe", tmp_path / "none.yaml")
    recipe = tmp_path / "a.yaml"
    for text, message in (
        ("- a\n", "holds no settings"),
        ("a: [1\n", "not valid YAML"),
        ("methods: x\n", "'methods' is"),
    ):
        recipe.write_text(text, encoding="utf-8")
        assert message in refused(*plan, "--recipe", recipe)


def test_an_unknown_method_is_a_usage_error(record):
    result = CliRunner().invoke(app, ["plan", record, *ASKED, "--method", "sauce"])
    assert result.exit_code == 2
    assert "sauce" in result.stderr and "grad-dot" in result.stderr


# ---- top -----------------------------------------------------------------------------------------------------------


def test_top_prints_and_writes_a_page(record, queries_file, tmp_path):
    out = tmp_path / "new" / "index.html"
    said = run("top", record, "-q", queries_file, "-k", 2, "-o", out, *FEW)
    lima = said.split("havana")[0]
    rows = [line.split() for line in lima.splitlines() if line.startswith(("pretrain", "sft"))]
    assert [row[0] for row in rows] == ["pretrain"] * 4 + ["sft"] * 4
    assert " ".join(rows[0][3:]) == "Peru: Lima."
    assert rows[0][1].startswith("+")
    assert "score (nats)" in lima
    assert f"Wrote {out}." in said
    page = out.read_text(encoding="utf-8")
    assert f"Attribution from {record}" in page
    assert page.count("<details") == 2
    assert rows[0][1] in page


def test_top_without_opposing_rows_and_without_unit(record):
    said = run("top", record, *ASKED, "-k", 1, "--no-opposing", "--method", "grad-cos")
    assert len([line for line in said.splitlines() if line.startswith(("pretrain", "sft"))]) == 2
    assert "nats" not in said


# ---- train ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """A stage from scratch: recipe file, with a tokenizer and rows beside it."""
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    facts().to_json(str(tmp_path / "facts.jsonl"))
    chats().to_json(str(tmp_path / "chats.jsonl"))
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
    return write(
        tmp_path / "pretrain.yaml",
        {
            "model_config": {"model_type": "gpt2", **sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            "tokenizer": str(tmp_path / "tokenizer"),
            "dataset": str(tmp_path / "facts.jsonl"),
            "training": {
                "output_dir": str(tmp_path / "out"),
                "record_dir": str(tmp_path / "record"),
                "stage": "pretrain",
                "num_segments": 1,
                "max_steps": 50,
                "per_device_train_batch_size": 4,
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
            },
        },
    )


def write(path: Path, settings: dict) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_two_stages_from_recipes(recipe, tmp_path):
    said = run("train", recipe, "training.learning_rate=2e-3", "training.max_steps=3", "model_config.n_layer=2")
    assert f"Recorded in {tmp_path / 'record'}" in said
    (first,) = TrainingRecord.load(tmp_path / "record").stages
    assert first.num_steps == 3
    assert first.num_rows == 8
    assert first.build_model().config.n_layer == 2
    assert float(first.steps().learning_rate.max()) == pytest.approx(2e-3)

    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings |= {"model": settings["training"]["record_dir"], "dataset": str(tmp_path / "chats.jsonl")}
    settings["training"] |= {"stage": "sft", "max_steps": 2}
    second = write(
        tmp_path / "sft.yaml", {k: v for k, v in settings.items() if k not in ("model_config", "tokenizer")}
    )
    run("train", second)
    record = TrainingRecord.load(tmp_path / "record")
    assert [stage.name for stage in record.stages] == ["pretrain", "sft"]
    final, start = record.stage("pretrain").weights("final"), record.stage("sft").weights("initial")
    assert all(bool((final[name] == start[name]).all()) for name in final)

    # Trained anew, the second stage starts where the first one ended, not where it ended itself.
    assert "'sft'" in refused("train", second)
    run("train", second, "training.overwrite_stage=true", "training.max_steps=4")
    sft = TrainingRecord.load(tmp_path / "record").stage("sft")
    assert sft.num_steps == 4
    assert all(bool((final[name] == weights).all()) for name, weights in sft.weights("initial").items())
    assert "No stage of the record" in refused("train", second, "training.stage=pretrain")


def test_the_seed_makes_the_weights(recipe, tmp_path):
    weights = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        over = [f"training.record_dir={tmp_path / folder}", f"training.seed={seed}", "training.max_steps=1"]
        run("train", recipe, *over)
        weights.append(TrainingRecord.load(tmp_path / folder).stage().weights("initial")["transformer.wte.weight"])
    assert bool((weights[0] == weights[1]).all())
    assert not bool((weights[0] == weights[2]).all())


def test_train_from_a_folder(recipe, tmp_path):
    run("train", recipe, "training.max_steps=1")
    TrainingRecord.load(tmp_path / "record").stage().build_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    run("train", recipe, "model_config=", "tokenizer=", f"model={tmp_path / 'model'}", "training.max_steps=1",
        f"training.record_dir={tmp_path / 'other'}")  # fmt: skip
    assert TrainingRecord.load(tmp_path / "other").processing_class() is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser=adam", "unknown key 'optimiser'; a training recipe has model, model_config"),
        ("training.learning_rte=1", "(or TrainingArguments). Did you mean learning_rate?"),
        ("training.qqqq=1", "training.qqqq is not a setting of SourceConfig (or TrainingArguments)."),
        ("training.learning_rate", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("training.seed=[1", "not valid YAML: quote it"),
        ("dataset.path=x", "'dataset' holds a single value"),
        ("training=3", "`training` holds a single value"),
        ("training=", "The recipe has no `training`"),
        ("dataset=", "The recipe has no `dataset`"),
        ("dataset=nowhere.jsonl", "There is no file nowhere.jsonl"),
        ("model=gpt2", "either `model` (a Hub id, folder or record) or `model_config`"),
        ("model_config=", "either `model` (a Hub id, folder or record) or `model_config`"),
        ("tokenizer=", "needs `tokenizer`, and `model_type`"),
        ("tokenizer=./no/such/folder", "There is no folder ./no/such/folder"),
        ("training.stage=a/b", "cannot name a folder"),
        ("training.eval_strategy=sometimes", "settings do not fit together: sometimes is not"),
        ("training.max_length=1", "max_length=1 must be at least 2"),
        ("model_config.n_positions=8", "the model's context holds 8"),
    ],
)
def test_train_refuses(recipe, override, message):
    assert message in refused("train", recipe, override)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "holds no settings"), ("a: [1\n", "not valid YAML"), ("", "has no `dataset`")]
)
def test_train_refuses_files_without_settings(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    assert "There is no recipe" in refused("train", path)
    path.write_text(text, encoding="utf-8")
    assert message in refused("train", path)


def test_numbers_and_words_of_a_recipe(recipe, tmp_path):
    """`1e-4` is a number although YAML 1.1 takes it for text; a stage may be called 2024."""
    run("train", recipe, "training.learning_rate=1e-4", "training.max_steps=1", "training.stage='2024'")
    stage = TrainingRecord.load(tmp_path / "record").stage("2024")
    assert float(stage.steps().learning_rate.max()) == pytest.approx(1e-4)


# ---- the error printer itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["asked.jsonl", "asked.csv", "asked.parquet"])
def test_an_empty_file(record, tmp_path, name):
    (tmp_path / name).touch()
    assert "is empty" in refused("plan", record, "-q", tmp_path / name)


def test_an_interrupted_command_says_so(record, monkeypatch):
    def interrupt(*given, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(SourceAttributor, "top", interrupt)
    result = CliRunner().invoke(app, ["top", record, *ASKED])
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n" and not result.stdout


def test_markup_in_an_error_is_shown_literally(record, tmp_path):
    assert "There is no file [bold]x[/bold].jsonl" in refused("plan", record, "-q", "[bold]x[/bold].jsonl")


# ---- ensembles -----------------------------------------------------------------------------------------------------


def test_ensembles_from_the_command_line(record, queries_file, tmp_path):
    other = tell(tmp_path, seed=1)
    out = tmp_path / "scored.parquet"
    said = run("attribute", record, "--run", other.path, "-q", queries_file, "--stage", "pretrain", *FEW, "-o", out,
               "--std")  # fmt: skip
    assert "Scores are means over 2 independently trained models." in said
    scored = load_dataset("parquet", data_files=str(out), split="train")
    assert np.asarray(scored["source_lima_std"]).max() > 0
    masks = ["--ensemble", "dropout", "--ensemble-size", "3", "--set", "dropout=0.1", "--method", "grad-dot"]
    out = run("plan", record, *ASKED, *FEW, "--stage", "pretrain", *masks)
    assert "3 members, one after another" in out
    said = run("top", record, *ASKED, *FEW, *masks, "-k", "1")
    assert "Scores are means over 3 dropout masks of the model." in " ".join(said.split())
    assert "dropout=0.1" in refused("top", record, *ASKED, *FEW, "--ensemble", "dropout")
    assert "'dropout' is not a setting" in refused("top", record, *ASKED, "--set", "dropout=0.1")
    assert "should be of type int" in refused("top", record, *ASKED, "--ensemble", "lora", "--set", "lora_steps=often")
