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
"""One stage of a record, and its segments: what attribution reads."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ...errors import RecordError
from ..freezing import frozen_at
from ..models import is_prompt_learning
from ..names import canonical_name
from ..optimizers import OptimizerDescription
from ..precision import scale_at
from ..rows.stored import read_rows
from ..writer import STEP_SCHEMA, stage_folder
from .assumed import uniform_objective_scale, uniform_visits, uniform_weights, visits_are_recorded
from .momentum import applied_learning_rate
from .steps import StepTable


if TYPE_CHECKING:
    from .record import TrainingRecord


class SegmentRecord:
    """One segment of a stage: what its steps averaged to.

    Attributes:
        index: number of the segment in its stage.
        first_step, end_step: its optimizer steps, `first_step <= step < end_step`.
        learning_rate_sum: sum of the reference learning rates `eta`.
        effective_learning_rate_sum: `s = sum of eta * c` (`c`: clip factor).
        matrix_sides: parameters whose preconditioner is a matrix -> the side it acts on, `"left"` or `"right"`.
    """

    def __init__(self, stage: "StageRecord", index: int, data: Mapping[str, Any]) -> None:
        self.stage = stage
        self.index = index
        self.first_step: int = data["first_step"]
        self.end_step: int = data["end_step"]
        self.learning_rate_sum: float = data["learning_rate_sum"]
        self.effective_learning_rate_sum: float = data["effective_learning_rate_sum"]
        self.learning_rate_sum_per_group: list[float] = data["learning_rate_sum_per_group"]
        self.matrix_sides: dict[str, str] = data.get("matrix_sides", {})
        self.effective_learning_rate_sum_per_group: list[float] = data["effective_learning_rate_sum_per_group"]
        self._missed: dict[str, list[float]] = data.get("missed_learning_rates", {})

    def __repr__(self) -> str:
        return f"SegmentRecord({self.stage.name!r}, {self.index}, steps {self.first_step}-{self.end_step})"

    def parameters(self) -> dict[str, torch.Tensor]:
        """Average weights `theta = sum of eta c theta_k / s`, weights before each step, by name."""
        return self.stage.tensors(f"segments/{self.index}/parameters.safetensors")

    def preconditioner(self) -> dict[str, torch.Tensor]:
        """Average preconditioner `P = sum of eta_g c P_k / s`, by name; 0-dim for SGD.

        A tensor holds the factor of each entry, unless the name is in `matrix_sides`: then it is a matrix `M`, and the
        update is `M G` (`"left"`) or `G M` (`"right"`) of the gradient `G` (Muon).

        `eta_g` is the learning rate of the parameter's group, so that `s P` is the sum of the real step sizes.
        """
        return self.stage.tensors(f"segments/{self.index}/preconditioner.safetensors")

    def gradient_mean(self) -> dict[str, torch.Tensor]:
        """Mean gradient `sum of eta_k g_k / sum of eta_k` by name, `g_k` as the optimizer got it: clipped, normalised.

        It is for the response of Adam's second moment to a row that is removed (see `SourceConfig`).

        Raises:
            RecordError: if the run was not recorded with `record_gradient_mean=True`.
        """
        name = f"segments/{self.index}/gradient_mean.safetensors"
        if f"{stage_folder(self.stage.index, self.stage.name)}/{name}" not in self.stage.data["files"]:
            raise RecordError(
                f"Stage '{self.stage.name}' was recorded without mean gradients. Train it with "
                "SourceConfig(record_gradient_mean=True)."
            )
        return self.stage.tensors(name)

    def decay(self) -> dict[str, torch.Tensor]:
        """Weight decay `Lambda` by name, such that `s Lambda` is the fraction of a weight that the segment decays.

        Decoupled (AdamW) and SGD: 0-dim. Coupled (Adam): one value per entry, since the decay passes through `P`
        (approximated as the average `P`, which is exact if clipping was constant in the segment).
        """
        total, preconditioner = self.effective_learning_rate_sum, self.preconditioner()
        rates = zip(self.learning_rate_sum_per_group, self.effective_learning_rate_sum_per_group, strict=True)
        decays = {}
        for group, sums in zip(self.stage.groups, rates, strict=True):
            strength = group.weight_decay
            for name in group.parameters:
                # Steps without a gradient of the parameter do not decay it.
                rate_sum, effective = (a - b for a, b in zip(sums, self._missed.get(name, (0.0, 0.0)), strict=True))
                dtype = preconditioner[name].dtype
                if effective <= 1e-12 * sums[1] or strength == 0:
                    decays[name] = torch.zeros((), dtype=dtype)
                elif group.decoupled_weight_decay:
                    decays[name] = torch.tensor(strength * rate_sum / total, dtype=dtype)
                else:
                    decays[name] = preconditioner[name] * (strength * rate_sum / effective)
        return decays

    def objective_scale(self) -> float:
        """Objective that was trained, over the mean loss per item: average of `items / normalizer`, weighted by lr.

        1 when losses are divided by the number of loss items. Not 1 where the Trainer divides by another count:
        transformers 5.23 counts the first token of each row too for GPT-2, though it is never predicted. Curvature of
        the mean loss is to be multiplied by this number.
        """
        if not visits_are_recorded(self.stage):
            return uniform_objective_scale(self)
        steps = self.stage.steps()
        batches, step = steps._batches(self.first_step, self.end_step)
        share = batches.field("items").to_numpy() / batches.field("normalizer").to_numpy()
        total = float((steps.effective_learning_rate[step] * share).sum())
        return total / self.effective_learning_rate_sum if self.effective_learning_rate_sum else 1.0

    def row_weights(self) -> np.ndarray:
        """float64 `[num_examples]`: sum over the row's visits in the segment of `eta c / normalizer`."""
        if not visits_are_recorded(self.stage):
            return uniform_weights(self.stage, self.effective_learning_rate_sum)
        visits = self.stage.steps().visits(self.first_step, self.end_step)
        return np.bincount(visits["row"], weights=visits["weight"], minlength=self.stage.num_examples)

    def applied_weights(self) -> np.ndarray:
        """float64 `[num_examples]`: the rows' weights in the segment's updates, momentum included (see `momentum.py`).

        Like `row_weights`, with the learning rate that really applied each gradient: gradients of earlier segments
        that momentum still carries count here, and what this segment's momentum carries on counts later. Of the first
        group that trains anything, if they differ: see `applied_parts`.
        """
        return self.applied_parts()[0][1]

    def applied_parts(self) -> list[tuple[list[str], np.ndarray]]:
        """Parameters that share their momentum, and the rows' weights in their updates (see `applied_weights`).

        One part, but for groups with different momentum or different optimizers (Muon with AdamW, say).
        """
        steps = self.stage.steps()
        before = (self.stage.data.get("optimizer_start") or {}).get("updates", 0)
        parts: list[tuple[list[str], np.ndarray]] = []
        for group in (group for group in self.stage.groups if group.parameters):
            rates = applied_learning_rate(
                group, steps.reference_learning_rate, steps.skipped, self.first_step, self.end_step, before
            )
            same = next((names for names, known in parts if np.array_equal(known, rates)), None)
            if same is None:
                parts.append((list(group.parameters), rates))
            else:
                same.extend(group.parameters)
        return [(names, self._weights_at(rates)) for names, rates in parts]

    def _weights_at(self, rates: np.ndarray) -> np.ndarray:
        steps, first = self.stage.steps(), int(np.argmax(rates > 0))
        if not visits_are_recorded(self.stage):
            return uniform_weights(self.stage, float((rates * steps.clip_factor[: self.end_step]).sum()))
        visits = steps.visits(first, self.end_step, rates * steps.clip_factor[: self.end_step])
        return np.bincount(visits["row"], weights=visits["weight"], minlength=self.stage.num_examples)

    def num_visits(self) -> np.ndarray:
        """`[num_examples]`: how often each row was trained on in the segment; float64 expectations if not recorded."""
        if not visits_are_recorded(self.stage):
            return uniform_visits(self)
        visits = self.stage.steps().visits(self.first_step, self.end_step)
        return np.bincount(visits["row"], minlength=self.stage.num_examples)


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
        self.num_examples: int = data["dataset"].get("num_examples", self.num_rows)
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
        self.segments = [SegmentRecord(self, index, segment) for index, segment in enumerate(data["segments"])]
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
                f"{self.num_steps}. Continue it with `trainer.train(resume_from_checkpoint=True)`."
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

    def load_weights(self, model: torch.nn.Module, which: str | int) -> None:
        """Copy trained weights into a model, in place, cast to its dtype.

        Args:
            model: has this stage's trainable parameters, under the same names or names that differ by a wrapper.
            which: `"initial"`, `"final"`, or a segment's index for its average weights.

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
                parameter.copy_(tensor)

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

    def weights(self, which: str | int) -> dict[str, torch.Tensor]:
        """Trained weights by name: `"initial"`, `"final"`, or a segment's index for its average.

        Raises:
            RecordError: if the record holds no such weights.
        """
        if which == "final":
            self.require_complete()
        if which in ("initial", "final"):
            return self.tensors(f"{which}.safetensors")
        if isinstance(which, int) and 0 <= which < len(self.segments):
            return self.segments[which].parameters()
        raise RecordError(
            f"Stage '{self.name}' has no weights {which!r}: ask for 'initial', 'final', or a segment from 0 to "
            f"{len(self.segments) - 1}."
        )

    @contextlib.contextmanager
    def end_weights(self) -> Iterator["EndWeights"]:
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


class EndWeights(Mapping[str, torch.Tensor]):
    """Weights at the end of a stage by canonical name; tensors are read on access.

    Frozen weights that a stage shares with its parent are found there.
    """

    def __init__(self, stage: StageRecord, stack: contextlib.ExitStack) -> None:
        self._found: dict[str, tuple[Any, str]] = {}
        names = ["final.safetensors"]
        names += ["frozen.safetensors"] if stage.data["frozen"] == "stored" else []
        for name in names:
            key = f"{stage_folder(stage.index, stage.name)}/{name}"
            if key not in stage.data["files"]:
                stage.require_complete()
            stage.record.check_size(stage.data["files"], key)
            file = stack.enter_context(safe_open(stage.record.path / key, framework="pt"))
            for own in file.keys():
                self._found.setdefault(stage.canonical_name(own), (file, own))
        self._parent = None
        if stage.data["frozen"] == "parent":
            self._parent = EndWeights(stage.record.stage(stage.parent), stack)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._found:
            file, key = self._found[name]
            return file.get_tensor(key)
        if self._parent is None:
            raise KeyError(name)
        return self._parent[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found or (self._parent is not None and name in self._parent)

    def __iter__(self) -> Iterator[str]:
        yield from self._found
        if self._parent is not None:
            yield from (name for name in self._parent if name not in self._found)

    def __len__(self) -> int:
        return sum(1 for _ in self)
