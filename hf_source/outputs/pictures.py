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
"""Images in a page: those that were asked about and the strongest rows', as `data:` addresses of PNG files."""

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from ..attribution.queries import Queries
from ..data import ROW
from .attribution_files import Attribution


COLUMNS = ("pixel_values", "image", "img")
"""Columns of images, arrays `[channels, height, width]` or pictures; the first that there is."""

_RANGES = ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0))  # of pixels, by custom


@dataclass
class Pictures:
    """Addresses of images.

    Attributes:
        queries: query -> address.
        rows: (stage, row) -> address.
    """

    queries: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.queries or self.rows)


def pictures_of(attribution: Attribution) -> Pictures:
    """Images of the queries and of their strongest rows, as far as both are images and go along with the scores.

    All are drawn on one scale: what is black in one is black in all.
    """
    asked = dict(_asked(attribution.queries))
    rows = dict(_strongest(attribution.stages, attribution.top))
    every = [*asked.values(), *rows.values()]
    if not every:
        return Pictures()
    scale = _scale(every)
    return Pictures(
        {name: address(pixels, scale) for name, pixels in asked.items()},
        {key: address(pixels, scale) for key, pixels in rows.items()},
    )


def _asked(queries: Queries) -> Iterable[tuple[str, np.ndarray]]:
    for name, row in zip(queries.names, queries.rows or [], strict=False):
        pixels = _pixels(row)
        if pixels is not None:
            yield name, pixels


def _strongest(stages: Mapping[str, Dataset], top: Dataset) -> Iterable[tuple[tuple[str, int], np.ndarray]]:
    for stage, rows in stages.items():
        columns = [name for name in COLUMNS if name in rows.column_names][:1]
        if not columns or ROW not in rows.column_names:
            continue
        place = {int(number): index for index, number in enumerate(rows[ROW])}
        chosen = rows.select_columns(columns).with_format(None)
        for number in sorted({row for own, row in zip(top["stage"], top["row"], strict=True) if own == stage}):
            pixels = _pixels(chosen[place[number]]) if number in place else None
            if pixels is not None:
                yield (stage, number), pixels


def _pixels(row: Mapping[str, Any]) -> np.ndarray | None:
    """A row's image as float32 `[channels, height, width]` with 1, 3 or 4 channels; `None` if it has none."""
    given = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if given is None or isinstance(given, (str, bytes, Mapping)):
        return None
    if hasattr(given, "convert"):  # a picture of PIL
        return np.asarray(given.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
    try:
        pixels = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    if pixels.ndim == 2:
        pixels = pixels[None]
    fits = pixels.ndim == 3 and len(pixels) in (1, 3, 4) and 0 < pixels[0].size <= 2**22
    return np.nan_to_num(pixels) if fits else None


def _scale(images: Iterable[np.ndarray]) -> tuple[float, float]:
    """The values of black and white: a usual range that holds all images, or their own."""
    images = list(images)
    low, high = min(float(image.min()) for image in images), max(float(image.max()) for image in images)
    found = next(((a, b) for a, b in _RANGES if a <= low and high <= b and (a == 0 or low < 0)), None)
    return found or (low, max(high, low + 1e-6))


def address(pixels: np.ndarray, scale: tuple[float, float] = (0.0, 1.0)) -> str:
    """An image as the `data:` address of a PNG.

    Args:
        pixels: `[channels, height, width]`, of 1 (grey), 3 (colours) or 4 channels (with transparency).
        scale: values of black and white.
    """
    low, high = scale
    bytes_ = np.round((pixels - low) / (high - low) * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    height, width, channels = bytes_.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), bytes_.reshape(height, -1)], axis=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
