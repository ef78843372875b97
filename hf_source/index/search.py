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
"""Answering from an index: a gradient of each query, a rotation, and one sparse product."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, DataError
from ..gradients import CausalLMTask, RowGradients
from ..recording.digest import record_digest
from .accuracy import accuracy_note
from .build import METHODS, model_digest
from .coordinates import Coordinates
from .files import COORDINATES, open_folder, read_rows, read_tensors, verified
from .sharing import push_index


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor
    from ..attribution.queries import Queries


class SourceIndex:
    """An index that was built (`SourceAttributor.build_index`): scores of every row for any query, in one product.

    Args:
        folder, content: from `SourceIndex.load`.

    Attributes:
        settings: of the attributor that built it.
        stages: names of the stages.
        numbers: kept of each row.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content
        self.settings: dict[str, Any] = content["settings"]
        self.numbers: int = content["numbers"]
        self._stages = {stage["name"]: stage for stage in content["stages"]}
        self._coordinates: Coordinates | None = None
        self._checked: set[str] = set()

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> "SourceIndex":
        """Open an index.

        Args:
            path: folder, or id of the dataset repository on the Hub.
            revision, token: branch, tag or commit on the Hub, and what authenticates there.

        Raises:
            DataError: if there is none, it is unfinished, torn, or another version wrote it.
        """
        folder, content = open_folder(path, revision, token)
        try:
            return cls(folder, content)
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / 'index.json'} is damaged ({error!r}): copy the index again.") from error

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in the order of training."""
        return list(self._stages)

    @property
    def num_bytes(self) -> int:
        """Size on disk, without the manifest."""
        return sum(entry["bytes"] for entry in self.content["files"].values())

    def described(self) -> dict[str, Any]:
        """What its scores depend on besides the attributor that built it."""
        return {"numbers": self.numbers, "precision": self.content["precision"], "seed": self.content["seed"]}

    def note(self, stages: list[str]) -> str:
        """How accurate the index is for some stages."""
        return accuracy_note(self.content["stages"], stages)

    def accuracy(self, stage: str | None = None) -> dict[str, Any]:
        """Agreement with the full computation, measured when the index was built: see `index.accuracy.agreement`."""
        return dict(self._stage(stage)["accuracy"])

    def coordinates(self) -> Coordinates:
        """The coordinates, read once."""
        if self._coordinates is None:
            self._coordinates = Coordinates.load(read_tensors(self._file(COORDINATES)))
        return self._coordinates

    def ask(self, model: nn.Module, processing_class: Any, queries: "Queries", stage: str | None = None) -> np.ndarray:
        """Scores for people who have the model and the dataset, but not the record.

        Args:
            model: the causal language model at its final weights; its parameters must be those that were indexed.
            processing_class: its tokenizer.
            queries: texts, or tokenised.
            stage: see `scores`.

        Returns:
            float32 `[queries, rows]`, in the order that the rows were numbered in training.

        Raises:
            DataError: if it is another model, or a query cannot be used.
        """
        names = self.content["model"]["names"]
        gradients = RowGradients(model, CausalLMTask(), names)
        if model_digest(gradients) != self.content["model"]["parameters"]:
            raise DataError(
                "The model's parameters are not those that the index was built with: load the final weights of the "
                "recorded training, in float32."
            )
        rows = queries.encode(processing_class, getattr(model.config, "max_position_embeddings", None)).rows
        device, collator = next(model.parameters()).device, CausalLMTask().collator(processing_class)
        batches = [{key: value.to(device) for key, value in collator([row]).items()} for row in rows]
        gradients.check(batches[0])
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in batches:
            for name, _, grads in gradients.blocks(gradients.run(batch)):
                found[name].append(grads)
        return self.scores({name: torch.cat(grads) for name, grads in found.items()}, stage)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = True,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload index",
    ) -> str:
        """Publish the index as a dataset repository, in one commit; `SourceIndex.load(repo_id)` reads it.

        Args:
            repo_id: `"user/name"`; made if it does not exist.
            private: it holds compressed gradients of the rows, from which something of them may be told: private by
                default.
            token, revision, commit_message: as `SourceAttributor.push_to_hub` has them.

        Returns:
            Address of the commit.

        Raises:
            ConfigError: if a repository that is to be private exists and is public.
            DataError: if a file is torn, or the Hub refuses.
        """
        return push_index(self, repo_id, private, token, revision, commit_message)

    def scores(self, vectors: dict[str, torch.Tensor], stage: str | None = None) -> np.ndarray:
        """Scores of a stage's rows.

        Args:
            vectors: gradients of the queries at the final weights, name -> `[queries, *parameter.shape]`.
            stage: its name; may be left out if there is only one.

        Returns:
            float32 `[queries, rows by number]`; 0 for rows that never trained.

        Raises:
            DataError: if there is no such stage, or a file is torn.
        """
        found = self._stage(stage)
        like = next(iter(vectors.values()))
        coordinates = self.coordinates().to(like.device, like.dtype)
        missing = [name for name in coordinates.scales if name not in vectors]
        if missing:
            raise DataError(f"The index was built with parameter {missing[0]!r}, which the model lacks.")
        asked = coordinates.of_queries(vectors).cpu().numpy()
        result = np.zeros((len(asked), found["num_rows"]), dtype=np.float32)
        for name in found["rows"]:
            rows, numbers, _ = read_rows(self._file(name))
            result[:, numbers] = rows.times(asked)
        return result

    def _file(self, name: str) -> Path:
        if name not in self._checked:
            verified(self.folder, name, self.content["files"])
            self._checked.add(name)
        return self.folder / name

    def _stage(self, name: str | None) -> dict[str, Any]:
        if name is None and len(self._stages) == 1:
            name = next(iter(self._stages))
        if name not in self._stages:
            raise DataError(f"The index has no stage {name!r}: choose `stage=` from {list(self._stages)}.")
        return self._stages[name]


def refuse_unfit(index: SourceIndex, attributor: "SourceAttributor") -> None:
    """Raise if an index cannot answer for an attributor.

    Raises:
        DataError: if it was built of another record.
        ConfigError: if the attributor is to score in another way.
    """
    if attributor.ensemble is not None or attributor.method not in METHODS:
        what = f"method={attributor.method!r}" if attributor.ensemble is None else "an ensemble"
        raise ConfigError(f"An index holds scores of Source on one record: leave out `index=`, or {what}.")
    if record_digest(attributor.record) != index.content["record"]:
        raise DataError(
            f"The index {index.folder} was built of another record than {attributor.record.path}: build one of this "
            "record with `attributor.build_index(folder)`, or open the record that it belongs to."
        )


def index_scores(attributor: "SourceAttributor", queries: "Queries") -> dict[str, np.ndarray]:
    """Scores of every stage from the attributor's index: stage -> `[queries, rows by number]`."""
    index, stage = attributor.index, attributor.record.stages[-1]
    model = attributor.build_model(stage)
    stage.load_weights(model, "final")
    rows = attributor.rows(stage)
    gradients = RowGradients(model, rows.task, index.content["model"]["names"])
    if queries.are_rows:
        rows.prepare(gradients)
        stage.load_weights(model, "final")
    gradients.check(rows.collated(rows.shortest(2), attributor.device))
    vectors = attributor.query_gradients(gradients, queries)
    return {name: index.scores(vectors, name) for name in index.stages}
