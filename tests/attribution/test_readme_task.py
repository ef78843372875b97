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
"""The README's task of one's own runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import torch
from transformers import default_data_collator

from hf_source import Queries, SourceTrainer
from hf_source.evaluation import evaluate

from ..cases import config
from ..heads import HEADS, Perceptron


def test_the_readmes_task_of_ones_own(tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"test_readme_task.py -->\n```python\n(.*?)```", text, flags=re.S)
    rows = HEADS["own-regression"].rows()
    make_model = lambda: Perceptron(1, torch.nn.HuberLoss())  # noqa: E731
    SourceTrainer(make_model(), config(tmp_path), train_dataset=rows).train()
    given = {"rows": rows, "asked": rows.select(range(2)), "collator": default_data_collator, "make_model": make_model}
    exec(code.replace("runs/huber", str(tmp_path / "record")), given)
    scored = np.asarray(given["scored"]["source_q0"])
    assert scored.shape == (12,) and scored.argmax() == 0 and np.isfinite(scored).all()
    report = evaluate(
        given["attributor"], Queries.from_rows(given["asked"]), num_subsets=4, fraction=0.1, progress=False
    )
    assert [entry.method for entry in report.entries] == ["source"] and np.isfinite(report.entries[0].value)
