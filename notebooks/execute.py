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

Each runs in a temporary folder, so that no output holds a path of this machine and nothing is left behind.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent


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
    for given in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        start = time.perf_counter()
        nbformat.write(execute(given), given)
        print(f"{given.name}: {time.perf_counter() - start:.0f} s")
