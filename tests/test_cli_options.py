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
"""Every option of every command is in some test, and those that change one setting only reach what they set."""

import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from hf_source import SourceIndex, TrainingRecord
from hf_source.cli import app

from .fake_hub import TOKEN


TESTS = Path(__file__).parent
ASKED = ["-p", "Peru:", "-c", " Lima"]


def options():
    """`(command, names)` of every option; of a switch, the names that change its default."""

    def walk(command, path):
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, [*path, name])
        for option in command.params if not hasattr(command, "commands") else ():
            if option.param_type_name == "option" and option.name != "help":
                off = option.secondary_opts if option.default is True else []
                yield " ".join(path), off or option.opts

    yield from walk(get_command(app), [])


def test_every_option_is_in_a_test():
    """Recipes and pages of the documentation are run by the tests."""
    pages = [*TESTS.rglob("*.py"), *TESTS.parent.glob("recipes/*/README.md"), *TESTS.parent.glob("docs/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = {word for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text)}
    lacking = [f"{command} {'/'.join(names)}" for command, names in options() if not found & set(names)]
    assert not lacking


def called(monkeypatch, target, words):
    """What a function was called with by a command, which ends there."""
    seen = {}

    def note(*args, **kwargs):
        seen.update(kwargs, args=args)
        raise typer.Exit(0)

    monkeypatch.setattr(target, note)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 and seen, result.output + result.stderr
    return seen


EXPERIMENT = "hf_source.evaluation.experiments.Experiment"
ATTRIBUTOR = "hf_source.SourceAttributor"


@pytest.mark.parametrize(
    ("words", "target", "expected"),
    [
        (["experiment", "removal", "--no-bottom", "--num-matched", 3, "--seed", 5, "--num-random", 2],
         f"{EXPERIMENT}.subset_removal", {"bottom": False, "num_matched": 3, "seed": 5, "num_random": 2}),
        (["experiment", "leave-one-out", "--num-bottom", 2, "--chosen-by", "bm25", "--seed", 4, "--figures", "f"],
         f"{EXPERIMENT}.leave_one_out", {"num_bottom": 2, "chosen_by": "bm25", "seed": 4}),
        (["experiment", "tail-patch", "--steps", 3, "--seed", 2, "--optimizer", "sgd"],
         f"{EXPERIMENT}.tail_patch", {"steps": 3, "seed": 2, "optimizer": "sgd"}),
        (["evaluate", "--seed", 7, "--seeds", 2, "--fraction", 0.5, "--fresh"],
         "hf_source.evaluation.evaluate", {"seed": 7, "num_seeds": 2, "fraction": 0.5}),
        (["top", "--no-opposing", "-k", 2], f"{ATTRIBUTOR}.top", {"opposing": False, "k": 2}),
    ],
    ids=["removal", "leave-one-out", "tail-patch", "evaluate", "top"],
)  # fmt: skip
def test_options_reach_what_they_set(story, monkeypatch, words, target, expected):
    command = 2 if words[0] == "experiment" else 1
    more = [] if words[0] == "top" else ["--stage", "pretrain"]
    given = [*words[:command], story.path, *words[command:], *ASKED, *more]
    seen = called(monkeypatch, target, given)
    assert {name: seen[name] for name in expected} == expected


def test_options_of_what_is_pushed(story, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def call(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output + result.stderr
        return result.stdout

    call("push", story.path, "me/s", *ASKED, "--method", "bm25", "--revision", "v2", "--commit-message", "Mine")
    assert "README.md" in hub.files("datasets/me/s", "v2") and "README.md" not in hub.files("datasets/me/s")
    call("record", "push", story.path, "me/r", "--include-rows", "--revision", "v2")
    for command in ("show", "verify"):
        assert "pretrain" in call("record", command, "me/r", "--revision", "v2") or command == "verify"
    call("record", "pull", "me/r", tmp_path / "here", "--revision", "v2")
    assert [stage.name for stage in TrainingRecord.load(tmp_path / "here").stages] == ["pretrain", "sft"]
    call("record", "push-model", story.path, "me/m", "--revision", "v2")
    assert "model.safetensors" in hub.files("me/m", "v2")
    index = tmp_path / "index"
    call(
        "index",
        story.path,
        index,
        "--num-samples",
        8,
        "--numbers",
        50,
        "--precision",
        "full",
        "--push",
        "me/i",
        "--public",
    )
    assert SourceIndex.load(index).described()["precision"] == "full"
    assert not hub.repositories["datasets/me/i"]["private"]


def test_what_is_left_beside_the_scores(story, tmp_path, monkeypatch):
    """`--no-resume` keeps no finished work."""
    seen = {}
    from hf_source.cli.groups import Models

    opened = Models.open

    def note(self, *args, **settings):
        seen.update(settings)
        return opened(self, *args, **settings)

    monkeypatch.setattr(Models, "open", note)
    words = ["attribute", str(story.path), *ASKED, "--method", "bm25", "--stage", "sft", "-o", str(tmp_path / "s.csv")]
    for more, kept in ((["--no-resume"], None), ([], str(tmp_path / "s.csv.work"))):
        assert CliRunner().invoke(app, [*words, *more], catch_exceptions=False).exit_code == 0
        assert seen["cache_dir"] == kept


def test_the_explorer_opens_in_the_browser_if_that_is_said(story, monkeypatch):
    pytest.importorskip("gradio")
    for more, expected in (([], False), (["--browser"], True)):
        seen = called(monkeypatch, "hf_source.explorer.app.launch", ["explore", story.path, "--method", "bm25", *more])
        assert seen["inbrowser"] is expected
