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
"""`SourceTrainer`: a `Trainer` that leaves a training record behind."""

import contextlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import (
    IGNORE_INDEX,
    ROW,
    CausalLMCollator,
    dataset_kind,
    prepare_rows,
    refuse_long_rows,
    refuse_unknown_tokens,
)
from ..errors import DataError, UnsupportedError
from ..gradients.heads import HeadTask
from ..gradients.selection import HEADS, TASKS
from ..logs import get_logger
from .checkpoints import check_checkpoint, forget_checkpoint, last_checkpoint
from .checks import refuse_unsupported, warn_about_resuming, warn_about_unknown_loss
from .config import RecordingOptions, SourceConfig
from .deepspeed import FollowedEngine
from .given import (
    check_args,
    load_model,
    load_rows,
    refuse_other_than_rows,
    refuse_unfit_collator,
    refuse_unfit_rows,
)
from .heads import HEAD, recognise_head
from .lock import writing
from .losses import divides_by_count, loss_owner
from .models import context_length, is_causal_lm, num_embeddings, predicted_labels
from .optimizers import learning_rates
from .precision import clip_factor, loss_scale, refuse_broken_gradient
from .processes import Processes
from .recorder import StageRecorder, read_sidecar
from .rows.columns import check_columns
from .rows.numbering import RowCollator, RowDataset, count_numbers, with_row_numbers
from .rows.packing import packed_with_rows
from .rows.streams import carries_numbers, column_names, is_stream, number_rows
from .start import refuse_existing_stage, restart_recorder, start_recorder
from .writer import RecordWriter


logger = get_logger(__name__)


class _RecordingCallback(TrainerCallback):
    """Tells the trainer's recorder what happens.

    It comes last, so a checkpoint that another callback saves in the same event (on SIGTERM) is of the step before.
    """

    def __init__(self, trainer: "RecordingMixin") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start_recording()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:  # where the step is made already, and reported
            self.trainer._before_update()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.trainer._after_update()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._finish_recording()


class RecordingMixin:
    """Adds recording to any Trainer subclass: `class SourceSFTTrainer(RecordingMixin, SFTTrainer): pass`.

    Settings come from a `SourceConfig`; with any other `TrainingArguments` they have their defaults, and the record
    is written to `<output_dir>/record`. For a Trainer with a config of its own, take both:
    `@dataclass class SourceSFTConfig(SFTConfig, SourceConfig): pass`.

    Raises:
        ConfigError: if settings contradict each other.
        UnsupportedError: at the start of `train()`, if the run cannot be recorded correctly.
        RecordError: at the start of `train()`, if the stage is in the record already, or cannot be resumed.
    """

    train_rows_kind = "tokenized"
    """How rows were given, see `hf_source.data.dataset_kind`; what a subclass does to them is not ours to repeat."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorder: StageRecorder | None = None
        self._engine: FollowedEngine | None = None
        self._resume_folder: Path | None = None
        self._loss_divides_by_count: bool | None = None
        self._head: HeadTask | None = None
        self.num_train_rows = 0
        self.packing: str | None = None
        self.num_train_examples: int | None = None  # packed sequences
        self.rows_were_numbered = self._numbered = False
        self.given_dataset: datasets.Dataset | None = None
        # Before the parent sees the rows: it may filter or shuffle them.
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        for arguments in (given.arguments, given.arguments.get("kwargs", {})):
            if "train_dataset" in arguments:
                arguments["train_dataset"] = self._number_rows(arguments["train_dataset"])
        super().__init__(*given.args, **given.kwargs)
        self.data_collator = self._with_row_numbers(self.data_collator)
        self.add_callback(_RecordingCallback(self))

    # ---- Rows carry their number ----

    def _number_rows(self, dataset: Any) -> Any:
        if dataset is None:
            return dataset
        refuse_other_than_rows(dataset)
        if isinstance(dataset, Mapping):
            raise DataError(
                f"train_dataset holds several sets ({', '.join(map(str, dataset))}): pass one, such as "
                f"dataset[{next(iter(dataset), 'train')!r}]."
            )
        self.rows_were_numbered = ROW in column_names(dataset)
        self.given_dataset = dataset if isinstance(dataset, datasets.Dataset) else None
        dataset = number_rows(dataset)
        self.num_train_rows = 0 if is_stream(dataset) else count_numbers(dataset)
        self._numbered = True
        return dataset

    @staticmethod
    def _with_row_numbers(collator: Any) -> RowCollator:
        return collator if isinstance(collator, RowCollator) else RowCollator(collator)

    def get_train_dataloader(self):
        """The parent's, over rows that carry their number."""
        self.data_collator = self._with_row_numbers(self.data_collator)
        return super().get_train_dataloader()

    def _prepare_dataset(self, dataset, processing_class, args, *more):
        """TRL's; a packed training set keeps the row of every token. Only TRL's trainers call it."""
        prepare = super()._prepare_dataset
        numbered = isinstance(dataset, datasets.Dataset) and ROW in dataset.column_names
        packs = len(more) == 3 and more[0]  # SFTTrainer gives packing, formatting_func and the name of the split
        if not (numbered and packs and more[-1] == "train"):
            return prepare(dataset, processing_class, args, *more)
        packed = packed_with_rows(
            dataset, lambda own, packing: prepare(dataset, processing_class, own, packing, *more[1:]), args
        )
        self.packing, self.num_train_examples = args.packing_strategy, len(packed)
        return packed

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW]

    def prediction_step(self, model, inputs, *args, **kwargs):
        """The parent's, on inputs without row numbers."""
        inputs.pop(ROW, None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    # ---- What one optimizer step did ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The parent's; notes which rows the micro-batch holds and how their loss is normalised."""
        rows = inputs.pop(ROW, None)
        if rows is None:
            raise UnsupportedError(
                f"A batch reached training_step without its row numbers (`{ROW}`), so its rows cannot be recorded. "
                "Something removed the column: packing in a way of one's own (turn it off), a data collator that is "
                "set after training began, or a dataset transform (keep the column in its result)."
            )
        if self._recorder is not None:  # None outside of train()
            self._recognise_head(self._recorder.writer.stage["loss"], inputs)
            items = self.count_items(inputs, len(rows))
            self._recorder.add_micro_batch(rows, self._normalizer(inputs, num_items_in_batch, items), items, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._recorder is not None and self.args.world_size == 1:
            self._recorder.note_first_loss(loss)
        return loss

    def _recognise_head(self, loss: dict[str, Any], inputs: Any) -> None:
        """Find out from the first batch which loss the model's head computes, unless the record says so already."""
        if loss["kind"] == HEAD and not loss["reason"]:
            loss |= recognise_head(self, inputs)
            if loss["reason"]:
                warn_about_unknown_loss(loss["reason"])
        self._head = TASKS[loss["kind"]](loss["settings"]) if loss["kind"] in HEADS else None

    def count_items(self, inputs: Any, num_rows: int) -> torch.Tensor | int:
        """Number of loss items in a micro-batch: label tokens that are predicted, or rows for other losses."""
        if self._head is not None:
            return self._head.num_items(self._head.labels(inputs)).sum()
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"].ne(IGNORE_INDEX).sum()
        labels = inputs.get("labels")
        if labels is None or labels.is_floating_point():
            return num_rows
        return predicted_labels(self.model, labels).ne(IGNORE_INDEX).sum()

    def _normalizer(self, inputs: Any, num_items_in_batch: Any, items: Any) -> Any:
        # The same decision as in Trainer.training_step, which leaves no trace of it.
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            takes_count = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = takes_count or self.compute_loss_func is not None
        if scaled and num_items_in_batch is None:
            raise UnsupportedError(
                "The loss function normalises the loss itself, but the batch has no `labels` to count, so the weight "
                "of a row is unknown. Give the batch `labels`, or drop compute_loss_func."
            )
        if scaled and self._loss_divides_by_count is None:
            self._loss_divides_by_count = self._divides_by_count(inputs, num_items_in_batch)
        by_count = scaled and self._loss_divides_by_count is not False
        self._recorder.writer.stage["loss"]["normalization"] = "tokens" if by_count else "micro_batch_mean"
        summed = self._head is not None and self._head.summed  # the micro-batch's losses are divided by nothing
        normalizer = num_items_in_batch if by_count else 1 if summed else items
        if not scaled:
            normalizer = normalizer * self.current_gradient_accumulation_steps
        # Gradients are averaged over processes. Trainer.compute_loss undoes that where it counted items over all.
        counted_over_all = scaled and self.args.average_tokens_across_devices
        self._recorder.merge_processes = by_count and counted_over_all
        return normalizer if counted_over_all else normalizer * self.args.world_size

    def _divides_by_count(self, inputs: Any, count: Any) -> bool | None:
        """Whether a loss that is told the number of items in the whole batch divides by it; tried out once."""
        ours = loss_owner(self) is Trainer
        if not ours or (is_causal_lm(self.model) and self.compute_loss_func is None):
            return True
        self.model.eval()  # training_step sets it back
        inputs = self._prepare_inputs(dict(inputs))
        with self.compute_loss_context_manager():
            return divides_by_count(
                lambda given, n: self.compute_loss(self.model, given, num_items_in_batch=n), inputs, count
            )

    def _get_grad_norm(self, model, grad_norm=None):
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def _before_update(self) -> None:
        norm, factor = float(self._grad_norm), clip_factor(self._grad_norm, self.args.max_grad_norm)
        scale = loss_scale(self)
        refuse_broken_gradient(norm, self._recorder.step, scale)
        rates = learning_rates(self._recorder.accumulator.optimizer)
        self._recorder.before_update(rates, norm, factor, float(self.state.epoch or 0.0), scale)

    def _before_update_of_engine(self, grad_norm: Any) -> None:
        self._grad_norm = grad_norm
        self._before_update()

    def _after_update(self) -> None:
        # A fused optimizer is called on an overflow too, and leaves the weights alone itself: Accelerate does not see
        # that, and moves the learning rate on.
        overflow = not math.isfinite(float(self._grad_norm))
        self._recorder.after_update(overflow or bool(self.accelerator.optimizer_step_was_skipped))

    # ---- Start, checkpoint, end ----

    def log(self, logs, *args, **kwargs):
        """The parent's. A training's last entry, which goes where `report_to` says, has the record's figures too."""
        if self._recorder is not None and "train_runtime" in logs:
            logs = {**logs, **self._recorder.figures()}
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint=None, trial=None, **kwargs):
        """The parent's, recorded. See `Trainer.train`; resuming continues the record as well."""
        processes = self._processes = Processes()
        options = processes.agree(lambda: RecordingOptions.from_args(self.args))
        processes.agree(lambda: refuse_unsupported(self))
        found = processes.agree(lambda: self._find_checkpoint(options, resume_from_checkpoint), main_only=True)
        self._resume_folder = None if found is None else Path(found)
        if found is not None:
            warn_about_resuming(self, self._resume_folder)
        processes.agree(self._number_rows_again)
        processes.agree(lambda: check_columns(self.given_dataset, self.train_dataset, options.record_columns))
        with contextlib.ExitStack() as stack:
            lock = writing(Path(options.record_dir))
            processes.agree(lambda: stack.enter_context(lock), main_only=True)
            try:
                return super().train(resume_from_checkpoint=found, trial=trial, **kwargs)
            finally:
                if self._engine is not None:
                    self._engine.leave()
                self._recorder = self._engine = None

    def _find_checkpoint(self, options: RecordingOptions, wanted: Any) -> str | None:
        """The checkpoint to go on from, if any; it can be, or the stage can be started."""
        if isinstance(wanted, (str, Path)):
            check_checkpoint(Path(wanted))
        elif wanted:
            stages = RecordWriter.read(Path(options.record_dir))["stages"]
            wanted = last_checkpoint(self.args.output_dir, stages, options.stage)
        else:
            refuse_existing_stage(options)
        return str(wanted) if wanted else None

    def _number_rows_again(self) -> None:
        """The training set may have been replaced after the trainer was made, or filtered by the parent class."""
        dataset = self.train_dataset
        if dataset is None:
            return
        if not is_stream(dataset) and hasattr(dataset, "__len__") and not len(dataset):
            raise DataError("The training set has no rows: look at what it was read from, and what was filtered out.")
        if self._numbered and carries_numbers(dataset):
            if not is_stream(dataset):
                with_row_numbers(dataset, self.num_train_examples or self.num_train_rows)  # only checks
        else:
            if self._numbered:
                logger.warning(
                    "The training set is not the one the trainer was given: it was replaced, or prepared in a way "
                    "that dropped row numbers (packing does). Rows are numbered by their position in "
                    "trainer.train_dataset."
                )
            self.packing = self.num_train_examples = None
            self.train_dataset = self._number_rows(dataset)

    def _start_recording(self) -> None:
        options = RecordingOptions.from_args(self.args)
        if self.is_deepspeed_enabled:
            self._engine = self._processes.agree(lambda: FollowedEngine(self))
        if self._recorder is None:
            self._recorder = start_recorder(self, options, self._resume_folder, self._processes, self._engine)
        else:  # the Trainer starts anew after running out of memory
            self._recorder = restart_recorder(self, options, self._resume_folder, self._recorder)
        if self._engine is not None:
            self._engine.report(self._before_update_of_engine, self._after_update)

    def _run_epoch(self, *args, **kwargs):
        # Resumed from the checkpoint of its last step in mid-epoch, the parent would make one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        # Before the parent's, which pushes and rotates checkpoints.
        wanted = not self.args.save_only_model or self.args.load_best_model_at_end
        if self._recorder is not None:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._processes.agree(lambda: forget_checkpoint(folder), main_only=True)
            if wanted:
                self._recorder.save_sidecar(folder)
        super()._save_checkpoint(model, trial)

    def _finish_recording(self) -> None:
        recorder = self._recorder
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None:
            step = self._processes.agree(lambda: read_sidecar(Path(best))["step"], main_only=True)
            if step < recorder.step:
                # The model now has the best checkpoint's weights: the steps after it are not how it came to be.
                recorder.go_back(Path(best))
        recorder.finish(recorder.accumulator.parameters)
        logger.info(f"Training record of stage '{recorder.writer.stage['name']}' is complete: {recorder.writer.root}")


class SourceTrainer(RecordingMixin, Trainer):
    """A `Trainer` that records what attribution needs: which rows each optimizer step saw, with which weight.

    Takes what `Trainer` takes. For causal language models, rows may also be raw text (columns `text`, or `prompt` and
    `completion`; needs `processing_class`), and rows are padded to the right by default.

    Args:
        model: model to train; the path or Hub id of a causal language model loads it in float32, with its tokenizer.
        args: a `SourceConfig`; default `SourceConfig()`. A plain `TrainingArguments` works too.
        train_dataset: rows; a path or Hub id loads its `train` split.
        kwargs: the other arguments of `Trainer`.

    Raises:
        DataError: if rows cannot be read, or are longer than the model's context.

    Example:
        >>> args = SourceConfig(output_dir="out", record_dir="runs/capitals", stage="pretrain")  # doctest: +SKIP
        >>> SourceTrainer(model, args, train_dataset=facts, processing_class=tokenizer).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: torch.nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        check_args(args, kwargs)
        args = SourceConfig() if args is None else args
        if isinstance(model, str):
            model, processing_class = load_model(model, processing_class)
        if isinstance(train_dataset, str):
            train_dataset = load_rows(train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if not is_causal_lm(self.model):
            if self.args.remove_unused_columns:
                self._set_signature_columns_if_needed()
                refuse_unfit_rows(self.model, self.train_dataset, self._signature_columns)
            return
        if data_collator is None:
            self.data_collator = RowCollator(CausalLMCollator(processing_class))
        # A collator of one's own may read columns that we cannot.
        strict = data_collator is None
        if isinstance(self.train_dataset, _DATASETS):
            self.train_rows_kind = _kind(self.train_dataset, strict)
        self.train_dataset = self._prepared(self.train_dataset, strict)
        refuse_unfit_collator(data_collator, self.train_dataset, self.train_rows_kind in ("text", "prompt_completion"))
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._prepared(rows, strict) for name, rows in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._prepared(self.eval_dataset, strict)

    def _prepared(self, dataset: Any, strict: bool) -> Any:
        if strict and isinstance(dataset, RowDataset):
            _refuse_raw_rows(dataset)
        if not isinstance(dataset, _DATASETS) or _kind(dataset, strict) == "custom":
            return dataset
        dataset = prepare_rows(dataset, self.processing_class, getattr(self.args, "max_length", None))
        if strict and not is_stream(dataset):  # a collator of one's own may cut rows
            refuse_long_rows(dataset, context_length(self.model))
            refuse_unknown_tokens(dataset, num_embeddings(self.model))
        return dataset


_DATASETS = (datasets.Dataset, datasets.IterableDataset)


def _refuse_raw_rows(dataset: RowDataset) -> None:
    """Only a `datasets.Dataset` is tokenised here; of other rows the first one says how they are."""
    if len(dataset) and "input_ids" not in (row := dataset[0]):
        raise DataError(
            f"The rows of this {type(dataset.dataset).__name__} have {sorted(set(row) - {ROW})}, not `input_ids`. "
            "Make it a dataset, which may hold raw text (datasets.Dataset.from_list(rows)), or tokenise its rows."
        )


def _kind(dataset: datasets.Dataset | datasets.IterableDataset, strict: bool) -> str:
    try:
        return dataset_kind(column_names(dataset))
    except DataError:
        if strict:
            raise
        return "custom"
