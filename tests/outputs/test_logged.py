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
"""Attributions where a run's metrics are."""

import numpy as np
import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor
from hf_source.cli import app
from hf_source.errors import ConfigError
from hf_source.outputs.logged import log_attribution
from hf_source.outputs.sharing import collect

from ..cases import tiny_gpt2, train


class Heard(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events, self.logs, self.step = [], {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append("log")
        self.logs, self.step = logs, state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


@pytest.fixture
def attributor(story):
    return SourceAttributor.from_record(story.path, method="bm25", progress=False)


def written(folder):
    """Scalars and texts of TensorBoard's files in a folder."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loader.EventAccumulator(str(folder))
    found.Reload()
    scalars = {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
    texts = {tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    return scalars, texts


def test_figures_and_tables_of_an_attribution(attributor):
    queries = Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", "<b>|Havana"], names=["lima", "havana"])
    heard = Heard()
    logs = log_attribution(attributor, heard, step=7, queries=queries)
    assert heard.events == ["begin", "log", "end"] and heard.step == 7 and heard.logs == logs
    scores = attributor.scores(None, queries, "sft")[0].astype(np.float64)
    assert logs["source/lima/sft/sum"] == pytest.approx(scores.sum())
    assert logs["source/lima/sft/largest"] == pytest.approx(scores.max())
    assert logs["source/lima/sft/supporting"] == pytest.approx(scores[scores > 0].sum())
    assert len(logs) == 2 * 2 * 5 + 2
    table = logs["source/havana/rows"]
    assert "&lt;b&gt;\\|Havana" in table and "<b>" not in table
    best = attributor.top(queries, k=10)[0]
    assert f"| {best['score']:+.4f} | {best['stage']} | {best['row']} |" in logs["source/lima/rows"]


def test_an_attribution_without_its_model(attributor):
    queries = Queries.from_text(["Peru:"], [" Lima"])
    with pytest.raises(ConfigError, match="Nothing was attributed yet"):
        log_attribution(attributor, Heard())
    assert log_attribution(collect(attributor, queries), [Heard(), Heard()]) == log_attribution(attributor, Heard())


def test_tensorboard(attributor, tmp_path):
    attributor.top(Queries.from_text(["Peru:"], [" Lima"]))
    logs = log_attribution(attributor, "tensorboard", output_dir=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    scalars, texts = written(folder)
    assert scalars["train/source/q0/sft/sum"] == pytest.approx(logs["source/q0/sft/sum"])
    assert texts["train/source/q0/rows/text_summary"] == logs["source/q0/rows"]


def test_an_attributor_goes_on_after_logging(attributor):
    attributor.top(Queries.from_text(["Peru:"], [" Lima"]))
    log_attribution(attributor, Heard())
    assert attributor.accelerator.num_processes == 1 and attributor.accelerator.is_main_process
    assert attributor.scores(None, Queries.from_text(["Cuba:"], [" Havana"]), "sft").shape == (1, 4)


def test_a_training_reports_its_record(tmp_path):
    """In the entry that ends a training, before integrations close their runs."""
    settings = {"report_to": ["tensorboard"], "max_steps": 5, "num_segments": 2, "logging_strategy": "steps"}
    run, record = train(tmp_path, tiny_gpt2(), **settings)
    stage = record.stages[0]
    figures = {
        "record_steps": stage.num_steps,
        "record_segments": len(stage.segments),
        "record_rows": stage.num_rows,
        "record_trained_parameters": run.model.num_parameters(),
    }
    assert figures["record_steps"] == 5 and figures["record_segments"] == 2
    (last,) = [entry for entry in run.state.log_history if "train_runtime" in entry]
    assert {key: last[key] for key in figures} == figures
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    scalars, _ = written(folder)
    assert {key: scalars[f"train/{key}"] for key in figures} == figures
    assert sum("record_steps" in entry for entry in run.state.log_history) == 1


def test_what_is_not_there(attributor):
    attributor.top(Queries.from_text(["Peru:"], [" Lima"]))
    with pytest.raises(ConfigError, match="report_to='nowhere' cannot be used .*: install it, or choose one"):
        log_attribution(attributor, "nowhere")


def test_from_a_shell(story, tmp_path):
    words = ["report", str(story.path), "-p", "Peru:", "-c", " Lima", "--method", "bm25", "--report-to", "tensorboard"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "r.html")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert "train/source/q0/sft/sum" in written(folder)[0]
