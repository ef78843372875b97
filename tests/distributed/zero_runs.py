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
"""What two processes run under DeepSpeed: `zero_runs.py FOLDER CASE ...`, see `two_runs.py`."""

from functools import partial

import torch
import two_runs
from accelerate import PartialState
from cases import random_rows, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, TrainerCallback
from two_runs import RANK, SAVES, Stop, StopAfter, main, run

from hf_source import SourceTrainer


AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def zero(stage, more=None, **settings):
    config = {"zero_optimization": {"stage": stage} | settings}
    config = dict.fromkeys(AUTO, "auto") | config | (more or {})
    return {"deepspeed": {key: value for key, value in config.items() if value is not None}}


class HoldsAShare(SourceTrainer):
    """Fails if the processes together hold more than one sum of each kind per weight."""

    def _finish_recording(self):
        sums = self._recorder.accumulator
        held = torch.tensor([sum(t.numel() for t in kind.values()) for kind in (sums.theta, sums.scale)])
        torch.distributed.all_reduce(held)
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        assert held.tolist() == [numel, numel]
        super()._finish_recording()


def llama(folder, stage, **settings):
    run(folder, tiny_llama(), trainer=HoldsAShare, **zero(stage), **settings)


def odd(folder, stage):
    """Weights that two processes cannot share evenly, in pieces of a few tensors; rows that fill no whole batch."""
    model = tiny_gpt2(vocab_size=49, n_embd=18)
    more = {"sub_group_size": 1000, "stage3_param_persistence_threshold": 100} if stage == 3 else {}
    run(folder, model, random_rows(22), record_averages_on_cpu=True, **zero(stage, **more))


def sgd(folder, stage):
    run(
        folder,
        tiny_llama(),
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=0.05,
        max_grad_norm=0.0,
        **zero(stage),
    )


def lora(folder, stage):
    """Frozen weights, which ZeRO 3 shards too."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    run(folder, get_peft_model(tiny_llama(), adapter, autocast_adapter_dtype=False), **zero(stage))


def resumed(folder, stage):
    try:
        run(folder, tiny_llama(), callbacks=[StopAfter(5)], **SAVES, **zero(stage))
    except Stop:
        run(folder, tiny_llama(), resume=True, **SAVES, **zero(stage))


def best(folder, stage):
    """The first update has a learning rate, and the moments that it made are looked up."""
    two_runs.best(folder, model=tiny_llama(), warmup_steps=0, **zero(stage))


def loaded(folder, stage):
    """From a path: ZeRO 3 shards weights while it loads them."""
    if RANK == 0:
        tiny_llama().save_pretrained(folder / "model")
    PartialState().wait_for_everyone()

    def load():
        model = LlamaForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float32)
        assert hasattr(model.lm_head.weight, "ds_id") == (stage == 3)
        return model

    run(folder, load, **zero(stage))


def again(folder, stage):
    """A second train() on one trainer."""
    trainer = run(folder, tiny_llama(), max_steps=2, **zero(stage))
    trainer.args.stage = "again"
    trainer.train()


def frozen_later(folder, stage):
    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.requires_grad_(False)

    run(folder, tiny_llama(), callbacks=[Freeze()], **zero(stage))


def refused(folder, **settings):
    run(folder, tiny_llama(), **settings)


def refused_in(part, **entries):
    """With more entries in the config, or in its `zero_optimization`."""
    return partial(refused, **zero(2, **({"more": entries} if part == "config" else entries)))


RECORDED = (llama, odd, sgd, lora, resumed, best, loaded)
CASES = {f"{case.__name__}{stage}": partial(case, stage=stage) for case in RECORDED for stage in (1, 2, 3)}
CASES |= {"again": partial(again, stage=2), "frozen_later": partial(frozen_later, stage=2)}
CASES |= {
    "stage0": partial(refused, **zero(0)),
    "offload": refused_in("zero", offload_optimizer={"device": "cpu"}),
    "plus_plus": refused_in("zero", zero_hpz_partition_size=2),
    "bf16": refused_in("config", bf16={"enabled": True}),
    "fp16": refused_in("config", fp16={"enabled": True}),
    "optimizer": refused_in("config", optimizer={"type": "AdamW", "params": {"lr": "auto"}}),
    "scheduler": refused_in("config", scheduler={"type": "WarmupLR", "params": {}}),
    "clipping": refused_in("config", gradient_clipping=None),  # Accelerate says 1 then
    "adafactor": partial(refused, optim="adafactor", **zero(2)),
    "half": lambda folder: run(folder, tiny_llama(dtype=torch.bfloat16), **zero(2)),
    "means": partial(refused, record_gradient_mean=True, **zero(2)),
}


if __name__ == "__main__":
    main(CASES)
