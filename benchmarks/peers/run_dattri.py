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
"""dattri-LLM: TracIn, EK-FAC influence, and AdamW's unrolled influence over the exported run.

It hooks every layer (linear, embedding, norm); a tied weight counts as two independent ones, and EK-FAC leaves
embeddings out (norms get its `direct` Fisher). Its own trajectory is shuffled anew, so that for AdamW's influence the
run is trained again here in the recorded order, with its hooks around the loop as its documentation shows; the weights
reached are compared with the exported ones. `propagation="test"` is its setting for every coordinate of the model.
Losses are summed over tokens; the training loop takes their mean, as trained. EK-FAC fits its Fisher to the training
gradients themselves (the labels of the data, not drawn ones).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from dattri_llm import (
    REGISTER_ALL,
    AdamWInfluenceAttributor,
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    OffloadCallback,
    OptimizerStateCallback,
    TracInAttributor,
)
from dattri_llm.utils.hashing import hash_sample
from measured import Export, main, sum_of_losses
from transformers import AutoModelForCausalLM


transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
BATCH = 64


class Rows(torch.utils.data.Dataset):
    """Padded token rows."""

    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        # Positions that the model makes up have no row axis, and their embedding's gradient would be the batch's.
        positions = torch.arange(rows["input_ids"].shape[1]).expand_as(rows["input_ids"])
        self.rows = {**rows, "position_ids": positions}

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed over the tokens of the batch. The labels go along, for they are part of a sample's identity."""
    return sum_of_losses(model(**batch).logits, batch["labels"])


def load(path: Path) -> torch.nn.Module:
    """The model of a checkpoint, without dropout or caches."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def ordered(score, rows: Rows, queries: Rows, weights: dict[int, float] | None = None) -> np.ndarray:
    """Scores by row number from scores by content; those of a row's visits are summed."""
    places: dict[str, list[int]] = {}
    for i in range(len(rows)):
        places.setdefault(hash_sample(rows[i]), []).append(i)
    result = np.zeros((len(queries), len(rows)))
    columns = [score.test_ids.index(hash_sample(queries[i])) for i in range(len(queries))]
    values = score.scores.numpy()[:, columns].T
    for position, (key, step) in enumerate(zip(score.row_train_ids, score.row_steps, strict=True)):
        for i in places[key]:
            result[:, i] += values[:, position] * (1.0 if weights is None else weights[step])
    return result


def tracin(export: Export, work: Path) -> np.ndarray:
    """Gradient products at six checkpoints, weighted by the learning rates since the one before."""
    rows, queries = (Rows(export.padded(kind)) for kind in ("rows", "queries"))
    states = [load(path).state_dict() for path in export.checkpoints]
    args = AttributionArguments(
        output_dir=str(work), use_cpu=True, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH
    )
    task = AttributionTask(loss, load(export.final), checkpoints=states)
    score = TracInAttributor(args, task=task).attribute(
        rows, queries, hook_config=HookManagerConfig(linear_io=REGISTER_ALL)
    )
    rates = dict(enumerate(export.segment_rates(len(states))))
    return ordered(score, rows, queries, rates)


def ekfac(damping: float, relative: bool):
    """EK-FAC influence functions at the final weights."""

    def method(export: Export, work: Path) -> np.ndarray:
        rows, queries = (Rows(export.padded(kind)) for kind in ("rows", "queries"))
        args = AttributionArguments(
            output_dir=str(work), use_cpu=True, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH
        )
        score = EKFACAttributor(args, task=AttributionTask(loss, load(export.final))).attribute(
            rows,
            queries,
            hook_config=HookManagerConfig(linear_io=REGISTER_ALL),
            damping=damping,
            relative_damping=relative,
            non_kfac_strategy="direct",
        )
        return ordered(score, rows, queries)

    return method


def adamw(export: Export, work: Path) -> np.ndarray:
    """First-order influence unrolled through AdamW's updates."""
    rows, queries = (Rows(export.padded(kind)) for kind in ("rows", "queries"))
    about, model = export.about, load(export.checkpoint(0))
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": about["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    )
    config = HookManagerConfig(linear_io=REGISTER_ALL)
    train = GradientStorageManager(str(work / "train_grads"))
    moments = OptimizerStateCallback(model, optimizer)
    manager = HookManager(
        model,
        config=config,
        callbacks=[OffloadCallback(offload_interval=1, file_manager=train, recording_type="per_sample"), moments],
    )
    with manager.collect(deregister_on_exit=True):
        for step, (batch, rate) in enumerate(zip(about["batches"], about["learning_rates"], strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs = {key: value[batch] for key, value in rows.rows.items()}
            optimizer.zero_grad()
            (loss(model, inputs) / (inputs["labels"][:, 1:] != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), about["max_grad_norm"])
            optimizer.step()
            moments.record_post(step)
    reached = torch.cat([p.detach().flatten() for p in model.parameters()])
    meant = torch.cat([p.detach().flatten() for p in load(export.final).parameters()])
    if F.cosine_similarity(reached, meant, dim=0) < 0.99999 or (reached - meant).norm() > 1e-2 * meant.norm():
        raise SystemExit("The run was not reached again.")
    test = GradientStorageManager(str(work / "test_grads"))
    callback = OffloadCallback(offload_interval=1, file_manager=test, recording_type="per_sample")
    with HookManager(model, config=config, callbacks=[callback]).collect(deregister_on_exit=True):
        loss(model, queries.rows).backward()
    args = AttributionArguments(output_dir=str(work), use_cpu=True)
    score = AdamWInfluenceAttributor(args).attribute_from_cache(
        str(work / "train_grads"), str(work / "test_grads"), dynamics=moments.dynamics(), propagation="test"
    )
    return ADAMW_SIGN * ordered(score, rows, queries)


# Its score is -grad(query)^T d theta_T / d eps, with theta_dot the response to DOWN-weighting the sample.
ADAMW_SIGN = -1.0

METHODS = {
    "tracin": tracin,
    "influence ekfac (defaults)": ekfac(1e-3, False),
    "influence ekfac, relative damping": ekfac(0.1, True),
    "adamw influence": adamw,
}

if __name__ == "__main__":
    main(METHODS, ["dattri-llm", "dattri", "torch", "transformers"])
