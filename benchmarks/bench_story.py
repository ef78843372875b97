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
"""From a Trainer script to a page: the README's six lines, timed as a new user would run them.

The lines are taken from the README and run as they are, in a fresh process, on the demo's pretraining rows (975 facts)
and model (a GPT-2 of 0.33 M parameters). Each statement's wall time and processor time are written, imports included:
with one thread they are the same on a machine that does nothing else.

    OMP_NUM_THREADS=1 python benchmarks/bench_story.py

Writes `benchmarks/story.json`.
"""

import ast
import os
import re
import tempfile
import time
from pathlib import Path

import results_file


ROOT = Path(__file__).parents[1]


def readme_code() -> str:
    """The Python of the README's section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## From a Trainer script .*?```python\n(.*?)```", text, re.DOTALL)
    return code


def own_things() -> dict:
    """What the script had before: a model, its tokenizer and a dataset."""
    from hf_source.demo.facts import build_model, load_facts, pretrain_rows, train_tokenizer

    rows = pretrain_rows(load_facts())
    tokenizer = train_tokenizer(rows["text"])
    return {"model": build_model(tokenizer, 0), "tokenizer": tokenizer, "dataset": rows}


def main() -> None:
    code, given, seconds = readme_code(), own_things(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for statement in ast.parse(code).body:
            start = time.perf_counter(), time.process_time()
            exec(compile(ast.Module([statement], []), "README.md", "exec"), given)
            end = time.perf_counter(), time.process_time()
            spent = {name: round(b - a, 2) for name, a, b in zip(("wall", "processor"), start, end, strict=True)}
            seconds[ast.unparse(statement)[:60]] = spent
        size = Path("answer.html").stat().st_size
    report = results_file.section({"rows": len(given["dataset"]), "parameters": given["model"].num_parameters()})
    report["results"] = {"seconds": seconds, "page_bytes": size}
    for clock in ("wall", "processor"):
        report["results"][f"total_{clock}"] = round(sum(spent[clock] for spent in seconds.values()), 1)
    results_file.saver(ROOT / "benchmarks" / "story.json", report)()
    print(report["results"])


if __name__ == "__main__":
    main()
