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

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor
from hf_source.cli import app
from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import Experiment, Report, corrupt_labels, find_mislabelled

from ..cases import byte_tokenizer, tiny_gpt2, train
from .fakes import LinearRetraining


PROMPTS, COMPLETIONS = ["red:", "two:"], ["hue", "sum"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Two facts, ten times each, a few of them wrong; the dataset has more columns than the record."""
    folder = tmp_path_factory.mktemp("experiments")
    rows = Dataset.from_dict({"prompt": PROMPTS * 10, "completion": COMPLETIONS * 10, "kind": ["a", "b"] * 10})
    rows = corrupt_labels(rows, 0.1, seed=3, column="completion")
    given = rows.select_columns(["prompt", "completion"])
    trainer = {"processing_class": byte_tokenizer()}
    record = train(folder, tiny_gpt2(vocab_size=260), given, trainer=trainer, num_train_epochs=4)[1]
    rows.to_json(str(folder / "rows.jsonl"))
    queries = {"prompt": PROMPTS, "completion": COMPLETIONS, "name": ["red", "two"], "row": [0, 1]}
    Dataset.from_dict(queries).to_json(str(folder / "queries.jsonl"))
    return record, rows, folder


def experiment(told, **settings) -> Experiment:
    record, rows, _ = told
    attributor = SourceAttributor(record, num_samples=16, progress=False, datasets={record.stages[0].name: rows})
    queries = Queries.from_text(PROMPTS, COMPLETIONS, ["red", "two"])
    return Experiment(attributor, queries, **{"methods": ["source", "bm25"], "progress": False, **settings})


def test_removal_against_rows_of_the_same_kind(told, tmp_path):
    record, rows, _ = told
    effects = np.random.default_rng(0).normal(size=(2, 20))
    fake = LinearRetraining(effects)
    fake.stage.name = record.stages[0].name
    own = experiment(told, retraining=fake)
    report = own.subset_removal(match="kind", k=(2,), num_random=3)
    lines = {(entry.method, entry.measure): entry for entry in report.entries}
    methods = [f"{name}{part}" for name in ("source", "bm25") for part in ("", ", lowest rows")]
    measure = "loss rise without 2 rows (nats)"
    assert {method for method, _ in lines} == {
        "random", *methods, "source, rows of the same classes", "bm25, rows of the same classes",
    }  # fmt: skip
    top = lines["source", measure]
    best = np.argsort(-own.scores()[0]["source"], axis=1, kind="stable")[:, :2]
    assert list(top.per_query.values()) == pytest.approx(np.take_along_axis(effects, best, axis=1).sum(axis=1))
    assert list(top.per_query) == ["red", "two"]
    assert top.value == pytest.approx(np.mean(list(top.per_query.values())))
    assert top.seconds > 0 and top.settings["k"] == 2
    assert lines["source", "rise without 2 rows / |effect of random rows|"].value == pytest.approx(
        top.value / np.abs(_random_changes(fake, effects)).mean(), rel=1e-6
    )
    assert Report.from_json(report.write(tmp_path) / "report.json").to_dict() == report.to_dict()


def _random_changes(fake, effects):
    """What the three random sets did: the masks after that of all rows."""
    return (~fake.trained[0][1:4]) @ effects.T


def test_leave_one_out_has_an_error_for_methods_in_nats(told, tmp_path):
    report = experiment(told, cache=tmp_path / "cache").leave_one_out(tmp_path / "figures", num_top=2, num_random=2)
    lines = {(entry.method, entry.measure): entry for entry in report.entries}
    assert {measure for method, measure in lines if method == "source"} == {"Spearman", "Pearson", "relative error"}
    assert {measure for method, measure in lines if method == "bm25"} == {"Spearman", "Pearson"}
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == [
        "leave_one_out_0_source.svg", "leave_one_out_1_bm25.svg",
    ]  # fmt: skip
    assert any((tmp_path / "cache").iterdir())


def test_tail_patch_and_agreement(told):
    own = experiment(told)
    entries = own.tail_patch(k=(2,), learning_rate=1e-3).entries
    assert [entry.method for entry in entries if entry.measure == "gain of 2 rows (nats)"] == [
        "random", "source", "bm25",
    ]  # fmt: skip
    assert all(np.isfinite(entry.value) for entry in entries)
    report = experiment(told, methods=["unrolled", "bm25"]).agreement(k=(3,))
    values = {(entry.method, entry.measure): entry.value for entry in report.entries}
    assert values["unrolled", "Spearman"] == pytest.approx(1.0)
    assert values["unrolled", "overlap of the top 3"] == 1.0
    assert values["unrolled", "relative error"] == pytest.approx(0.0, abs=1e-6)
    assert ("bm25", "relative error") not in values
    assert report.settings["unrolled_seconds"] >= 0


def test_wrong_rows(told):
    record, rows, _ = told
    report = experiment(told).mislabelled(k=(2,), checked=(0.5,))
    areas = {entry.method: entry.value for entry in report.entries if entry.measure == "AUROC"}
    assert set(areas) == {
        "source, self-influence", "loss", "source, influence on the queries", "bm25, influence on the queries",
    }  # fmt: skip
    own = experiment(told).attributor
    expected = find_mislabelled(own.self_influence(), rows["is_corrupted"][:], k=(2,))
    assert areas["source, self-influence"] == expected.auroc.value
    given = experiment(told).mislabelled(np.asarray(rows["is_corrupted"]), k=(2,))
    assert {entry.method: entry.value for entry in given.entries if entry.measure == "AUROC"} == areas
    bare = Experiment(experiment(told).attributor, methods=["source"])
    assert {entry.method for entry in bare.mislabelled(k=(2,)).entries} == {"source, self-influence", "loss"}
    with pytest.raises(DataError, match="does not say true or false"):
        experiment(told).mislabelled("kind")
    with pytest.raises(DataError, match="have no column 'wrong'"):
        experiment(told).mislabelled("wrong")
    with pytest.raises(ConfigError, match="needs queries"):
        bare.tail_patch()


def test_columns_are_by_row_number(told):
    record, rows, _ = told
    shuffled = rows.add_column("source_row", np.arange(20)).select([3, 0, 19, *range(4, 19), 1, 2])
    attributor = SourceAttributor(record, progress=False, datasets={record.stages[0].name: shuffled})
    assert Experiment(attributor).column("kind") == rows["kind"][:]


def test_retrieval(told):
    own = experiment(told)
    lines = {(entry.method, entry.measure): entry for entry in own.retrieval([0, None]).entries}
    scores = own.scores()[0]["source"][0]
    assert lines["source", "mrr"].value == pytest.approx(1 / (scores >= scores[0]).sum())
    assert lines["source", "mrr"].low is None  # one query says nothing of the others
    assert list(lines["source", "mrr"].per_query) == ["red"]
    both = {entry.measure: entry for entry in own.retrieval([0, 1]).entries if entry.method == "source"}
    assert both["mrr"].low <= both["mrr"].value <= both["mrr"].high
    for wrong in ([0], [0, 20], [None, None]):
        with pytest.raises(DataError, match="[Rr]ight row"):
            own.retrieval(wrong)


# ---- the commands ----------------------------------------------------------------------------------------------


def run(told, command: str, *given: str) -> list[dict]:
    record, _, folder = told
    out = folder / "reports" / command
    asked = ["--queries", str(folder / "queries.jsonl"), "--set", "num_samples=16"]
    result = CliRunner().invoke(app, ["experiment", command, str(record.path), *asked, "--out", str(out), *given])
    assert result.exit_code == 0, result.output
    return json.loads((out / "report.json").read_text())["entries"]


def test_every_experiment_is_a_command(told):
    _, _, folder = told
    rows = ["--dataset", str(folder / "rows.jsonl")]
    both, cache = ["--methods", "grad-dot,bm25"], ["--cache", str(folder / "cache")]
    removed = run(
        told, "removal", *both, *cache, *rows, "-k", "2", "--match", "kind", "--num-random", "2", "--no-bottom"
    )
    assert {entry["method"] for entry in removed} == {
        "random", "grad-dot", "bm25", "grad-dot, rows of the same classes", "bm25, rows of the same classes",
    }  # fmt: skip
    left = run(told, "leave-one-out", *both, *cache, "--num-top", "2", "--num-random", "1", "--seeds", "2")
    assert left[0]["settings"]["seeds"] == [1, 2]
    patched = run(told, "tail-patch", *both, "-k", "3", "--learning-rate", "0.01", "--optimizer", "sgd")
    assert patched[0]["settings"]["optimizer"] == "sgd" and patched[0]["measure"] == "gain of 3 rows (nats)"
    agreed = run(told, "agreement", "--methods", "grad-dot", "-k", "5")
    assert "overlap of the top 5" in {entry["measure"] for entry in agreed}
    wrong = run(told, "mislabelled", *rows, "-k", "2", "--checked", "0.3")
    assert "found after 0.3 of the rows" in {entry["measure"] for entry in wrong}
    found = run(told, "retrieval", *both)
    assert {entry["measure"] for entry in found} == {"recall@1", "recall@5", "mrr"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["removal", "--prompt", "red:", "--completion", "hue", "-k", "20"], "give numbers of rows from 1 to 19"),
        (["removal", "--prompt", "red:", "--completion", "hue", "--seeds", "-1"], "--seeds -1"),
        (["removal", "--prompt", "red:", "--completion", "hue", "--match", "colour"], "have no column 'colour'"),
        (["tail-patch"], "Say what to explain"),
        (["retrieval"], "Give --queries"),
    ],
)
def test_commands_refuse_what_makes_no_sense(told, given, said):
    record, _, _ = told
    small = ["--set", "num_samples=16", "--methods", "grad-dot"]
    result = CliRunner().invoke(app, ["experiment", given[0], str(record.path), *given[1:], *small])
    assert result.exit_code == 1
    assert said in result.output


def test_retrieval_names_the_column_that_is_missing(told):
    record, _, folder = told
    queries = ["--queries", str(folder / "queries.jsonl"), "--right-row", "place"]
    result = CliRunner().invoke(app, ["experiment", "retrieval", str(record.path), *queries])
    assert result.exit_code == 1 and "has no column 'place'" in result.output
