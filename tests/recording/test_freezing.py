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
"""Parameters that are frozen and unfrozen: between stages, and by callbacks while a stage trains."""

import numpy as np
import pytest
import torch
from cases import config, distance, random_rows, tiny_gpt2, tiny_llama, train
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.recording import SourceTrainer, TrainingRecord, replay


OPTIMIZERS = {
    "adamw": {},
    "adam": {"optim": "adamw_torch", "adam_beta2": 0.9},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.8", "learning_rate": 0.05},
}


class Toggle(TrainerCallback):
    """Sets which parameters train before some steps: step -> part of their names (all that have it)."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        part = [part for step, part in sorted(self.plan.items()) if step <= state.global_step][-1]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)


GRADUAL = {0: "lm_head", 2: "layers.1", 5: ""}


def gradual(folder, plan=None, **settings):
    model = tiny_llama(dtype=torch.float64)
    _, record = train(folder, model, trainer={"callbacks": [Toggle(plan or GRADUAL)]}, **settings)
    return model, record.stage()


def replay_error(stage, **options):
    final = stage.weights("final")
    again = {n: p for n, p in replay(stage, random_rows(), **options).named_parameters() if n in final}
    return distance(again, final), distance(stage.weights("initial"), final)


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradual_unfreezing_replays(tmp_path, settings):
    """Moments, decay and updates of a frozen parameter stand still."""
    model, stage = gradual(tmp_path, **settings)
    assert [change["step"] for change in stage.data["trainable_changes"]] == [0, 2, 5]
    everything = set(dict(model.named_parameters()))
    assert set(stage.trainable) == everything
    assert stage.frozen_at(1) == everything - {"lm_head.weight"}
    assert stage.frozen_at(4) == {name for name in everything if "layers.1" not in name}
    assert stage.frozen_at(8) == frozenset()
    error, moved = replay_error(stage)
    assert error <= 1e-9 * moved
    seen = []
    replay(stage, random_rows(), callback=lambda step, model, optimizer: seen.append(copy(model)))
    frozen = stage.frozen_at(0)
    for before, after in zip(seen[:2], seen[1:3], strict=True):
        same = {name for name in everything if torch.equal(before[name], after[name])}
        assert same == (frozen if after is seen[1] else stage.frozen_at(2))
    stage.data["trainable_changes"] = []
    error, moved = replay_error(stage)
    assert error > 1e-2 * moved


def copy(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_averages_count_the_steps_that_updated(tmp_path, settings):
    """`s P` and `s Lambda` are sums over those steps; compared with what a spy sees beside the optimizer."""
    seen = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
            rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
            seen.append({n: rates[id(p)] for n, p in model.named_parameters() if p.grad is not None})

    model = tiny_llama(dtype=torch.float64)
    settings = settings | {"num_segments": 2, "segment_boundaries": [4]}
    _, record = train(tmp_path, model, trainer={"callbacks": [Toggle(GRADUAL), Spy()]}, **settings)
    stage = record.stage()
    sgd = stage.optimizer["name"] == "SGD"
    for segment in stage.segments:
        steps = range(segment.first_step, segment.end_step)
        s = segment.effective_learning_rate_sum
        scale, decay = segment.preconditioner(), segment.decay()
        for name in stage.trainable:
            rates = [(seen[step].get(name, (0.0, 0.0)), stage.steps().clip_factor[step]) for step in steps]
            step_size = 1 / (1 - 0.8) if sgd else 1.0
            expected = sum(rate * strength for (rate, strength), _ in rates) * step_size
            assert s * float(decay[name]) == pytest.approx(expected, rel=1e-9, abs=1e-15)
            moved = sum(rate * clip for (rate, _), clip in rates)
            if sgd:
                assert s * float(scale[name]) == pytest.approx(step_size * moved, rel=1e-9, abs=1e-15)
            else:
                assert bool(scale[name].any()) == (moved > 0)
    assert not stage.segments[0].preconditioner()["model.embed_tokens.weight"].any()
    assert stage.segments[1].preconditioner()["model.embed_tokens.weight"].any()


def test_parts_that_are_never_used_do_not_decay(tmp_path):
    """The optimizer skips a parameter without a gradient, whatever the reason."""

    class WithSpare(type(tiny_llama())):
        def __init__(self, config):
            super().__init__(config)
            self.spare = torch.nn.Linear(4, 4)

    torch.manual_seed(0)
    settings = tiny_llama().config
    model = WithSpare(settings).double()
    _, record = train(tmp_path, model, weight_decay=0.5, optim="sgd", learning_rate=0.1)
    stage = record.stage()
    assert stage.frozen_at(0) == {"spare.weight", "spare.bias"}
    assert all(float(segment.decay()["spare.weight"]) == 0 for segment in stage.segments)
    assert float(stage.segments[1].decay()["lm_head.weight"]) > 0
    error, moved = replay_error(stage, model=WithSpare(settings).double())
    assert error <= 1e-9 * moved


def test_scores_go_through_frozen_segments(tmp_path):
    _, stage = gradual(tmp_path)
    attributor = SourceAttributor(stage.record, num_samples=16, progress=False)
    found = attributor.scores(None, Queries.from_dataset(random_rows(2, seed=9)))
    assert np.isfinite(found).all() and np.abs(found).max() > 1e-3


def test_a_resumed_run_remembers_what_was_frozen(tmp_path):
    whole, _ = gradual(tmp_path / "whole")
    plan, settings = {"callbacks": [Toggle(GRADUAL)]}, {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, tiny_llama(dtype=torch.float64), trainer=plan, **settings)
    run = SourceTrainer(
        tiny_llama(dtype=torch.float64), config(tmp_path, **settings), train_dataset=random_rows(), **plan
    )
    run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    stage = TrainingRecord.load(tmp_path / "record").stage()
    first = TrainingRecord.load(tmp_path / "whole" / "record").stage()
    assert stage.data["trainable_changes"] == first.data["trainable_changes"]
    for segment, expected in zip(stage.segments, first.segments, strict=True):
        assert segment.missed_learning_rates == expected.missed_learning_rates
        for name, value in expected.decay().items():
            torch.testing.assert_close(segment.decay()[name], value, rtol=1e-12, atol=0)
    assert distance(stage.weights("final"), dict(whole.named_parameters())) < 1e-12


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_frozen_between_stages(tmp_path, make):
    """The second stage trains a part; the rest is the first stage's, and is not stored again."""
    model = make(dtype=torch.float64)
    train(tmp_path, model, stage="pretrain")
    part = "h.1" if make is tiny_gpt2 else "layers.1"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    _, record = train(tmp_path, model, stage="part")
    model.requires_grad_(True)
    _, record = train(tmp_path, model, stage="all")
    stage = record.stage("part")
    assert stage.trainable and all(part in name for name in stage.trainable)
    assert stage.data["frozen"] == "parent" and stage.continues_parent and not stage.data["trainable_changes"]
    assert record.stage("all").continues_parent and record.stage("all").data["frozen"] == "none"
    for name in ("part", "all"):
        error, moved = replay_error(record.stage(name))
        assert error <= 1e-9 * moved
    found = SourceAttributor(record, num_samples=16, progress=False).scores(
        None, Queries.from_dataset(random_rows(2, seed=9)), "pretrain"
    )
    assert np.isfinite(found).all() and np.abs(found).max() > 1e-3


# ---- Refused and warned about ----


class At(TrainerCallback):
    """Does something once, at the beginning of a step."""

    def __init__(self, step, work, event="on_step_begin"):
        def act(args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == step:
                work(model, optimizer)

        setattr(self, event, act)


def test_parameters_that_join_the_optimizer_are_refused_at_once(tmp_path):
    def join(model, optimizer):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})

    with pytest.raises(UnsupportedError, match="added to the optimizer.*before step 3.*another `stage=`"):
        train(tmp_path, tiny_llama(), trainer={"callbacks": [At(3, join)]})


def test_toggling_between_micro_batches_is_refused(tmp_path):
    def freeze(model, optimizer):
        model.lm_head.requires_grad_(False)

    callback = At(2, freeze, "on_substep_end")
    with pytest.raises(UnsupportedError, match=r"`lm_head.weight` \(1 in all\).*between two micro-batches.*step 2"):
        train(tmp_path, tiny_llama(), trainer={"callbacks": [callback]})


def test_unfreezing_what_the_optimizer_lacks_is_said(tmp_path, caplog):
    model = tiny_llama(dtype=torch.float64)
    model.lm_head.requires_grad_(False)
    callback = At(2, lambda model, optimizer: model.lm_head.requires_grad_(True))
    with caplog.at_level("WARNING"):
        _, record = train(tmp_path, model, trainer={"callbacks": [callback]})
    assert caplog.text.count("Parameters that the optimizer does not hold") == 1
    stage = record.stage()
    assert "lm_head.weight" in stage.frozen
    error, moved = replay_error(stage)
    assert error <= 1e-9 * moved


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_base_that_thaws_under_an_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    callback = At(2, lambda model, optimizer: model.requires_grad_(True))
    trainer = {"callbacks": [callback], "optimizers": (optimizer, None)}
    with pytest.raises(UnsupportedError, match="under an adapter were unfrozen before step 2.*new stage"):
        train(tmp_path, model, trainer=trainer)
