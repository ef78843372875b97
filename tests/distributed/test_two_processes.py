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
"""Two processes leave the record that one process leaves of the same global batches."""

import builtins
import re

import numpy as np
import pytest
import torch
from cases import distance, random_rows, tiny_gpt2
from denoisers import Denoiser, images

from hf_source.recording import TrainingRecord, replay

from .launching import endings, launch
from .two_runs import CASES, SCORED, even_rows, killed, mean_loss_llama, resumed, score


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


ROWS = {"uneven": random_rows(22), "drop_last": random_rows(22), "dispatched": even_rows(22)}
ROWS |= {"diffusion": images(24)}
ROWS |= {"packed": None, "stream": None, "stream_read_by_all": None, "stream_in_shards": None}  # those in the record
MODELS = {"tied": tiny_gpt2, "mean_loss": mean_loss_llama, "diffusion": lambda: Denoiser().double()}
NOT_IN_THE_RECORD = ("mean_loss", "diffusion")  # models that it cannot rebuild

RECORDED = ("run", "tied", "local_counts", "mean_loss", "sgd_on_cpu", "uneven", "drop_last", "dispatched", "split")
RECORDED += ("by_length", "lora", "best", "packed", "diffusion", "resumed", "resumed_as_two")
RECORDED += ("stream", "stream_read_by_all", "stream_in_shards")
SHARDED = ("fsdp", "fsdp_tied", "fsdp_odd", "fsdp_lora", "fsdp_best", "fsdp_resumed", "fsdp_resumed_sharded")
ROUNDING = {"packed": 1e-5}  # TRL takes logarithms in float32, and Adam magnifies that where gradients are near 0
REFUSED = {
    "other_rows": ("RecordError", "different training sets.*Give every process the whole dataset"),
    "one_refuses": ("UnsupportedError", "Rprop cannot be attributed"),
    "on_signal": ("UnsupportedError", "Set enable_jit_checkpoint=False"),
    "finds_batch_size": ("UnsupportedError", "Set auto_find_batch_size=False"),
    "fsdp_again": ("UnsupportedError", "sharded over the processes.*Make a new trainer"),
    "fsdp_adafactor": ("UnsupportedError", "Adafactor is not known to update each entry.*With FSDP use one of SGD"),
    "stream_shuffled": ("UnsupportedError", "another row came under number"),
    "uneven_batches": ("RecordError", "different numbers of optimizer steps.*Leave even_batches"),
    "exists": ("RecordError", "has a stage 'train' already .complete, 2 steps"),
}
EQUAL = ("run", "tied", "sgd_on_cpu", "dispatched", "split", "lora", "best", "packed")
EQUAL += ("stream", "stream_read_by_all")
EQUAL += ("fsdp", "fsdp_tied", "fsdp_odd", "fsdp_lora", "fsdp_best")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of every case, run by two processes."""
    folder = tmp_path_factory.mktemp("two")
    killed(folder / "resumed_as_two")  # by one process
    launch("two_runs.py", folder, *RECORDED, *SHARDED, "killed", "scores", *REFUSED, "disk_is_full")
    return folder


def assert_same_run(one, two, relative=1e-12):
    """Steps equal, micro-batches and their rows in order included; tensors equal to the rounding of float64 sums."""
    first, second = one.steps(), two.steps()
    assert first.micro_batches == second.micro_batches
    for field in ("step", "epoch", "learning_rate", "skipped"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field), err_msg=field)
    for field in ("grad_norm", "clip_factor"):
        np.testing.assert_allclose(getattr(first, field), getattr(second, field), rtol=relative, err_msg=field)
    assert len(one.segments) == len(two.segments)
    for a, b in zip(one.segments, two.segments, strict=True):
        assert (a.first_step, a.end_step) == (b.first_step, b.end_step)
        np.testing.assert_allclose(a.effective_learning_rate_sum, b.effective_learning_rate_sum, rtol=relative)
        assert_close(a.parameters(), b.parameters(), relative)
        assert a.checkpoint_steps == b.checkpoint_steps
        for step in a.checkpoint_steps:
            assert_close(a.checkpoint(step), b.checkpoint(step), relative)
        # P = 1 / (sqrt(v) + eps) magnifies the rounding of gradients near 0.
        assert_close(a.preconditioner(), b.preconditioner(), 1000 * relative)
    for which in ("initial", "final"):
        assert_close(one.weights(which), two.weights(which), relative)


def assert_close(first, second, relative):
    size = distance(first, {name: torch.zeros_like(tensor) for name, tensor in first.items()})
    assert distance(first, second) <= relative * size


@pytest.mark.parametrize("case", RECORDED + SHARDED)
def test_the_record_of_two_processes_replays(two, case):
    """In one process, from the record alone: every row, normalizer, rate and clip factor is the real one."""
    assert endings(two / case) == [None, None]
    record = TrainingRecord.load(two / case / "record")
    assert record.verify() == []
    stage = record.stages[-1]
    assert stage.training["num_processes"] == (1 if case == "resumed_as_two" else 2)  # as it was started
    model = MODELS[case]() if case in NOT_IN_THE_RECORD else None
    again = replay(stage, ROWS.get(case, random_rows(24)), model=model)
    final = stage.weights("final")
    moved = distance(stage.weights("initial"), final)
    assert moved > 0.05
    weights = {name: p.detach() for name, p in again.named_parameters() if name in final}
    assert distance(weights, final) <= max(1e-9, ROUNDING.get(case, 0)) * moved


@pytest.mark.parametrize("case", EQUAL)
def test_the_record_is_that_of_one_process(two, tmp_path, case):
    CASES[case](tmp_path)
    one, both = (TrainingRecord.load(folder / "record").stages for folder in (tmp_path, two / case))
    for first, second in zip(one, both, strict=True):
        assert_same_run(first, second, ROUNDING.get(case, 1e-12))
        assert first.data["frozen"] == second.data["frozen"] and first.frozen == second.frozen
        if case in ("run", "tied", "fsdp", "fsdp_tied"):
            assert [len(segment.checkpoint_steps) for segment in second.segments] == [1, 1]
        if case in ("tied", "fsdp_tied"):
            for a, b in zip(first.segments, second.segments, strict=True):
                assert_close(a.gradient_mean(), b.gradient_mean(), 1e-11)
        assert first.tensor_info == second.tensor_info and first.model == second.model


def batches(folder):
    return TrainingRecord.load(folder / "record").stage().steps().micro_batches


def test_rows_repeated_to_fill_the_last_batch_count_again(two, tmp_path):
    """22 rows are 5 whole batches of 4 and one of 2, which Accelerate fills with the epoch's first rows."""
    CASES["uneven"](tmp_path)
    alone, both = batches(tmp_path), batches(two / "uneven")
    first, rows = alone[0][0].rows, both[2][1].rows
    assert rows == alone[2][1].rows + first[:2] and len(alone[2][1].rows) == 2
    counts = TrainingRecord.load(two / "uneven" / "record").stage().segments
    assert sum(segment.num_visits().sum() for segment in counts) == 3 * 24


def test_the_last_batch_is_dropped_if_asked(two):
    assert all(len(batch.rows) == 4 for step in batches(two / "drop_last") for batch in step)
    assert sum(len(batch.rows) for step in batches(two / "drop_last") for batch in step) == 3 * 20


def test_counts_of_one_process_stay_apart(two):
    """Each process divides by its own items, then gradients are averaged over the two."""
    items = 0
    for step in batches(two / "local_counts"):
        assert len(step) == 4  # 2 processes x 2 micro-batches, process by process within each
        for rank in range(2):
            own = step[rank::2]
            assert {batch.normalizer for batch in own} == {2 * sum(batch.items for batch in own)}
        items += sum(batch.items for batch in step)
    assert items == sum(batch.items for step in batches(two / "run") for batch in step)


def test_means_over_the_micro_batch_stay_apart(two):
    for step in batches(two / "mean_loss"):
        assert [len(batch.rows) for batch in step] == [2, 2, 2, 2]
        assert all(batch.normalizer == batch.items * 2 * 2 for batch in step)


def test_images_draw_the_same_noise_in_two_processes(two, tmp_path):
    """The record keeps the processes' micro-batches apart, as it does means; the run is that of one process."""
    CASES["diffusion"](tmp_path)
    one, both = (TrainingRecord.load(folder / "record").stage() for folder in (tmp_path, two / "diffusion"))
    rows = [[[row for batch in step for row in batch.rows] for step in s.steps().micro_batches] for s in (one, both)]
    assert rows[0] == rows[1]
    assert_close(one.weights("final"), both.weights("final"), 1e-12)


@pytest.mark.parametrize(
    ("whole", "again"), [("run", "resumed"), ("fsdp", "fsdp_resumed"), ("fsdp", "fsdp_resumed_sharded")]
)
def test_a_killed_run_resumes_bit_for_bit(two, whole, again):
    whole, again = (TrainingRecord.load(two / case / "record").stage() for case in (whole, again))
    assert_same_run(whole, again)
    for first, second in zip(whole.segments, again.segments, strict=True):
        assert distance(first.parameters(), second.parameters()) == 0
        assert distance(first.preconditioner(), second.preconditioner()) == 0
    assert distance(whole.weights("final"), again.weights("final")) == 0


def test_one_process_resumes_what_two_began_and_the_other_way_round(two):
    whole = TrainingRecord.load(two / "run" / "record").stage()
    assert TrainingRecord.load(two / "killed" / "record").stage().status == "running"
    resumed(two / "killed")
    for case in ("killed", "resumed_as_two"):
        assert_same_run(whole, TrainingRecord.load(two / case / "record").stage())


@pytest.mark.parametrize("case", ["run", "fsdp", "fsdp_odd"])
def test_a_few_steps_are_verified_against_the_sampled_weights(two, case):
    (check,) = TrainingRecord.load(two / case / "record").check_replays(4)
    steps = [name for name in check.compared if name.startswith("step")]
    assert check.problem is None and steps == ["step 0", "step 1", "step 3"]
    assert "checkpoint 3" in check.compared
    assert check.error <= 1e-6


# ---- Scores ----


@pytest.mark.parametrize("method", SCORED)
def test_two_processes_score_like_one(two, tmp_path, method):
    """Each scores its share of the rows; float32 sums in another order are the only difference."""
    CASES["run"](tmp_path)
    first, second = (np.load(two / f"{method}-{rank}.npy") for rank in range(2))
    np.testing.assert_array_equal(first, second)
    bound = 1e-5 * np.abs(first).max()
    for record in (two / "run" / "record", tmp_path / "record"):
        np.testing.assert_allclose(score(record, method), first, rtol=1e-4, atol=bound)
    assert (np.abs(first) > bound).any(axis=0).all()  # no row was left out


def test_four_processes_score_like_two(two):
    """They share out rows and parameters in another way; two by two, without exchanging vectors; and the model."""
    launch("two_runs.py", two, "scores_of_four", processes=4)
    expected = np.load(two / "source-0.npy")
    for file in [f"{kind}-{rank}.npy" for rank in range(4) for kind in ("four", "sharded", "shared")]:
        found = np.load(two / file)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_two_processes_build_one_index(two):
    """It holds everything, so that its scores are those of `source`; float32 sums in another order apart."""
    assert len(list((two / "index" / "rows").iterdir())) > 2
    expected = np.load(two / "source-0.npy")
    for rank in range(2):
        found = np.load(two / f"index-{rank}.npy")
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# ---- What one process refuses, all refuse ----


@pytest.mark.parametrize("case", REFUSED)
def test_every_process_raises(two, case):
    kind, message = REFUSED[case]
    for found in endings(two / case):
        assert found[0] == kind and re.search(message, found[1])


def test_a_disk_that_is_full_stops_every_process(two):
    (kind, message), other = endings(two / "disk_is_full")
    assert issubclass(getattr(builtins, kind), OSError)
    assert other == ["RuntimeError", f"Another process stopped with {kind}: {message}"]
