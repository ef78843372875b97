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
"""One stage of a record: what attribution reads."""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...errors import RecordError
from ..freezing import frozen_at
from ..models import is_prompt_learning
from ..names import canonical_name
from ..optimizers import OptimizerDescription
from ..precision import scale_at
from ..rows.stored import read_rows
from ..sharding import put
from ..writer import STEP_SCHEMA, stage_folder
from .assumed import visits_are_recorded
from .merged import merged
from .segment import SegmentRecord
from .steps import StepTable
from .weights import EndWeights


if TYPE_CHECKING:
    from .record import TrainingRecord


class StageRecord:
    """One training stage of a record.

    Attributes:
        name, index: the stage's name, and its place in the record.
        parent: name of the stage before it, or `None`.
        status: `"complete"`, or `"running"` if training has not come to its end.
        num_rows: rows of the training set; row numbers are below it.
        num_examples: what batches drew from: rows, or packed sequences (then `steps()` and weights speak of those).
        packing: how rows were packed into sequences (`"bfd"`, `"bfd_split"`, `"wrapped"`), or `None`.
        num_steps: optimizer steps recorded.
        trainable: names of the parameters that trained.
        tensor_info: shape and dtype of every trainable, frozen parameter and saved buffer, by name.
        dataset, optimizer, loss, model, training: descriptions, as in `record.json`.
        segments: list of `SegmentRecord`.
    """

    def __init__(self, record: "TrainingRecord", data: Mapping[str, Any]) -> None:
        self.record = record
        self.data = data
        self.name: str = data["name"]
        self.index: int = data["index"]
        self.parent: str | None = data["parent"]
        self.continues_parent: bool = data.get("continues_parent", self.parent is not None)
        self.status: str = data["status"]
        self.num_steps: int = data["num_steps"]
        self.num_rows: int = data["dataset"]["num_rows"]
        # Of a stream nobody knew when training began: 0 was written.
        self.num_examples: int = data["dataset"].get("num_examples") or self.num_rows
        self.trainable: list[str] = list(data["trainable"])
        self.frozen: list[str] = list(data["frozen_parameters"])
        self.tensor_info: dict[str, dict] = {**data["trainable"], **data["frozen_parameters"]}
        self.dataset: dict[str, Any] = data["dataset"]
        self.packing: str | None = data["dataset"].get("packing")
        self.optimizer: dict[str, Any] = data["optimizer"]
        self.groups = OptimizerDescription.from_dict(self.optimizer).groups
        self.loss: dict[str, Any] = data["loss"]
        self.model: dict[str, Any] = data["model"]
        self.training: dict[str, Any] = data["training"]
        self.collator: dict[str, Any] = data["collator"]
        self.segments = self.recorded_segments()
        self.path = record.path / stage_folder(self.index, self.name)

    def __repr__(self) -> str:
        visits = "" if visits_are_recorded(self) else f", visits {self.data['visits']}"
        count = f"{self.num_steps} steps, {len(self.segments)} segments"
        return f"StageRecord({self.name!r}, {count}, {self.status}{visits})"

    def steps(self) -> StepTable:
        """Every optimizer step of the stage."""
        return self._step_table

    @cached_property
    def _step_table(self) -> StepTable:
        prefix = f"{stage_folder(self.index, self.name)}/steps/"
        tables = []
        for name in sorted(name for name in self.data["files"] if name.startswith(prefix)):
            self.record.check_hash(self.data["files"], name)
            tables.append(pq.read_table(self.record.path / name, schema=STEP_SCHEMA))
        table = pa.concat_tables(tables) if tables else STEP_SCHEMA.empty_table()
        if not np.array_equal(table["step"].to_numpy(), np.arange(self.num_steps)):
            raise RecordError(
                f"The steps of stage '{self.name}' in {self.path / 'steps'} are not 0 to {self.num_steps - 1}: a file "
                "is missing or was changed. Restore the folder from a copy, or train the stage again."
            )
        groups = [g for g, group in enumerate(self.groups) if group.parameters]
        return StepTable(table, groups)

    def frozen_at(self, step: int) -> frozenset[str]:
        """Trainable parameters that a step did not update, because they were frozen or had no part in its loss."""
        return frozen_at(self.data.get("trainable_changes", []), step)

    def loss_scale_at(self, step: int) -> float:
        """What fp16 training multiplied a step's loss by before backward; 1 otherwise."""
        return scale_at(self.data.get("loss_scales", []), step)

    @property
    def autocast(self) -> torch.dtype | None:
        """Half-precision type that the forward pass ran in, if it did."""
        if self.training.get("fp16"):
            return torch.float16
        return torch.bfloat16 if self.training["bf16"] else None

    def require_complete(self) -> None:
        """Raise if the stage's training did not come to its end.

        Raises:
            RecordError: naming the step at which it stopped, and how to go on.
        """
        if self.status != "complete":
            raise RecordError(
                f"Stage '{self.name}' of {self.record.path} is not complete: training stopped after step "
                f"{self.num_steps}. Continue it with `trainer.train(resume_from_checkpoint=True)`, or train it anew "
                "with overwrite_stage=True."
            )

    def build_model(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The trained model, in evaluation mode, from the record alone.

        Args:
            dtype: floating type of the weights; default that of training.

        Raises:
            RecordError: if the stage is not complete, or frozen weights were not recorded.
            UnsupportedError: if the model's class is not transformers'.
        """
        from .building import build_model

        return build_model(self, dtype)

    def load_weights(self, model: torch.nn.Module, which: str | int | tuple[int, int]) -> None:
        """Copy trained weights into a model, in place, cast to its dtype.

        Args:
            model: has this stage's trainable parameters, under the same names or names that differ by a wrapper.
            which: `"initial"`, `"final"`, a segment's index for its average weights, or segment and step of a
                checkpoint.

        Raises:
            RecordError: if there are no such weights, or they do not fit the model.
        """
        own = dict(model.named_parameters(remove_duplicate=False))
        prompt_learning = is_prompt_learning(model)
        canonical = {canonical_name(name, prompt_learning): parameter for name, parameter in own.items()}
        with torch.no_grad():
            for name, tensor in self.weights(which).items():
                parameter = own.get(name, canonical.get(self.canonical_name(name)))
                if parameter is None or parameter.shape != tensor.shape:
                    found = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                    raise RecordError(
                        f"Stage '{self.name}' trained `{name}` of shape {tuple(tensor.shape)}, the given "
                        f"{type(model).__name__} has {found}. Pass the model that was trained, or use "
                        "stage.build_model()."
                    )
                put(parameter, tensor)

    def merged(self, num_segments: int | None) -> "StageRecord":
        """The same stage with at most so many segments: see `TrainingRecord.merged`."""
        found = copy.copy(self)
        found.segments = merged(found.recorded_segments(), num_segments)
        return found

    def recorded_segments(self) -> list[SegmentRecord]:
        """The segments as they were recorded."""
        return [SegmentRecord(self, index, segment) for index, segment in enumerate(self.data["segments"])]

    def rows(self) -> Any:
        """The rows as they were trained on (`datasets.Dataset` with their numbers), or `None` if not recorded."""
        return read_rows(self)

    def canonical_name(self, name: str) -> str:
        """The name that a parameter of this stage has in the plain model: see `names.canonical_name`."""
        return canonical_name(name, self.model.get("prompt_learning", False))

    @property
    def context_length(self) -> int | None:
        """Tokens that the model's context holds, where its configuration says."""
        config = self._model_config()
        length = config.get("max_position_embeddings") or config.get("n_positions")
        return length and length - self.model.get("virtual_tokens", 0)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads a prompt in an encoder, and answers with a decoder."""
        return bool(self._model_config().get("is_encoder_decoder"))

    def _model_config(self) -> dict[str, Any]:
        file = self.path / "model" / "config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def num_bytes(self) -> int:
        """Size of the stage's files."""
        return sum(entry["bytes"] for entry in self.data["files"].values())

    def weights(self, which: str | int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Trained weights by name: `"initial"`, `"final"`, a segment's index for its average, or segment and step.

        Raises:
            RecordError: if the record holds no such weights.
        """
        if which == "final":
            self.require_complete()
        if which in ("initial", "final"):
            return self.tensors(f"{which}.safetensors")
        if isinstance(which, int) and 0 <= which < len(self.segments):
            return self.segments[which].parameters()
        if isinstance(which, tuple):
            return self.segments[which[0]].checkpoint(which[1])
        raise RecordError(
            f"Stage '{self.name}' has no weights {which!r}: ask for 'initial', 'final', or a segment from 0 to "
            f"{len(self.segments) - 1}."
        )

    @contextlib.contextmanager
    def end_weights(self) -> Iterator[EndWeights]:
        """All weights at the end of the stage, trained and frozen, by canonical name; read one at a time."""
        with contextlib.ExitStack() as stack:
            yield EndWeights(self, stack)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read one of the stage's safetensors files.

        Raises:
            RecordError: if the stage has not recorded it, or it is damaged.
        """
        key = f"{stage_folder(self.index, self.name)}/{name}"
        if key not in self.data["files"]:
            raise RecordError(
                f"Stage '{self.name}' has not recorded {self.record.path / key} (its status is '{self.status}'). "
                "Finish its training with `trainer.train(resume_from_checkpoint=True)`."
            )
        self.record.check_size(self.data["files"], key)
        try:
            return load_file(self.record.path / key)
        except SafetensorError as error:
            raise self.record.damaged(key, str(error)) from error
