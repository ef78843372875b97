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
"""What a Trainer is given, looked at before anything is made of it: mistakes of a first day, with their fix."""

from typing import Any

import datasets
import pyarrow as pa
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from ..data import ROW, take_rows
from ..errors import ConfigError, DataError


_PADDING = (DataCollatorForLanguageModeling, DataCollatorWithPadding, DefaultDataCollator)
_LABELLED = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice", "ForImageClassification")
_NO_INPUTS = {"label", "label_ids", "labels", ROW}


def check_args(args: Any, other: dict[str, Any]) -> None:
    """Refuse something else where the settings of a run are expected, and a name that transformers gave up.

    Args:
        args: of the Trainer.
        other: its further arguments.

    Raises:
        ConfigError: naming the fix.
    """
    if args is not None and not isinstance(args, TrainingArguments):
        raise ConfigError(
            f"args is a {type(args).__name__}, not the settings of a run: write SourceTrainer(model, "
            "SourceConfig(output_dir='out'), train_dataset=rows)."
        )
    if "tokenizer" in other:
        raise ConfigError("tokenizer= is called processing_class= in transformers 5: rename it.")


def load_model(name: str, processing_class: Any) -> tuple[Any, Any]:
    """A causal language model in float32, and its tokenizer.

    Raises:
        ConfigError: if there is none of the name.
    """
    try:
        processing_class = processing_class or AutoTokenizer.from_pretrained(name)
        # Checkpoints are often bfloat16, in which small updates would round away.
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), processing_class
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={name!r} could not be loaded ({error}): pass a folder that save_pretrained wrote, the id of a "
            "causal language model on the Hub, or a model."
        ) from error


def load_rows(name: str) -> datasets.Dataset:
    """The split `train` of a dataset.

    Raises:
        DataError: if there is none of the name.
    """
    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"train_dataset={name!r} could not be loaded ({error}): pass the id of a dataset on the Hub or a folder "
            "of data files; a file with load_dataset('json', data_files=..., split='train')."
        ) from error


def refuse_other_than_rows(dataset: Any) -> None:
    """Refuse tables and lists of texts, which are no rows yet.

    Raises:
        DataError: naming the fix.
    """
    if type(dataset).__name__ == "DataFrame":
        raise DataError("train_dataset is a DataFrame: make it a dataset, datasets.Dataset.from_pandas(frame).")
    if isinstance(dataset, dict) and dataset and all(isinstance(column, (list, tuple)) for column in dataset.values()):
        raise DataError(
            "train_dataset is a dictionary of columns: make it a dataset, datasets.Dataset.from_dict(rows)."
        )
    if isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], str):
        raise DataError(
            "train_dataset is a list of texts: make it a dataset, datasets.Dataset.from_dict({'text': texts})."
        )


def refuse_unfit_collator(collator: Any, dataset: Any, raw: bool) -> None:
    """Refuse collators that cannot pad the labels which rows of raw text have been given.

    Args:
        collator: that was given, or `None`.
        dataset: the prepared rows.
        raw: whether they were raw text.

    Raises:
        DataError: naming the fix.
    """
    known = isinstance(collator, _PADDING) or collator is default_data_collator
    if not (known and raw and isinstance(dataset, datasets.Dataset) and len(dataset)):
        return
    lengths = [len(ids) for ids in dataset.with_format(None)["input_ids"][:1000]]
    rows = take_rows(dataset.select_columns(["input_ids", "labels"]), (lengths.index(f(lengths)) for f in (min, max)))
    try:
        collator([dict(row) for row in rows])
    except (ValueError, TypeError) as error:
        name = getattr(collator, "__name__", type(collator).__name__)
        raise DataError(
            f"{name} cannot pad rows that were tokenised from raw text, since these have `labels` of their own: leave "
            "data_collator= out (rows are padded as a causal language model needs them), or tokenise the rows "
            "yourself, without `labels`."
        ) from error


def refuse_unfit_rows(model: Any, dataset: Any, inputs: list[str]) -> None:
    """Refuse rows of which the Trainer would leave nothing for a model that is no causal language model.

    Args:
        model: classifier, regressor, ...
        dataset: rows.
        inputs: what the model's `forward` takes, labels among it.

    Raises:
        DataError: naming the fix.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom" or not len(dataset):
        return
    names = set(dataset.column_names) - {ROW}
    wanted = [name for name in inputs if name not in _NO_INPUTS]
    kind = type(model).__name__
    if wanted and not names & set(wanted):
        fix = f"give them columns that the model takes ({', '.join(wanted[:4])})"
        if texts := sorted(names & {"text", "sentence", "sentence1", "content", "review"}):
            fix = (
                "tokenise them first, dataset.map(lambda rows: tokenizer(rows["
                f"{texts[0]!r}], truncation=True), batched=True)"
            )
        raise DataError(
            f"The rows have {sorted(names)}, none of which {kind} takes; only causal language models have raw text "
            f"tokenised for them: {fix}."
        )
    if not isinstance(model, PreTrainedModel) or not kind.endswith(_LABELLED):
        return
    label = next((name for name in ("label", "labels", "label_ids") if name in names), None)
    if label is None:
        raise DataError(
            f"The rows have {sorted(names)}, and no `label` for {kind} to learn: rename the column that holds it, "
            "dataset.rename_column(..., 'label')."
        )
    if pa.types.is_string(dataset.features.arrow_schema.field(label).type):
        raise DataError(
            f"Column {label!r} holds texts, where {kind} learns numbers: dataset.class_encode_column({label!r})."
        )
