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


import multiprocessing
import re
import threading
from functools import partial

import numpy as np
import pytest
import torch
import worker_jobs

from hf_source import Queries, SourceAttributor
from hf_source.errors import ConfigError, RetrainingError, UnsupportedError
from hf_source.evaluation import TrainerRetraining, evaluate
from hf_source.evaluation.workers import Failure, run_jobs
from hf_source.recipes import trainer_of

from ..cases import byte_tokenizer, random_rows, tiny_gpt2, train
from ..story import tell


ALL = np.ones((1, 22), dtype=bool)
STEADY = {"lr_scheduler_type": "constant", "warmup_steps": 0}


def asked(count: int = 3) -> Queries:
    return Queries.from_dataset(random_rows(count, seed=9))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), tiny_gpt2(), **STEADY)[1]


def _nll(model, row) -> torch.Tensor:
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"])[1:]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@torch.no_grad()
def final_losses(model) -> list[float]:
    return [float(_nll(model.eval(), row)) for row in asked().rows]


@pytest.mark.parametrize("accumulated", [2, 4])  # 6 micro-batches an epoch: 4 leave a step of 2
def test_with_every_row_the_run_comes_out_again(tmp_path, accumulated):
    _, record = train(tmp_path, tiny_gpt2(), gradient_accumulation_steps=accumulated)
    run = TrainerRetraining(record, asked(), progress=False)
    # float32: the batches are the same, sums may be made in another order
    np.testing.assert_allclose(run.losses(ALL)[0], final_losses(record.stages[0].build_model()), rtol=1e-4)


def test_rows_leave_their_batches_and_the_normalizer(tmp_path):
    """Against a loop written out; all rows of one micro-batch are left out, too."""
    _, record = train(tmp_path, tiny_gpt2(), optim="sgd", learning_rate=0.1, max_grad_norm=0.5)
    stage, rows = record.stages[0], random_rows()
    keep = ALL[0].copy()
    keep[stage.steps().micro_batches[1][0].rows] = False
    model = tiny_gpt2()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": plain}], lr=0.0)
    for step, batches in enumerate(stage.steps().micro_batches):
        kept = [rows[row] for batch in batches for row in batch.rows if keep[row]]
        count = sum(label != -100 for row in kept for label in row["labels"])  # as transformers counts
        optimizer.zero_grad()
        (sum(_nll(model, row) for row in kept) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = float(stage.steps().learning_rate[step].max())
        optimizer.step()
    run = TrainerRetraining(record, asked(), progress=False)
    np.testing.assert_allclose(run.losses(keep[None])[0], final_losses(model), rtol=1e-4)


def test_a_seed_is_a_training_of_its_own(record, tmp_path):
    """Against a plain Trainer on the rows that are kept."""
    keep = np.arange(22) % 2 == 0
    run = TrainerRetraining(record, asked(), progress=False)
    own = worker_jobs.own_trainer(random_rows().select(np.flatnonzero(keep)), 4, str(tmp_path))
    own.train()
    assert own.state.global_step == 6  # of 9 with every row
    np.testing.assert_allclose(run.losses(keep[None], seed=4)[0], final_losses(own.model), rtol=1e-4)
    assert np.abs(run.losses(keep[None], seed=5) - run.losses(keep[None], seed=4)).max() > 1e-3


def test_fresh_weights(record):
    run = TrainerRetraining(record, asked(), fresh=True, progress=False)
    assert (
        np.abs(run.losses(ALL, seed=1) - TrainerRetraining(record, asked(), progress=False).losses(ALL, 1)).max()
        > 0.01
    )


def test_a_trainer_of_ones_own(record, tmp_path):
    seen = []

    def make_trainer(dataset, seed, output_dir):
        seen.append((len(dataset), seed, sorted(dataset.column_names)))
        return worker_jobs.own_trainer(dataset, seed, output_dir)

    keep = np.stack([ALL[0], np.arange(22) > 3])
    options = {"cache": tmp_path, "progress": False}
    run = TrainerRetraining(record, asked(), make_trainer=make_trainer, **options)
    losses = run.losses(keep)
    run.losses(keep, seed=8)
    columns = ["input_ids", "labels"]
    assert seen == [(22, 42, columns), (18, 42, columns), (22, 8, columns), (18, 8, columns)]
    np.testing.assert_allclose(losses[0], final_losses(record.stages[0].build_model()), rtol=1e-4)
    again = TrainerRetraining(record, asked(), make_trainer=make_trainer, **options)
    again.losses(keep)
    assert len(seen) == 4
    other = TrainerRetraining(record, asked(), make_trainer=worker_jobs.own_trainer, **options)
    assert len(other.missing(keep)) == 2  # another function is another training


def test_a_recipe_trains_again(tmp_path):
    record = tell(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
        model_config: {{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}}
        tokenizer: {tmp_path / "tokenizer"}
        dataset: facts.jsonl
        training: {{output_dir: out, max_steps: 3, learning_rate: 1e-2, use_cpu: true}}
    """)
    queries = Queries.from_text(["Cuba:"], [" Havana"])
    run = TrainerRetraining(record, queries, stage="sft", make_trainer=trainer_of(recipe), progress=False)
    losses = [run.losses(np.ones((1, 4), dtype=bool), seed=seed)[0, 0] for seed in (1, 2)]
    assert all(np.isfinite(losses)) and losses[0] != losses[1]  # weights from scratch, by the seed
    changed = trainer_of(recipe, ["training.max_steps=4"])
    assert TrainerRetraining(record, queries, stage="sft", make_trainer=changed).settings() != run.settings()
    with pytest.raises(ConfigError, match="not a setting of SourceConfig"):
        trainer_of(recipe, ["training.max_stebs=4"])


def test_through_the_later_stages(tmp_path):
    """Small steps of gradient descent: the exact derivative foresees both kinds of retraining."""
    record = tell(tmp_path, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0)
    queries = Queries.from_text(["Q Peru? A", "Cuba:"], [" Lima", " Havana"])
    run = TrainerRetraining(record, queries, stage="pretrain", progress=False)
    model = record.stages[-1].build_model()
    rows = queries.encode(record.processing_class()).rows
    with torch.no_grad():
        expected = [float(_nll(model, row)) for row in rows]
    np.testing.assert_allclose(run.losses(np.ones((1, 8), dtype=bool))[0], expected, rtol=1e-4)
    own = SourceAttributor(record, method="unrolled", progress=False)
    found = evaluate(own, queries, retraining=run, num_subsets=6, fraction=0.2, store=False)
    assert found.settings["retraining"]["retraining"] == "trainer"
    assert found.entries[0].value > 0.3  # a missing row also changes what its batch is divided by


def test_workers_find_the_same(record, tmp_path):
    keep = np.stack([np.arange(22) != row for row in range(3)])
    here = TrainerRetraining(record, asked(), progress=False, cache=tmp_path / "here").losses(keep)
    run = TrainerRetraining(record, asked(), num_workers=2, progress=False, cache=tmp_path / "there")
    # one thread there and perhaps more here: float32 sums in another order
    np.testing.assert_allclose(run.losses(keep), here, rtol=1e-4)
    assert run.cache.misses == 3 and run.at_once == 2


def test_a_worker_that_dies_costs_its_own_job(tmp_path):
    found = dict(run_jobs(partial(worker_jobs.fragile, tmp_path), [0, 1, 2, 3, 4], 2))
    assert (found[0], found[1], found[4]) == (0, 10, 40)  # job 1 at its second try
    assert found[2] == Failure("its process died (exit code 7), twice", died=True)
    assert found[3].reason == "ValueError: no threes" and "worker_jobs" in found[3].details


@pytest.mark.parametrize("unsendable", [lambda: None, partial(worker_jobs.fragile, threading.Lock())])
def test_what_cannot_be_sent_is_refused_with_no_process_left(unsendable):
    with pytest.raises(ConfigError, match="cannot be sent to another process .*num_workers=0"):
        list(run_jobs(unsendable, [0, 1], 2))
    assert not multiprocessing.active_children()


def test_a_failed_subset_does_not_lose_the_others(record, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_jobs, "FIRST", random_rows()[0]["input_ids"])
    keep = np.stack([ALL[0], np.arange(22) != 0, np.arange(22) != 5])
    options = {"make_trainer": worker_jobs.failing_trainer, "cache": tmp_path, "progress": False}
    run = TrainerRetraining(record, asked(), **options)
    with pytest.raises(RetrainingError, match=re.escape("1 of 3 retrainings failed")) as caught:
        run.losses(keep)
    assert "left out rows 0: RuntimeError: the first row is gone. The 2 that finished are kept" in str(caught.value)
    assert run.missing(keep).tolist() == [1]
    assert TrainerRetraining(record, asked(), **options).losses(keep[[0, 2]]).shape == (2, 3)
    with pytest.raises(RetrainingError, match="1 of 2 retrainings failed"):  # nothing has finished: the rest waits
        run.losses(np.stack([np.arange(22) > 0, np.arange(22) > 1]), seed=1)


def test_what_cannot_be_is_refused(record, tmp_path):
    with pytest.raises(ConfigError, match="num_workers=-1"):
        TrainerRetraining(record, asked(), num_workers=-1)
    run = TrainerRetraining(record, asked(), make_trainer=lambda *_: None, num_workers=1, cache=tmp_path)
    with pytest.raises(ConfigError, match="at the top of a module"):
        run.losses(ALL)
    with pytest.raises(ConfigError, match="fresh=True"):
        TrainerRetraining(record, asked(), make_trainer=worker_jobs.own_trainer, fresh=True)
    record.stages[0].loss["kind"], kind = "dpo", record.stages[0].loss["kind"]
    try:
        with pytest.raises(UnsupportedError, match="make_trainer="):
            TrainerRetraining(record, asked())
    finally:
        record.stages[0].loss["kind"] = kind
