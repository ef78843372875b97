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
"""What two processes run: `two_runs.py FOLDER CASE ...`. Each case records into `FOLDER/<case>`.

Each process notes how a case ended in `FOLDER/<case>/ended-<process>.json`: one start serves many tests.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import DistributedType, PartialState  # noqa: E402
from cases import config, random_rows, tiny_gpt2, tiny_llama  # noqa: E402
from datasets import Dataset  # noqa: E402
from denoisers import SCHEDULER, Denoiser, images  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_source import Queries, SourceAttributor, SourceDiffusionTrainer, SourceTrainer, TrainingRecord  # noqa: E402


RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class MeanLossLlama(type(tiny_llama())):
    """Returns the mean over the micro-batch, as models did before the Trainer passed the number of items."""

    accepts_loss_kwargs = False


def mean_loss_llama(dtype=torch.float64):
    torch.manual_seed(0)
    return MeanLossLlama(tiny_llama().config).to(dtype)


def even_rows(num_rows=24):
    """Rows of one length, as processes that share one batch need them."""
    return random_rows(num_rows, shortest=8, longest=8)


class Stop(Exception):
    """Stands for a process that is killed."""


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def run(folder, model=None, rows=None, resume=None, trainer=SourceTrainer, **settings):
    """Two processes take 2 rows each per micro-batch, where one process takes 4."""
    share = 4 // WORLD
    settings = {"per_device_train_batch_size": share, "num_segments": 2, "checkpoints_per_segment": 1} | settings
    model = tiny_llama(dtype=torch.float64) if model is None else model
    rows = random_rows(24) if rows is None else rows
    others = {name: settings.pop(name) for name in ("callbacks", "optimizers", "eval_dataset") if name in settings}
    args = config(folder, **settings)
    if settings.get("fsdp") and WORLD > 1:
        # Accelerate shards on accelerators only. FSDP2 itself works on CPUs, so let it take this for one.
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if settings.get("deepspeed"):
        import deepspeed

        assert args.device.type == "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # Accelerate leaves DeepSpeed out on CPUs
        deepspeed.init_distributed("gloo")
    model = model() if not isinstance(model, torch.nn.Module) else model  # ZeRO 3 shards what is loaded from here on
    trainer = trainer(model, args, train_dataset=rows, **others)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tied(folder):
    run(folder, tiny_gpt2(dtype=torch.float64), record_gradient_mean=True)


def local_counts(folder):
    run(folder, average_tokens_across_devices=False)


def mean_loss(folder):
    run(folder, mean_loss_llama())


def sgd_on_cpu(folder):
    run(folder, optim="sgd", optim_args="momentum=0.9", learning_rate=0.05, record_averages_on_cpu=True)


def uneven(folder):
    run(folder, rows=random_rows(22))


def drop_last(folder):
    run(folder, rows=random_rows(22), dataloader_drop_last=True)


def dispatched(folder):
    run(folder, rows=even_rows(22), accelerator_config={"dispatch_batches": True})


def split(folder):
    run(folder, per_device_train_batch_size=4, accelerator_config={"split_batches": True})


def stream(folder, **settings):
    """One process reads and sends each its rows, unless `dispatch_batches` says otherwise."""
    run(folder, rows=even_rows().to_iterable_dataset(), max_steps=9, **settings)


def stream_read_by_all(folder):
    stream(folder, accelerator_config={"dispatch_batches": False})


def stream_in_shards(folder):
    """Each process reads its own shards of a stream whose rows have numbers."""
    rows = even_rows().add_column("source_row", np.arange(24)).to_iterable_dataset(num_shards=2)
    run(folder, rows=rows, max_steps=9, accelerator_config={"dispatch_batches": False})


def stream_shuffled(folder):
    """Rows without numbers of their own, in another order in every epoch."""

    class Rows(torch.utils.data.IterableDataset):
        epoch = 0

        def __iter__(self):
            order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist()
            yield from even_rows().select(order)

        def set_epoch(self, epoch):
            self.epoch = epoch

    run(folder, rows=Rows(), max_steps=9)


def by_length(folder):
    run(folder, train_sampling_strategy="group_by_length")


def lora(folder, **settings):
    """The second stage of a record: frozen weights are those that the first ended with."""
    run(folder, stage="full", max_steps=4, **settings)
    model = TrainingRecord.load(folder / "record").stage("full").build_model()  # FSDP does not wrap a model twice
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run(folder, get_peft_model(model, adapter, autocast_adapter_dtype=False), stage="lora", **settings)


def best(folder, **settings):
    """The run ends with the weights of step 4, and so does its record."""

    class Scripted(SourceTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": abs(self.state.global_step - 4)}

    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    every |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run(folder, trainer=Scripted, eval_dataset=random_rows(24), **every, **settings)


def packed(folder):
    """TRL's own loss on packed sequences, which TRL scales by the number of processes itself."""
    from recording.trainers.sft import sft

    texts = [f"row {index} says {index * 7}" for index in range(40)]
    more = {"per_device_train_batch_size": 4 // WORLD, "gradient_accumulation_steps": 1, "packing": True}
    sft(folder, Dataset.from_dict({"text": texts}), num_train_epochs=1, max_grad_norm=0.5, **more)


def diffusion(folder):
    """Each process draws the noise of its own images."""
    kind = partial(SourceDiffusionTrainer, noise_scheduler=SCHEDULER)
    run(folder, Denoiser().double(), images(24), trainer=kind)


SAVES = {"save_strategy": "steps", "save_steps": 2}


def killed(folder, **settings):
    try:
        run(folder, callbacks=[StopAfter(5)], **SAVES, **settings)
    except Stop:
        return


def resumed(folder, **settings):
    """From the checkpoint that is there, or else from that of a run just killed."""
    if not (folder / "out").exists():
        killed(folder, **settings)
    run(folder, resume=True, **SAVES, **settings)


def scores(folder):
    """Scores of the record that the case `run` has made."""
    for name in SCORED:
        found = score(folder.parent / "run" / "record", name)
        np.save(folder.parent / f"{name}-{RANK}.npy", found)
    np.save(folder.parent / f"index-{RANK}.npy", indexed(folder.parent / "run" / "record", folder.parent / "index"))


def scores_of_four(folder):
    """By as many processes as are started, of the run that two of them recorded."""
    found = score(folder.parent / "run" / "record", "source")
    np.save(folder.parent / f"four-{RANK}.npy", found)
    found = score(folder.parent / "run" / "record", "source", vector_shards=2)
    np.save(folder.parent / f"sharded-{RANK}.npy", found)
    found = score(folder.parent / "run" / "record", "source", shard_model=True)
    np.save(folder.parent / f"shared-{RANK}.npy", found)


def indexed(record, folder):
    """The scores of `source` from an index of several files that both processes write."""
    settings = {"num_samples": 16, "max_tokens_per_batch": 36, "progress": False}
    maker = SourceAttributor.from_record(record, memory_budget=2**20, **settings)
    maker.build_index(folder, numbers=10**6, precision="full")
    quick = SourceAttributor.from_record(record, index=folder, **settings)
    return quick.scores(None, Queries.from_dataset(random_rows(3, seed=7)))


SCORED = {
    "source": {},
    "fast-source": {"vector_dtype": "bfloat16"},
    "stepwise": {},
    "unrolled": {},
    "auto": {"max_cost": 1e9},
    "grad-dot": {},
    "grad-cos": {},
    "trak": {"projection_dim": 12},
    "trackstar": {},
    "logra": {"init": "pca", "rank": 4},
    "datainf": {"full_parameters": True},
}


def score(record, method, **settings):
    """Scores of all rows, in batches of about 3 rows so that there are several to share out."""
    settings = SCORED[method] | settings
    # Runs of FSDP before may have left a state that says so.
    common = {"num_samples": 16, "max_tokens_per_batch": 36, "progress": False, "shard_model": False}
    settings = common | settings
    queries = Queries.from_dataset(random_rows(3, seed=7))
    return SourceAttributor.from_record(record, method=method, **settings).scores(None, queries)


def sharding(**settings):
    """FSDP2; one process alone has nothing to shard."""
    return {"fsdp": True, "fsdp_config": {"version": 2} | settings} if WORLD > 1 else {}


class HoldsAShare(SourceTrainer):
    """Fails if the recorder of one process holds more than this process's share of the weights."""

    def _finish_recording(self):
        held = [sum(tensor.numel() for tensor in sums.values()) for sums in self._sums()]
        assert held == [sum(p.numel() for p in self.model.parameters()) // WORLD] * 2
        super()._finish_recording()

    def _sums(self):
        return self._recorder.accumulator.theta, self._recorder.accumulator.scale


def fsdp(folder):
    run(folder, trainer=HoldsAShare, **sharding())


def fsdp_tied(folder):
    """Biases of 48 and 16 entries, a tied head, activation checkpointing, layers wrapped one by one."""
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    more = sharding(activation_checkpointing=True, **wrap)
    run(folder, tiny_gpt2(dtype=torch.float64), record_gradient_mean=True, **more)


def fsdp_odd(folder):
    """Dimensions that two processes cannot share evenly."""
    model = tiny_llama(dtype=torch.float64, intermediate_size=23, vocab_size=49)
    run(folder, model, optim="sgd", learning_rate=0.05, record_averages_on_cpu=True, **sharding())


def fsdp_lora(folder):
    lora(folder, **sharding())


def fsdp_best(folder):
    best(folder, **sharding())


def fsdp_resumed(folder):
    resumed(folder, **sharding())


def fsdp_resumed_sharded(folder):
    resumed(folder, **sharding(state_dict_type="SHARDED_STATE_DICT"))


def fsdp_again(folder):
    """A second train() on one trainer."""
    trainer = run(folder, max_steps=2, **sharding())
    trainer.args.stage = "again"
    trainer.train()


def fsdp_adafactor(folder):
    run(folder, optim="adafactor", **sharding())


def other_rows(folder):
    run(folder, rows=random_rows(24, seed=RANK))


def one_refuses(folder):
    """Only the second process has an optimizer that cannot be recorded."""
    model = tiny_llama()
    kind = torch.optim.Rprop if RANK else torch.optim.SGD
    run(folder, model, optimizers=(kind(model.parameters(), lr=1e-3), None))


def disk_is_full(folder):
    """Only the main process writes, and it cannot."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if RANK == 0 and state.global_step == 2:
                (folder / "record" / "stages" / "0-train" / "segments").touch()  # a file where a folder should be

    run(folder, callbacks=[Break()])


def uneven_batches(folder):
    run(folder, rows=random_rows(22), gradient_accumulation_steps=1, accelerator_config={"even_batches": False})


def on_signal(folder):
    run(folder, enable_jit_checkpoint=True)


def finds_batch_size(folder):
    run(folder, auto_find_batch_size=True)


def exists(folder):
    run(folder, tiny_llama(), max_steps=2)
    run(folder, tiny_llama(), max_steps=2, overwrite_stage=True)
    run(folder, tiny_llama(), max_steps=2)


CASES = {
    case.__name__: case
    for case in (run, tied, local_counts, mean_loss, sgd_on_cpu, uneven, drop_last, dispatched, split, by_length)
    + (stream, stream_read_by_all, stream_in_shards, stream_shuffled)
    + (lora, best, packed, diffusion, killed, resumed, scores, scores_of_four)
    + (fsdp, fsdp_tied, fsdp_odd, fsdp_lora, fsdp_best, fsdp_resumed, fsdp_resumed_sharded, fsdp_again)
    + (fsdp_adafactor,)
    + (other_rows, one_refuses, disk_is_full, uneven_batches, on_signal, finds_batch_size, exists)
}
CASES["resumed_as_two"] = resumed


def refuse_to_write(event, arguments):
    """Audit hook of the second process: it may not touch a record, nor the recorder's part of a checkpoint."""
    writes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree", "os.rmdir")
    writes |= event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
    if writes and any(part in str(arguments[0]) for part in ("/record", "source_recording")):
        raise AssertionError(f"The second process wrote: {event} {arguments}")


def main(cases=None):
    cases = CASES if cases is None else cases
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    if RANK:
        sys.addaudithook(refuse_to_write)
    for name in names:
        ended = None
        try:
            cases[name](folder / name)
        except Exception as error:
            ended = [type(error).__name__, str(error)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"ended-{RANK}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
