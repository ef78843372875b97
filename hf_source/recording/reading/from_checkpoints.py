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
"""A record of a run that was not recorded, from the checkpoints that an ordinary Trainer left.

Known exactly: the learning rate of every step (the Trainer's own scheduler, built again and stepped, and compared with
what every checkpoint says), optimizer constants, the rows, the weights and preconditioners at the checkpoints.
Assumed, and said so in the record: that every row was visited equally often at any time (the Source paper's setting),
that a segment's averages are those of the checkpoints in it, and clipping factors between logged gradient norms. No
pickle is read: `training_args.bin` stays closed, and `optimizer.pt` is read with `weights_only=True`.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ...errors import ConfigError, DataError, RecordError, UnsupportedError
from ..checks import refuse_unsupported
from ..config import RecordingOptions, SourceConfig
from ..lock import writing
from ..rows.columns import check_columns
from ..start import refuse_existing_stage
from ..trainer import SourceTrainer
from .checkpoint_files import Checkpoint
from .past_run import PastRun
from .rebuilt_stage import write_stage


def record_from_checkpoints(
    checkpoints: Sequence[str | Path], dataset: Any, options: RecordingOptions, num_segments: int | None, **run: Any
) -> None:
    """Write the stage. See `TrainingRecord.from_checkpoints`; `run` is what the Trainer was made of."""
    refuse_existing_stage(options)
    found = _sorted(checkpoints)
    if dataset is None:
        raise DataError(
            "Pass `dataset=`: the rows of the run, as the Trainer took them. Checkpoints do not hold them."
        )
    if not isinstance(dataset, str) and not hasattr(dataset, "__len__"):
        raise UnsupportedError(
            "A stream has no fixed rows that could be visited equally often. Collect it with Dataset.from_generator."
        )
    trainer = _make_trainer(found, dataset, max_length=options.max_length, **run)
    check_columns(trainer.given_dataset, trainer.train_dataset, options.record_columns)
    past = PastRun(trainer, found, options, num_segments)
    with writing(Path(options.record_dir)):
        write_stage(past, options)


def _sorted(sources: Sequence[str | Path]) -> list[Checkpoint]:
    if isinstance(sources, (str, Path)) or not sources:
        raise ConfigError("Pass a list of checkpoints, such as ['out/checkpoint-500', 'out/checkpoint-1000'].")
    found = sorted((Checkpoint.read(source) for source in sources), key=lambda checkpoint: checkpoint.step)
    steps = [checkpoint.step for checkpoint in found]
    lengths = sorted({checkpoint.state["max_steps"] for checkpoint in found})
    if len(set(steps)) < len(steps) or len(lengths) > 1:
        raise RecordError(
            f"The checkpoints (of steps {steps}, of runs of {lengths} steps) are not of one run. Pass those of one "
            "run, each once; another run is another stage."
        )
    if steps[-1] == 0:
        raise RecordError("There is no checkpoint after step 0: pass those that training left.")
    return found


def _make_trainer(
    checkpoints: Sequence[Checkpoint],
    dataset: Any,
    *,
    args: TrainingArguments | Mapping[str, Any],
    model: Any,
    processing_class: Any,
    data_collator: Any,
    max_length: int | None,
) -> SourceTrainer:
    """The Trainer of the run, at its beginning."""
    if isinstance(args, Mapping):
        try:
            args = SourceConfig(**args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"args do not fit together: {error}") from error
    if not isinstance(args, TrainingArguments):
        raise ConfigError(
            "Pass `args=`: the TrainingArguments of the run, or a dictionary of its settings. training_args.bin is a "
            "pickle, which could run any code, so it is not read."
        )
    first = checkpoints[0]
    source = model if model is not None else first.folder if first.step == 0 else None
    if source is None:
        raise RecordError(
            "The weights that training started from are unknown: pass `model=` (the model or its path or Hub id), or "
            "a checkpoint of step 0."
        )
    if isinstance(source, (str, Path)):
        dtype = next(iter(first.weights().values())).dtype
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        if processing_class is None:
            holders = [path for path in (first.folder, Path(source)) if (path / "tokenizer_config.json").is_file()]
            processing_class = AutoTokenizer.from_pretrained(holders[0]) if holders else None
    args = copy.copy(args)
    # Nothing is evaluated, reported or pushed: the run is over.
    args.eval_strategy, args.report_to = IntervalStrategy.NO, []
    args.load_best_model_at_end = args.push_to_hub = False
    args.max_length = max_length if max_length is not None else getattr(args, "max_length", None)
    trainer = SourceTrainer(model, args, data_collator, dataset, processing_class=processing_class)
    refuse_unsupported(trainer)
    return trainer
