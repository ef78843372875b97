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
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from cases import config, random_rows, tiny_gpt2, tiny_llama  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_source.recording import SourceTrainer  # noqa: E402


RANK = int(os.environ.get("RANK", 0))


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


def run(folder, model=None, rows=None, callbacks=(), resume=None, optimizers=(None, None), **settings):
    """Two processes take 2 rows each per micro-batch, where one process takes 4."""
    share = 4 // int(os.environ.get("WORLD_SIZE", 1))
    settings = {"per_device_train_batch_size": share, "num_segments": 2} | settings
    model = tiny_llama(dtype=torch.float64) if model is None else model
    rows = random_rows(24) if rows is None else rows
    others = {"callbacks": list(callbacks), "optimizers": optimizers}
    trainer = SourceTrainer(model, config(folder, **settings), train_dataset=rows, **others)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tied(folder):
    run(folder, tiny_gpt2(dtype=torch.float64))


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


def by_length(folder):
    run(folder, train_sampling_strategy="group_by_length")


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
    + (other_rows, one_refuses, disk_is_full, on_signal, finds_batch_size, exists)
}


def refuse_to_write(event, arguments):
    """Audit hook of the second process: it may not touch a record, nor the recorder's part of a checkpoint."""
    writes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree", "os.rmdir")
    writes |= event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
    if writes and any(part in str(arguments[0]) for part in ("/record", "source_recording")):
        raise AssertionError(f"The second process wrote: {event} {arguments}")


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    if RANK:
        sys.addaudithook(refuse_to_write)
    for name in names:
        ended = None
        try:
            CASES[name](folder / name)
        except Exception as error:
            ended = [type(error).__name__, str(error)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"ended-{RANK}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
