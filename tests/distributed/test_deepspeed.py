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
"""Two processes under DeepSpeed ZeRO 1 to 3 leave the record that one process leaves without it.

These tests need `pip install deepspeed`, which the project's own checks do not install: there they are skipped. They
run on CPUs, through gloo, in float32.
"""

import re

import pytest
import torch
from cases import distance, random_rows, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model

from hf_source.recording import TrainingRecord, replay

from .launching import endings, launch
from .test_two_processes import assert_close, assert_same_run
from .two_runs import best, run


pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def odd(folder):
    run(folder, tiny_gpt2(vocab_size=49, n_embd=18), random_rows(22))


def sgd(folder):
    run(folder, tiny_llama(), optim="sgd", optim_args="momentum=0.9", learning_rate=0.05, max_grad_norm=0.0)


def lora(folder):
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    run(folder, get_peft_model(tiny_llama(), adapter, autocast_adapter_dtype=False))


ALONE = {
    "llama": lambda folder: run(folder, tiny_llama()),
    "odd": odd,
    "sgd": sgd,
    "lora": lora,
    "best": lambda folder: best(folder, model=tiny_llama(), warmup_steps=0),
}
RECORDED = (*ALONE, "loaded", "resumed")
STAGES = (1, 2, 3)
# float32 has 6e-8. P after the first update is 1 / |gradient|, so its largest entries are of gradients near 0.
ROUNDING, ROUNDING_OF_P = 1e-6, 3e-4
REFUSED = {
    "again": "has a DeepSpeed engine already.*Make a new trainer",
    "frozen_later": "`lm_head.weight` had no gradient.*Freeze it before the trainer is made",
    "stage0": "ZeRO stage 0 cannot be recorded. Set `stage` of zero_optimization to 1, 2 or 3",
    "offload": "`zero_optimization.offload_optimizer`.*set its device to 'none'",
    "plus_plus": "`zero_optimization.zero_hpz_partition_size`.*Leave it out",
    "bf16": "`bf16` of the DeepSpeed config.*Train in float32",
    "fp16": "`fp16` of the DeepSpeed config.*Train in float32",
    "optimizer": "`optimizer` of the DeepSpeed config.*Leave it out",
    "scheduler": "`scheduler` of the DeepSpeed config.*set lr_scheduler_type",
    "clipping": "clips gradients at 1 .*max_grad_norm=0.7.*to 'auto'",
    "adafactor": "updates of Adafactor cannot be recorded.*optim='adamw_torch'",
    "half": "copies of weights in torch.bfloat16.*Load the model in float32",
    "means": "Set record_gradient_mean=False",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of every case, run by two processes."""
    folder = tmp_path_factory.mktemp("zero")
    launch("zero_runs.py", folder, *(f"{case}{stage}" for case in RECORDED for stage in STAGES), *REFUSED)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Recorded stage of every case, by one process without DeepSpeed."""
    stages = {}
    for case, train in ALONE.items():
        folder = tmp_path_factory.mktemp(case)
        train(folder)
        stages[case] = TrainingRecord.load(folder / "record").stage()
    return stages | {"loaded": stages["llama"], "resumed": stages["llama"]}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", RECORDED)
def test_the_record_is_that_of_one_process(two, alone, case, stage):
    assert endings(two / f"{case}{stage}") == [None, None]
    record = TrainingRecord.load(two / f"{case}{stage}" / "record")
    assert record.verify() == []
    one, both = alone[case], record.stage()
    if case != "odd":  # the last batch of an epoch is filled up with rows, where one process takes fewer
        assert_same_run(one, both, ROUNDING)
        for a, b in zip(one.segments, both.segments, strict=True):
            assert_close(a.preconditioner(), b.preconditioner(), ROUNDING_OF_P)
    assert one.tensor_info == both.tensor_info
    assert one.data["frozen_parameters"] == both.data["frozen_parameters"]
    assert one.data["files"].get("frozen.safetensors") == both.data["files"].get("frozen.safetensors")
    if case != "loaded":
        assert one.model == both.model


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", RECORDED)
def test_the_record_replays_in_one_process(two, case, stage):
    record = TrainingRecord.load(two / f"{case}{stage}" / "record")
    both = record.stage()
    final = both.weights("final")
    moved = distance(both.weights("initial"), final)
    assert moved > 0.05
    again = replay(both, random_rows(22 if case == "odd" else 24))
    weights = {name: p.detach() for name, p in again.named_parameters() if name in final}
    # The true gradient of GPT-2's key biases is 0, and Adam takes the rounding of it for a gradient.
    assert distance(weights, final) <= (1e-4 if case == "odd" else 2e-6) * moved
    (check,) = record.check_replays(2)
    assert check.problem is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_bit_for_bit(two, stage):
    whole, again = (TrainingRecord.load(two / f"{case}{stage}" / "record").stage() for case in ("llama", "resumed"))
    assert len(again.data["attempts"]) == 1
    assert_same_run(whole, again, 0)
    for first, second in zip(whole.segments, again.segments, strict=True):
        assert distance(first.parameters(), second.parameters()) == 0
        assert distance(first.preconditioner(), second.preconditioner()) == 0
    assert distance(whole.weights("final"), again.weights("final")) == 0


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(two, case):
    for kind, message in endings(two / case):
        assert kind == "UnsupportedError" and re.search(REFUSED[case], message)
