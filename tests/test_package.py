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
import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import hf_source


def modules_after(statement: str) -> set[str]:
    """Names of all modules loaded in a fresh interpreter that runs one statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow"}


def test_import_loads_nothing_heavy():
    loaded = modules_after("import hf_source")
    assert "hf_source" in loaded
    assert not HEAVY & loaded


def test_help_loads_nothing_heavy():
    """`hf-source --help` answers at once."""
    loaded = modules_after(
        "import sys\nfrom hf_source.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['attribute', '--help']).exit_code == 0"
    )
    assert "hf_source.cli" in loaded
    assert not HEAVY & loaded


def test_a_lazy_name_loads_what_it_needs():
    assert {"torch", "hf_source.recording"} <= modules_after("from hf_source import SourceConfig")


def test_lazy_names_are_those_of_their_modules():
    from hf_source import attribution, recording

    for name in ("SourceConfig", "SourceTrainer", "RecordingMixin", "TrainingRecord", "number_rows"):
        assert getattr(hf_source, name) is getattr(recording, name)
    for name in ("SourceAttributor", "Queries"):
        assert getattr(hf_source, name) is getattr(attribution, name)
    assert set(hf_source.__all__) <= set(dir(hf_source))
    assert {name for name in hf_source.__all__ if not name.startswith("_")} == {
        "SourceConfig",
        "SourceTrainer",
        "SourceDiffusionTrainer",
        "RecordingMixin",
        "TrainingRecord",
        "number_rows",
        "DiffusionTask",
        "SourceAttributor",
        "Queries",
        "Attribution",
        "load_attribution",
        "save_attribution",
        "SourceIndex",
        "RowLossTask",
        "CausalLMTask",
    }


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'hf_source' has no attribute 'SourceAtributor'"):
        _ = hf_source.SourceAtributor


def test_version_is_that_of_the_distribution():
    assert hf_source.__version__ == version("hf_source")
