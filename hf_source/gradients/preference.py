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
"""Preference pairs: reward models (`RewardTask`) and direct preference optimisation (`DPOTask`).

A row is a pair, chosen and rejected, and its loss that of a coin: `-log sigmoid(margin)`, with the margin of two
rewards, or of two log-likelihood ratios against a reference model (Rafailov et al. 2023, arXiv 2305.18290). The coin's
own labels (was the chosen one preferred?) are drawn with probability `sigmoid(margin)` for the Fisher, which is the
Gauss-Newton matrix.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..data import IGNORE_INDEX
from .task import Batch, RowLossTask, token_losses


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns: log-likelihood of the two completions under the reference model, as TRL calls them."""


_SIDES = ("chosen_ids", "rejected_ids")


class PairTask(RowLossTask):
    """What reward models and DPO share: two sequences to a row, one after the other."""

    sequences_per_row = 2

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Whether the chosen one is preferred, by the model's own probability."""
        sampled = labels.clone()
        uniform = torch.rand(len(outputs), generator=generator).to(outputs.device)
        sampled[:, 0] = (uniform < outputs[:, 0].float().sigmoid()).to(labels)
        return sampled

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`-log sigmoid(margin)` where the label is 1, `-log sigmoid(-margin)` where it is 0; nats, `[rows]`."""
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels[:, 0].to(outputs), reduction="none")

    def length(self, row: Mapping[str, Any]) -> int:
        """Padded tokens of both sequences."""
        prompt = len(row.get("prompt_ids", ()))
        return 2 * (prompt + max(len(row["chosen_ids"]), len(row["rejected_ids"])))


class RewardTask(PairTask):
    """A reward model: `-log sigmoid(r_chosen - r_rejected - margin)`.

    With `center_rewards_coefficient`, plus `c (r_chosen + r_rejected)^2`.
    """

    columns = ("chosen_ids", "rejected_ids", "margin")

    @property
    def centering(self) -> float:
        """The coefficient `c`."""
        return self.settings.get("center_rewards_coefficient") or 0.0

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Margin and sum of the rewards, float `[rows, 2]`."""
        rewards = model(
            input_ids=batch["input_ids"].flatten(0, 1),
            attention_mask=batch["attention_mask"].flatten(0, 1),
            use_cache=False,
        ).logits.view(-1, 2)
        margin = rewards[:, 0] - rewards[:, 1] - batch["margin"].to(rewards)
        return torch.stack([margin, rewards.sum(dim=1)], dim=1)

    def row_losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each pair, `[rows]`; labels are `[preferred, centre]`."""
        centred = self.centering * (outputs[:, 1] - labels[:, 1].to(outputs)).square()
        return super().row_losses(outputs, labels) + centred

    def sample_labels(self, outputs: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A coin for the preference; for the square, the Gaussian of which it is the negative log-likelihood."""
        sampled = super().sample_labels(outputs, labels, generator)
        if self.centering:
            noise = torch.randn(len(outputs), generator=generator).to(outputs)
            sampled[:, 1] = (outputs[:, 1] + noise / (2 * self.centering) ** 0.5).to(labels)
        return sampled

    def collator(self, processing_class: Any) -> Callable[[list], Batch]:
        """Pads both sequences of each pair to the right."""

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
            pairs = [[_tokens(row[side]) for side in _SIDES] for row in rows]
            margin = torch.tensor([float(row.get("margin") or 0.0) for row in rows], dtype=torch.float64)
            labels = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(len(rows), 1)
            return _padded(pairs, self.settings["pad_token_id"]) | {"labels": labels, "margin": margin}

        return collate


class DPOTask(PairTask):
    """DPO with the sigmoid loss: `-log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected))`."""

    columns = ("prompt_ids", "chosen_ids", "rejected_ids", *REFERENCE)

    def log_likelihoods(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Summed log-likelihood of the completions, chosen and rejected, `[rows, 2]`."""
        ids = batch["input_ids"].flatten(0, 1)
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"].flatten(0, 1), use_cache=False).logits
        targets = ids.masked_fill(batch["completion_mask"].flatten(0, 1) == 0, IGNORE_INDEX)
        return -token_losses(logits[:, :-1], targets[:, 1:]).sum(dim=1).view(-1, 2)

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """`beta` times the difference of the log-ratios, float `[rows, 1]`."""
        likelihoods = self.log_likelihoods(model, batch)
        ratios = likelihoods - batch["reference"].to(likelihoods)
        return self.settings["beta"] * (ratios[:, :1] - ratios[:, 1:])

    def collator(self, processing_class: Any) -> Callable[[list], Batch]:
        """Cuts and pads both sequences of each pair, to the right."""
        length, mode = self.settings.get("max_length"), self.settings.get("truncation_mode", "keep_start")
        kept = slice(None) if length is None else slice(None, length) if mode == "keep_start" else slice(-length, None)

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
            pairs = [[_tokens(row["prompt_ids"]) + _tokens(row[side]) for side in _SIDES] for row in rows]
            asked = [[[0] * len(row["prompt_ids"]) + [1] * len(row[side]) for side in _SIDES] for row in rows]
            cut = lambda found: [[part[kept] for part in pair] for pair in found]  # noqa: E731
            batch = _padded(cut(pairs), self.settings["pad_token_id"])
            batch["completion_mask"] = _padded(cut(asked), 0)["input_ids"]
            # Not a number where it has not been computed yet, so that nothing can be scored without it.
            reference = [[row.get(name, float("nan")) for name in REFERENCE] for row in rows]
            batch["reference"] = torch.tensor(reference, dtype=torch.float64)
            batch["labels"] = torch.ones((len(rows), 1), dtype=torch.float64)
            return batch

        return collate

    def prepare(self, model: torch.nn.Module, rows: Any) -> None:
        """Add the reference model's log-likelihoods to the rows, where training did not store them."""
        rows.dataset = self.with_reference(rows.dataset, model, rows.stage)

    @torch.no_grad()
    def with_reference(self, dataset: Any, model: torch.nn.Module, stage: Any, batch_size: int = 16) -> Any:
        """The dataset with the columns `REFERENCE`; leaves the model at the stage's initial weights."""
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        stage.load_weights(model, "initial")
        base = model.disable_adapter() if self.settings["reference"] == "adapter_off" else contextlib.nullcontext()
        wanted = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format(None)
        collate, device, found = self.collator(None), next(model.parameters()).device, []
        was_training = model.training
        model.eval()
        with base:
            for start in range(0, len(wanted), batch_size):
                rows = [wanted[i] for i in range(start, min(start + batch_size, len(wanted)))]
                batch = {key: value.to(device) for key, value in collate(rows).items()}
                found.append(self.log_likelihoods(model, batch).double().cpu())
        model.train(was_training)
        likelihoods = torch.cat(found)
        for column, name in enumerate(REFERENCE):
            dataset = dataset.add_column(name, likelihoods[:, column].numpy())
        return dataset


def _tokens(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


def _padded(pairs: Sequence[Sequence[list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 `[rows, 2, tokens]`, padded to the right."""
    width = max(len(part) for pair in pairs for part in pair)
    ids = [[part + [pad] * (width - len(part)) for part in pair] for pair in pairs]
    mask = [[[1] * len(part) + [0] * (width - len(part)) for part in pair] for pair in pairs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
