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


import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from hf_source import Queries
from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import RetrainingCache, StackedRetraining, losses_of, removal_masks, retrain
from hf_source.evaluation.identity import record_digest
from hf_source.recording import replay

from ..cases import random_rows, tiny_gpt2, train
from ..story import STORY_STEPS, tell


def asked(count: int = 3) -> Queries:
    return Queries.from_dataset(random_rows(count, seed=9))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), tiny_gpt2())[1]


def test_nothing_is_trained_twice(record, tmp_path):
    keep = ~removal_masks(22, 5, 0.2)
    keep[4] = keep[0]
    first = StackedRetraining(record, asked(), cache=tmp_path, chunk=2, progress=False)
    losses = first.losses(keep)
    assert losses.shape == (5, 3) and losses.dtype == np.float64
    assert (first.cache.hits, first.cache.misses) == (0, 4)  # equal masks are trained once
    np.testing.assert_array_equal(losses[4], losses[0])
    expected = losses_of(*retrain(record.stages[0], random_rows(), keep[:2]), asked().rows)
    np.testing.assert_allclose(losses[:2], expected, rtol=1e-6)
    again = StackedRetraining(record, asked(), cache=tmp_path, progress=False)
    np.testing.assert_array_equal(again.losses(keep[::-1]), losses[::-1])
    assert (again.cache.hits, again.cache.misses) == (5, 0)
    again.losses(keep[:1], seed=3)
    StackedRetraining(record, asked(2), cache=again.cache, progress=False).losses(keep[:1])
    StackedRetraining(record, asked(), cache=again.cache, progress=False, dtype=torch.float64).losses(keep[:1])
    assert again.cache.misses == 3  # another order, other queries, another precision: none of them is known


def test_a_torn_file_is_trained_again(record, tmp_path):
    keep = ~removal_masks(22, 1, 0.1)
    losses = StackedRetraining(record, asked(), cache=tmp_path, progress=False).losses(keep)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    again = StackedRetraining(record, asked(), cache=tmp_path, progress=False)
    np.testing.assert_array_equal(again.losses(keep), losses)
    assert again.cache.misses == 1


def test_a_killed_evaluation_goes_on(record, tmp_path):
    """Killed inside the third chunk, the next process makes only what is missing."""
    tokens = {key: [row[key] for row in asked().rows] for key in ("input_ids", "labels")}
    script = f"""
        import os, signal
        import numpy as np
        from datasets import Dataset
        from hf_source import Queries, TrainingRecord
        from hf_source.evaluation import StackedRetraining, removal_masks, stacked
        queries = Queries.from_dataset(Dataset.from_dict({tokens}))
        run = StackedRetraining(TrainingRecord.load({str(record.path)!r}), queries, cache={str(tmp_path)!r}, chunk=2)
        calls, inner = [], stacked.losses_of
        def dying(*args):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args)
        stacked.losses_of = dying
        run.losses(~removal_masks(22, 6, 0.2))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    run = StackedRetraining(record, asked(), cache=tmp_path, progress=False)
    keep = ~removal_masks(22, 6, 0.2)
    losses = run.losses(keep)
    assert (run.cache.hits, run.cache.misses) == (4, 2)
    fresh = StackedRetraining(record, asked(), cache=tmp_path / "other", progress=False)
    # the same sums in other company: float32 rounding through 9 steps
    np.testing.assert_allclose(losses, fresh.losses(keep), rtol=1e-4)


def test_writers_do_not_disturb_each_other(tmp_path):
    first, second = RetrainingCache(tmp_path), RetrainingCache(tmp_path)
    key = first.key({"a": 1, "b": 2}, np.ones(9, dtype=bool), None)
    assert key == second.key({"b": 2, "a": 1}, np.ones(9, dtype=bool), None)
    # a mask of 9 and one of 16 rows pack into the same bytes
    assert key != first.key({"a": 1, "b": 2}, np.r_[np.ones(9, dtype=bool), np.zeros(7, dtype=bool)], None)
    for cache in (first, second):
        cache.put(key, np.arange(3.0))
    np.testing.assert_array_equal(first.get(key), np.arange(3.0))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_the_digest_is_of_content(record, tmp_path):
    """Recorded again, the same run has the same digest; another learning rate has not."""
    same, other = (train(tmp_path / str(rate), tiny_gpt2(), learning_rate=rate)[1] for rate in (1e-2, 2e-2))
    assert record_digest(same) == record_digest(record) != record_digest(other)


def test_a_seed_is_another_order_of_the_same_visits(tmp_path):
    """Against a replay of the rows in their new places: each step divides by the items that are then in it."""
    _, record = train(tmp_path, tiny_gpt2(dtype=torch.float64), max_grad_norm=0.0)
    run = StackedRetraining(record, asked(), dtype=torch.float64, progress=False)
    losses = run.losses(np.ones((1, 22), dtype=bool), seed=5)
    assert np.abs(losses - run.losses(np.ones((1, 22), dtype=bool))).max() > 1e-3
    order = np.random.default_rng(5).permutation(22)
    rows = random_rows()
    steps = record.stages[0].steps().micro_batches
    items = np.asarray([sum(label != -100 for label in row["labels"]) for row in rows])  # as transformers counts
    torch.manual_seed(0)
    model = tiny_gpt2(dtype=torch.float64)
    optimizer = torch.optim.AdamW(_groups(model), lr=0.0)
    for index, step in enumerate(steps):
        taken = [int(order[row]) for micro in step for row in micro.rows]
        loss = sum(_nll(model, rows[row]) for row in taken) / items[taken].sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(record.stages[0].steps().learning_rate[index].max())
        optimizer.step()
    expected = [float(_nll(model, row)) for row in asked().rows]
    # transformers' initial weights are the same; sums in another order, and Adam's division by small moments
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


def _groups(model):
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    plain = [p for n, p in model.named_parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def _nll(model, row):
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"])[1:]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def test_fresh_weights_come_with_a_seed(record, tmp_path):
    keep = np.ones((1, 22), dtype=bool)
    run = StackedRetraining(record, asked(), cache=tmp_path, fresh=True, progress=False)
    plain = StackedRetraining(record, asked(), cache=tmp_path, progress=False)
    assert np.abs(run.losses(keep, seed=1) - plain.losses(keep, seed=1)).max() > 1e-3
    assert np.abs(run.losses(keep, seed=1) - run.losses(keep, seed=2)).max() > 1e-3
    np.testing.assert_allclose(run.losses(keep), plain.losses(keep))  # the run's own weights


def test_rows_of_an_early_stage_are_left_out_of_the_whole_run(tmp_path):
    record = tell(tmp_path, max_grad_norm=0.0, optim="sgd", learning_rate=0.05)
    queries = Queries.from_text(["Q Peru? A", "Cuba:"], [" Lima", " Havana"])
    run = StackedRetraining(record, queries, stage="pretrain", dtype=torch.float64, progress=False)
    keep = np.ones((2, 8), dtype=bool)
    keep[1, [0, 3]] = False
    losses = run.losses(keep)
    last = record.stages[-1].build_model(torch.float64)
    rows = queries.encode(record.processing_class()).rows
    # trained in float32, and again in float64
    np.testing.assert_allclose(losses[0], [float(_nll(last, row)) for row in rows], rtol=1e-3)
    early = replay(record.stages[0], row_mask=keep[1], dtype=torch.float64)
    torch_sgd = torch.optim.SGD(_decayed(early), lr=0.05)
    steps, chats = record.stages[1].steps(), record.stages[1].rows()
    assert len(steps) == STORY_STEPS["sft"]
    for index, step in enumerate(steps.micro_batches):
        torch_sgd.zero_grad()
        for micro in step:
            (sum(_nll(early, chats[row]) for row in micro.rows) / micro.normalizer).backward()
        for group in torch_sgd.param_groups:
            group["lr"] = float(steps.learning_rate[index].max())
        torch_sgd.step()
    np.testing.assert_allclose(losses[1], [float(_nll(early, row)) for row in rows], rtol=1e-6)


def _decayed(model):
    return [{**group, "weight_decay": group["weight_decay"] / 10} for group in _groups(model)]


def test_what_cannot_be_is_refused(record, tmp_path):
    run = StackedRetraining(record, asked(), cache=tmp_path / "cache", progress=False)
    with pytest.raises(DataError, match="bool array"):
        run.losses(np.ones((1, 22)))
    with pytest.raises(DataError, match="of shape"):
        run.losses(np.ones((1, 21), dtype=bool))
    with pytest.raises(DataError, match="no row at all"):
        run.losses(np.zeros((1, 22), dtype=bool))
    story = tell(tmp_path)
    with pytest.raises(ConfigError, match="from scratch"):
        StackedRetraining(story, Queries.from_text(["Cuba:"], [" Havana"]), stage="sft", fresh=True)
