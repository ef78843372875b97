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
"""Rows of the paper's tasks that are no text: images of a dataset, or the numbers of a table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Image

from hf_source.recipes import load_rows


SOURCE = ("path", "name", "split", "data_dir", "data_files")  # arguments of `datasets.load_dataset`
Settings = Mapping[str, Any]


def rows_of(settings: Settings, scale: Settings | None = None) -> tuple[Dataset, dict[str, Any]]:
    """The rows that settings ask for, always in the same random order.

    Args:
        settings: `path` (a table `.csv`, or a dataset of images), `skip` and `rows` of the order, `where` (column ->
            values), and how a table or images are read.
        scale: mean and deviation of a table, of the rows trained on; those of these rows by default.

    Returns:
        Rows with `pixel_values` and a class `label`, or `features` and a number `label`; and the scale.
    """
    table = "target" in settings
    source = {key: settings[key] for key in SOURCE if key in settings}
    if table and set(source) == {"path"}:
        source = {"path": "csv", "data_files": settings["path"], "split": "train"}
    found = load_rows(source)
    for column, values in settings.get("where", {}).items():
        names = getattr(found.features[column], "names", None)
        wanted = [names.index(value) if names and value in names else value for value in values]
        found = found.select([i for i, value in enumerate(found[column]) if value in wanted])
    order = np.random.default_rng(0).permutation(len(found))
    start = settings.get("skip", 0)
    chosen = found.select(order[start : start + settings.get("rows", len(order))])
    if not len(chosen):
        raise SystemExit(f"{settings['path']} has {len(order)} such rows, none of them beyond the first {start}.")
    return numbers(chosen, settings, scale) if table else (images(chosen, settings), {})


def numbers(rows: Dataset, settings: Settings, scale: Settings | None) -> tuple[Dataset, dict[str, Any]]:
    """A table's features and target, with mean 0 and deviation 1 over the rows that are trained on."""
    left_out = {settings["target"], *settings.get("drop", [])}
    columns = [*(name for name in rows.column_names if name not in left_out), settings["target"]]
    values = np.stack([np.asarray(rows[name], dtype=np.float64) for name in columns], axis=1)
    scale = scale or {"mean": values.mean(axis=0), "deviation": values.std(axis=0).clip(1e-12)}
    values = ((values - scale["mean"]) / scale["deviation"]).astype(np.float32)
    return Dataset.from_dict({"features": values[:, :-1], "label": values[:, -1]}), dict(scale)


def images(rows: Dataset, settings: Settings) -> Dataset:
    """Images `[channels, size, size]` about between -1 and 1, turned by `angle` degrees, and their classes."""
    column = settings.get("image", "image")
    mode, size = {1: "L", 3: "RGB"}[settings["channels"]], (settings["size"], settings["size"])
    made = []
    for image in rows.cast_column(column, Image())[column]:
        image = image.convert(mode).resize(size).rotate(settings.get("angle", 0), resample=2)
        made.append(np.asarray(image, dtype=np.float32).reshape(*size, -1).transpose(2, 0, 1) / 127.5 - 1)
    return Dataset.from_dict({"pixel_values": np.stack(made), "label": list(rows[settings.get("label", "label")])})
