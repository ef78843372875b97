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
"""kronfluence: EK-FAC influence functions and gradient products at the final weights.

As its documentation and its GPT-2 example do it: `Conv1D` becomes `Linear` (the only language-model layer it takes),
the loss is summed over tokens, curvature from labels drawn from the model, the attention mask tells it the padding. It
does not take embeddings, norms, nor the use of a tied weight as an embedding. The example tracks the linear layers of
the blocks; `with head` tracks `lm_head` too. `heuristic damping` is its `damping_factor=None` (.1 of the mean
eigenvalue); the default is 1e-8. A positive score is a row that lowers the query's loss, as its documentation says.
"""

from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from measured import Export, main, sum_of_losses
from torch.utils.data import StackDataset
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


class LanguageModeling(Task):
    """Summed losses of token rows."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch, model, sample=False):
        """Loss of the batch, with its labels or with drawn ones."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels = batch["labels"]
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits[:, :-1].flatten(0, 1).softmax(dim=-1), 1).view_as(labels[:, 1:])
                labels = labels.clone()
                labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, drawn)
        return sum_of_losses(logits, labels)

    def compute_measurement(self, batch, model):
        """The query's summed loss."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        """The linear layers."""
        return self.modules

    def get_attention_mask(self, batch):
        """Where there is text."""
        return batch["attention_mask"]


def with_linear_layers(model: torch.nn.Module) -> torch.nn.Module:
    """Replace every `Conv1D` by the same `Linear`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = torch.nn.Linear(*child.weight.shape)
                linear.weight.data.copy_(child.weight.data.T)
                linear.bias.data.copy_(child.bias.data)
                setattr(module, name, linear)
    return model


def run(strategy: str, damping: float | None, head: bool):
    """Fit factors on all rows and score every row for every query."""

    def method(export: Export, work: Path) -> np.ndarray:
        model = with_linear_layers(AutoModelForCausalLM.from_pretrained(export.final, dtype=torch.float32)).eval()
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        task = LanguageModeling([name for name in linear if head or name != "lm_head"])
        analyzer = Analyzer(
            "peers", prepare_model(model, task), task, cpu=True, output_dir=str(work), disable_tqdm=True
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
        rows, queries = (StackDataset(**export.padded(kind)) for kind in ("rows", "queries"))
        batch, settings = export.about["batch"], FactorArguments(strategy=strategy)
        analyzer.fit_all_factors("factors", dataset=rows, per_device_batch_size=batch, factor_args=settings)
        analyzer.compute_pairwise_scores(
            "scores",
            factors_name="factors",
            query_dataset=queries,
            train_dataset=rows,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()

    return method


METHODS = {
    "identity": run("identity", 1e-8, False),
    "influence ekfac (defaults)": run("ekfac", 1e-8, False),
    "influence ekfac, heuristic damping": run("ekfac", None, False),
    "influence ekfac, heuristic damping, with head": run("ekfac", None, True),
}

if __name__ == "__main__":
    main(METHODS, ["kronfluence", "torch", "transformers"])
