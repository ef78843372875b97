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
"""Building an index: coordinates, then a file of rows after the other, then how accurate it came out."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger

from .. import __version__
from ..curvature import FisherSample
from ..errors import ConfigError, UnsupportedError
from ..gradients import RowGradients
from ..recording.digest import record_digest
from .accuracy import agreement
from .coordinates import Coordinates
from .files import COORDINATES, begin, finish, plan_of, read_rows, read_tensors, rows_file, write_rows
from .responses import Responses, Vectors, products, rows_at_once
from .sparse import PRECISIONS, SparseRows


if TYPE_CHECKING:
    from ..attribution.attributor import SourceAttributor


logger = get_logger(__name__)

NUMBERS = 2048
"""Numbers kept of a row: the fewest (in powers of two) that kept 90 % of the LDS in `benchmarks/index.json`."""

METHODS = ("source", "fast-source")
NUM_CHECKS = 16
"""Queries that an index is measured with."""

MEASURED_ROWS = 2**17
"""Rows that it is measured on, or somewhat fewer."""

_PATIENCE = 8  # passes worth of samples for each pass over the rows before a warning is given
_SEED = 104729  # of the sample at the final weights, apart from those of segments


def build_index(
    attributor: "SourceAttributor", folder: str | Path, numbers: int = NUMBERS, precision: str = "int8"
) -> Path:
    """Build an index, or go on with one that was cut off. See `SourceAttributor.build_index`."""
    folder = Path(folder).expanduser()
    check(attributor, numbers, precision)
    attributor.record.require_complete()
    responses = Responses(attributor)
    gradients = responses.final()
    content = {
        "rows_per_file": rows_at_once(gradients, attributor.memory_budget),
        "record": record_digest(attributor.record),
        "settings": {key: value for key, value in attributor.settings().items() if key != "measurement"},
        "seed": attributor.seed,
        "numbers": numbers,
        "precision": precision,
        "num_parameters": sum(parameter.numel() for parameter in gradients.parameters.values()),
    }
    main = attributor.accelerator.is_main_process
    if main:
        begin(folder, content)
    attributor.accelerator.wait_for_everyone()
    content = plan_of(folder)
    coordinates = _coordinates(attributor, responses, folder)
    checks = _check_queries(responses)
    files = list(_files(responses, content["rows_per_file"]))
    # Shared before those that exist are left out, or processes that look at other times would share differently.
    todo = [job for job in attributor.share(files) if not (folder / job[0]).exists()]
    _warn_of_time(attributor, content["rows_per_file"], len(todo))
    for name, position, own in attributor.progress(todo, "indexing rows"):
        found = responses.of(position, own)
        exact = products(checks, found).float().cpu().numpy()
        kept = SparseRows.largest(coordinates.of_responses(found), numbers, precision)
        write_rows(folder / name, kept, own, exact)
    attributor.accelerator.wait_for_everyone()
    if main:
        asked = coordinates.of_queries(checks).cpu().numpy()
        stages = _measured(attributor, folder, files, asked)
        model = {"parameters": model_digest(responses.final()), "names": list(gradients.parameters)}
        finish(folder, {**content, "hf_source": __version__, "model": model, "stages": stages})
    attributor.accelerator.wait_for_everyone()
    return folder


def check(attributor: "SourceAttributor", numbers: int, precision: str) -> None:
    """Raise if there cannot be such an index.

    Raises:
        UnsupportedError: for a method other than Source, or an ensemble.
        ConfigError: if a setting is impossible.
    """
    if attributor.index is not None:
        raise ConfigError("This attributor answers from an index already: build from one without `index=`.")
    if attributor.method not in METHODS or attributor.ensemble is not None:
        what = f"method={attributor.method!r}" if attributor.ensemble is None else "an ensemble"
        raise UnsupportedError(f"{what} cannot be indexed: use method='source' of one record.")
    if numbers < 1:
        raise ConfigError(f"numbers={numbers}: at least one number of a row has to be kept ({NUMBERS} is usual).")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}.")


def _warn_of_time(attributor: "SourceAttributor", at_once: int, num_files: int) -> None:
    """Every file costs two passes over the sample of each segment, most of the time where a file has few rows."""
    ratio = 2 * attributor.num_samples / at_once
    if num_files > 1 and ratio > _PATIENCE and attributor.curvature_name not in ("identity", "diagonal", "ekfac"):
        logger.warning(
            f"Responses of {at_once} rows fit the memory budget at once, and every so many cost two passes over "
            f"{attributor.num_samples} sampled rows: building takes about {ratio:.0f} times as long as a pass over "
            f"the rows. Raise memory_budget (now {attributor.memory_budget / 2**30:.1f} GiB), or lower num_samples."
        )


def _coordinates(attributor: "SourceAttributor", responses: Responses, folder: Path) -> Coordinates:
    file = folder / COORDINATES
    if not file.exists() and attributor.accelerator.is_main_process:
        Coordinates.fit(_final_sample(responses, attributor.num_samples, _SEED)).save(file)
    attributor.accelerator.wait_for_everyone()
    return Coordinates.load(read_tensors(file)).to(attributor.device, attributor.dtype)


def _final_sample(responses: Responses, size: int, seed: int) -> FisherSample:
    """Gradients of the last stage's rows at the final weights, with labels drawn from the model."""
    gradients, rows = responses.final(), responses.rows[responses.stages[-1].name]
    generator = np.random.default_rng(seed + responses.settings.seed)
    pool = rows.trained[rows.items[rows.trained] > 0]
    numbers = np.sort(generator.choice(pool, size=min(size, len(pool)), replace=False))
    batches = [rows.collated(part, responses.settings.device) for part in rows.batches(numbers)]
    return FisherSample(gradients, batches, seed + responses.settings.seed, probes=responses.settings.probes)


def _check_queries(responses: Responses) -> Vectors:
    """Queries that the accuracy is measured with: rows with labels drawn anew."""
    sample = _final_sample(responses, NUM_CHECKS, _SEED + 1)
    return sample.matrices(list(sample.gradients.parameters))


def _files(responses: Responses, at_once: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, stage and rows of each file, the rows of one file of similar length so that batches are even."""
    for position, stage in enumerate(responses.stages):
        rows = responses.rows[stage.name]
        lengths = np.bincount(rows.row[rows.trained], weights=rows.lengths[rows.trained], minlength=stage.num_rows)
        numbers = rows.trained_rows[np.argsort(-lengths[rows.trained_rows], kind="stable")]
        for place, start in enumerate(range(0, len(numbers), at_once)):
            yield rows_file(position, place), position, numbers[start : start + at_once]


def _measured(attributor: "SourceAttributor", folder: Path, files: list, asked: np.ndarray) -> list[dict[str, Any]]:
    """Each stage's files, and how the index ranks its rows, or some of very many, compared with the full computation.

    One file is in memory at a time, and no more than so many scores.
    """
    stages = []
    for position, stage in enumerate(attributor.record.stages):
        names = [name for name, own, _ in files if own == position]
        exact, found = [], []
        rows_in_all = sum(len(numbers) for _, own, numbers in files if own == position)
        every = max(1, -(-rows_in_all // MEASURED_ROWS))
        for name in names[::every]:
            rows, _, truth = read_rows(folder / name)
            exact.append(truth)
            found.append(rows.times(asked))
        accuracy = agreement(np.concatenate(found, axis=1), np.concatenate(exact, axis=1)) if names else {}
        stages.append({"name": stage.name, "num_rows": stage.num_rows, "rows": names, "accuracy": accuracy})
    return stages


def model_digest(gradients: RowGradients) -> str:
    """SHA-256 of the parameters that queries are differentiated by, as float32."""
    found = hashlib.sha256()
    for name, parameter in gradients.parameters.items():
        content = parameter.detach().to("cpu", torch.float32).contiguous()
        found.update(f"{name}{tuple(content.shape)}".encode())
        found.update(content.numpy().tobytes())
    return found.hexdigest()
