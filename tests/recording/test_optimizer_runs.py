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
"""Real recorded runs with every optimizer: the record replays to the same weights, and its averages are usable."""

import pytest
import torch
from cases import distance, random_rows, tiny_llama, train
from torch.optim import Adafactor, NAdam, RAdam
from transformers.optimization import Adafactor as TransformersAdafactor
from transformers.optimization import AdafactorSchedule
from transformers.training_args import OptimizerNames

from hf_source.errors import UnsupportedError
from hf_source.recording import replay
from hf_source.recording.optimizers import describe_optimizer


BY_NAME = {
    "sgd dampening": {"optim": "sgd", "optim_args": "momentum=0.7,dampening=0.3", "learning_rate": 0.05},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 2e-3},
    "rmsprop centered": {"optim": "rmsprop", "optim_args": "momentum=0.5,centered=True", "learning_rate": 1e-3},
    "adafactor": {"optim": "adafactor"},
    "adagrad": {"optim": "adagrad", "optim_args": "lr_decay=0.1", "learning_rate": 0.05},
}
BY_OBJECT = {
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "torch adafactor": lambda p: Adafactor(p, lr=0.02, weight_decay=0.1),
    "hf adafactor scaled": lambda p: TransformersAdafactor(p, lr=0.05, relative_step=False, beta1=0.8),
    "nadam": lambda p: NAdam(p, lr=0.01, weight_decay=0.1),
    "nadam decoupled": lambda p: NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: RAdam(p, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1, decoupled_weight_decay=True),
}


def run(folder, case, dtype=torch.float64):
    model = tiny_llama(dtype=dtype)
    if case in BY_NAME:
        settings = BY_NAME[case]
        return model, train(folder, model, **settings)[1]
    optimizer = BY_OBJECT[case](model.parameters())
    return model, train(folder, model, trainer={"optimizers": (optimizer, None)})[1]


@pytest.mark.parametrize("case", [*BY_NAME, *BY_OBJECT])
def test_a_recorded_run_replays(tmp_path, case):
    model, record = run(tmp_path, case)
    stage = record.stage()
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, random_rows()).named_parameters())
    moved = distance(stage.weights("initial"), final)
    assert moved > 0.1
    assert distance(again, final) <= 1e-9 * moved
    for segment in stage.segments:
        for name, scale in segment.preconditioner().items():
            assert torch.isfinite(scale).all() and (scale >= 0).all() and (scale > 0).any(), name
        assert segment.applied_weights().min() >= 0


def test_a_relative_step_is_recorded_as_the_learning_rate(tmp_path):
    """Adafactor that sets its own steps: the group has no learning rate, and the schedule only reports one."""
    model = tiny_llama(dtype=torch.float64)
    optimizer = TransformersAdafactor(model.parameters())
    _, record = train(tmp_path, model, trainer={"optimizers": (optimizer, AdafactorSchedule(optimizer))})
    stage = record.stage()
    assert stage.steps().learning_rate[:, 0].tolist() == [0.01] * 9
    final = {name: p.detach() for name, p in model.named_parameters()}
    again = dict(replay(stage, random_rows()).named_parameters())
    assert distance(again, final) <= 1e-9 * distance(stage.weights("initial"), final)


RECORDED = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adafactor": "transformers.Adafactor",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adamw_bnb_8bit": "bitsandbytes.AdamW",
    "adamw_8bit": "bitsandbytes.AdamW",
    "paged_adamw_32bit": "bitsandbytes.AdamW",
    "paged_adamw_8bit": "bitsandbytes.AdamW",
    "rmsprop_bnb": "bitsandbytes.RMSprop",
    "rmsprop_bnb_8bit": "bitsandbytes.RMSprop",
    "rmsprop_bnb_32bit": "bitsandbytes.RMSprop",
}
REFUSED = {  # by us, or by transformers where a package is missing
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "ademamix": "mixes two momenta",
    "lion": "sign of its momentum",
    "galore": "galore_torch",
    "lomo": "lomo",
    "adalomo": "lomo",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "apollo": "apollo_torch",
    "stable_adamw": "torch-optimi",
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_name_that_the_trainer_knows_is_recorded_or_refused(tmp_path, name):
    model = tiny_llama()
    settings = {"optim": name, "max_steps": 2, "num_segments": 1, "gradient_accumulation_steps": 1}
    if "galore" in name or "apollo" in name:
        settings["optim_target_modules"] = "all-linear"
    if name in RECORDED:
        if "bnb" in name or "paged" in name or "8bit" in name:
            pytest.importorskip("bitsandbytes")
        _, record = train(tmp_path, model, **settings)
        assert {group.rule for group in record.stage().groups} == {RECORDED[name]}
        return
    reason = next(reason for part, reason in REFUSED.items() if part in name)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises((UnsupportedError, ImportError, ValueError), match=f"(?s){reason}"):
        train(tmp_path, model, **settings)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("torchao.optim.adam", "its quantised moments cannot be read"),
        ("galore_torch.galore_adamw", "projects gradients to a low rank"),
        ("schedulefree.adamw_schedulefree", "takes gradients at other weights"),
        ("somewhere.else", "does not know its preconditioner. Supported: torch.optim.SGD"),
    ],
)
def test_other_optimizers_are_refused_with_the_reason(module, reason):
    """As they would be if their packages were here."""
    kind = type("AdamW", (torch.optim.AdamW,), {"__module__": module})
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match=f"{module}.AdamW cannot be attributed: .*{reason}"):
        describe_optimizer(kind([parameter]), {parameter: "a"})
