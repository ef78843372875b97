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
"""Packed sequences: what a batch draws is then no row, but a sequence that holds several rows or parts of them.

TRL's `SFTTrainer` packs in three ways. `bfd` and `bfd_split` keep rows apart: each row, or fragment of a row, attends
to itself alone, counts its positions from 0, and its first token is not predicted. `wrapped` cuts one long text: a
token attends to whatever stands before it in its sequence, be it of another row.

Every token carries its row's number in the column `row_ids`. A *piece* is a row's part of a packed sequence, and the
pieces' losses add up to the sequence's.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np
import torch

from ...data import IGNORE_INDEX, ROW
from ...errors import UnsupportedError


TOKEN_ROWS = "row_ids"
"""Column of a packed sequence: the row of each token."""

KEEPS_ROWS_APART = {"bfd", "bfd_split"}


def packed_with_rows(
    dataset: datasets.Dataset, prepare: Callable[[Any, bool], datasets.Dataset], args: Any
) -> datasets.Dataset:
    """Pack rows as `SFTTrainer._prepare_dataset` does, with the row of each token.

    Args:
        dataset: rows that carry their number.
        prepare: prepares rows with the given arguments, packed or not; the Trainer's own.
        args: the Trainer's `SFTConfig`.

    Returns:
        Packed sequences with `input_ids`, `labels`, `row_ids`, for `bfd` also `seq_lengths`, numbered by position.
    """
    from trl import pack_dataset

    if args.max_length is None:  # let TRL say so
        return prepare(args, True)
    whole = copy.copy(args)
    whole.max_length, whole.shuffle_dataset = None, False  # packing cuts rows itself
    rows = prepare(whole, False)
    rows = rows.map(
        lambda row: {TOKEN_ROWS: [row[ROW]] * len(row["input_ids"])},
        desc="Numbering tokens",
        num_proc=args.dataset_num_proc,
    )
    rows = rows.select_columns(["input_ids", "labels", TOKEN_ROWS])
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    map_kwargs = {"num_proc": args.dataset_num_proc, "desc": "Packing train dataset"}
    packed = pack_dataset(rows, args.max_length, args.packing_strategy, map_kwargs)
    if args.shuffle_dataset:
        packed = packed.shuffle(seed=args.seed)
    return packed.add_column(ROW, np.arange(len(packed)))


def split(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pieces of a packed sequence, each a row of its own with the same loss as in the sequence.

    Returns:
        Dictionaries with `row`, `input_ids`, `labels` and `context`: a piece of a sequence that does not keep rows
        apart begins with the `context` tokens that stand before it, which have no label.
    """
    ids, labels, rows = (np.asarray(example[name]).tolist() for name in ("input_ids", "labels", TOKEN_ROWS))
    apart = example.get("seq_lengths") is not None
    if apart:
        ends = np.cumsum(example["seq_lengths"])
    else:
        ends = [*(np.flatnonzero(np.diff(rows)) + 1), len(rows)]
    pieces, start = [], 0
    for end in map(int, ends):
        piece = {"row": rows[start], "input_ids": ids[start:end], "labels": labels[start:end], "context": 0}
        if not apart:
            piece |= {"input_ids": ids[:end], "labels": [IGNORE_INDEX] * start + labels[start:end], "context": start}
        pieces.append(piece)
        start = end
    return pieces


@torch.no_grad()
def refuse_leaks(model: torch.nn.Module, device: torch.device) -> None:
    """Try out whether two rows in one sequence, told apart by their positions only, leave each other alone.

    Raises:
        UnsupportedError: if a row's predictions depend on the row before it.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    positions = torch.arange(4, device=device).repeat(2)[None]
    both = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:]
    alone = model(input_ids=ids[:, 4:], position_ids=positions[:, 4:], use_cache=False).logits[0]
    model.train(was_training)
    if not torch.allclose(both, alone, rtol=0, atol=2e-2 * float(alone.abs().max())):
        raise UnsupportedError(
            f"In one sequence of several rows, {type(model).__name__} lets each row attend to the rows before it, so "
            "a row has no loss of its own. Load it with attn_implementation='flash_attention_2' or 'sdpa', set "
            "packing_strategy='wrapped' (which is attributed as it attends), or train without packing and "
            "padding_free."
        )
