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
"""What a model has to be for processes to hold it between them; `distributed/test_shared_model.py` has the rest."""

import pytest
import torch
from accelerate import Accelerator
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from hf_source import SourceAttributor
from hf_source.budget import NotEnoughMemoryError
from hf_source.errors import ConfigError, UnsupportedError
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.gradients.shards import Shards

from ..cases import tiny_llama
from ..oracles import Odd, make_batch


BATCH = (6, 5, 4)


def take(model: nn.Module, task: CausalLMTask | None = None, change=lambda gradients: None) -> None:
    batch = make_batch(BATCH, seed=1, vocabulary=7)
    gradients = RowGradients(model, task or CausalLMTask(), [name for name, _ in model.named_parameters()])
    change(gradients)
    Shards(torch.device("cpu")).take(gradients, batch)


class Twice(CausalLMTask):
    """Asks the model two times."""

    def forward(self, model, batch):
        return super().forward(model, batch) + super().forward(model, batch)


def test_models_without_known_layers_are_refused():
    with pytest.raises(UnsupportedError, match="Odd has none that it knows.*Leave it out"):
        take(Odd())


def test_parameters_that_need_more_than_calls_are_refused():
    with pytest.raises(UnsupportedError, match="model.norm.weight.*shard_model=False"):
        take(tiny_llama(), change=lambda gradients: gradients.around.update({"model.norm.weight": "model.norm"}))


def test_quantized_weights_are_refused():
    model = tiny_llama()
    model.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="'packed', which is quantized"):
        batch = make_batch(BATCH, seed=1, vocabulary=7)
        Shards(torch.device("cpu")).take(RowGradients(model, CausalLMTask(), ["lm_head.weight"]), batch)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_learned_prompts_are_refused():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="a learned prompt"):
        take(model)


def test_tasks_that_call_the_model_twice_are_refused():
    with pytest.raises(UnsupportedError, match="Twice.forward calls the model 2 times"):
        take(tiny_llama(), Twice())


def test_memory_that_runs_out_ends_the_process_for_the_others_wait():
    shards = Shards(torch.device("cpu"))
    with pytest.raises(NotEnoughMemoryError, match="holds the model with others.*Lower max_tokens_per_batch"):
        with shards.whole_batches():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(ValueError, match="something else"), shards.whole_batches():
        raise ValueError("something else")


def test_a_batch_of_an_unknown_layout_is_refused():
    model, batch = tiny_llama(), make_batch(BATCH, seed=1, vocabulary=7)
    gradients = RowGradients(model, CausalLMTask(), ["lm_head.weight"])
    gradients.fallback, gradients.shards = {"lm_head.weight"}, Shards(torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="'lm_head.weight'.*layout that is unknown.*shard_model=False"):
        list(gradients._fallback_blocks(gradients.run(batch), ["lm_head.weight"]))


class Two(Accelerator):
    """One of two processes, as far as an attributor is concerned."""

    num_processes = 2


REFUSED = [{"method": "grad-dot"}, {"curvature": "exact"}, {"ensemble": "dropout", "dropout": 0.1}]


@pytest.mark.parametrize("settings", REFUSED)
def test_what_holds_the_model_whole_says_so(story, settings):
    with pytest.raises(ConfigError, match="shard_model=True belongs to method='source' and 'fast-source'"):
        SourceAttributor(story, shard_model=True, accelerator=Two(cpu=True), **settings)
    assert SourceAttributor(story, accelerator=Two(cpu=True), **settings).shards is None


def test_one_process_has_nobody_to_share_with(story, monkeypatch):
    with pytest.raises(ConfigError, match="several processes.*here are 1, with 'source' and 'joint'"):
        SourceAttributor(story, shard_model=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert SourceAttributor(story).shards is None
