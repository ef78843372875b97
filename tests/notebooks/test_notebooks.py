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

"""Every notebook runs on small settings, and the outputs that are kept are whole and hold nothing of a machine."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest


NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"""(^|[\s"'(=])/(home|root|tmp|work|usr|var|opt|private|Users)/|[A-Z]:\\""")

# What takes the place of the cell of settings, and what must then hold in the kernel at the end.
SMALL = {
    "quickstart": (
        "NUM_FACTS, EPOCHS, NUM_SAMPLES = 96, 12, 32",
        "assert scored.num_rows == 96 and set(scored.column_names) >= {'source_australia', 'source_belgium'}",
    ),
    "two_stages": (
        "NUM_FACTS, EPOCHS, NUM_SAMPLES = 60, 8, 32",
        "assert abs(table['share of pretrain'] + table['share of sft'] - 1).max() < 0.011 and len(table) == 6",
    ),
    "debugging_an_error": (
        "NUM_FACTS, EPOCHS, NUM_SAMPLES = 96, 12, 32",
        "assert found['planted'][:1].all() and odds[3] < odds[0]",
    ),
    "evaluating_trust": (
        "NUM_FACTS, EPOCHS, NUM_SAMPLES, NUM_SUBSETS, NUM_QUERIES = 40, 3, 32, 4, 3",
        "assert [entry.method for entry in report.entries] == methods and len(found) == 3",
    ),
    "sharing": (
        "NUM_FACTS, EPOCHS, NUM_SAMPLES = 96, 4, 32",
        "assert (attribution.scores('pretrain')[0] == list(scored['source_australia'])).all()",
    ),
}


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_known():
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (NOTEBOOKS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(SMALL) == [path.stem for path in PATHS]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_badges(path):
    """Each opens Colab; an address to install from comes from the one place that may name it."""
    pytest.importorskip("nbformat")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    expected = runpy.run_path(str(NOTEBOOKS / "execute.py"))["badge"](path)
    assert "".join(cells[0]["source"]) == expected, "run notebooks/execute.py --badges"
    assert sum("colab-badge.svg" in "".join(cell["source"]) for cell in cells) == 1
    named = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text())["project"].get("urls", {})
    assert ("git+" in expected) == ("Repository" in named)


@pytest.mark.parametrize("repository", [None, "https://github.com/someone/somewhere"])
def test_a_badge_follows_the_address(repository, tmp_path):
    pytest.importorskip("nbformat")
    project = '[project]\nname = "hf_source"\n'
    project += f'[project.urls]\nRepository = "{repository}"\n' if repository else ""
    (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    badge = runpy.run_path(str(NOTEBOOKS / "execute.py"))["badge"]
    badge.__globals__["FOLDER"] = tmp_path / "notebooks"
    said = badge(PATHS[0])
    if repository is None:
        assert "(https://colab.research.google.com/)" in said and "hf_source-*.whl" in said
    else:
        assert (
            f"(https://colab.research.google.com/github/someone/somewhere/blob/main/notebooks/{PATHS[0].name})" in said
        )
        assert f"git+{repository}" in said


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_kept_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run notebooks/execute.py"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    text = json.dumps(outputs, ensure_ascii=False).replace("\\n", "\n")
    assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)
    assert path.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"pip install {package} to run the notebooks")
    settings, check = SMALL[path.stem]
    execute = runpy.run_path(str(NOTEBOOKS / "execute.py"))["execute"]
    notebook = execute(path, settings, tmp_path, check)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert (tmp_path / "runs").is_dir()
