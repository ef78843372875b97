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
"""Scores of runs with other optimizers than Adam, against the exact answer of a run without curvature."""

import numpy as np
import pytest
import torch
from cases import random_rows, tiny_llama, train
from datasets import Dataset
from torch.optim import AdamW, Muon
from transformers.optimization import Adafactor

from hf_source.attribution import Queries, SourceAttributor
from hf_source.data import CausalLMCollator
from hf_source.gradients import CausalLMTask
from hf_source.recording.optimizers import CombinedOptimizer


def combined(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "proj" in n]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return CombinedOptimizer(
        Muon(matrices, lr=0.005, weight_decay=0.0), AdamW(rest, lr=0.005, betas=(0.5, 0.95), weight_decay=0.0)
    )


OPTIMIZERS = {
    "muon and adamw": combined,
    "adafactor": lambda model: Adafactor(
        model.parameters(), lr=0.005, relative_step=False, scale_parameter=False, beta1=0.6
    ),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.001, momentum=0.5),
}


def row_gradients(model, row):
    model.zero_grad()
    batch = CausalLMCollator()([row])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    CausalLMTask().row_losses(logits, batch["labels"]).sum().backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_scores_without_curvature_are_sums_of_preconditioned_products(tmp_path, case):
    """`sum over segments and parts of w_m <P q, grad l_m> / s * s`, with every part's own momentum and matrix."""
    model = tiny_llama(dtype=torch.float64)
    rows = random_rows()
    _, record = train(tmp_path, model, rows, trainer={"optimizers": (OPTIMIZERS[case](model), None)}, num_segments=2)
    stage = record.stage()
    attributor = SourceAttributor.from_record(tmp_path / "record", curvature="identity", dtype=torch.float64)
    question = {"input_ids": [5, 9, 3, 11, 7], "labels": [-100, -100, 3, 11, 7]}
    queries = Queries.from_dataset(Dataset.from_list([question]))
    scores = attributor.scores(rows, queries)
    reference = stage.build_model(torch.float64)
    q = row_gradients(reference, question)
    expected = np.zeros(len(rows))
    for segment in stage.segments:
        stage.load_weights(reference, segment.index)
        P = segment.preconditioner()
        names = [names for names, _ in segment.applied_parts()]
        assert len(names) == (2 if case == "muon and adamw" else 1)
        moved = {}
        for name, vector in q.items():
            side = segment.matrix_sides.get(name)
            if side is None:
                moved[name] = P[name] * vector
            else:
                moved[name] = P[name] @ vector if side == "left" else vector @ P[name]
        for number in range(len(rows)):
            grads = row_gradients(reference, rows[number])
            for part, weights in segment.applied_parts():
                expected[number] += weights[number] * sum(float((moved[n] * grads[n]).sum()) for n in part)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("curvature", ["joint", "ekfac"])
def test_every_curvature_takes_a_run_with_muon(tmp_path, curvature):
    model = tiny_llama()
    rows = random_rows()
    train(tmp_path, model, rows, trainer={"optimizers": (combined(model), None)})
    attributor = SourceAttributor.from_record(tmp_path / "record", curvature=curvature)
    queries = Queries.from_dataset(rows.select([4]))
    scores = attributor.scores(rows, queries)
    assert np.isfinite(scores).all() and scores[0].argmax() == 4  # what it was trained on supports it most
