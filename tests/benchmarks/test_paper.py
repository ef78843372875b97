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
"""The paper's benchmark on a toy: it runs, resumes, and its retraining is that of plain torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_source.gradients import make_measurement


@pytest.fixture()
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import bench_paper

    return bench_paper


@pytest.fixture(params=["classes", "value"])
def toy(bench, monkeypatch, request):
    """A benchmark called `toy`, with two stages, and its problem."""
    from paper.data import Benchmark, Problem, Settings, Stage

    def rows(count, seed, name="train"):
        inputs = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
        values = inputs.sum(axis=1)
        classes = request.param == "classes"
        return Stage(inputs, (values > 0).astype(np.int64) + (values > 2) if classes else values, name)

    problem = Problem([rows(24, 0, "first"), rows(20, 1, "second")], rows(5, 2))
    settings = Settings((4, 6, 3 if request.param == "classes" else 1), request.param, 0.05, 0.1, 5, 2)
    monkeypatch.setitem(bench.BENCHMARKS, "toy", Benchmark(lambda: problem, settings))
    return problem, settings


@pytest.mark.slow
def test_every_method_gets_a_line_and_a_second_run_trains_nothing(bench, toy, tmp_path, monkeypatch):
    def run(*more):
        common = ["toy", "--halves", "6", "--seeds", "2", "--members", "2", "--num-samples", "8", "--segments", "1"]
        bench.main([*common, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out.json"), *more])
        return json.loads((tmp_path / "out.json").read_text())["toy"]

    first = run()
    found = first["results"]
    assert {
        "grad-dot",
        "trak",
        "influence ekfac, 8 samples, 2 models",
        "source identity, L=1",
        "source joint, L=1, 8 samples",
        "source joint, 2 checkpoints a segment, L=1, 8 samples",
    } <= found.keys()
    for line in found.values():
        for stage in ("first", "second"):
            assert -1 <= line[stage]["low"] <= line[stage]["lds"] <= line[stage]["high"] <= 1
    assert len(found["source ekfac, L=1, 8 samples, 2 models"]["first"]["members"]) == 2
    assert set(first["ceiling"]) == {"first", "second"}
    monkeypatch.setattr("paper.halves.train_copies", None)
    monkeypatch.setattr(bench, "record_run", None)
    assert run()["results"] == found
    with pytest.raises(TypeError):
        run("--again", "--only", "grad-dot")


def test_copies_train_as_torch_trains_one(bench, toy):
    from paper.halves import forward, initial, train_copies

    problem, settings = toy
    stage, keep = problem.stages[0], np.zeros((2, 24), dtype=bool)
    keep[0, :12], keep[1, 7:19] = True, True
    copies = train_copies(stage, settings, keep, [3, 4])
    for number, seed in enumerate((3, 4)):
        generator = torch.Generator().manual_seed(seed)
        start = initial(settings.sizes, [generator])
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, settings.sizes[-1]))
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.data = value[0].T.reshape(parameter.shape).clone()
        matrices, biases = list(model.parameters())[::2], list(model.parameters())[1::2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        rows = np.flatnonzero(keep[number])
        for _ in range(2):
            for part in np.array_split(rows[torch.randperm(12, generator=generator).numpy()], [5, 10]):
                outputs, targets = model(torch.tensor(stage.inputs[part])), torch.tensor(stage.targets[part])
                loss = torch.nn.CrossEntropyLoss() if settings.kind == "classes" else torch.nn.MSELoss()
                optimizer.zero_grad()
                loss(outputs if settings.kind == "classes" else outputs[:, 0], targets).backward()
                optimizer.step()
        asked = torch.tensor(problem.queries.inputs)
        found = forward([weight[number : number + 1] for weight in copies], asked[None])[0]
        torch.testing.assert_close(found, model(asked), rtol=1e-4, atol=1e-5)


def _predictions(settings, outputs, problem):
    targets = torch.tensor(problem.queries.targets)
    return (outputs[:, None], targets[:, None]) if settings.kind == "classes" else (outputs, targets)


def test_the_measurement_scored_is_the_one_retraining_measures(bench, toy):
    from paper.halves import measured
    from paper.model import MEASUREMENTS

    problem, settings = toy
    outputs = torch.randn(5, settings.sizes[-1])
    asked = make_measurement(MEASUREMENTS[settings.kind]).value(*_predictions(settings, outputs, problem))
    np.testing.assert_allclose(measured(outputs.numpy(), problem.queries.targets, settings.kind), asked, rtol=1e-5)


def test_the_ceiling_is_what_independent_noise_leaves(bench):
    generator = np.random.default_rng(0)
    signal, noise = generator.normal(size=(2000, 3)), generator.normal(size=(4, 2000, 3))
    # The mean of 4 seeds has variance 1 + 1/4, of which 1 is signal; ranks attenuate it by a few per cent.
    assert bench.ceiling(signal + noise) == pytest.approx((1 / 1.25) ** 0.5, abs=0.02)
    assert bench.ceiling(np.stack([signal] * 3)) == pytest.approx(1)
