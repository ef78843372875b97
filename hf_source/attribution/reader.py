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
"""What a record, the datasets and the user say together: rows, tasks, models and batches of every stage."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from ..gradients import (
    CausalLMTask,
    HeadTask,
    Loss,
    Measurement,
    RowGradients,
    RowLossTask,
    Seq2SeqTask,
    Task,
    is_known,
    make_measurement,
    measured,
    refuse_incomplete,
    task_for,
)
from ..gradients.heads import LABELS
from ..gradients.rerun import enable as enable_rerun
from ..gradients.shards import Shards
from ..recording import StageRecord, TrainingRecord
from ..recording.quantized import keep_differentiable
from .asking import ask
from .queries import Queries, refuse_other_than_queries
from .rows import StageRows


class RunReader:
    """What every method of attribution reads of a recorded run.

    Args:
        record: what training left behind.
        reads_text: rows are compared by their text alone, so that no loss of theirs need be known.
        datasets, model, task, measurement, data_collator, max_tokens_per_batch, dtype, accelerator, progress,
            gradient_checkpointing: see `SourceAttributor`.

    Raises:
        ConfigError: if a task lacks a method, the measurement is unknown, or a setting is of another kind.
        DataError: if a dataset is not the one a stage was trained on.
    """

    def __init__(
        self,
        record: TrainingRecord,
        *,
        datasets: Mapping[str, Dataset] | None,
        model: Callable[[StageRecord], nn.Module] | None,
        task: Task | Mapping[str, Task] | None,
        measurement: str | Measurement,
        data_collator: Any,
        max_tokens_per_batch: int,
        dtype: torch.dtype,
        accelerator: Accelerator | None,
        progress: bool,
        reads_text: bool,
        gradient_checkpointing: bool = False,
    ) -> None:
        for own in task.values() if isinstance(task, Mapping) else [task]:
            refuse_incomplete(own)
        if isinstance(model, nn.Module):
            raise ConfigError("model= takes a function that makes a stage's model: model=lambda stage: make_model().")
        if datasets is not None and not isinstance(datasets, Mapping):
            raise ConfigError("datasets= takes one dataset for each stage, by name: datasets={'train': dataset}.")
        self.record = record
        self._task = task
        self._measurement = make_measurement(measurement)
        self.data_collator = data_collator
        self.max_tokens_per_batch = max_tokens_per_batch
        self.dtype = dtype
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.show_progress = progress
        self.processing_class = record.processing_class()
        self.make_model = model
        self._reads_text = reads_text
        self.gradient_checkpointing = gradient_checkpointing
        self.shards: Shards | None = None
        self._datasets: dict[str, Dataset] = {}
        self._rows: dict[str, StageRows] = {}
        # What a member of an ensemble changes of a model, and the parameters it chooses at the final weights.
        self._change_model: Callable[[nn.Module, StageRecord], None] | None = None
        self._choose_parameters: Callable[[nn.Module, list[str]], list[str]] | None = None
        for name, dataset in (datasets or {}).items():
            self.set_dataset(name, dataset)

    @property
    def datasets(self) -> dict[str, Dataset]:
        """Datasets that were given, by stage; of the others the record holds the rows."""
        return dict(self._datasets)

    def set_dataset(self, stage: str | None, dataset: Dataset) -> StageRows:
        """Give a stage's dataset; it is checked against the record.

        Raises:
            DataError: if it is not the dataset the stage was trained on.
            RecordError: if there is no such stage.
        """
        if isinstance(dataset, (str, Path, Mapping)) or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"dataset is a {type(dataset).__name__}, not a dataset: give the one that the stage trained on (one "
                "split, loaded), or None for the rows in the record."
            )
        record = self.record.stage(stage)
        if self._datasets.get(record.name) is not dataset or record.name not in self._rows:
            self._rows[record.name] = self._stage_rows(record, dataset)
            self._datasets[record.name] = dataset
        return self._rows[record.name]

    def _stage_rows(self, stage: StageRecord, dataset: Dataset | None) -> StageRows:
        task = None if self._reads_text else self.task_of(stage)
        return StageRows(stage, dataset, self.processing_class, self.data_collator, self.max_tokens_per_batch, task)

    def rows(self, stage: StageRecord) -> StageRows:
        """The rows of a stage: as given, or as the record holds them.

        Raises:
            DataError: if neither does.
        """
        if stage.name not in self._rows:
            self._rows[stage.name] = self._stage_rows(stage, None)
        return self._rows[stage.name]

    def all_rows(self) -> dict[str, StageRows]:
        """Rows of every stage: the walk to an early stage passes through the later ones."""
        return {stage.name: self.rows(stage) for stage in self.record.stages}

    def task_of(self, stage: StageRecord) -> Task:
        """What a row's loss is in a stage.

        Raises:
            UnsupportedError: if neither the record nor the user says; the message holds what is to be said.
        """
        if isinstance(self._task, Mapping):
            return self._task.get(stage.name) or task_for(stage)
        if self._task is not None and (not is_known(stage) or all(map(is_known, self.record.stages))):
            return self._task
        return task_for(stage)

    def measurement(self, queries: Queries) -> Task:
        """What a query measures: the log-likelihood of its text, or the loss of its rows as the last stage trains.

        With `measurement=` another number of the same predictions.

        Raises:
            ConfigError: if the measurement means nothing for what the model predicts.
        """
        stage = self.record.stages[-1]
        task = self.rows(stage).task
        if queries.are_rows:
            known = isinstance(task, (CausalLMTask, Seq2SeqTask))
            if known and any("input_ids" not in row for row in queries.rows):
                raise DataError(
                    f"The queries' rows have {sorted(queries.rows[0])}, not `input_ids`: tokenise them as training "
                    "did, or ask with Queries.from_text(prompts, completions)."
                )
            # A collator of one's own may make labels of other columns.
            labelled = self.data_collator is not None or all(set(row) & set(LABELS) for row in queries.rows)
            if isinstance(task, HeadTask) and task.needs_labels and not labelled:
                raise DataError(
                    f"The queries' rows have {sorted(queries.rows[0])}, and no label whose loss could be asked for: "
                    f"give them one of the columns {', '.join(LABELS)}, as training had."
                )
            if not isinstance(self._measurement, Loss):
                return measured(task, self._measurement)
            return task.asked() if isinstance(task, RowLossTask) else task
        if not isinstance(task, (CausalLMTask, Seq2SeqTask)):
            task = Seq2SeqTask() if stage.is_encoder_decoder else CausalLMTask()
        return measured(task, self._measurement)

    def build_model(self, stage: StageRecord, device: torch.device | str | None = None) -> nn.Module:
        """The stage's model at its final weights, in evaluation mode on a device, the attributor's by default."""
        if self.make_model is None:
            model = stage.build_model(self.dtype)
        else:
            model = self.make_model(stage)
            stage.load_weights(model, "final")
            keep_differentiable(model)
        model = model.to(device or self.device, self.dtype).eval()
        if self._change_model is not None:
            self._change_model(model, stage)
        if self.gradient_checkpointing:
            enable_rerun(model)
        return model

    @property
    def place(self) -> torch.device:
        """Where a model is built: on the device, or beside it if processes are to share it."""
        return self.device if self.shards is None else torch.device("cpu")

    def engine(self, stage: StageRecord, model: nn.Module, names: Sequence[str]) -> RowGradients:
        """The engine of a stage's model at its final weights for some parameters; checked, if there are any."""
        rows = self.rows(stage)
        gradients, batch = RowGradients(model, rows.task, names), rows.collated(rows.shortest(2), self.place)
        if names:
            rows.prepare(gradients)
        elif isinstance(rows.task, RowLossTask):
            rows.task.prepare(model, rows)
        stage.load_weights(model, "final")
        if names:
            gradients.check(batch)
        if self.shards is not None:
            self.shards.take(gradients, batch)
        return gradients

    @contextmanager
    def entered(self, stage: StageRecord, names: Sequence[str] = ()) -> Iterator[RowGradients]:
        """See `engine`; processes that hold the model between them let it go together."""
        gradients = self.engine(stage, self.build_model(stage, self.place), names)
        if self.shards is None:
            yield gradients
            return
        try:
            yield gradients
            self.shards.settle()
        finally:
            self.shards.release()

    def final_parameters(self, model: nn.Module, recorded: list[str]) -> list[str]:
        """Parameters compared by a method at the final weights: the recorded ones, or those of a member's adapter."""
        return recorded if self._choose_parameters is None else self._choose_parameters(model, recorded)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model's context holds, where its configuration says."""
        return self.record.stages[-1].context_length

    # ---- queries -----------------------------------------------------------------------------------------------

    def encode(self, queries: Queries) -> Queries:
        """The queries with token rows, as the last stage's model reads them."""
        refuse_other_than_queries(queries)
        return queries.encode(self.processing_class, self.context_length, self.record.stages[-1].is_encoder_decoder)

    def query_gradients(
        self, gradients: RowGradients, queries: Queries, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """`grad f_q` at the model's present weights: name -> `[queries, *parameter.shape]`, held in `dtype`."""
        dtype = dtype or self.dtype
        result = {
            name: torch.empty((len(queries), *parameter.shape), dtype=dtype, device=self.device)
            for name, parameter in gradients.parameters.items()
        }

        def fill(engine: RowGradients, chosen: np.ndarray, batch: dict[str, torch.Tensor]) -> None:
            for name, rows, grads in engine.blocks(engine.run(batch)):
                result[name][torch.as_tensor(chosen[rows].copy(), device=self.device)] = grads.to(dtype)

        ask(self, gradients, queries, fill)
        return result

    # ---- several processes -------------------------------------------------------------------------------------

    def share(self, batches: Sequence) -> Sequence:
        """This process's share of a list of batches."""
        return batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes; every one gets it."""
        return self.accelerator.reduce(tensor) if self.accelerator.num_processes > 1 else tensor

    def progress(self, items: Sequence, description: str) -> Iterable:
        """A progress bar on the main process."""
        hidden = not self.show_progress or not self.accelerator.is_main_process
        return tqdm(items, desc=description, disable=hidden, leave=False)
