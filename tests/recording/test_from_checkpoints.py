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
"""Records of runs that were not recorded, rebuilt from checkpoints, against the record of the same run."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, config, random_rows, tiny_gpt2, tiny_llama, train
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import GPT2LMHeadModel, Trainer

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.data import CausalLMCollator
from hf_source.errors import ConfigError, DataError, RecordError, UnsupportedError
from hf_source.evaluation.retraining import retrain
from hf_source.outputs.page import write_page
from hf_source.recording import replay
from hf_source.recording.reading.hub import record_card


SETTINGS = {
    "max_steps": 36,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_strategy": "steps",
    "logging_steps": 4,
    "num_segments": 3,
}


def make_model(**sizes):
    return tiny_gpt2(vocab_size=257, **sizes)


def make_rows():
    facts = [f"Row {number} is {number * number}." for number in range(20)]
    return Dataset.from_dict({"text": [*facts, "Peru: Lima.", "Cuba: Havana.", "Fiji: Suva.", "Oman: Muscat."]})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run that was truly recorded, with its checkpoints in `out`."""
    folder = tmp_path_factory.mktemp("recorded")
    train(folder, make_model(), make_rows(), trainer={"processing_class": byte_tokenizer()}, **SETTINGS)
    return folder


def checkpoints(folder, *steps):
    found = sorted((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return [path for path in found if not steps or int(path.name.partition("-")[2]) in steps]


def rebuild(source, folder, steps=(), settings=None, **given):
    settings = {**SETTINGS, **(settings or {})}
    known = {"dataset": make_rows(), "args": config(folder, **settings), "model": make_model()}
    known |= {"processing_class": byte_tokenizer(), "record_dir": folder / "rebuilt"} | given
    return TrainingRecord.from_checkpoints(checkpoints(source, *steps), **known)


@pytest.fixture(scope="module")
def both(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return TrainingRecord.load(recorded / "record"), rebuild(recorded, folder)


def relative(first, second):
    difference = torch.cat([(first[name] - second[name]).flatten() for name in first]).norm()
    return float(difference / torch.cat([first[name].flatten() for name in first]).norm())


def test_what_is_known_is_exact(both):
    true, rebuilt = (record.stage() for record in both)
    assert rebuilt.record.verify() == [] and rebuilt.status == "complete"
    np.testing.assert_array_equal(true.steps().learning_rate, rebuilt.steps().learning_rate)
    for a, b in zip(true.segments, rebuilt.segments, strict=True):
        assert (a.first_step, a.end_step, a.learning_rate_sum) == (b.first_step, b.end_step, b.learning_rate_sum)
        assert a.learning_rate_sum_per_group == b.learning_rate_sum_per_group
    assert true.optimizer == rebuilt.optimizer and true.trainable == rebuilt.trainable
    assert {**rebuilt.dataset, **true.dataset} == rebuilt.dataset and true.loss["kind"] == rebuilt.loss["kind"]
    for which in ("initial", "final"):
        assert relative(true.weights(which), rebuilt.weights(which)) == 0
    assert rebuilt.build_model().config.n_embd == 16 and len(rebuilt.rows()) == 24
    logged = ~np.isnan(rebuilt.steps().grad_norm)
    assert logged.sum() == 9
    np.testing.assert_allclose(rebuilt.steps().clip_factor[logged], true.steps().clip_factor[logged], rtol=1e-6)


def test_rebuilt_segments_are_read_as_fewer(both):
    """Of a run that was recorded, and of one that was not: uniform visits have the weight of all segments."""
    for record in both:
        parts, (whole,) = record.stage().segments, record.merged(1).stage().segments
        for read in ("row_weights", "num_visits"):
            np.testing.assert_allclose(getattr(whole, read)(), sum(getattr(part, read)() for part in parts), rtol=1e-9)
        walker = SourceAttributor(record, num_samples=8, num_segments=1, progress=False)
        scores = walker.scores(None, Queries.from_text(["Peru:"], [" Lima"]))
        assert scores[0].argmax() == 20  # the row that says so


def test_what_is_assumed_is_near(both):
    """18 checkpoints for 36 steps: weights within 5 %, preconditioners 2 %, learning rates times clipping 10 %."""
    true, rebuilt = (record.stage() for record in both)
    for a, b in zip(true.segments, rebuilt.segments, strict=True):
        assert relative(a.parameters(), b.parameters()) < 0.05
        assert relative(a.preconditioner(), b.preconditioner()) < 0.02
        assert b.effective_learning_rate_sum == pytest.approx(a.effective_learning_rate_sum, rel=0.1)
        assert b.row_weights().sum() == pytest.approx(a.row_weights().sum(), rel=0.15)
        assert b.objective_scale() == pytest.approx(a.objective_scale(), rel=1e-2)
        assert b.num_visits().sum() == pytest.approx(a.num_visits().sum(), rel=0.1)
        assert np.ptp(b.row_weights()) == 0 and np.ptp(b.applied_weights()) == 0
    applied = [sum(segment.applied_weights() for segment in stage.segments).sum() for stage in (true, rebuilt)]
    assert applied[1] == pytest.approx(applied[0], rel=0.1)


@pytest.mark.parametrize(("steps", "bound"), [((), 0.8), ((6, 12, 24, 36), 0.5)])
def test_scores_rank_rows_as_those_of_the_recorded_run(both, recorded, tmp_path, steps, bound):
    """Mean over queries of the rank correlation of the rows' scores: .91 with 18 checkpoints, .65 with 4."""
    true, rebuilt = both
    if steps:
        rebuilt = rebuild(recorded, tmp_path, steps)
    assert len(rebuilt.stage().segments) == 3
    queries = Queries.from_text(["Peru:", "Oman:", "Row 4 is"], [" Lima", " Muscat", " 16"])
    found = [
        SourceAttributor(record, num_samples=64, progress=False).attribute(None, queries, return_scores=True)
        for record in (true, rebuilt)
    ]
    ranks = [spearmanr(a, b).statistic for a, b in zip(*found, strict=True)]
    assert np.mean(ranks) > bound, ranks


@pytest.mark.parametrize(
    "settings",
    [{"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "rmsprop"}, {"lr_scheduler_type": "constant"}],
)
def test_other_optimizers_and_schedules(tmp_path, settings):
    settings = {"max_steps": 8, "num_segments": 2, "learning_rate": 1e-3, **settings}
    given = {"trainer": {"processing_class": byte_tokenizer()}}
    _, true = train(tmp_path, make_model(), make_rows(), **given, **{**SETTINGS, **settings})
    rebuilt = rebuild(tmp_path, tmp_path, settings=settings, num_segments=2)
    for a, b in zip(true.stage().segments, rebuilt.stage().segments, strict=True):
        assert a.learning_rate_sum == b.learning_rate_sum
        assert relative(a.preconditioner(), b.preconditioner()) < 0.15
    assert relative(true.stage().weights("final"), rebuilt.stage().weights("final")) == 0


def test_ids_of_the_optimizer_follow_its_groups(tmp_path):
    """Decaying parameters first: in the order of the model, moments would go to others of the same shape."""
    settings = {"max_steps": 4, "num_segments": 1, "learning_rate": 1e-3}
    rows = random_rows()
    trainer = Trainer(tiny_llama(), config(tmp_path, **{**SETTINGS, **settings}), CausalLMCollator(), rows)
    trainer.train()
    names = [name for name, _ in trainer.model.named_parameters()]
    decay = set(trainer.get_decay_parameter_names(trainer.model))
    order = [name for name in names if name in decay] + [name for name in names if name not in decay]
    assert order != names
    saved = torch.load(tmp_path / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    args = config(tmp_path, **{**SETTINGS, **settings})
    record = TrainingRecord.from_checkpoints(
        [tmp_path / "out" / "checkpoint-4"],
        dataset=rows,
        args=args,
        record_dir=tmp_path / "rebuilt",
        model=tiny_llama(),
    )
    segment = record.stage().segments[0]
    share = segment.effective_learning_rate_sum_per_group[0] / segment.effective_learning_rate_sum
    for number, name in enumerate(order):
        root = (saved["state"][number]["exp_avg_sq"] / (1 - 0.999**4)).sqrt()
        expected = torch.where(root > 0, share / (root + 1e-8), 0)
        torch.testing.assert_close(segment.preconditioner()[name], expected, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        return peft.get_peft_model(make_model(), lora)

    settings = {"max_steps": 4, "num_segments": 1}
    tokenizer = {"processing_class": byte_tokenizer()}
    _, true = train(tmp_path, make(), make_rows(), trainer=tokenizer, **{**SETTINGS, **settings})
    rebuilt = rebuild(tmp_path, tmp_path, settings=settings, model=make())
    assert rebuilt.stage().trainable == true.stage().trainable
    assert relative(true.stage().weights("final"), rebuilt.stage().weights("final")) == 0
    assert rebuilt.verify() == [] and rebuilt.stage().build_model() is not None


# ---- It is said everywhere ----


def test_the_assumption_is_said_in_every_output(both, tmp_path, caplog):
    rebuilt = both[1]
    stage = rebuilt.stage()
    assert stage.data["visits"] == "assumed uniform" and "visits assumed uniform" in repr(stage)
    assert any("9 logged" in assumption for assumption in stage.data["assumptions"])
    with caplog.at_level("WARNING"):
        attributor = SourceAttributor(rebuilt, method="grad-dot", progress=False)
    assert "Visits are assumed uniform: stage train was rebuilt from checkpoints" in caplog.text
    queries = Queries.from_text(["Peru:"], [" Lima"])
    assert "assumed uniform" in attributor.attribute(None, queries).info.description
    top = attributor.top(queries, k=2)
    assert "assumed uniform" in top.info.description
    page = write_page(tmp_path / "page.html", "Page", queries, top).read_text()
    assert "Visits are assumed uniform" in page
    assert "its visits are assumed uniform" in " ".join(record_card(rebuilt, rebuilt.data, "me/x").split())
    assert [check.note for check in rebuilt.check_replays(2)] == ["its visits are assumed uniform, not recorded"]


def test_nothing_is_said_of_a_recorded_run(both, tmp_path, caplog):
    attributor = SourceAttributor(both[0], method="grad-dot", progress=False)
    queries = Queries.from_text(["Peru:"], [" Lima"])
    top = attributor.top(queries, k=2)
    assert "assumed" not in top.info.description + caplog.text + attributor.attribute(None, queries).info.description
    assert "assumed" not in write_page(tmp_path / "page.html", "Page", queries, top).read_text()


def test_what_needs_the_real_visits_is_refused(both):
    stage = both[1].stage()
    with pytest.raises(UnsupportedError, match="which rows each step trained on is not known .*cannot be replayed"):
        replay(stage, stage.rows())
    with pytest.raises(UnsupportedError, match="cannot be trained again. Train it with SourceTrainer"):
        retrain(stage, stage.rows(), np.ones((1, 24), dtype=bool))
    queries = Queries.from_text(["Peru:"], [" Lima"])
    with pytest.raises(UnsupportedError, match="cannot be unrolled"):
        SourceAttributor(both[1], method="unrolled", progress=False).top(queries, k=1)


# ---- Stages, segments, sources ----


def test_a_rebuilt_stage_before_a_recorded_one(recorded, tmp_path):
    rebuilt = rebuild(recorded, tmp_path, record_dir=tmp_path / "record", stage="pretrain")
    model = rebuilt.stage().build_model()
    tokenizer = {"processing_class": byte_tokenizer()}
    _, record = train(tmp_path, model, make_rows(), trainer=tokenizer, stage="sft", max_steps=4, num_segments=1)
    assert record.stage("sft").continues_parent and record.verify() == []
    queries = Queries.from_text(["Peru:"], [" Lima"])
    top = SourceAttributor(record, num_samples=16, progress=False).top(queries, k=1)
    assert set(top["stage"]) == {"pretrain", "sft"}


def test_few_checkpoints_make_few_segments(recorded, tmp_path):
    assert len(rebuild(recorded, tmp_path / "a", (2, 36)).stage().segments) == 2
    assert len(rebuild(recorded, tmp_path / "b", (36,)).stage().segments) == 1
    with pytest.raises(RecordError, match="No checkpoint lies after step .*smaller num_segments"):
        rebuild(recorded, tmp_path / "c", (36,), num_segments=2)


def test_a_run_whose_end_was_not_kept(recorded, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        record = rebuild(recorded, tmp_path, (10, 20))
    assert record.stage().num_steps == 20 and "step 20 of 36: the stage ends there" in caplog.text


def test_a_start_that_was_saved(recorded, tmp_path):
    """Checkpoint 0 stands for `model=`, and args may be a dictionary."""
    zero = shutil.copytree(recorded / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-0")
    make_model().save_pretrained(zero)
    state = json.loads((zero / "trainer_state.json").read_text())
    (zero / "trainer_state.json").write_text(json.dumps(state | {"global_step": 0}))
    settings = {k: v for k, v in vars(config(tmp_path, **SETTINGS)).items() if k in {**SETTINGS, "learning_rate": 0}}
    settings |= {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "weight_decay": 0.1}
    settings |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "use_cpu": True}
    record = TrainingRecord.from_checkpoints(
        [zero, *checkpoints(recorded)],
        dataset=make_rows(),
        args=settings | {"max_grad_norm": 0.7, "disable_tqdm": True},
        record_dir=tmp_path / "rebuilt",
    )
    expected = dict(make_model().named_parameters())
    assert relative(record.stage().weights("initial"), {n: p.detach() for n, p in expected.items()}) == 0
    assert record.processing_class() is not None  # the checkpoint's


# ---- What does not fit is refused ----


def test_training_args_are_never_unpickled(recorded, tmp_path, monkeypatch):
    assert (recorded / "out" / "checkpoint-36" / "training_args.bin").is_file()
    with pytest.raises(
        ConfigError, match="training_args.bin is a pickle, which could run any code, so it is not read"
    ):
        rebuild(recorded, tmp_path, args=None)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    loaded = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded(*a, **k) if k.get("weights_only") else 1 / 0)
    assert rebuild(recorded, tmp_path, (36,)).verify() == []


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(
    ("settings", "given", "error", "said"),
    [
        ({"learning_rate": 2e-2}, {}, RecordError, "learning rates .*Pass the learning_rate, lr_scheduler_type"),
        ({"lr_scheduler_type": "linear"}, {}, RecordError, "checkpoint-4 goes on with learning rates"),
        ({"weight_decay": 0.2}, {}, RecordError, "other constants than `args`: weight_decay 0.1 instead of 0.2"),
        ({"adam_beta2": 0.99}, {}, RecordError, r"betas \[0.9, 0.999\] instead of \[0.9, 0.99\]"),
        ({"max_steps": 30}, {}, RecordError, "a run of 36 optimizer steps; `args` and `dataset` make 30"),
        ({}, {"dataset": None}, DataError, "Pass `dataset=`"),
        ({}, {"dataset": make_rows().to_iterable_dataset()}, UnsupportedError, "A stream has no fixed rows"),
        ({}, {"model": None}, RecordError, "weights that training started from are unknown: pass `model=`"),
        ({}, {"model": make_model(n_embd=8)}, RecordError, r"`transformer.wte.weight` of shape \(257, 8\)"),
        (PLATEAU, {}, UnsupportedError, "ReduceLROnPlateau depend on how training went"),
        ({"optim": "adafactor"}, {}, UnsupportedError, "Adafactor cannot be read from optimizer.pt"),
    ],
)
def test_what_does_not_fit(recorded, tmp_path, settings, given, error, said):
    with pytest.raises(error, match=said):
        rebuild(recorded, tmp_path, settings=settings, **given)
    assert not (tmp_path / "rebuilt" / "record.json").exists()


def test_frozen_otherwise(recorded, tmp_path):
    model = make_model()
    model.transformer.wte.weight.requires_grad_(False)
    with pytest.raises(RecordError, match=r"groups of \[\d+, \d+\] parameters, the model and `args` give groups of"):
        rebuild(recorded, tmp_path, model=model)


def test_moments_of_other_shapes(recorded, tmp_path):
    folder = shutil.copytree(recorded / "out", tmp_path / "out")
    file = folder / "checkpoint-36" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    saved["state"][0]["exp_avg_sq"] = saved["state"][0]["exp_avg_sq"][:5]
    torch.save(saved, file)
    with pytest.raises(RecordError, match=r"`exp_avg_sq` of parameter 0 .* has shape \(5, 16\), but `transformer.wte"):
        rebuild(tmp_path, tmp_path)


def test_missing_files(recorded, tmp_path):
    shutil.copytree(recorded / "out", tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(RecordError, match="checkpoint-4 has no optimizer.pt.*Leave this checkpoint out"):
        rebuild(tmp_path, tmp_path)
    (tmp_path / "out" / "checkpoint-2" / "model.safetensors").unlink()
    with pytest.raises(RecordError, match="checkpoint-2 holds no model.safetensors"):
        rebuild(tmp_path, tmp_path)
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(RecordError, match="checkpoint-6 is no checkpoint of a Trainer"):
        rebuild(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="Pass a list of checkpoints"):
        TrainingRecord.from_checkpoints("out", dataset=None, args=None, record_dir=tmp_path)


def test_checkpoints_of_two_runs(recorded, tmp_path):
    shutil.copytree(recorded / "out", tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_steps": 40}))
    with pytest.raises(RecordError, match=r"of runs of \[36, 40\] steps\) are not of one run"):
        rebuild(tmp_path, tmp_path)


def test_a_stage_is_not_overwritten(both, recorded, tmp_path):
    with pytest.raises(RecordError, match="has a stage 'train' already"):
        rebuild(recorded, tmp_path, record_dir=both[1].path)


def test_the_model_that_is_given_ends_trained(recorded, tmp_path):
    """Like that of a Trainer."""
    model = make_model()
    record = rebuild(recorded, tmp_path, model=model)
    assert isinstance(model, GPT2LMHeadModel)
    assert relative({n: p.detach() for n, p in model.named_parameters()}, record.stage().weights("final")) == 0
