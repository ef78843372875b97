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
from torch.optim import NAdam, RAdam

from hf_source.recording import replay


BY_NAME = {
    "sgd dampening": {"optim": "sgd", "optim_args": "momentum=0.7,dampening=0.3", "learning_rate": 0.05},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 2e-3},
    "rmsprop centered": {"optim": "rmsprop", "optim_args": "momentum=0.5,centered=True", "learning_rate": 1e-3},
    "adagrad": {"optim": "adagrad", "optim_args": "lr_decay=0.1", "learning_rate": 0.05},
}
BY_OBJECT = {
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
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
