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
"""The documentation builds, and what it says of links, code, commands and messages is so."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from typer.main import get_command

from hf_source.attribution import ENSEMBLES, METHODS, SourceAttributor
from hf_source.cli import app

from ..cases import byte_tokenizer, tiny_gpt2
from ..story import facts


ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_CODE = [*PAGES, ROOT / "README.md", *sorted((ROOT / "recipes").glob("*/README.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


# ---- the site ------------------------------------------------------------------------------------------------------


class Found(HTMLParser):
    """What a page links to, what it loads, and what can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Found]:
    """The pages of a strict build, in which any warning is an error."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason="the documentation needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path] = Found()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def test_every_page_is_built(site):
    assert {page.stem for page in PAGES} <= {path.stem for path in site}


def test_every_internal_link_leads_somewhere(site):
    checked = 0
    for path, found in site.items():
        if path.name == "404.html":  # its links start at the root of a server
            continue
        for link in [*found.links, *found.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name} links to {link}, which is not there"
            if parts.fragment and target in site and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in site[target].anchors, f"{path.name}: {link} has no such heading"
            checked += 1
    assert checked > 100


def test_pages_load_nothing_from_elsewhere(site):
    for path, found in site.items():
        away = [link for link in found.loaded if urlsplit(link).netloc]
        assert not away, f"{path.name} loads {away}"


def test_formulas_are_drawn(site):
    text = next(path for path in site if path.stem == "source").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "arithmatex" not in text and "\\frac" not in text


def test_public_names_are_in_the_api(site):
    import hf_source

    text = next(path for path in site if path.stem == "api").read_text(encoding="utf-8")
    for name in hf_source._LAZY:
        assert re.search(rf'id="hf_source\.[\w.]*\b{name}"', text), name


# ---- what Markdown files point at ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_relative_links_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not urlsplit(link).scheme and not link.startswith("#"):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_files_and_make_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b((?:benchmarks|recipes)/[\w/.-]+\.(?:py|json|yaml))\b", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE):
        assert "".join(target) in targets, target


# ---- commands ------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Every `hf-source` line of the page's shell blocks, with continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("hf-source ")]


COMMANDS = [pytest.param(line, id=f"{name_of(page)}: {line[:60]}") for page in WITH_CODE for line in commands(page)]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    command, words, given = get_command(app), shlex.split(line, comments=True)[1:], {}
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{command.name} has no command {words[0]}"
        command = command.commands[words.pop(0)]
    with command.make_context(command.name, list(words)) as context:  # raises for an option that is not there
        given = context.params
    for override in given.get("settings") or []:
        assert override.split("=")[0] in attributor_settings(), override


def test_a_wrong_option_would_be_noticed():
    with pytest.raises(Exception, match="[Nn]o such option"):
        test_commands_parse("hf-source top runs/mine --promt x")


# ---- Python --------------------------------------------------------------------------------------------------------


def attributor_settings() -> set[str]:
    named = set(inspect.signature(SourceAttributor.__init__).parameters) - {"self", "options"}
    kinds = [*METHODS.values(), *ENSEMBLES.values()]
    return named | {field.name for kind in kinds for field in fields(kind.options)}


PYTHON = [
    pytest.param(text, id=f"{name_of(page)}-{number}")
    for page in WITH_CODE
    for number, text in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_blocks_fit_the_library(text):
    """They compile, import what is there, and call it with arguments that it takes."""
    tree = ast.parse(text)
    known = {"Queries": SourceAttributor.__init__.__globals__["Queries"], "SourceAttributor": SourceAttributor}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_source":
            known |= {alias.name: imported(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        called = called_by(node, known) if isinstance(node, ast.Call) else None
        if called is None:
            continue
        keywords = {word.arg for word in node.keywords if word.arg}
        if called in (SourceAttributor.from_record, SourceAttributor.like):
            assert keywords <= attributor_settings(), keywords - attributor_settings()
        else:
            taken = inspect.signature(called).parameters
            open_ended = any(each.kind is each.VAR_KEYWORD for each in taken.values())
            assert open_ended or keywords <= set(taken), f"{ast.unparse(node)}: {keywords - set(taken)}"


def imported(module: str, name: str):
    """What `from module import name` gives: an attribute, or a module of the package."""
    found = import_module(module)
    return getattr(found, name) if hasattr(found, name) else import_module(f"{module}.{name}")


def called_by(node: ast.Call, known: dict):
    """The function of the library that a call calls, if it is one."""
    called = node.func
    if isinstance(called, ast.Name):
        return known.get(called.id)
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        owner = known.get(called.value.id)
        if called.value.id in ("attributor", "runs", "other"):
            owner = SourceAttributor
        return None if owner is None else getattr(owner, called.attr)
    return None


def test_a_wrong_argument_would_be_noticed():
    with pytest.raises(AssertionError):
        test_python_blocks_fit_the_library("queries = Queries.from_text(prompt=['x'], completions=['y'])")
    with pytest.raises(AttributeError):
        test_python_blocks_fit_the_library("attributor.atribute(rows, queries)")


def section(page: str, heading: str) -> str:
    """The Python of one section of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(body for kind, body in _BLOCK.findall(found) if kind == "python")
    assert code, f"{page} has no code under {heading}"
    return code


@pytest.fixture()
def given(tmp_path, monkeypatch) -> dict:
    """What the pages say is the reader's own, on a byte-level model; `runs/` is in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    model, rows = tiny_gpt2(vocab_size=260, n_positions=64), facts()
    return {"model": model, "tokenizer": byte_tokenizer(), "facts": rows, "rows": rows, "dataset": rows}


def test_the_quickstart_runs(given):
    code = section("index.md", "Quickstart")
    assert code.count("scored.sort") == 1 and "range(10)" in code
    exec(code.replace("range(10)", "range(3)"), given)
    assert given["scored"].num_rows == 8 and np.isfinite(given["scored"]["source_q0"][:]).all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_how_to_runs(given):
    """Section after section, as a reader would; evaluations, ensembles and the Hub have tests of their own."""
    for heading in ("Record a stage", "LoRA", "Streams", "Ask your own question", "Several stages"):
        exec(section("how-to.md", heading), given)
    assert {"source_hungary", "source_wrong"} <= set(given["early"].column_names) & set(given["late"].column_names)
    assert set(given["table"]["stage"]) == {"train", "lora"}
    assert sorted(row["source_row"] for row in given["stream"]) == list(range(8))
    given["attributor"] = given["attributor"].like(num_samples=32)
    exec(section("how-to.md", "Parts of an answer, and tokens of a row"), given)
    assert len(given["tokens"]) == 5 and len(given["tokens"][0]["source_hungary_tokens"]) > 1
    assert sum(name.startswith("source_hungary_t") for name in given["each"].column_names) >= 1
    for heading in ("Ask again in seconds", "Score candidates only"):
        exec(section("how-to.md", heading), given)
    assert {"source_hungary", "source_wrong"} <= set(given["answered"].column_names)
    assert "are scored" in given["found"].info.description
    for heading in ("Write a report", "Explore in a browser"):
        exec(section("how-to.md", heading), given)
    assert Path("answer.html").stat().st_size > 10_000
    exec(section("how-to.md", "Other methods and settings"), given)
    assert given["scores"].shape == (2, 8) and np.isfinite(given["scores"]).all()


# ---- tables and messages -------------------------------------------------------------------------------------------


def test_every_method_and_setting_is_described():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name, method in METHODS.items():
        assert f"| `{name}` |" in text, name
        unit = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |")).split(" | ")[2]
        assert (unit.strip() == "nats") == method.nats, name
        for field in fields(method.options):
            rows = [line for line in text.splitlines() if f"`{name}`" in line and f"`{field.name}`" in line]
            assert rows, f"{name}: {field.name}"


def messages() -> list[tuple[str, str]]:
    """All text of the library, with … for what is put in, and the error that it is raised as, if any."""
    found = []
    for path in (ROOT / "hf_source").rglob("*.py"):
        raised = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                raised |= {id(part): node.func.id for part in ast.walk(node)}
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append(("".join(parts), raised.get(id(node), "")))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((node.value, raised.get(id(node), "")))
    return found


def test_messages_and_their_errors_are_those_of_the_library():
    text, known = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), messages()
    shown = re.findall(r"^### `(.*)`\n\n`(\w+)`", text, re.MULTILINE)
    assert len(shown) == text.count("\n### ") and len(shown) > 40
    missing = [message for message, _ in shown if not any(message in said for said, _ in known)]
    assert not missing, missing
    kinds = {message: {kind for said, kind in known if message in said and kind} for message, _ in shown}
    wrong = {message: kinds[message] for message, kind in shown if kinds[message] and kind not in kinds[message]}
    assert not wrong, wrong
    assert sum(map(bool, kinds.values())) > 40
