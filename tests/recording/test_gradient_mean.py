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
"""The mean gradient of a segment is that of the gradients which the optimizer really received."""

import pytest
import torch
from cases import config, random_rows, tiny_llama, train

from hf_source.errors import RecordError
from hf_source.recording import SourceTrainer, TrainingRecord
from hf_source.recording.optimizers import describe_optimizer
from hf_source.recording.segments import SegmentAccumulator


def spied(monkeypatch, model, **settings):
    """An SGD optimizer of two groups, and what it will have seen."""
    seen = []
    real = torch.optim.SGD.step

    def step(self, closure=None):
        rates = [group["lr"] for group in self.param_groups]
        seen.append((rates, [[p.grad.clone() for p in group["params"]] for group in self.param_groups]))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    head, rest = [model.lm_head.weight], [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    groups = [{"params": rest, "lr": 0.05}, {"params": head, "lr": 0.02}]
    return torch.optim.SGD(groups, momentum=0.8, nesterov=True, **settings), seen


@pytest.mark.parametrize("on_cpu", [False, True])
def test_it_is_the_weighted_mean_of_what_the_optimizer_received(tmp_path, monkeypatch, on_cpu):
    """Clipped; and before the optimizer changes it in place, as foreach SGD with Nesterov does."""
    model = tiny_llama(dtype=torch.float64)
    optimizer, seen = spied(monkeypatch, model, foreach=True)
    _, record = train(
        tmp_path,
        model,
        trainer={"optimizers": (optimizer, None)},
        record_gradient_mean=True,
        record_averages_on_cpu=on_cpu,
    )
    stage = record.stage()
    assert (stage.steps().clip_factor < 1).any() and len(stage.segments) == 3
    names = [group.parameters for group in stage.groups]
    for segment in stage.segments:
        found = segment.gradient_mean()
        assert set(found) == set(stage.trainable)
        steps = range(segment.first_step, segment.end_step)
        total = sum(max(seen[step][0]) for step in steps)
        for group, own in enumerate(names):
            for index, name in enumerate(own):
                expected = sum(max(seen[step][0]) * seen[step][1][group][index] for step in steps) / total
                torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-15)


def test_it_survives_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "num_segments": 2}
    means = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        _, record = train(folder, tiny_llama(), record_gradient_mean=True, **settings)
        if interrupted:
            arguments = config(folder, record_gradient_mean=True, **settings)
            again = SourceTrainer(tiny_llama(), arguments, train_dataset=random_rows())
            again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-4"))
            record = TrainingRecord.load(folder / "record")
        means.append([segment.gradient_mean() for segment in record.stage().segments])
    for one, other in zip(*means, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_it_the_fix_is_named(tmp_path):
    _, record = train(tmp_path, tiny_llama(), save_strategy="steps", save_steps=4)
    with pytest.raises(RecordError, match="record_gradient_mean=True"):
        record.stage().segments[0].gradient_mean()
    arguments = config(tmp_path, save_strategy="steps", save_steps=4, record_gradient_mean=True)
    again = SourceTrainer(tiny_llama(), arguments, train_dataset=random_rows())
    with pytest.raises(RecordError, match="Resume with record_gradient_mean=False"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_a_skipped_step_leaves_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    description = describe_optimizer(optimizer, {parameter: "a"})
    sums = SegmentAccumulator({"a": parameter}, optimizer, description, gradient_mean=True)
    for skipped, finite in ((True, True), (False, True), (True, False)):
        parameter.grad = torch.full((3,), 2.0 if finite else float("inf"))
        sums.before_update(0.1, 1.0)
        if finite:  # as the recorder decides by the gradient's norm
            sums.add_gradients(0.1)
        if not skipped:
            optimizer.step()
        sums.after_update(0.1, [0.1], 1.0, skipped=skipped)
    assert torch.equal(sums.close_gradient_mean()["a"], torch.full((3,), 2.0))
