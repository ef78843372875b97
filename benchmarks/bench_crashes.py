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
"""Kills recorded trainings at random moments, resumes them, and compares their records with an uninterrupted one.

A run trains two stages with checkpoints. Its process gets SIGKILL at a moment drawn either from the time that the
whole run takes, or from the file operations that it makes (opening for writing, renaming, removing, making folders),
which hits the short moments in which files are half written. It is then started again as a user would (from the newest
checkpoint, or anew if there is none) and may be killed again, until it completes. Every process looks first at what
the one before it left: the record must load and verify. In the end it must equal the record of the run that was never
killed: the same steps, bit-identical segments and weights, no file beside those listed.

    OMP_NUM_THREADS=1 python benchmarks/bench_crashes.py --kills 50

Runs are forked from this process, which has imported everything and started no thread. Writes
`benchmarks/crashes.json`.
"""

import argparse
import contextlib
import functools
import gc
import json
import mmap
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_source.errors import RecordError
from hf_source.recording import SourceConfig, SourceTrainer, TrainingRecord, recorder, trainer
from hf_source.recording.lock import LOCK_FILE


PHASES = [
    "before training",
    "creating the stage",
    "training a step",
    "closing a segment",
    "writing steps",
    "saving a checkpoint",
    "going back to a checkpoint",
    "finishing the stage",
]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 3,
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
STAGES = {"pretrain": {"max_steps": 24, "num_segments": 3}, "sft": {"max_steps": 8, "num_segments": 2}}
STEPS_PER_SHARD = 5

phase = mmap.mmap(-1, 1)
"""Shared with forked processes: what a run was doing when it was killed."""


# ---- the run that is killed ----------------------------------------------------------------------------------------


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 257}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0))


def make_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: index + 1 for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_rows(seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    rows = [generator.integers(1, 257, size=size).tolist() for size in generator.integers(4, 12, size=26)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def train_to_the_end(folder: Path, events: Callable[[str], None]) -> None:
    """Both stages, each from where it stands: as a job that is started again and again would."""
    recorder.STEPS_PER_SHARD = STEPS_PER_SHARD
    for seed, (stage, length) in enumerate(STAGES.items()):
        record = TrainingRecord.load(folder / "record") if (folder / "record" / "record.json").exists() else None
        found = {stage.name: stage for stage in record.stages} if record else {}
        if stage in found and found[stage].status == "complete":
            continue
        model = make_model() if seed == 0 else record.stage("pretrain").build_model()
        args = SourceConfig(
            output_dir=str(folder / stage), record_dir=str(folder / "record"), stage=stage, **SETTINGS, **length
        )
        run = SourceTrainer(model, args, train_dataset=make_rows(seed), processing_class=make_tokenizer())
        try:
            run.train(resume_from_checkpoint=True)
            events("resumed")
        except RecordError as error:
            if "There is no checkpoint" not in str(error):
                raise
            events("started")
            run.args.overwrite_stage = True
            run.train()


# ---- one process ---------------------------------------------------------------------------------------------------


def watch_phases() -> None:
    """Keep `phase` up to date."""
    watched = [
        (trainer, "start_recorder", "creating the stage", "training a step"),
        (recorder.StageRecorder, "_close_segment", "closing a segment", None),
        (recorder.StageRecorder, "flush", "writing steps", None),
        (recorder.StageRecorder, "go_back", "going back to a checkpoint", None),
        (SourceTrainer, "_save_checkpoint", "saving a checkpoint", None),
        (SourceTrainer, "_finish_recording", "finishing the stage", "before training"),
    ]
    for owner, name, inside, after in watched:
        setattr(owner, name, _in_phase(getattr(owner, name), inside, after))


def _in_phase(function: Callable, inside: str, after: str | None) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = phase[0]
        phase[0] = PHASES.index(inside)
        try:
            return function(*args, **kwargs)
        finally:
            phase[0] = before if after is None else PHASES.index(after)

    return wrapper


def watch_files(folder: Path, die_at: int | None) -> Callable[[], int]:
    """Count the operations that change files below `folder`, and die before number `die_at`."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(folder) not in str(args[0]):
            return
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def fork(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a process of its own; its id."""
    phase[0] = 0
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            with contextlib.suppress(SystemExit):
                work()
        code = 0
    except BaseException:
        log.with_suffix(".error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def attempt(folder: Path, whole: Path | None, die_at: int | None) -> None:
    """One process: look at what is there, train to the end, compare."""
    watch_phases()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bar()
    operations = watch_files(folder, die_at)

    def events(text: str) -> None:
        with open(folder.parent / f"{folder.name}.events", "a") as stream:
            stream.write(text + "\n")

    if (folder / "record" / "record.json").exists():
        problems = TrainingRecord.load(folder / "record").verify()
        assert problems == [], problems
    train_to_the_end(folder, events)
    events(f"operations {operations()}")
    if whole is not None:
        compare(TrainingRecord.load(folder / "record"), TrainingRecord.load(whole / "record"))


# ---- what must hold ------------------------------------------------------------------------------------------------


def compare(record: TrainingRecord, whole: TrainingRecord) -> None:
    """All that a reader can see is equal, bit for bit, and nothing else lies about."""
    assert record.verify() == []
    assert [stage.name for stage in record.stages] == [stage.name for stage in whole.stages] == list(STAGES)
    listed = {name for files in record._file_lists() for name in files} | {"record.json"}
    present = {path.relative_to(record.path).as_posix() for path in record.path.rglob("*") if path.is_file()}
    # A process that died after its last write leaves its lock file, which locks nobody out.
    assert present - {LOCK_FILE} == listed, present ^ listed
    for left, right in zip(record.stages, whole.stages, strict=True):
        assert left.status == right.status == "complete" and left.num_steps == right.num_steps
        one, two = left.steps(), right.steps()
        assert one.step.tolist() == list(range(left.num_steps))
        for field in ("epoch", "learning_rate", "grad_norm", "clip_factor", "skipped"):
            np.testing.assert_array_equal(getattr(one, field), getattr(two, field), err_msg=field)
        assert one.micro_batches == two.micro_batches
        assert left.data["segments"] == right.data["segments"]
        names = {name for name in right.data["files"] if name.endswith(".safetensors")}
        assert names == {name for name in left.data["files"] if name.endswith(".safetensors")}
        for name in names:
            assert left.data["files"][name]["sha256"] == right.data["files"][name]["sha256"], name
        for a, b in zip(left.segments, right.segments, strict=True):
            same_tensors(a.parameters(), b.parameters())
            same_tensors(a.preconditioner(), b.preconditioner())
        same_tensors(left.weights("final"), right.weights("final"))


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- the campaign --------------------------------------------------------------------------------------------------


class Campaign:
    """Runs that are killed until a number of kills is reached."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.whole = folder / "whole"
        # What the imports made would be copied by the first garbage collection of every process.
        gc.collect()
        gc.freeze()
        self.seconds = self._uninterrupted()
        self.operations = self._count("whole", "operations")[0]

    def _uninterrupted(self) -> float:
        start = time.perf_counter()
        child = fork(lambda: attempt(self.whole, None, None), self.folder / "whole.log")
        _, status = os.waitpid(child, 0)
        self._require(status, "whole")
        return time.perf_counter() - start

    def _require(self, status: int, name: str) -> None:
        if status != 0:
            error = self.folder / f"{name}.error"
            raise SystemExit(f"{name} failed:\n{error.read_text() if error.exists() else status}")

    def _count(self, name: str, word: str) -> list[int]:
        file = self.folder / f"{name}.events"
        lines = file.read_text().splitlines() if file.exists() else []
        return [int((line.split() + ["1"])[1]) for line in lines if line.split()[0] == word]

    def run(self, kills: int, by: str) -> dict[str, Any]:
        """Kill `kills` times, at moments drawn from time or from file operations."""
        phases: Counter[str] = Counter()
        names = []
        while sum(phases.values()) < kills:
            names.append(f"{by}-{len(names)}")
            for hit in self._one_run(names[-1], by, kills - sum(phases.values())):
                phases[hit] += 1
        skipped = sum((self.folder / f"{name}.log").read_text().count("is of no use") for name in names)
        return {
            "kills": sum(phases.values()),
            "runs_compared": len(names),
            "kills_by_phase": {name: phases[name] for name in PHASES},
            "stages_started_anew": sum(len(self._count(name, "started")) for name in names),
            "resumptions_that_completed": sum(len(self._count(name, "resumed")) for name in names),
            "incomplete_checkpoints_passed_over": skipped,
            "records_that_differ": 0,  # or the campaign would have ended
        }

    def _one_run(self, name: str, by: str, kills: int) -> Iterator[str]:
        """Kill and start again until it completes; yields the phase of each kill."""
        folder = self.folder / name
        while True:
            timed = by == "time" and kills > 0
            die_at = self.random.randint(1, self.operations) if by == "operations" and kills > 0 else None
            child = fork(lambda die_at=die_at: attempt(folder, self.whole, die_at), self.folder / f"{name}.log")
            if timed:
                time.sleep(self.random.uniform(0, self.seconds))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                kills -= 1
                yield PHASES[phase[0]]
                continue
            self._require(status, name)
            return


def main() -> None:
    """Run the campaign and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("crashes.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        results = {}
        for by in ("time", "operations"):
            results[f"drawn from {by}"] = found = campaign.run(options.kills, by)
            print(f"{found['kills']} kills by {by}: {found['runs_compared']} records equal the uninterrupted one")
            print("  " + ", ".join(f"{name} {count}" for name, count in found["kills_by_phase"].items()))
        settings = {
            "kills_of_each_kind": options.kills,
            "seed": options.seed,
            "stages": STAGES,
            "training": SETTINGS,
            "seconds_of_an_uninterrupted_run": round(campaign.seconds, 2),
            "file_operations_of_an_uninterrupted_run": campaign.operations,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        options.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
