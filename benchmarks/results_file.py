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
"""What the files of results have in common: where and with what something was measured, and lines that are kept."""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_source import __version__


def machine() -> dict[str, Any]:
    """Where something was measured."""
    return {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """What it was measured with."""
    return {"hf_source": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def section(settings: Mapping[str, Any], kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A part of a file, or the whole of it.

    Args:
        settings: of what is measured.
        kept: an earlier section, whose lines stay until they are measured again; they are forgotten by default.
    """
    results = dict(kept.get("results", {})) if kept else {}
    return {"settings": dict(settings), "machine": machine(), "versions": versions(), "results": results}


def load(file: Path) -> dict[str, Any]:
    """What a file holds; nothing, if it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def saver(file: Path, report: Mapping[str, Any]) -> Callable[[], None]:
    """What writes the report as it then is, to be called after every line."""

    def save() -> None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    return save


def parser(doc: str, script: str) -> argparse.ArgumentParser:
    """The command line of a benchmark, with `--only` and `--out`.

    Args:
        doc: its docstring.
        script: its `__file__`; `bench_<name>.py` writes `<name>.json` beside it.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--only", nargs="+", default=[""], help="what to run, by a part of the name; other lines are kept"
    )
    name = Path(script).stem.removeprefix("bench_")
    found.add_argument("--out", type=Path, default=Path(script).with_name(f"{name}.json"))
    return found


def go_on(
    run: Callable[[argparse.Namespace, Path, dict[str, Any], Callable[[], None]], None],
    args: argparse.Namespace,
    settings: Mapping[str, Any],
) -> None:
    """Run a benchmark that is one section: `run(args, folder, report, save)`, in a folder that is gone afterwards."""
    report = section(settings, None if args.only == [""] else load(args.out))
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder), report, saver(args.out, report))
