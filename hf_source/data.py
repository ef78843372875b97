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
"""Rows: from a dataset as people have it to the tensors a model trains on, the same way in training and attribution.

A *row* is one example of the dataset given to the Trainer. Its *loss items* are the label tokens that enter the loss
(`labels[1:] != -100` for a causal language model).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .errors import DataError


ROW = "source_row"
"""Column that carries a row's number through shuffling, collating and training."""

IGNORE_INDEX = -100

TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of prepared rows that hold what a model of text reads."""

TRAINED_COLUMNS = ("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "margin", "row_ids")
"""Columns of prepared rows that decide what is trained: tokens, their labels, pairs of preferences, and whose tokens a
packed sequence holds."""

HEAD_COLUMNS = ("label", "label_ids", "start_positions", "end_positions", "token_type_ids")
"""Columns that decide what is trained where a row has no `labels`, and the segments of a pair of texts."""


def dataset_kind(column_names: Sequence[str]) -> str:
    """How rows are given: `"tokenized"` (`input_ids`), `"prompt_completion"` or `"text"`.

    Raises:
        DataError: if none of the three sets of columns is there.
    """
    columns = set(column_names)
    if "input_ids" in columns:
        return "tokenized"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if "text" in columns:
        return "text"
    chats = sorted(columns & {"messages", "conversations"})
    more = (
        f" Conversations (`{chats[0]}`) are trained by TRL: class SourceSFTTrainer(RecordingMixin, SFTTrainer), or a "
        "recipe with trainer: sft."
        if chats
        else ""
    )
    raise DataError(
        f"The dataset has columns {sorted(columns - {ROW})}, none of which hf_source can read as rows. Give it a "
        "`text` column, `prompt` and `completion` columns, or tokenise it yourself to `input_ids` (and `labels`)."
        + more
    )


def encode_completion(
    processing_class: PreTrainedTokenizerBase, prompt: str, completion: str, append_eos: bool = False
) -> tuple[list[int], list[int]]:
    """Tokenise `prompt + completion` as one text and mask the prompt.

    The two are encoded together, because many tokenizers merge across the boundary (`"is" + " Paris"`); a token is
    the completion's if it covers at least one of its characters.

    Returns:
        `input_ids` and `labels` (`-100` on the prompt's tokens), both of length `num_tokens`.
    """
    text = prompt + completion
    if processing_class.is_fast:
        encoded = processing_class(text, return_offsets_mapping=True)
        input_ids = list(encoded["input_ids"])
        # Special tokens have empty spans (end == 0 or start == end): never the completion's.
        asked = [end > len(prompt) and end > start for start, end in encoded["offset_mapping"]]
    else:
        input_ids = list(processing_class(text)["input_ids"])
        alone = processing_class(prompt)["input_ids"]
        common = 0
        while common < min(len(alone), len(input_ids)) and alone[common] == input_ids[common]:
            common += 1
        asked = [position >= common for position in range(len(input_ids))]
    if append_eos and processing_class.eos_token_id is not None and input_ids[-1:] != [processing_class.eos_token_id]:
        input_ids.append(processing_class.eos_token_id)
        asked.append(True)
    labels = [token if on else IGNORE_INDEX for token, on in zip(input_ids, asked, strict=True)]
    return input_ids, labels


def _encode_text(processing_class: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    input_ids = list(processing_class(text)["input_ids"])
    if processing_class.eos_token_id is not None and input_ids[-1:] != [processing_class.eos_token_id]:
        input_ids.append(processing_class.eos_token_id)
    return input_ids, list(input_ids)


def prepare_rows(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> Dataset:
    """Rows as token ids; a dataset that has `input_ids` already passes through unchanged.

    `text` rows train on every token, `prompt`/`completion` rows on the completion only; both end with the
    tokenizer's end-of-sequence token, so that generation learns to stop. Other columns are kept.

    Args:
        dataset: rows with `text`, with `prompt` and `completion`, or with `input_ids`; a `Dataset` or a stream.
        processing_class: tokenizer; needed for raw text.
        max_length: rows are cut to this many tokens; `None` leaves them whole.

    Raises:
        DataError: if the columns are unknown, a text is missing, or raw text comes without a tokenizer.
    """
    names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    kind = dataset_kind(names)
    if kind == "tokenized":
        return dataset
    if processing_class is None:
        raise DataError(f"The dataset holds raw `{kind}` rows, which need a tokenizer: pass `processing_class=`.")

    def encode(batch: Mapping[str, list]) -> dict[str, list]:
        _refuse_missing_text(batch, ("text",) if kind == "text" else ("prompt", "completion"))
        if kind == "text":
            pairs = [_encode_text(processing_class, text) for text in batch["text"]]
        else:
            pairs = [
                encode_completion(processing_class, prompt, completion, append_eos=True)
                for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
            ]
        return {"input_ids": [ids[:max_length] for ids, _ in pairs], "labels": [lab[:max_length] for _, lab in pairs]}

    if "labels" in names:
        raise DataError("A raw text dataset may not have a `labels` column: rename it, or tokenise to `input_ids`.")
    if isinstance(dataset, IterableDataset):
        return dataset.map(encode, batched=True)
    settings = f"{dataset._fingerprint}/{kind}/{max_length}/{tokenizer_digest(processing_class)}"
    fingerprint = xxhash.xxh64(settings.encode())
    return dataset.map(encode, batched=True, desc="Tokenizing rows", new_fingerprint=fingerprint.hexdigest())


def _refuse_missing_text(batch: Mapping[str, list], names: Sequence[str]) -> None:
    for name in names:
        for place, value in enumerate(batch[name]):
            if not isinstance(value, str):
                where = f"Row {batch[ROW][place]}" if ROW in batch else "A row"
                raise DataError(
                    f"{where} has {value!r} as its `{name}`, which is no text: leave such rows out first, e.g. "
                    f"dataset.filter(lambda row: isinstance(row[{name!r}], str))."
                )


def refuse_unknown_tokens(dataset: Dataset, num_tokens: int | None) -> None:
    """Refuse tokens that the model has no embedding for, before a lookup fails on them.

    Args:
        dataset: rows from [`prepare_rows`].
        num_tokens: embeddings of the model; `None` if that is not known.

    Raises:
        DataError: naming a row and the fix.
    """
    if num_tokens is None or not len(dataset) or dataset.format["type"] == "custom":
        return
    start = 0
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=4096):
        largest = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if largest is not None and largest >= num_tokens:
            rows = batch["input_ids"].to_pylist()
            place = start + next(i for i, row in enumerate(rows) if max(row, default=0) >= num_tokens)
            number = dataset.with_format(None)[place].get(ROW, place)
            raise DataError(
                f"Row {number} has the token {max(rows[place - start])}, the model has embeddings of {num_tokens} "
                "tokens: the tokenizer is of another model. Take the model's own, or enlarge the model with "
                "model.resize_token_embeddings(len(tokenizer))."
            )
        start += len(batch)


def refuse_long_rows(dataset: Dataset, context_length: int | None) -> None:
    """Refuse token rows that are longer than the model's context, before an embedding lookup fails on them.

    Args:
        dataset: rows from [`prepare_rows`].
        context_length: tokens the model takes; `None` if it has no limit.

    Raises:
        DataError: naming the longest row and the fix.
    """
    if (
        context_length is None or not len(dataset) or dataset.format["type"] == "custom"
    ):  # a transform may shorten rows
        return
    batches = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=4096)
    lengths = np.concatenate([np.asarray(pc.list_value_length(batch["input_ids"])) for batch in batches])
    num_long = int((lengths > context_length).sum())
    if num_long:
        longest = int(lengths.argmax())
        number = dataset.with_format(None)[longest].get(ROW, longest)
        raise DataError(
            f"Row {number} has {lengths[longest]} tokens, the model's context holds {context_length} ({num_long} of "
            f"{len(dataset)} rows are too long): set `max_length={context_length}` to cut raw text, or shorten the "
            "rows (`input_ids` and `labels` alike) yourself."
        )


def tokenizer_digest(processing_class: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: its serialised model for a fast one, its vocabulary otherwise."""
    if getattr(processing_class, "is_fast", False):
        return xxhash.xxh64(processing_class.backend_tokenizer.to_str().encode()).hexdigest()
    return xxhash.xxh64(repr(sorted(processing_class.get_vocab().items())).encode()).hexdigest()


def content_fingerprint(dataset: Dataset | Sequence[Mapping[str, Any]]) -> str:
    """Hash of what training sees: the `TRAINED_COLUMNS` of every row, in the order of the rows' numbers.

    Rows without tokens are hashed whole. Independent of integer width, of Arrow chunking, of columns that
    do not train, and of shuffling if the rows carry their numbers (`source_row`).
    """
    digest = xxhash.xxh3_128()
    if isinstance(dataset, Dataset):
        if ROW in dataset.column_names:
            numbers = np.asarray(dataset[ROW])
            if not np.array_equal(numbers, np.arange(len(numbers))):
                dataset = dataset.select(np.argsort(numbers))
                if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):  # some rows were filtered out
                    digest.update(np.sort(numbers).astype(np.int64).tobytes())
        columns = [name for name in TRAINED_COLUMNS + HEAD_COLUMNS if name in dataset.column_names]
        if not any(name in columns for name in TOKENS):
            return dataset_digest(dataset, [name for name in dataset.column_names if name != ROW])
        digest.update(repr((len(dataset), columns)).encode())
        rows = dataset.select_columns(columns).with_format("arrow")
        for batch in rows.iter(batch_size=4096):
            for name in columns:
                column = batch[name].combine_chunks() if isinstance(batch[name], pa.ChunkedArray) else batch[name]
                _hash_column(digest, column)
        return digest.hexdigest()
    if len(dataset) and not any(name in dataset[0] for name in TOKENS):
        from .recording.rows.stored import rows_dataset

        return content_fingerprint(rows_dataset(dataset[index] for index in range(len(dataset))))
    names: list[str] = []
    numbers: list[int] = []
    for start in range(0, len(dataset), 4096):
        rows = [dataset[index] for index in range(start, min(start + 4096, len(dataset)))]
        if not start:
            names = [name for name in ("input_ids", "labels", *HEAD_COLUMNS) if name in rows[0]]
            digest.update(repr((len(dataset), names)).encode())
        for name in names:
            lacking = [start + place for place, row in enumerate(rows) if name not in row]
            if lacking:
                digest.update(repr((name, lacking)).encode())
            _hash_column(digest, pa.array([np.asarray(row.get(name, [])).tolist() for row in rows]))
        numbers += [int(row.get(ROW, start + place)) for place, row in enumerate(rows)]
    if numbers != list(range(len(numbers))):
        rows = [dataset[index] for index in range(len(dataset))]
        tokens = {name: [np.asarray(row.get(name, [])).tolist() for row in rows] for name in names}
        return content_fingerprint(Dataset.from_dict(tokens | {ROW: numbers}))
    return digest.hexdigest()


def _hash_column(digest: Any, column: pa.Array) -> None:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    while any(is_kind(column.type) for is_kind in lists):  # choices of a row are lists of lists
        digest.update(np.asarray(pc.list_value_length(column), dtype=np.int64).tobytes())
        column = column.flatten()
    kind = np.float64 if pa.types.is_floating(column.type) else np.int64
    digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False).astype(kind)).tobytes())


def dataset_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """Hash of some columns as people have them (texts, chats, numbers), in the order of the rows' numbers."""
    if ROW in dataset.column_names:
        numbers = np.asarray(dataset.with_format(None)[ROW])
        if not np.array_equal(numbers, np.arange(len(numbers))):
            dataset = dataset.select(np.argsort(numbers))
    digest = xxhash.xxh3_128(repr((len(dataset), list(columns))).encode())
    parts = {name: xxhash.xxh3_128() for name in columns}
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=4096):
        for name, part in parts.items():
            column = batch[name]
            _hash_values(part, column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    for part in parts.values():
        digest.update(part.digest())
    return digest.hexdigest()


def _hash_values(digest: Any, column: pa.Array) -> None:
    """Any Arrow array: structs by field, lists by length and values, the rest by value."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if column.null_count:
        digest.update(np.asarray(pc.is_null(column)).tobytes())
    if pa.types.is_struct(column.type):
        for index in range(column.type.num_fields):
            digest.update(column.type.field(index).name.encode())
            _hash_values(digest, pc.struct_field(column, [index]))
    elif any(kind(column.type) for kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        digest.update(np.asarray(pc.fill_null(pc.list_value_length(column), 0), dtype=np.int64).tobytes())
        _hash_values(digest, pc.list_flatten(column))
    elif pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        digest.update(np.asarray(pc.fill_null(column, 0).to_numpy(zero_copy_only=False), dtype=np.float64).tobytes())
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        digest.update(b"\0".join(value or b"" for value in column.to_pylist()))
    else:
        digest.update("\0".join(map(str, column.to_pylist())).encode())


class CausalLMCollator:
    """Right-pads token rows of a causal language model.

    Padding goes to the right whatever the tokenizer's side: with a causal mask the tokens of a row then never see it,
    so a row's loss does not depend on its batch-mates.

    Args:
        processing_class: tokenizer, for its padding id (its end-of-sequence id, then 0, where it has none).

    Returns (when called on a list of rows):
        `input_ids`, `attention_mask`, `labels`, each int64 `[rows, tokens]`; `source_row` int64 `[rows]` where rows
        have it.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase | None = None) -> None:
        pad = getattr(processing_class, "pad_token_id", None)
        eos = getattr(processing_class, "eos_token_id", None)
        self.pad_token_id = pad if pad is not None else eos if eos is not None else 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows to the longest of them."""
        input_ids = [_as_ids(row["input_ids"]) for row in rows]
        labels = [
            ids if row.get("labels") is None else _as_ids(row["labels"])
            for row, ids in zip(rows, input_ids, strict=True)
        ]
        batch = {
            "input_ids": _pad(input_ids, self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(ids) for ids in input_ids], 0),
            "labels": _pad(labels, IGNORE_INDEX),
        }
        if all(ROW in row for row in rows):
            batch[ROW] = torch.tensor([int(row[ROW]) for row in rows])
        return batch


def _as_ids(values: Iterable[int] | torch.Tensor) -> torch.Tensor:
    # A copy: rows of a numpy-formatted dataset are read-only, which tensors cannot express.
    return values.long() if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int64)


def _pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def take_rows(dataset: Dataset | Sequence[Mapping[str, Any]], rows: Iterable[int]) -> list[dict[str, Any]]:
    """The given rows as a list of dictionaries, in the given order."""
    indices = [int(row) for row in rows]
    if isinstance(dataset, Dataset):
        columns = dataset.with_format(None)[indices]
        names = list(columns)
        return [{name: columns[name][i] for name in names} for i in range(len(indices))]
    return [dict(dataset[index]) for index in indices]
