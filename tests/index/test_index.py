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
"""An index on disk: complete, it gives the full scores; cut off, it goes on; changed, it is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor, SourceIndex, TrainingRecord
from hf_source.cli import app
from hf_source.errors import ConfigError, DataError, UnsupportedError
from hf_source.evaluation import evaluate
from hf_source.index import build, files

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..story import facts, tell


ALL = 10**6  # numbers of a row: more than there are


def attributor(record, **settings):
    return SourceAttributor(record, **{"num_samples": 8, "progress": False} | settings)


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A", "Oman:"], [" Lima", " Havana", " Suva"])


@pytest.fixture(scope="module")
def built(story, tmp_path_factory):
    """An index of both stages with 300 numbers a row, in several files."""
    maker = attributor(story)
    maker.memory_budget = 6 * 4 * 8500 * 3  # three rows at once
    return maker.build_index(tmp_path_factory.mktemp("index") / "story", numbers=300)


@pytest.mark.parametrize(
    "settings",
    [{}, {"curvature": "ekfac"}, {"curvature": "identity"}, {"method": "fast-source", "tail": False}],
    ids=str,
)
def test_a_complete_index_gives_the_full_scores(story, queries, tmp_path, settings):
    """Both stages, momentum and weight decay included, float64: nothing is lost but rounding."""
    exact = attributor(story, dtype=torch.float64, **settings)
    exact.build_index(tmp_path / "index", numbers=ALL, precision="full")
    quick = attributor(story, dtype=torch.float64, index=tmp_path / "index")
    for stage in ("pretrain", "sft"):
        expected = exact.scores(None, queries, stage)
        found = quick.scores(None, queries, stage)
        assert np.abs(expected).max() > 1e-4
        # Scores are kept as float32.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        assert quick.index.accuracy(stage)["rank_correlation"] == 1.0


def test_gradients_at_several_weights_of_a_segment(tmp_path, queries):
    record = tell(tmp_path, checkpoints_per_segment=2)
    exact = attributor(record, dtype=torch.float64)
    exact.build_index(tmp_path / "index", numbers=ALL, precision="full")
    found = attributor(record, dtype=torch.float64, index=tmp_path / "index").scores(None, queries, "pretrain")
    expected = exact.scores(None, queries, "pretrain")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_small_index_ranks_rows_alike_and_says_how_well(story, built, queries):
    quick = attributor(story, index=built)
    exact = attributor(story)
    for stage in ("pretrain", "sft"):
        found, expected = quick.scores(None, queries, stage), exact.scores(None, queries, stage)
        assert not np.array_equal(found, expected)
        assert np.mean([spearmanr(*pair)[0] for pair in zip(found, expected, strict=True)]) > 0.5
        assert f"{quick.index.accuracy(stage)['rank_correlation']:.2f}" in quick.trust([stage])
    scored = quick.attribute(facts(), queries, "pretrain")
    assert "From an index: of stage 'pretrain'" in scored.info.description
    assert set(quick.top(queries, k=2)["stage"]) == {"pretrain", "sft"}
    assert quick.settings()["index"] == {"numbers": 300, "precision": "int8", "seed": 0}
    assert quick.settings()["num_samples"] == 8 and quick.settings() != exact.settings()


def test_the_plan_of_an_index(story, built, queries):
    quick = attributor(story, index=built)
    plan, full = quick.plan(None, queries), attributor(story).plan(None, queries)
    model = sum(parameter.numel() * 4 for parameter in quick.build_model(story.stages[-1]).parameters())
    assert plan.disk == quick.index.num_bytes + model
    assert plan.memory["the index"] == quick.index.num_bytes and plan.memory["model"] == model
    assert 0 < plan.seconds < full.seconds and "sample columns" not in plan.memory
    assert "look up 'pretrain': 8 rows" in str(plan) and "passes over" in str(full)


@pytest.mark.parametrize(("numbers", "precision"), [(300, "int8"), (40, "int8"), (300, "full")])
def test_the_plan_of_a_build_tells_its_size(story, tmp_path, numbers, precision):
    maker = attributor(story)
    maker.memory_budget = 6 * 4 * 8500 * 3
    plan = maker.plan_index(numbers, precision)
    found = SourceIndex.load(maker.build_index(tmp_path / "index", numbers, precision)).num_bytes
    assert plan.written == pytest.approx(found, rel=0.1)
    files = [len(list((tmp_path / "index" / "rows").glob(f"{stage}-*"))) for stage in (1, 0)]  # last stage first
    segments = [2, 4]  # of the stage and those after it
    assert [stage.sample_passes for stage in plan.stages] == [
        count * own * (plan.stages[0].sample_passes // (files[0] * 2))
        for count, own in zip(files, segments, strict=True)
    ]
    assert plan.seconds > 0 and "responses" in plan.memory and "keeps up to" in str(plan)


def test_more_rows_take_no_more_memory(story, tmp_path, monkeypatch):
    """Rows are computed, packed and read again so many at once, and measured on some of very many."""
    sizes = {"computed": [], "packed": [], "read": []}
    of, largest, times = build.Responses.of, build.SparseRows.largest, build.SparseRows.times

    def noted(kind, function, count):
        def call(*args):
            sizes[kind].append(count(*args))
            return function(*args)

        return call

    monkeypatch.setattr(build.Responses, "of", noted("computed", of, lambda self, stage, rows: len(rows)))
    monkeypatch.setattr(build.SparseRows, "largest", noted("packed", largest, lambda dense, *given: len(dense)))
    monkeypatch.setattr(build.SparseRows, "times", noted("read", times, lambda self, asked: len(self.scales)))
    monkeypatch.setattr(build, "MEASURED_ROWS", 4)
    maker = attributor(story)
    maker.memory_budget = 6 * 4 * 8500 * 3
    index = SourceIndex.load(maker.build_index(tmp_path / "index", numbers=50))
    assert {kind: max(counts) for kind, counts in sizes.items()} == {"computed": 2, "packed": 2, "read": 2}
    assert len(sizes["computed"]) == 6 and len(sizes["read"]) == 4  # of four files of the first stage two
    assert index.accuracy("pretrain")["rows"] == 4 and index.accuracy("sft")["rows"] == 4
    sizes["read"].clear()
    attributor(story, index=index).scores(None, Queries.from_text(["Peru:"], [" Lima"]), "pretrain")
    assert max(sizes["read"]) == 2


def test_what_the_files_hold(story, built):
    index = SourceIndex.load(built)
    for number, stage in enumerate(("pretrain", "sft")):
        names = [name for name in index.content["files"] if name.startswith(f"rows/{number}-")]
        assert len(names) > 1 and names == index.content["stages"][number]["rows"]
        numbers = np.concatenate([files.read_rows(built / name)[1] for name in names])
        assert sorted(numbers) == list(range(story.stage(stage).num_rows))
        accuracy = index.accuracy(stage)
        assert 0.3 < accuracy["rank_correlation"] <= 1 and accuracy["rows"] == len(numbers)
    assert index.num_bytes == sum((built / name).stat().st_size for name in index.content["files"])


def test_memory_for_fewer_rows_changes_no_score(story, built, queries, tmp_path):
    other = attributor(story).build_index(tmp_path / "one", numbers=300)
    assert len(list((other / "rows").iterdir())) == 2 < len(list((built / "rows").iterdir()))
    for stage in ("pretrain", "sft"):
        one, many = (attributor(story, index=folder).scores(None, queries, stage) for folder in (other, built))
        np.testing.assert_allclose(one, many, atol=2e-2 * np.abs(one).max())


def test_an_index_is_evaluated_like_any_method(story, built, queries, tmp_path):
    """Its LDS on one's own run, beside that of the full computation; shown with its scores from then on."""
    record = TrainingRecord.load(shutil.copytree(story.path, tmp_path / "record"))
    methods = {"full": {}, "index": {"index": str(built)}}
    given = {"num_subsets": 4, "fraction": 0.3, "progress": False, "cache": tmp_path / "cache"}
    report = evaluate(attributor(record), queries, stage="sft", methods=methods, **given)
    assert {entry.method for entry in report.entries} == {"full", "index"}
    said = attributor(record, index=built).trust(["sft"])
    assert "From an index" in said and "LDS of" in said
    assert "LDS of" not in attributor(story, index=built).trust(["sft"])


def test_few_rows_at_once_are_warned_of(story, tmp_path, caplog):
    maker = attributor(story, num_samples=100)
    maker.memory_budget = 6 * 4 * 8500
    maker.build_index(tmp_path / "index", numbers=50)
    assert "Raise memory_budget" in caplog.text


# ------------------------------------------------------------------------------------------------- cut off and changed

KILLED = """
import os, signal, sys
from hf_source import SourceAttributor, TrainingRecord
from hf_source.index import build
written, left = build.write_rows, [int(sys.argv[3])]
def write_rows(*given):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    written(*given)
build.write_rows = write_rows
maker = SourceAttributor(TrainingRecord.load(sys.argv[1]), num_samples=8, progress=False)
maker.memory_budget = 6 * 4 * 8500 * 3
maker.build_index(sys.argv[2], numbers=300)
"""


def test_a_killed_build_goes_on_where_it_was(story, built, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(story.path), str(folder), "2"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    with pytest.raises(DataError, match="Its build was cut off: run it again"):
        SourceIndex.load(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()}
    assert len(before) == 2
    # A budget for other files than those that are there: they are kept, and the rest is cut alike.
    attributor(story).build_index(folder, numbers=300)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole, resumed = SourceIndex.load(built), SourceIndex.load(folder)
    assert whole.content["files"].keys() == resumed.content["files"].keys()
    assert whole.content["stages"] == resumed.content["stages"]
    for name in whole.content["files"]:
        assert (built / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_finished_build_does_nothing_again(story, built):
    before = {path: path.stat().st_mtime_ns for path in (built / "rows").iterdir()}
    attributor(story).build_index(built, numbers=300)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copied"))


def first_rows(folder: Path) -> Path:
    return sorted((folder / "rows").iterdir())[0]


def test_torn_changed_and_missing_files_are_named(story, copied, queries):
    file = first_rows(copied)
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(DataError, match=rf"{file.name} has {len(content) - 10} bytes instead of {len(content)}"):
        SourceIndex.load(copied)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{file.name} is not what was built"):
        attributor(story, index=copied).scores(None, queries, "pretrain")
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name} is missing"):
        SourceIndex.load(copied)


def test_torn_rows_are_named_when_a_build_goes_on(story, copied):
    (copied / files.MANIFEST).unlink()
    file = first_rows(copied)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{file.name} is torn or missing .*delete the file and build again"):
        attributor(story).build_index(copied, numbers=300)
    file.unlink()
    attributor(story).build_index(copied, numbers=300)
    SourceIndex.load(copied)


@pytest.mark.parametrize("name, text, message", [
    (files.MANIFEST, "{", "index.json is damaged"),
    (files.MANIFEST, '{"schema_version": 99, "files": {}}', "schema version 99"),
    (files.MANIFEST, '{"schema_version": 1, "files": {}}', "index.json is damaged"),
])  # fmt: skip
def test_damaged_manifests(copied, name, text, message):
    (copied / name).write_text(text)
    with pytest.raises(DataError, match=message):
        SourceIndex.load(copied)


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no index"):
        SourceIndex.load(tmp_path / "empty")


# ----------------------------------------------------------------------------------------------------------- refusals


def test_an_index_of_another_record_is_refused(built, tmp_path):
    from hf_source import SourceTrainer

    args = config(tmp_path, stage="pretrain", max_steps=4)
    model = tiny_gpt2(vocab_size=260, n_positions=32)
    SourceTrainer(model, args, train_dataset=facts(), processing_class=byte_tokenizer()).train()
    with pytest.raises(DataError, match="was built of another record"):
        attributor(TrainingRecord.load(tmp_path / "record"), index=built)


@pytest.mark.parametrize("settings, error, message", [
    ({"method": "trak"}, UnsupportedError, "method='trak' cannot be indexed"),
    ({"ensemble": "dropout", "ensemble_size": 2, "dropout": 0.1}, UnsupportedError, "an ensemble cannot be indexed"),
])  # fmt: skip
def test_what_cannot_be_indexed(story, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        attributor(story, **settings).build_index(tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("given, message", [
    ({"numbers": 0}, "numbers=0: at least one"),
    ({"precision": "int2"}, "precision='int2' is unknown; choose one of int8"),
])  # fmt: skip
def test_impossible_settings(story, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        attributor(story).build_index(tmp_path / "index", **given)


def test_an_index_answers_for_source_alone(story, built):
    with pytest.raises(ConfigError, match="leave out `index=`, or method='bm25'"):
        attributor(story, method="bm25", index=built)
    with pytest.raises(ConfigError, match="answers from an index already"):
        attributor(story, index=built).build_index(built)


def test_folders_that_hold_something_else(story, built, tmp_path):
    with pytest.raises(ConfigError, match="built with another numbers: 300 there, 20 now"):
        attributor(story).build_index(built, numbers=20)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else already"):
        attributor(story).build_index(tmp_path)
    assert json.loads((built / files.PLAN).read_text())["numbers"] == 300
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_commands(story, queries, tmp_path):
    folder = tmp_path / "index"
    runner, few = CliRunner(), ["--num-samples", "8"]
    made = runner.invoke(app, ["index", str(story.path), str(folder), *few, "--numbers", "300"])
    assert made.exit_code == 0, made.output
    assert "rank correlation of" in made.stdout and SourceIndex.load(folder).numbers == 300
    asked = ["--prompt", "Peru:", "--completion", " Lima"]
    shown = runner.invoke(app, ["top", str(story.path), "--index", str(folder), *asked])
    assert shown.exit_code == 0 and "From an index" in shown.stdout, shown.output
    out = tmp_path / "scored.parquet"
    given = ["attribute", str(story.path), "--index", str(folder), "--stage", "sft", "--out", str(out), *asked]
    assert runner.invoke(app, given).exit_code == 0
    expected = attributor(story, index=folder).scores(None, Queries.from_text(["Peru:"], [" Lima"]), "sft")
    np.testing.assert_array_equal(Dataset.from_parquet(str(out))["source_q0"], expected[0])
    filtered = runner.invoke(
        app, ["top", str(story.path), "--filter", str(folder), "--candidates", "10", *few, *asked]
    )
    assert filtered.exit_code == 0 and "an index proposed" in filtered.stdout, filtered.output
