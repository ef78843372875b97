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
"""TRAK: projected gradients of every parameter, whitened by their own second moment.

The output function is the mean over a row's tokens of log(p / (1 - p)), its published one for classification taken per
token, and the weight 1 - p its mean. Projection to 2,048 dimensions and no ridge are its defaults; `ridge` sets
`lambda_reg` to .1 of the mean eigenvalue of the projected gradients, since 512 rows cannot fill 2,048 dimensions.
Half precision (a GPU's) is off. It asks for independently trained models, of which there is one here; checkpoints of
one run, which it allows instead, are averaged in `six checkpoints`.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from measured import Export, main
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from transformers import AutoModelForCausalLM


BATCH = 128


def _log_odds(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-odds of the right tokens and mean probability of the wrong ones, per row."""
    labels = labels[:, 1:]
    asked = (labels != -100).float()
    logp = logits[:, :-1].log_softmax(dim=-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    wrong = (-torch.expm1(logp)).clamp_min(1e-6)
    items = asked.sum(dim=1).clamp_min(1)
    return ((logp - wrong.log()) * asked).sum(dim=1) / items, (wrong * asked).sum(dim=1) / items


class LanguageModelOutput(AbstractModelOutput):
    """TRAK's output function for token rows."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def get_output(model, weights, buffers, input_ids, labels):
        """The output of one row."""
        kwargs = {"use_cache": False}
        result = torch.func.functional_call(model, (weights, buffers), (input_ids.unsqueeze(0),), kwargs)
        return _log_odds(result.logits, labels.unsqueeze(0))[0].squeeze(0)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        """1 - p of each row."""
        input_ids, labels = batch
        with torch.no_grad():
            logits = torch.func.functional_call(model, (weights, buffers), (input_ids,), {"use_cache": False}).logits
        return _log_odds(logits, labels)[1].unsqueeze(-1)


def run(number: int, ridge: float):
    """TRAK over the last `number` checkpoints."""

    def method(export: Export, work: Path) -> np.ndarray:
        load = lambda path: AutoModelForCausalLM.from_pretrained(  # noqa: E731
            path, dtype=torch.float32, attn_implementation="eager"
        )
        model = load(export.final).eval()
        model.config.pad_token_id = None  # transformers looks for padding by a branch that `vmap` does not take
        rows, queries = (export.padded(kind) for kind in ("rows", "queries"))
        traker = TRAKer(
            model, LanguageModelOutput(), train_set_size=len(rows["input_ids"]), save_dir=str(work / "trak"),
            device="cpu", use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        chosen = [load(path).state_dict() for path in export.checkpoints[-number:]]
        for i, state in enumerate(chosen):
            traker.load_checkpoint(state, model_id=i)
            for start in range(0, len(rows["input_ids"]), BATCH):
                batch = [rows[key][start : start + BATCH] for key in ("input_ids", "labels")]
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        if ridge:
            stored = np.asarray(traker.saver.current_store["grads"])
            traker.score_computer.lambda_reg = ridge * float(np.square(stored).sum() / stored.shape[1])
        traker.finalize_features()
        asked = [queries[key] for key in ("input_ids", "labels")]
        for i, state in enumerate(chosen):
            traker.start_scoring_checkpoint("queries", state, model_id=i, num_targets=len(asked[0]))
            traker.score(batch=asked, num_samples=len(asked[0]))
        return np.asarray(traker.finalize_scores("queries")).T

    return method


METHODS = {
    "trak (defaults)": run(1, 0.0),
    "trak, ridge": run(1, 0.1),
    "trak, ridge, six checkpoints": run(6, 0.1),
}

if __name__ == "__main__":
    main(METHODS, ["traker", "torch", "transformers"])
