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
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.cli import app
from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import (
    LDSProtocol,
    Report,
    StackedRetraining,
    evaluate,
    linear_datamodelling_score,
    removal_masks,
)
from hf_source.evaluation.planning import plan_evaluation

from ..cases import random_rows, tiny_gpt2, train
from ..story import tell


FEW = {"num_subsets": 12, "fraction": 0.1, "progress": False}


GENTLE = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}


def asked(count: int = 4) -> Queries:
    return Queries.from_dataset(random_rows(count, seed=9))


@pytest.fixture
def record(tmp_path):
    # Plain gradient descent in small steps: what removing rows does is then within reach of a derivative.
    return train(tmp_path / "run", tiny_gpt2(), **GENTLE)[1]


def attributor(record, **settings) -> SourceAttributor:
    return SourceAttributor(record, progress=False, num_samples=16, **settings)


def test_the_exact_method_foresees_removals(record):
    found = evaluate(attributor(record, method="unrolled"), asked(), methods=["unrolled", "bm25", "source"], **FEW)
    exact, words, source = found.entries
    assert exact.value > 0.95 and exact.low > 0.9
    assert exact.low <= exact.value <= exact.high
    assert list(exact.per_query) == ["q0", "q1", "q2", "q3"]
    assert np.mean(list(exact.per_query.values())) == pytest.approx(exact.value)
    assert words.value < exact.value and source.value > 0.5
    assert [entry.method for entry in found.entries] == ["unrolled", "bm25", "source"]
    assert exact.settings["num_subsets"] == 12 and exact.settings["seeds"] == [None]
    assert exact.settings["attributor"]["method"] == "unrolled"
    assert found.settings["retraining"]["retraining"] == "stacked" and found.settings["queries"] == 4


def test_halves_are_averaged_over_orders(record, tmp_path):
    settings = {"protocols": ["halves"], "num_subsets": 8, "num_seeds": 2, "progress": False}
    own = attributor(record, method="grad-dot")
    found = evaluate(own, asked(), **settings, cache=tmp_path / "cache")
    assert found.entries[0].settings["seeds"] == [1, 2] and found.entries[0].settings["fraction"] == 0.5
    retraining = StackedRetraining(record, asked(), cache=tmp_path / "cache", progress=False)
    protocol = LDSProtocol("halves", 0.5, 8, 2)
    losses = protocol.losses(retraining)
    assert losses.shape == (2, 8, 4) and np.abs(losses[0] - losses[1]).max() > 1e-4
    assert retraining.cache.misses == 0
    removed = removal_masks(22, 8, 0.5)
    expected = linear_datamodelling_score(own.scores(None, asked()), removed, losses.mean(axis=0))
    assert found.entries[0].value == pytest.approx(expected.mean)


def test_another_method_costs_no_training(record):
    evaluate(attributor(record), asked(), **FEW)
    retraining = StackedRetraining(record, asked(), progress=False)  # the record's own cache
    evaluate(attributor(record), asked(), methods=["grad-dot"], retraining=retraining, **FEW)
    assert (retraining.cache.hits, retraining.cache.misses) == (12, 0)


def test_early_stages_are_evaluated_through_the_later_ones(tmp_path):
    record = tell(tmp_path, **GENTLE)
    queries = Queries.from_text(["Q Peru? A", "Q Cuba? A", "Fiji:"], [" Lima", " Havana", " Suva"])
    own = SourceAttributor(record, method="unrolled", progress=False)
    for stage in ("pretrain", "sft"):
        found = evaluate(own, queries, stage=stage, num_subsets=8, fraction=0.2, progress=False)
        assert found.entries[0].stage == stage and found.entries[0].value > 0.95
    note = own.trust()
    assert note.index("'pretrain'") < note.index("'sft'")
    assert "'sft'" not in own.trust(["pretrain"])


def test_outputs_say_how_far_to_trust_them(record):
    own = attributor(record)
    assert own.trust() == "" and own.top(asked(), k=1).info.description == ""
    found = evaluate(own, asked(), **FEW).entries[0]
    note = f"LDS of {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] (12 subsets of 10 % of the rows left out"
    assert note in own.trust() and "4 queries" in own.trust()
    for output in (own.top(asked(), k=1), own.attribute(None, asked())):
        assert note in output.info.description
    # of another seed it holds; of other settings, methods or trainings it says nothing
    assert note in attributor(record, seed=3).trust()
    assert attributor(record, momentum=False).trust() == ""
    assert attributor(record, curvature="ekfac").trust() == ""
    assert attributor(record, method="influence").trust() == ""
    data = json.loads((record.path / "record.json").read_text())
    data["stages"][0]["training"]["seed"] += 1
    (record.path / "record.json").write_text(json.dumps(data))
    assert attributor(TrainingRecord.load(record.path)).trust() == ""


def test_the_larger_evaluation_speaks(record):
    own = attributor(record)
    evaluate(own, asked(), **FEW)
    evaluate(own, asked(), **FEW | {"num_subsets": 5})
    assert "12 subsets" in own.trust() and "5 subsets" not in own.trust()
    for broken in ("{", "[]", '{"record_digest": 1}'):
        (record.path / "evaluations" / "broken.json").write_text(broken)
        assert "12 subsets" in own.trust()


def test_nothing_is_stored_unasked(record, tmp_path):
    evaluate(attributor(record), asked(), store=False, cache=tmp_path / "cache", **FEW)
    assert not (record.path / "evaluations").exists()


def test_a_plan_times_what_is_missing_and_keeps_it(record):
    own = attributor(record)
    settings = {"num_subsets": 20, "fraction": 0.1}
    plan = plan_evaluation(own, asked(), **settings)
    assert (plan.retrainings, plan.finished) == (20, 16) and plan.seconds_each > 0  # one chunk
    assert plan.seconds == pytest.approx(4 * plan.seconds_each)
    assert "20 retrainings, 16 finished" in str(plan)
    evaluate(own, asked(), **settings, progress=False)
    again = plan_evaluation(own, asked(), **settings)
    assert again.finished == 20 and "All 20 retrainings are there" in str(again)


def test_the_interval_is_over_what_is_asked():
    generator = np.random.default_rng(0)
    truth, removed = generator.normal(size=(6, 40)), removal_masks(40, 50, 0.2)
    losses = removed @ truth.T
    scores = np.concatenate([truth[:3], -truth[3:]])  # perfect for three queries, opposite for three
    both, queries, subsets = (
        linear_datamodelling_score(scores, removed, losses, 200, over=over)
        for over in (("queries", "subsets"), ("queries",), ("subsets",))
    )
    assert both.mean == pytest.approx(0.0)
    assert subsets.high - subsets.low < 1e-9  # any subsets show the same
    assert queries.high - queries.low > 0.5 and both.high - both.low > 0.5
    with pytest.raises(ConfigError, match="draw anew"):
        linear_datamodelling_score(scores, removed, losses, over=("rows",))
    with pytest.raises(DataError, match="do not fit"):
        linear_datamodelling_score(scores[:2], removed, losses)
    with pytest.raises(DataError, match="diverged"):
        linear_datamodelling_score(scores, removed, np.full_like(losses, np.nan))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"protocols": ["half"]}, "protocol='half' is unknown"),
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"num_subsets": 2}, "at least 3"),
        ({"num_seeds": -1}, "num_seeds=-1"),
        ({"methods": ["sauce"]}, "method='sauce' is unknown"),
        ({"methods": {"a": {"method": "bm25", "draws": 3}}}, "no setting 'draws'"),
    ],
)
def test_bad_settings_are_refused_before_any_training(record, settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluate(attributor(record), asked(), **FEW | settings)
    assert not (record.path / "evaluations").exists()


def test_like_keeps_settings(record):
    own = attributor(record, method="stepwise", draws=3, seed=5, datasets={"train": random_rows()})
    same, other = own.like(seed=6), own.like(method="bm25")
    assert same.settings() == own.settings() and same.options.draws == 3 and same.seed == 6
    assert other.settings() == {"method": "bm25"} and other.num_samples == 16
    assert list(other.datasets) == ["train"]


# ---- the command -----------------------------------------------------------------------------------------------


def run(*arguments) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command(tmp_path):
    record = tell(tmp_path, learning_rate=1e-3)
    queries = tmp_path / "queries.jsonl"
    Queries.from_text(["Peru:", "Cuba:", "Fiji:"], [" Lima", " Havana", " Suva"]).to_dataset().to_json(queries)
    few = ["--queries", queries, "--stage", "sft", "--num-subsets", 6, "--fraction", 0.3]
    assert "6 retrainings, 6 finished" in run("evaluate", record.path, *few, "--plan") or "All 6" in run(
        "evaluate", record.path, *few, "--plan"
    )
    said = run(
        "evaluate", record.path, *few, "--methods", "source:num_samples=8,bm25", "-m", "grad-dot", "--out",
        tmp_path / "report",
    )  # fmt: skip
    report = Report.from_json(tmp_path / "report" / "report.json")
    assert [entry.method for entry in report.entries] == ["source:num_samples=8", "bm25", "grad-dot"]
    for entry in report.entries:
        assert entry.interval in said
    assert (tmp_path / "report" / "report.md").is_file() and (tmp_path / "report" / "report.html").is_file()
    halves = run("evaluate", record.path, *few, "--protocol", "halves", "--seeds", 2, "--methods", "bm25")
    assert "halves" in halves
    trained = run(
        "evaluate", record.path, *few, "--retraining", "trainer", "-m", "bm25", "--out", tmp_path / "trained"
    )
    assert "bm25" in trained
    assert Report.from_json(tmp_path / "trained" / "report.json").settings["retraining"]["retraining"] == "trainer"
    top = run("top", record.path, "--queries", queries, "--num-samples", 8, "-k", 1, "-o", tmp_path / "top.html")
    assert f"LDS of {report.entries[0].value:.2f}" in " ".join(top.split())
    assert "Measured on this run" in (tmp_path / "top.html").read_text()
    scored = run(
        "attribute", record.path, "-q", queries, "--stage", "sft", "--num-samples", 8, "-o", tmp_path / "a.csv"
    )
    assert "Measured on this run" in scored


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "source,source"], "names 'source' twice"),
        (["--methods", "source,"], "empty name"),
        (["--methods", "source:draws"], "not of the form key=value"),
        (["--protocol", "thirds"], "protocol='thirds' is unknown"),
        (["--methods", "sauce"], "method='sauce' is unknown"),
        (["--num-workers", "2"], "belong to --retraining trainer"),
        (["--retraining", "trainer", "--training", "none.yaml"], "no recipe none.yaml"),
        (["--retraining", "trainer", "--num-workers", "-2"], "num_workers=-2"),
    ],
)
def test_the_command_refuses(record, tmp_path, arguments, said):
    queries = tmp_path / "queries.jsonl"
    asked().to_dataset().to_json(queries)
    run = CliRunner().invoke(app, ["evaluate", str(record.path), "-q", str(queries), *arguments])
    assert run.exit_code != 0
    assert said in " ".join(run.output.split())
