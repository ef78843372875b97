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
"""Run the notebooks and keep their outputs: `python notebooks/execute.py [NAME.ipynb ...]`, by default all of them.

With `--badges` only their first cell is written anew, which opens them in Colab: from the repository that
pyproject.toml names (`Repository` of `[project.urls]`), or by uploading them where it names none.

Each runs in a temporary folder, so that no output holds a path of this machine and nothing is left behind.
"""

import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent
BADGE = "badge"
"""Tag of the cell that opens a notebook in Colab."""


def badge(path: Path) -> str:
    """Markdown that opens a notebook in Colab, and says how to install the library there."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    if repository is None:  # no address that is known to be this repository's: nobody is told to install another's
        where = ""
        install = (
            "Choose *Upload* and this notebook. Make a wheel of the repository (`pip wheel --no-deps .`), put it "
            f'beside the notebook, and first run `!pip install "$(ls {project["name"]}-*.whl)[demo,plot]"`.'
        )
    else:
        where = f"github/{repository.removeprefix('https://github.com/')}/blob/main/notebooks/{path.name}"
        install = f'On Colab, first run `!pip install "{project["name"]}[demo,plot] @ git+{repository}"`.'
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})](https://colab.research.google.com/{where})\n\n{install}"


def with_badge(notebook: nbformat.NotebookNode, path: Path) -> nbformat.NotebookNode:
    """The notebook with its badge as the first cell."""
    if BADGE not in notebook.cells[0].metadata.get("tags", []):
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(metadata={"tags": [BADGE]}, id=BADGE))
    notebook.cells[0].source = badge(path)
    return notebook


def execute(path: Path, changes: str = "", folder: Path | None = None, check: str = "") -> nbformat.NotebookNode:
    """Run a notebook.

    Args:
        path: of the notebook, which stays as it is.
        changes: Python that takes the place of the cell tagged `parameters`.
        folder: to run in; a temporary one by default.
        check: Python that runs after the last cell.

    Returns:
        The notebook with its outputs, without times and other traces of this run.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    if changes:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source = changes
    if check:
        notebook.cells.append(nbformat.v4.new_code_cell(check))
    # The notebooks show what the library does, not what a terminal or the Hub would add to it.
    env = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        where = str(folder or temporary)
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": where}}, record_timing=False
        ).execute(env=env)
    # What libraries say of this machine while they load is no part of the story; any other warning stays.
    loading = next(cell for cell in notebook.cells if cell.cell_type == "code")
    loading.outputs = [output for output in loading.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    only_badges = "--badges" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--badges"]
    for given in map(Path, names or sorted(FOLDER.glob("*.ipynb"))):
        start = time.perf_counter()
        notebook = nbformat.read(given, as_version=4) if only_badges else execute(given)
        nbformat.write(with_badge(notebook, given), given)
        print(f"{given.name}: {time.perf_counter() - start:.0f} s")
