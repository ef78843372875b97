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

import json
from dataclasses import replace
from pathlib import Path

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
from ..story import facts


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


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Where Trackio keeps what it is told; it reads that when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield Path(pytest.importorskip("trackio.utils").TRACKIO_DIR)


def trackio_logs(project):
    """The entries of the newest run of a project, as one."""
    from trackio.sqlite_storage import SQLiteStorage

    newest = SQLiteStorage.get_runs(project)[-1]
    return {key: value for entry in SQLiteStorage.get_logs(project, newest) for key, value in entry.items()}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Weights & Biases without its server: a folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = pytest.importorskip("wandb")
    yield wandb
    wandb.finish()


def stored_tables(folder):
    """Tables in the files of Weights & Biases."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).rglob("*.table.json"))]


def test_weights_and_biases(attributor, offline, tmp_path):
    """Numbers, and a table of its own, in a run that is open already; another is begun and ended where none is."""
    attributor.top(Queries.from_text(["Peru:"], [" <b>Lima"], ["lima"]), k=3)
    run = offline.init(project="p", dir=str(tmp_path))
    logs = log_attribution(attributor, "wandb", output_dir=tmp_path, step=3)
    assert offline.run is run and run.summary["train/source/lima/sft/sum"] == pytest.approx(
        logs["source/lima/sft/sum"]
    )
    assert run.summary["train/global_step"] == 3
    (table,) = stored_tables(tmp_path)
    assert table["columns"] == ["score", "stage", "row", "text"]
    best = attributor.top(attributor.attributed[0], k=10)
    assert [row[1:3] for row in table["data"]] == [[row["stage"], row["row"]] for row in best]
    assert [row[3] for row in table["data"]] == best["text"][:]
    np.testing.assert_allclose([row[0] for row in table["data"]], best["score"][:], rtol=1e-6)
    run.finish()
    log_attribution(attributor, "wandb", output_dir=tmp_path)
    assert offline.run is None and len(stored_tables(tmp_path)) == 2


def test_trackio(story, trackio_folder, tmp_path):
    """Its tables take text for Markdown, so none may be left in it."""
    rows = facts().map(lambda row: {"text": row["text"] + " <img src=x onerror=alert(1)>"})
    attributor = SourceAttributor.from_record(story.path, method="bm25", progress=False)
    attributor.top(Queries.from_text(["Peru:"], [" Lima"], ["lima"]), k=3)
    found = collect(attributor)
    shown = found.top.map(lambda row: {"text": row["text"] + rows[0]["text"]})
    logs = log_attribution(replace(found, top=shown), ["trackio", Heard()], output_dir=tmp_path, step=2)
    entries = trackio_logs("huggingface")
    assert entries["train/source/lima/sft/sum"] == pytest.approx(logs["source/lima/sft/sum"])
    table = entries["train/source/lima/rows"]
    assert table["_type"] == "trackio.table" and len(table["_value"]) == len(found.top)
    for line, row in zip(table["_value"], found.top, strict=True):
        assert (line["stage"], line["row"]) == (row["stage"], row["row"])
        assert line["score"] == pytest.approx(row["score"]) and "&lt;img" in line["text"] and "<" not in line["text"]
    assert any(trackio_folder.glob("huggingface*"))


def test_every_place_receives_the_figures_of_a_record(trackio_folder, offline, tmp_path):
    run, record = train(
        tmp_path, tiny_gpt2(), report_to=["wandb", "trackio"], max_steps=4, project="recorded", num_segments=2
    )
    stage = record.stages[0]
    expected = {"record_steps": 4, "record_segments": 2, "record_rows": stage.num_rows,
                "record_trained_parameters": run.model.num_parameters()}  # fmt: skip
    entries = trackio_logs("recorded")
    for name, value in expected.items():
        assert entries[f"train/{name}"] == value == offline.run.summary[f"train/{name}"]


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


def test_saved_scores_from_a_shell(attributor, tmp_path):
    folder = attributor.save(tmp_path / "saved", Queries.from_text(["Peru:"], [" Lima"]))
    words = ["report", str(folder), "--report-to", "tensorboard", "-o", str(tmp_path / "r.html")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert "train/source/q0/sft/sum" in written(folder)[0]


def test_from_a_shell(story, tmp_path):
    words = ["report", str(story.path), "-p", "Peru:", "-c", " Lima", "--method", "bm25", "--report-to", "tensorboard"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "r.html")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert "train/source/q0/sft/sum" in written(folder)[0]
