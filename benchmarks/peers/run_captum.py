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
"""captum: TracInCP at six checkpoints, over every parameter, one row after the other.

Its faster `sample_wise_grads_per_batch` takes `Linear` and `Conv2d` only, and its `TracInCPFast` the last layer. A
checkpoint's weight is the learning rates since the one before.
"""

from pathlib import Path

import numpy as np
import torch
from captum.influence import TracInCP
from measured import Export, main
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """A language model as a function of token ids."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, tokens, vocabulary]`."""
        return self.model(input_ids=input_ids, use_cache=False).logits


class RowLosses(torch.nn.Module):
    """Loss of each row, summed over its tokens."""

    reduction = "none"

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses `[rows]`."""
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
        )
        return losses.view(len(labels), -1).sum(dim=1)


def tracin(export: Export, work: Path) -> np.ndarray:
    """TracInCP."""
    rows, queries = (export.padded(kind) for kind in ("rows", "queries"))
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # noqa: E731
    model = Logits(load(export.final)).eval()
    rates = dict(zip(map(str, export.checkpoints), export.segment_rates(len(export.checkpoints)), strict=True))
    states = {path: load(path).state_dict() for path in rates}

    def load_checkpoint(module: Logits, path: str) -> float:
        module.model.load_state_dict(states[path])
        return rates[path]

    influence = TracInCP(
        model,
        TensorDataset(rows["input_ids"], rows["labels"]),
        list(rates),
        checkpoints_load_func=load_checkpoint,
        loss_fn=RowLosses(),
        batch_size=64,
    )
    return influence.influence((queries["input_ids"], queries["labels"])).detach().numpy()


METHODS = {"tracin": tracin}

if __name__ == "__main__":
    main(METHODS, ["captum", "torch", "transformers"])
