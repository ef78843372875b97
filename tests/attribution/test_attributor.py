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
import importlib
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_source import Queries, RowLossTask, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.attribution import METHODS
from hf_source.errors import ConfigError, DataError, RecordError, UnsupportedError
from hf_source.evaluation import losses_of, retrain
from hf_source.gradients import RowGradients
from hf_source.index.responses import Responses
from hf_source.source import draw_sample, on_disk

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..story import CAPITALS, chats, facts


FAST = {"num_samples": 16, "progress": False}


def attributor(record, **settings):
    return SourceAttributor.from_record(record.path, **FAST | settings)


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


@pytest.fixture(scope="module")
def scores(story, queries):
    """Scores of both stages by the default method."""
    walker = attributor(story)
    return {stage: walker.scores(None, queries, stage) for stage in ("sft", "pretrain")}


def test_columns_hold_the_scores(story, queries, scores):
    scored = attributor(story).attribute(facts(), queries, stage="pretrain")
    assert scored.column_names == ["text", "label_of_mine", "source_row", "source_lima", "source_havana"]
    assert scored.features["source_lima"].dtype == "float32"
    assert scored.features["source_row"].dtype == "int64"
    assert scored["source_row"] == list(range(8))
    np.testing.assert_array_equal(np.asarray(scored["source_havana"], dtype=np.float32), scores["pretrain"][1])
    assert scored.sort("source_lima", reverse=True)[0]["text"] == "Peru: Lima."


def test_order_of_asking_does_not_matter(story, queries, scores):
    walker = attributor(story)
    first = walker.scores(None, queries, "pretrain")
    second = walker.scores(None, queries, "sft")
    np.testing.assert_array_equal(first, scores["pretrain"])
    np.testing.assert_array_equal(second, scores["sft"])


def test_other_queries_start_another_walk(story, queries, scores):
    walker = attributor(story)
    walker.scores(None, queries.select([0]), "sft")
    np.testing.assert_allclose(walker.scores(None, queries, "sft"), scores["sft"], rtol=1e-4, atol=1e-6)


def test_a_query_does_not_depend_on_its_neighbours(story, queries, scores):
    alone = attributor(story).scores(None, queries.select([1]), "pretrain")
    # Same sampled labels; only the order of float32 sums differs.
    np.testing.assert_allclose(
        alone[0], scores["pretrain"][1], rtol=1e-3, atol=1e-5 * np.abs(scores["pretrain"]).max()
    )


def test_tokenised_rows_score_like_raw_ones(story, queries, scores):
    tokenised = story.stage("pretrain").rows().remove_columns(["text", "source_row"])
    got = attributor(story).scores(tokenised, queries, "pretrain")
    np.testing.assert_allclose(got, scores["pretrain"], rtol=1e-5, atol=1e-7)


def test_shuffled_rows_keep_their_scores(story, queries, scores):
    numbered = facts().add_column("source_row", np.arange(8))
    shuffled = numbered.shuffle(seed=3)
    assert shuffled["source_row"] != numbered["source_row"]
    scored = attributor(story).attribute(shuffled, queries, "pretrain")
    expected = scores["pretrain"][0][shuffled["source_row"]]
    np.testing.assert_allclose(np.asarray(scored["source_lima"]), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("curvature", ["joint", "ekfac", "ekfac-hybrid", "diagonal", "identity"])
def test_every_curvature_finds_the_fact(story, queries, curvature):
    got = attributor(story, curvature=curvature).scores(None, queries, "pretrain")
    assert got[0].argmax() == list(CAPITALS).index("Peru")


def test_the_damping_of_the_hybrid(story, queries):
    first, second = (
        attributor(story, curvature="ekfac-hybrid", damping=damping).scores(None, queries, "sft")
        for damping in (0.1, 1.0)
    )
    assert np.abs(second).max() < np.abs(first).max()
    default = attributor(story, curvature="ekfac-hybrid").scores(None, queries, "sft")
    np.testing.assert_array_equal(default, first)
    with pytest.raises(ConfigError, match="damping=0.0: the inverse needs a positive damping"):
        attributor(story, curvature="ekfac-hybrid", damping=0.0)


class Letters:
    """Stands in for a sentence encoder: how often each letter occurs."""

    def encode(self, texts):
        return [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


OF_DIFFUSION = {name for name in METHODS if name.startswith("diffusion-")}  # these score images: test_diffusion.py


@pytest.mark.parametrize("method", sorted(set(METHODS) - OF_DIFFUSION))
def test_every_method_scores_every_row(story, queries, method):
    needed = {"embedding": {"encoder": Letters()}, "datainf": {"full_parameters": True}}
    walker = attributor(story, method=method, **needed.get(method, {}))
    for stage, num_rows in (("pretrain", 8), ("sft", 4)):
        got = walker.scores(None, queries, stage)
        assert got.shape == (2, num_rows)
        assert got.dtype == np.float32
        assert np.isfinite(got).all()
        assert np.abs(got).max() > 0
    assert walker.scores(None, queries, "sft")[1].argmax() == list(CAPITALS).index("Cuba")


def test_grad_dot_is_the_dot_product_of_gradients(story, queries):
    got = attributor(story, method="grad-dot").scores(None, queries, "sft")
    cosines = attributor(story, method="grad-cos").scores(None, queries, "sft")
    model = story.stage("sft").build_model(torch.float32)
    tokenizer = byte_tokenizer()

    def gradient(ids, labels):
        model.zero_grad()
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        asked = [(t, label) for t, label in enumerate(labels[1:]) if label != -100]
        (-sum(logits[t, label] for t, label in asked)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rows = [gradient(row["input_ids"], row["labels"]) for row in story.stage("sft").rows()]
    asked = [gradient(r["input_ids"], r["labels"]) for r in queries.encode(tokenizer).rows]
    expected = torch.stack([torch.stack([a @ r for r in rows]) for a in asked]).numpy()
    norms = torch.stack([torch.stack([a.norm() * r.norm() for r in rows]) for a in asked]).numpy()
    # float32 sums over 10 thousand parameters
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(cosines, expected / norms, atol=1e-4)


def test_scores_are_the_derivative_of_retraining(tmp_path):
    """Sign, unit and rank: each row of a short SGD run is weighted a little less in turn, and the run made again."""
    settings = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "weight_decay": 0.0, "num_segments": 4}
    settings |= {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "max_steps": 24, "warmup_steps": 0}
    model = tiny_gpt2(vocab_size=260, dtype=torch.float64)
    SourceTrainer(
        model, config(tmp_path, **settings), train_dataset=chats(), processing_class=byte_tokenizer()
    ).train()
    record = TrainingRecord.load(tmp_path / "record")
    asked = Queries.from_text(["Q Peru? A", "Q Fiji? A"], [" Lima", " Suva"])
    got = attributor(record, num_samples=256).scores(None, asked)

    step = 1e-4  # of float64: truncation and rounding are both far below the method's own error
    weights = np.concatenate([np.ones((1, 4)), 1 - step * np.eye(4)])
    stage = record.stages[0]
    losses = losses_of(
        *retrain(stage, stage.rows(), weights, dtype=torch.float64), asked.encode(byte_tokenizer()).rows
    )
    real = (losses[1:] - losses[0]).T / step
    # What is left is the Gauss-Newton approximation and the segments' averages; measured: .97 and 1.06.
    assert np.corrcoef(got.ravel(), real.ravel())[0, 1] > 0.95
    assert np.abs(got).sum() / np.abs(real).sum() == pytest.approx(1, abs=0.2)
    assert (np.sign(got) == np.sign(real)).all()


def test_generate_makes_queries_of_what_was_said(story):
    made = attributor(story).generate(["Peru:", "Q Cuba? A"], max_new_tokens=8)
    assert made.names == ["q0", "q1"]
    model = story.stage("sft").build_model()
    for (_, prompt, completion), row in zip(made, made.rows, strict=True):
        ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
        alone = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=0)[0].tolist()
        said = alone[ids.shape[1] :]
        said = said[: said.index(0)] if 0 in said else said
        assert [label for label in row["labels"] if label != -100] == said  # batching and padding change nothing
        assert completion == byte_tokenizer().decode(said)


def test_top_lists_both_stages_and_directions(story, queries, scores):
    table = attributor(story).top(queries, k=2)
    assert table.column_names == ["query", "stage", "row", "rank", "score", "text"]
    lima = [row for row in table if row["query"] == "lima" and row["stage"] == "pretrain"]
    assert [row["rank"] for row in lima] == [1, 2, -1, -2]
    assert lima[0]["row"] == scores["pretrain"][0].argmax()
    assert lima[0]["text"] == "Peru: Lima."
    assert lima[2]["row"] == scores["pretrain"][0].argmin()
    assert len(attributor(story).top(queries, k=2, opposing=False, stages=["sft"])) == 4


def test_plan_says_what_will_be_done(story, queries):
    plan = attributor(story).plan(facts(), queries, stage="pretrain")
    assert [stage.name for stage in plan.stages] == ["sft", "pretrain"]
    rows = story.stage("pretrain").rows()
    assert plan.stages[1].score_tokens == 2 * sum(map(len, rows["input_ids"]))  # each row visited in both segments
    assert plan.seconds > 0
    assert plan.peak_memory > 2 * 3 * 4 * plan.num_parameters
    assert "walk and score 'pretrain'" in str(plan)
    assert attributor(story, memory_budget=1000).plan(None, queries, "sft").stages[0].sample_passes > 1


@pytest.mark.parametrize(
    "settings", [{}, {"curvature": "ekfac"}, {"method": "grad-dot"}, {"vector_dtype": "bfloat16"}], ids=str
)
def test_plan_counts_the_walks_that_a_memory_budget_makes(story, queries, settings, monkeypatch):
    """Of four queries: as many passes and vectors at once as scoring then makes and holds."""
    asked = Queries.from_text([*queries.prompts] * 2, [*queries.completions] * 2)
    whole, base = attributor(story, **settings), importlib.import_module("hf_source.attribution.methods.base")
    plan = whole.plan(None, asked, "pretrain")
    assert plan.walks == 1 and "walks" not in str(plan)
    size = base.num_vector_bytes(whole, 1)
    assert size == plan.num_parameters * (2 if "vector_dtype" in settings else 4)  # both stages train the same weights
    each = size * base.vectors_each(whole)
    for room, walks in ((4, 1), (3, 2), (2, 2), (1, 4)):
        small = attributor(story, memory_budget=room * each, **settings)
        found = small.plan(None, asked, "pretrain")
        assert found.walks == walks and (f"{walks} walks" in str(found)) == (walks > 1)
        assert [s.score_tokens for s in found.stages] == [walks * s.score_tokens for s in plan.stages]
        assert found.memory["query vectors"] <= plan.memory["query vectors"] * room / 4
        sizes, score = [], METHODS[small.method].score
        counted = replace(METHODS[small.method], score=lambda a, q, s=sizes, f=score: s.append(len(q)) or f(a, q))
        with monkeypatch.context() as patch:
            patch.setitem(METHODS, small.method, counted)
            small.scores(None, asked, "sft")
        assert len(sizes) == walks and max(sizes) == room


def test_vectors_in_bfloat16(story, queries, scores):
    walker = attributor(story, vector_dtype="bfloat16")
    for stage, expected in scores.items():
        found = walker.scores(None, queries, stage)
        assert found.dtype == np.float32 and not np.array_equal(found, expected)
        for one, other in zip(found, expected, strict=True):
            assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)
    assert walker.settings() == attributor(story).settings() | {"vector_dtype": "bfloat16"} == walker.like().settings()
    wide = attributor(story, vector_dtype="float32")
    np.testing.assert_array_equal(wide.scores(None, queries, "sft"), scores["sft"])
    with pytest.raises(ConfigError, match="vector_dtype='half': vectors are held in 'bfloat16' or 'float32'"):
        attributor(story, vector_dtype="half")
    with pytest.raises(ConfigError, match="no wider than dtype=torch.bfloat16"):
        attributor(story, vector_dtype="float32", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="curvature='joint'; here they are 'source' and 'ekfac'"):
        attributor(story, vector_dtype="bfloat16", curvature="ekfac")
    with pytest.raises(ConfigError, match="here they are 'tracin'"):
        attributor(story, vector_dtype="bfloat16", method="tracin")


class FourProcesses(Accelerator):
    """As one of four sees it."""

    num_processes = 4


def test_vectors_are_sharded_over_processes(story, queries):
    """What the processes then do: `tests/source/test_together.py` and `tests/distributed`."""
    from hf_source.attribution.methods import base

    for number in (0, 2, 1.5):
        with pytest.raises(ConfigError, match=f"vector_shards={number}: 1 processes cannot be cut into groups"):
            attributor(story, vector_shards=number)
    of_four = partial(attributor, story, accelerator=FourProcesses())
    with pytest.raises(ConfigError, match="vector_shards=3: 4 processes"):
        of_four(vector_shards=3)
    for settings in ({"method": "tracin"}, {"curvature": "exact"}):
        with pytest.raises(ConfigError, match="vector_shards=2 belongs to method='source' and 'fast-source'"):
            of_four(vector_shards=2, **settings)
    halves = of_four(vector_shards=2)
    assert halves.like(num_samples=4).vector_shards == 2 and halves.like(method="grad-dot").vector_shards == 1
    assert base.num_vector_bytes(halves, 3) == base.num_vector_bytes(attributor(story), 3) // 2
    assert halves.walk_settings().together.rows == (0, 2)
    # What does not walk has all parameters: an index, and the replay that a plan times.
    whole = attributor(story)
    for position in range(2):
        engines = [Responses(each).engine(position)[0] for each in (halves, whole)]
        assert engines[0].parameters.keys() == engines[1].parameters.keys()
    plans = [each.plan(None, queries) for each in (halves, whole)]
    assert plans[0].memory["query vectors"] == plans[1].memory["query vectors"] // 2
    assert len(plans[0].advice.replays) == len(plans[1].advice.replays)


def test_carried_vectors_wait_on_disk(story, queries, scores, monkeypatch, tmp_path):
    from hf_source.attribution.methods import base

    made, source = [], importlib.import_module("hf_source.attribution.methods.source")

    class Seen(on_disk.VectorsOnDisk):
        def __setitem__(self, name, tensor):
            made.append(self._folder.name)
            super().__setitem__(name, tensor)

    monkeypatch.setattr(importlib.import_module("hf_source.source.walk"), "VectorsOnDisk", Seen)
    walker = attributor(story)
    vectors = base.num_vector_bytes(walker, len(queries))
    assert not base.carries_on_disk(walker, len(queries))
    for budget, expected in ((2 * vectors, False), (2 * vectors - 1, True), (vectors, True)):
        assert base.carries_on_disk(attributor(story, memory_budget=budget), len(queries)) is expected
    assert not base.carries_on_disk(attributor(story, memory_budget=1, curvature="ekfac"), len(queries))
    monkeypatch.setattr(source, "carries_on_disk", lambda *asked: True)
    for stage, expected in scores.items():
        np.testing.assert_array_equal(walker.scores(None, queries, stage), expected)
    assert made and not any(Path(folder).exists() for folder in made)  # gone with the walk


def test_vectors_on_disk(tmp_path):
    vectors = on_disk.VectorsOnDisk(tmp_path, torch.device("cpu"))
    given = {"a": torch.randn(2, 3), "b": torch.randn(2).bfloat16(), "c": torch.randn(2, 3, 4).double().mT}
    vectors.update(given)
    assert list(vectors) == ["a", "b", "c"] and len(vectors) == 3
    assert all(
        torch.equal(vectors[name], tensor) and vectors[name].dtype == tensor.dtype for name, tensor in given.items()
    )
    vectors["a"].zero_()  # a copy
    assert torch.equal(vectors.pop("a"), given["a"]) and "a" not in vectors
    vectors["d"] = torch.ones(1)
    vectors["b"] = torch.zeros(4)
    assert vectors["b"].shape == (4,) and torch.equal(vectors["c"], given["c"]) and len(list(tmp_path.rglob("*"))) == 4
    del vectors
    assert not list(tmp_path.iterdir())


def test_small_memory_budget_changes_nothing(story, queries, scores):
    got = attributor(story, memory_budget=20_000).scores(None, queries, "pretrain")
    np.testing.assert_allclose(got, scores["pretrain"], rtol=1e-2, atol=1e-4 * np.abs(scores["pretrain"]).max())


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_another_dataset_is_refused(story, queries):
    other = facts().map(lambda row: {"text": row["text"].replace("Lima", "Cusco")})
    with pytest.raises(DataError, match="content hash differs.*same"):
        attributor(story).attribute(other, queries, "pretrain")


def test_another_number_of_rows_is_refused(story, queries):
    with pytest.raises(DataError, match="7 rows.*'pretrain' was trained on 8.*pass the dataset exactly"):
        attributor(story).attribute(facts().select(range(7)), queries, "pretrain")


def test_a_changed_order_is_refused(story, queries):
    with pytest.raises(DataError, match="same order"):
        attributor(story).attribute(facts().select(range(7, -1, -1)), queries, "pretrain")


def test_unknown_stage_lists_the_known(story, queries):
    with pytest.raises(RecordError, match=r"no stage 'dpo'.*\['pretrain', 'sft'\]"):
        attributor(story).scores(None, queries, "dpo")
    with pytest.raises(RecordError, match="several stages: choose"):
        attributor(story).scores(None, queries)


def test_a_column_of_the_name_is_refused_before_work(story):
    clash = facts().add_column("source_lima", [0.0] * 8)
    walker = attributor(story)
    with pytest.raises(DataError, match="'source_lima', which the dataset has already: rename the query"):
        walker.attribute(clash, Queries.from_text(["Peru:"], [" Lima"], names=["lima"]), "pretrain")
    with pytest.raises(DataError, match="'source_row'"):
        walker.attribute(facts(), Queries.from_text(["Peru:"], [" Lima"], names=["row"]), "pretrain")
    assert not walker._walks  # nothing was computed


def test_text_longer_than_the_context_is_refused(story):
    long = Queries.from_text(["Peru:"], [" Lima" * 10])
    with pytest.raises(DataError, match="'q0' has 55 tokens, the model's context holds 32: shorten"):
        attributor(story).scores(None, long, "sft")
    with pytest.raises(DataError, match="does not fit the context of 32"):
        attributor(story).generate(["Peru: " * 5], max_new_tokens=8)


def test_unknown_method_and_curvature_list_the_known(story):
    with pytest.raises(ConfigError, match="method='sauce' is unknown.*source"):
        attributor(story, method="sauce")
    with pytest.raises(ConfigError, match="curvature='flat' is unknown.*joint"):
        attributor(story, curvature="flat")
    with pytest.raises(ConfigError, match="num_samples=0"):
        attributor(story, num_samples=0)


def test_missing_or_torn_record(story, tmp_path):
    with pytest.raises(RecordError, match="no training record"):
        SourceAttributor.from_record(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(story.path, copy)
    file = next(copy.glob("stages/0-*/segments/0/parameters.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(RecordError, match="parameters.safetensors is damaged.*Restore it"):
        SourceAttributor.from_record(copy)
    file.unlink()
    with pytest.raises(RecordError, match="it is missing"):
        SourceAttributor.from_record(copy)


def test_stages_before_a_torn_or_unfinished_one_are_attributed(story, tmp_path, queries, caplog):
    """The model is then that of the last whole stage, and everything made of it says so."""
    shutil.copytree(story.path, tmp_path / "torn")
    (tmp_path / "torn" / "stages" / "1-sft" / "final.safetensors").unlink()
    shutil.copytree(story.path, tmp_path / "killed")
    data = json.loads((tmp_path / "killed" / "record.json").read_text())
    data["stages"][1]["status"] = "running"
    (tmp_path / "killed" / "record.json").write_text(json.dumps(data))
    alone = TrainingRecord(story.path, {**story.data, "stages": story.data["stages"][:1]})
    expected = SourceAttributor(alone, **FAST).scores(None, queries)
    for name, reason in (
        ("torn", "final.safetensors is damaged: it is missing"),
        ("killed", "Stage 'sft' of .* is not complete: training stopped after step 20. Continue it with"),
    ):
        caplog.clear()
        found = SourceAttributor.from_record(tmp_path / name, **FAST)
        assert re.search(f"The model is that of stage 'pretrain': sft left out. .*{reason}", found.note)
        assert re.search(reason, caplog.text)
        np.testing.assert_array_equal(found.scores(None, queries), expected)
        assert found.note in found.top(queries).info.description
        with pytest.raises(RecordError, match=reason):
            found.scores(None, queries, "sft")
    with pytest.raises(RecordError, match="is not complete"):  # who asks for the whole record is not given a part
        SourceAttributor(TrainingRecord.load(tmp_path / "killed"), **FAST).scores(None, queries, "pretrain")


@pytest.mark.parametrize("momentum", [True, False])
def test_plan_counts_rows_whose_gradients_an_optimizer_still_holds(tmp_path, queries, monkeypatch, momentum):
    """The second segment of an epoch visits half of the rows, and its updates hold gradients of the others."""
    settings = {"num_segments": 2, "num_train_epochs": 1, "max_steps": -1, "gradient_accumulation_steps": 1}
    args = config(tmp_path, **settings, per_device_train_batch_size=1, lr_scheduler_type="constant")
    SourceTrainer(tiny_gpt2(vocab_size=260), args, train_dataset=facts(), processing_class=byte_tokenizer()).train()
    walker = attributor(TrainingRecord.load(tmp_path / "record"), momentum=momentum)
    planned = walker.plan(None, queries).stages[0].score_tokens
    module, scored = importlib.import_module("hf_source.source.walk"), []
    original = module.score_rows

    def counted(gradients, batch, *args):
        scored.append(int((batch["labels"] != -100).sum()))
        return original(gradients, batch, *args)

    monkeypatch.setattr(module, "score_rows", counted)
    walker.scores(None, queries)
    assert planned == sum(scored)
    of_all = sum(map(len, walker.record.stages[0].rows()["input_ids"]))
    assert planned == of_all if not momentum else of_all < planned <= 2 * of_all


def test_rows_that_are_nowhere_are_asked_for(tmp_path, queries):
    model = tiny_gpt2(vocab_size=260)
    args = config(tmp_path, record_rows=False)
    SourceTrainer(model, args, train_dataset=facts(), processing_class=byte_tokenizer()).train()
    record = TrainingRecord.load(tmp_path / "record")
    with pytest.raises(DataError, match="does not hold them: pass `datasets="):
        attributor(record).top(queries)
    assert len(attributor(record, datasets={"train": facts()}).top(queries, k=1)) == 4


def test_a_stage_that_started_elsewhere_is_refused(story, tmp_path, queries):
    copy = tmp_path / "copy"
    shutil.copytree(story.path, copy)
    model = tiny_gpt2(seed=5, vocab_size=260)  # not the model that sft ended with
    args = config(tmp_path, record_dir=str(copy), stage="dpo", max_steps=4)
    SourceTrainer(model, args, train_dataset=chats(), processing_class=byte_tokenizer()).train()
    walker = SourceAttributor.from_record(copy, num_samples=4, progress=False)
    walker.scores(None, queries, "dpo")  # its own rows are fine
    with pytest.raises(UnsupportedError, match="does not start from the weights stage 'sft' ended with"):
        walker.scores(None, queries, "sft")


def test_other_label_masking_is_noticed(story, queries):
    rows = story.stage("sft").rows().remove_columns(["prompt", "completion", "source_row"])
    stage = story.stage("sft")
    unmasked = rows.map(lambda row: {"labels": row["input_ids"]})
    stage.dataset["fingerprint"], before = _fingerprint(unmasked), stage.dataset["fingerprint"]
    try:
        with pytest.raises(DataError, match="label tokens.*data_collator"):
            SourceAttributor(story, num_samples=4, progress=False).scores(unmasked, queries, "sft")
    finally:
        stage.dataset["fingerprint"] = before


def _fingerprint(dataset):
    from hf_source.data import content_fingerprint

    return content_fingerprint(dataset)


@pytest.mark.parametrize(
    ("settings", "products"), [({"method": "stepwise", "draws": 3}, 3), ({"method": "unrolled"}, 3)]
)
def test_plan_of_unrolling_counts_every_visit(story, queries, settings, products):
    plan = attributor(story, **settings).plan(None, queries, stage="sft")
    stage = story.stage("sft")
    visited = sum(len(batch.rows) for step in stage.steps().micro_batches for batch in step)
    (part,) = plan.stages
    assert part.num_segments == stage.num_steps and part.sample_passes == products
    assert part.sample_tokens * 4 == part.score_tokens * products and part.score_tokens > 4 * visited
    assert "states of the run" in plan.memory


@pytest.mark.parametrize("method", ["source", "stepwise", "influence"])
def test_signs_in_place_of_labels(story, queries, method):
    labels, signs = (attributor(story, method=method, probes=probes) for probes in ("labels", "signs"))
    found = [walker.scores(None, queries, "sft") for walker in (labels, signs)]
    assert not np.array_equal(*found) and np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.8
    assert signs.settings() == labels.settings() | {"probes": "signs"} == signs.like().settings()
    with pytest.raises(ConfigError, match="probes='coins' is unknown; choose one of labels, signs"):
        attributor(story, method=method, probes="coins")


def test_draws_must_be_positive(story):
    with pytest.raises(ConfigError, match="draws=0.*16 is usual"):
        attributor(story, method="stepwise", draws=0)


def test_a_setting_of_another_method_is_refused(story):
    with pytest.raises(ConfigError, match="'bm25' has no setting 'draws': it has no settings.*method='stepwise'"):
        attributor(story, method="bm25", draws=4)
    with pytest.raises(ConfigError, match="'stepwise' has no setting 'drews': its own settings are draws"):
        attributor(story, method="stepwise", drews=4)


def test_embedding_is_the_cosine_of_what_the_encoder_says(story, queries):
    got = attributor(story, method="embedding", encoder=Letters()).scores(None, queries, "pretrain")
    rows = np.asarray(Letters().encode(facts()["text"]), dtype=float)
    asked = np.asarray(Letters().encode(["Peru: Lima", "Q Cuba? A Havana"]), dtype=float)
    expected = asked @ rows.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="needs an encoder: pass `encoder=`"):
        attributor(story, method="embedding").scores(None, queries, "sft")


def test_influence_needs_a_curvature_to_invert(story, queries):
    with pytest.raises(ConfigError, match="curvature='identity' is not: set it to 'ekfac' or 'joint'"):
        attributor(story, method="influence", curvature="identity").scores(None, queries, "sft")
    for curvature in ("ekfac", "joint"):
        scores = attributor(story, method="influence", curvature=curvature).scores(None, queries, "sft")
        assert scores[1].argmax() == list(CAPITALS).index("Cuba")


def test_influence_is_a_damped_newton_step_per_loss_item(story, queries):
    """Against a dense inverse over all parameters, on the sample that the method draws."""
    walker = attributor(story, method="influence", dtype=torch.float64)
    stage = story.stage("sft")
    got = walker.scores(None, queries, "sft")
    rows, model = walker.rows(stage), walker.build_model(stage)
    gradients = RowGradients(model, rows.task, stage.trainable)
    sample = draw_sample(rows, np.ones(4), gradients, walker.walk_settings(), walker.seed)
    columns = torch.cat([part.flatten(1) for part in sample.matrices(stage.trainable).values()], dim=1).numpy()
    asked, own = (
        torch.cat([vectors[name].flatten(1) for name in stage.trainable], dim=1).numpy()
        for vectors in (
            walker.query_gradients(gradients, queries),
            {name: part for name, _, part in gradients.blocks(gradients.run(rows.collated(range(4), walker.device)))},
        )
    )
    gram = columns @ columns.T
    strength = 0.1 * gram.trace() / len(gram)
    inner = np.linalg.solve(gram + strength * np.eye(len(gram)), columns @ own.T)
    expected = (asked @ own.T - asked @ columns.T @ inner) / strength / rows.items.sum()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_tracin_sums_dot_products_over_segments_by_real_visits(story, queries):
    """One segment at a time from the record, with autograd for the gradients."""
    stage = story.stage("sft")
    got = attributor(story, method="tracin").scores(None, queries, "sft")
    model, tokenizer = stage.build_model(torch.float32), byte_tokenizer()
    encoded = queries.encode(tokenizer, 32)
    expected = np.zeros_like(got, dtype=np.float64)

    def gradient(row):
        model.zero_grad()
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    rows = stage.rows()
    for segment in stage.segments:
        stage.load_weights(model, segment.index)
        weights = segment.row_weights()
        asked = [gradient(row) for row in encoded.rows]
        for number in range(4):
            own = gradient(rows[number])
            expected[:, number] += [weights[number] * float(own @ query) for query in asked]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_an_incomplete_task_is_refused_at_once(story):
    class Half(RowLossTask):
        def forward(self, model, batch):
            return model(batch["input_ids"]).logits

    with pytest.raises(TypeError, match="Half .*abstract method '?row_losses"):
        Half()

    class OwnHalf:  # with no base class that says so
        forward = Half.forward

    for task in (OwnHalf(), {"sft": OwnHalf()}):
        with pytest.raises(ConfigError, match="task=OwnHalf has no `row_losses`: write"):
            attributor(story, task=task)
    with pytest.raises(ConfigError, match="task=object has no `forward`"):
        attributor(story, task=object())
    with pytest.raises(ConfigError, match=r"task=Half is a class: make one of it, task=Half\(\)"):
        attributor(story, task=Half)
