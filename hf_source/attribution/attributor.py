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
"""`SourceAttributor`: from a training record and a text to scores of every training row."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import Dataset
from torch import nn

from .. import __version__
from ..budget import naming_the_fix, parse_bytes
from ..curvature import JointCurvature, make_curvature
from ..errors import ConfigError, DataError, UnsupportedError
from ..gradients import PROBES, Loss, Measurement, Task, describe_measurement
from ..gradients.shards import Shards
from ..logs import get_logger
from ..outputs.columns import add_score_columns, check_names, top_table, with_note
from ..outputs.token_columns import add_token_columns, check_token_names, token_texts
from ..outputs.trust import trust_note
from ..recording import StageRecord, TrainingRecord
from ..recording.digest import digest, record_digest
from ..recording.reading.assumed import visits_note
from ..source import Together, WalkSettings, Work
from .advice import advised_plan
from .alone import final_losses, own_influence
from .ensembles import ENSEMBLES, check_agreement, make_ensemble, split_settings
from .filtered import filtered_top
from .generation import complete, prompt_text
from .granularity import Granularity, QueryGranularity, Span, check_choice, mark_spans, split_queries
from .methods import METHODS, in_chunks
from .methods.base import Scores
from .plan import Plan, plan_tokens
from .plan_filtered import filtered_plan, text_plan
from .queries import Queries, refuse_one_text, same_queries
from .reader import RunReader
from .row_tokens import refuse_tokens, row_token_scores, rows_of
from .shared import Shared


if TYPE_CHECKING:
    from ..index import SourceIndex
    from .tokens import TokenInfluence

logger = get_logger(__name__)


class SourceAttributor(Shared, RunReader):
    """Attributes what a recorded model says to the rows it was trained on.

    A score is the predicted change of the query's negative log-likelihood (nats) had the row not been trained on:
    positive, the row supports the completion; negative, it opposes it. Scores add over rows, segments and stages.

    Args:
        record: what training left behind; several records of runs with other seeds are an ensemble.
        method: one of `hf_source.attribution.METHODS`; `"auto"` takes the most accurate one that the record allows
            at a cost of at most `max_cost` times that of `"source"`.
        curvature: `"joint"` (all layers at once), `"ekfac"` (the paper's, whitened by the optimizer), `"ekfac-hybrid"`
            (the paper's form for Adam), `"diagonal"`, `"identity"`, `"exact"` (tiny models).
        num_samples: sampled-label gradients per segment; more is more accurate and costs `num_samples^2` memory.
        num_segments: read each stage's record as so many segments, fewer than it has: each takes a pass over the rows
            that it visited and a curvature, and is more accurate where training is long. By default as recorded.
        tail: give `joint` its block-diagonal tail.
        momentum: weigh a row's visits by the updates that its gradients really entered through momentum; `False` gives
            them the learning rate of the step that took them, as in the paper.
        probes: what the sampled gradients of the curvature are drawn with: `"labels"` from the model, or random
            `"signs"`, which are less noisy and cost the same, for losses that are the cross-entropy of a softmax.
        datasets: stage name -> dataset, for stages whose rows the record does not hold or that are given anew.
        model: a callable giving a fresh model for a stage, for architectures that transformers cannot rebuild.
        task: what defines a row's loss, for stages where the record does not say it (if it does in each: for all of
            them); or stage name -> task. See `hf_source.RowLossTask`.
        measurement: what queries ask about, a name of `hf_source.gradients.MEASUREMENTS` or an object: `"loss"`,
            `"margin"` (of the right class), `"logit-difference"`, `"log-probability"`, `"absolute-error"`. Scores have
            its unit, and stay positive for rows that support the answer.
        data_collator: the Trainer's, if it masked labels in its own way.
        max_tokens_per_batch: padded tokens per forward pass.
        memory_budget: bytes, or a size such as `"2GiB"`, for the columns of the sample matrix held at once (1 GiB by
            default), and, if given, for the query vectors: with more queries than fit it, some walk after others.
        dtype: of gradients.
        vector_dtype: that query vectors and the sample's columns are held in and multiplied with gradients in, of
            Source with `joint` curvature; `"bfloat16"` takes half the memory and, on processors made for it, less
            time, at an accuracy of some thousandths (`docs/scaling.md`). By default they are as gradients.
        vector_shards: processes that hold the query vectors between them, where they do not fit one; their number has
            to be a multiple of it. Each scores its rows along its own parameters only. With 1 every process holds all.
        shard_model: hold the model between the processes (FSDP2), of `source` and `fast-source`: each has a share of
            every layer, for models that one device has no room for. By default as `accelerate launch` was told.
        cache_dir: folder where finished work is kept, so that the same attribution goes on where it was when it was
            killed; scores stay, vectors (as large as the model times the queries) are deleted as they are used up.
        seed: of the sampled rows and labels.
        accelerator: places the model and shares rows among processes.
        progress: show progress bars (main process only).
        gradient_checkpointing: run layers of transformers again on the way back, where rows are scored and the sample
            of `joint` is taken: what a batch holds is that of one layer, for about a third more time in these passes.
            The scores are the same. A `model=` whose layers are enabled already needs no setting.
        ensemble: average over models: `"independent"` (several records), `"dropout"` (masks of each record's model) or
            `"lora"` (adapters fine-tuned from it); see `hf_source.attribution.ensembles`.
        ensemble_size: members that dropout or LoRA make of each record; 10 masks or 3 adapters by default.
        index: answer from an index that `build_index` left, a folder or an id on the Hub: in seconds, without a pass
            over the rows. Method, curvature and samples are those that it was built with.
        options: settings of the method, e.g. `draws=4` with `method="stepwise"` (`METHODS[method].options`), and of
            the ensemble, e.g. `dropout=0.1` (`ENSEMBLES[ensemble].options`).

    Raises:
        ConfigError: if `method`, `curvature` or a setting is unknown, a task lacks a method, or the records of an
            ensemble do not belong together.
        DataError: if they were trained on other rows.
    """

    def __init__(
        self,
        record: TrainingRecord | Sequence[TrainingRecord],
        *,
        method: str = "source",
        curvature: str = "joint",
        num_samples: int = 1024,
        num_segments: int | None = None,
        tail: bool = True,
        momentum: bool = True,
        probes: str = "labels",
        datasets: Mapping[str, Dataset] | None = None,
        model: Callable[[StageRecord], nn.Module] | None = None,
        task: Task | Mapping[str, Task] | None = None,
        measurement: str | Measurement = "loss",
        data_collator: Any = None,
        max_tokens_per_batch: int = 4096,
        memory_budget: int | str | None = None,
        cache_dir: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        vector_dtype: str | None = None,
        vector_shards: int = 1,
        shard_model: bool | None = None,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        progress: bool = True,
        gradient_checkpointing: bool = False,
        ensemble: str | None = None,
        ensemble_size: int | None = None,
        index: "str | Path | SourceIndex | None" = None,
        **options: Any,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"method={method!r} is unknown; choose one of {', '.join(sorted(METHODS))}.")
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ConfigError(f"num_samples={num_samples!r}: at least one sampled gradient is needed (1024 is usual).")
        if probes not in PROBES:
            raise ConfigError(f"probes={probes!r} is unknown; choose one of {', '.join(PROBES)}.")
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ConfigError(f"dtype={dtype!r}: gradients are taken in torch.float32, float64 or bfloat16.")
        if seed < 0:
            raise ConfigError(f"seed={seed} must not be negative.")
        if isinstance(record, (str, Path)):
            raise ConfigError(f"record={str(record)!r} is a path: use SourceAttributor.from_record(path, ...).")
        records = list(record) if isinstance(record, (list, tuple)) else [record]
        if not all(isinstance(each, TrainingRecord) for each in records):
            raise ConfigError(
                f"record={record!r} is no TrainingRecord: use SourceAttributor.from_record(path, ...), or open one "
                "with TrainingRecord.load(path)."
            )
        if not records:
            raise ConfigError("There is no record: give one, or several runs of the same stages with other seeds.")
        check_agreement(records)
        records = [each.merged(num_segments) for each in records]
        assumed = visits_note([stage for each in records for stage in each.stages])
        self.note = "\n".join(dict.fromkeys(note for note in (assumed, *(each.note for each in records)) if note))
        if self.note:
            logger.warning(self.note)
        self.method = method
        ensemble = ensemble or ("independent" if len(records) > 1 else None)
        of_ensemble, options = split_settings(options, ensemble, ENSEMBLES)
        self.options = METHODS[method].make_options(method, options, METHODS)
        self._given = {
            "curvature": curvature,
            "num_samples": num_samples,
            "num_segments": num_segments,
            "tail": tail,
            "momentum": momentum,
            "probes": probes,
            "model": model,
            "task": task,
            "measurement": measurement,
            "data_collator": data_collator,
            "max_tokens_per_batch": max_tokens_per_batch,
            "memory_budget": memory_budget,
            "cache_dir": cache_dir,
            "dtype": dtype,
            "vector_dtype": vector_dtype,
            "vector_shards": vector_shards,
            "shard_model": shard_model,
            "seed": seed,
            "accelerator": accelerator,
            "progress": progress,
            "gradient_checkpointing": gradient_checkpointing,
        }
        # A method's and a curvature's own settings are refused before a dataset is read.
        self.curvature_name = curvature
        own = {"damping": self.options.damping} if hasattr(self.options, "damping") else {}
        self.memory_budget = parse_bytes(memory_budget)
        self.query_budget = None if memory_budget is None else self.memory_budget
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.curvature = make_curvature(curvature, tail=tail, memory_budget=self.memory_budget, **own)
        self.vector_dtype = None if vector_dtype is None else self._vector_dtype(vector_dtype, dtype)
        self.num_samples = num_samples
        self.momentum, self.probes = momentum, probes
        self.seed = seed
        super().__init__(
            records[0],
            datasets=datasets,
            model=model,
            task=task,
            measurement=measurement,
            data_collator=data_collator,
            max_tokens_per_batch=max_tokens_per_batch,
            dtype=dtype,
            accelerator=accelerator,
            progress=progress,
            reads_text=METHODS[method].reads_text,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.vector_shards = self._vector_shards(vector_shards)
        self.shards = self._model_shards(shard_model, ensemble)
        self._walked: dict[str, dict[str, np.ndarray]] = {}
        self._walks: dict[str, Any] = {}
        # What `method="auto"` took, and why.
        self.taken: tuple[SourceAttributor, str] | None = None
        # The queries last attributed, and to which stages: what `push_to_hub` shares.
        self.attributed: tuple[Queries, list[str]] | None = None
        # What a report of some queries found of their tokens, which goes along when they are shared.
        self.shading: tuple[Queries, TokenInfluence, str] | None = None
        self.ensemble = make_ensemble(self, records, ensemble, ensemble_size, of_ensemble, ENSEMBLES)
        if self.ensemble is not None:
            self.note = "\n".join(part for part in (self.note, self.ensemble.note) if part)
        self.index = None if index is None else self._open_index(index)

    @classmethod
    def from_record(cls, path: str | Path | Sequence[str | Path], **settings: Any) -> "SourceAttributor":
        """Open a record directory, or a record on the Hub, with the settings of the class.

        Of a record whose last stages are torn, or still train, the stages before them are attributed; `note` says so.

        Args:
            path: of the record; several make an ensemble of runs with other seeds. Text is generated by the first.
            settings: see the class.

        Raises:
            ConfigError: if the path is no path.
            RecordError: if the record is missing, or torn or incomplete from its first stage on.
        """
        paths = path if isinstance(path, (list, tuple)) else [path]
        return cls([TrainingRecord.load(each).usable() for each in paths], **settings)

    def like(self, **changes: Any) -> "SourceAttributor":
        """Another attributor of the same record and datasets, with some settings changed.

        Settings of the method itself stay only if the method does.

        Raises:
            ConfigError: as the class.
        """
        same = changes.get("method", self.method) == self.method
        own = {field.name: getattr(self.options, field.name) for field in fields(self.options)} if same else {}
        given = {"method": self.method, "datasets": self._datasets, **self._given, **own}
        if not same or changes.get("curvature", "joint") != "joint":  # vectors of others are held as gradients are
            given["vector_dtype"] = None
        if not same:
            given |= {"vector_shards": 1, "shard_model": None}
        if same and "method" not in changes:
            given["index"] = self.index
        records = self.record if self.ensemble is None else self.ensemble.records
        if self.ensemble is not None and changes.get("ensemble", self.ensemble.name) == self.ensemble.name:
            given |= self.ensemble.settings()
        return type(self)(records, **{**given, **changes})

    def settings(self) -> dict[str, Any]:
        """What scores depend on besides the record and the draws of a seed, JSON-able.

        What was measured of scores holds for others of equal settings. Of `method="auto"` they are those of the method
        that was taken, once there are scores.
        """
        if self.index is not None:
            measured = {} if self._measurement == Loss() else {"measurement": describe_measurement(self._measurement)}
            return {**self.index.settings, **measured, "index": self.index.described()}
        if self.taken is not None:
            return self.taken[0].settings()
        own = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        read = () if METHODS[self.method].reads_text else ("curvature", "num_samples", "tail", "momentum")
        common = {key: self._given[key] for key in read}
        if read and self.probes != "labels":
            common["probes"] = self.probes
        if read and self._given["num_segments"] is not None:
            common["num_segments"] = self._given["num_segments"]
        if self._given["vector_dtype"] is not None:
            common["vector_dtype"] = self._given["vector_dtype"]
        if self._measurement != Loss():
            common["measurement"] = describe_measurement(self._measurement)
        named = {"task": self._task, "data_collator": self.data_collator}
        objects = {key: str(type(value).__qualname__) for key, value in named.items() if value is not None}
        if self.ensemble is not None:
            common |= {"records": len(self.ensemble.records), **self.ensemble.settings()}
        return json.loads(json.dumps({"method": self.method, **common, **own, **objects}, default=str))

    def trust(self, stages: Iterable[str] | None = None) -> str:
        """How far to trust the scores: what `hf_source.evaluation.evaluate` measured on this run with these settings.

        Args:
            stages: names of the stages whose rows are scored; all by default.

        Returns:
            One sentence per evaluation, and how accurate the index is, if there is one; else empty.
        """
        names = [stage.name for stage in self.record.stages] if stages is None else list(stages)
        said = [] if self.index is None else [self.index.note(names)]
        return " ".join(note for note in (*said, trust_note(self.record, names, self.settings())) if note)

    def walk_settings(self) -> WalkSettings:
        """Settings of a Source walk."""
        return WalkSettings(
            self.curvature,
            self.num_samples,
            self.dtype,
            self.device,
            self.seed,
            self._together,
            self.momentum,
            self.progress,
            probes=self.probes,
            vector_dtype=self.vector_dtype,
        )

    @property
    def _together(self) -> Together:
        own = {} if self.shards is None else {"settle": self.shards.settle}
        return Together(self.accelerator.process_index, self.accelerator.num_processes, self.vector_shards, **own)

    def _model_shards(self, asked: bool | None, ensemble: str | None) -> Shards | None:
        walks = self.method in ("source", "fast-source") and self.curvature_name != "exact"
        possible = self.accelerator.num_processes > 1 and walks and ensemble in (None, "independent")
        if asked and not possible:
            raise ConfigError(
                "shard_model=True belongs to method='source' and 'fast-source', not to curvature='exact' or ensemble="
                "'dropout' and 'lora', and to several processes (`accelerate launch` or `torchrun`); here are "
                f"{self.accelerator.num_processes}, with {self.method!r} and {self.curvature_name!r}."
            )
        # Accelerate itself shards on accelerators only.
        launched = self.accelerator.distributed_type == DistributedType.FSDP or parse_flag_from_env(
            "ACCELERATE_USE_FSDP"
        )
        return Shards(self.device) if possible and (launched if asked is None else asked) else None

    def _vector_shards(self, number: int) -> int:
        if not isinstance(number, int) or number < 1 or self.accelerator.num_processes % number:
            raise ConfigError(
                f"vector_shards={number!r}: {self.accelerator.num_processes} processes cannot be cut into groups of "
                "so many. Start a multiple of it, with `accelerate launch` or `torchrun`."
            )
        if number > 1 and (self.method not in ("source", "fast-source") or self.curvature_name == "exact"):
            raise ConfigError(
                f"vector_shards={number} belongs to method='source' and 'fast-source', and not to curvature='exact'; "
                f"here they are {self.method!r} and {self.curvature_name!r}."
            )
        return number

    def _vector_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        if name not in known or known[name].itemsize > dtype.itemsize:
            raise ConfigError(
                f"vector_dtype={name!r}: vectors are held in 'bfloat16' or 'float32', and no wider than dtype={dtype}."
            )
        if self.method not in ("source", "fast-source") or not isinstance(self.curvature, JointCurvature):
            raise ConfigError(
                f"vector_dtype={name!r} belongs to method='source' and 'fast-source' with curvature='joint'; "
                f"here they are {self.method!r} and {self.curvature_name!r}."
            )
        return known[name]

    def split(self, queries: Queries, granularity: QueryGranularity = "token") -> Queries:
        """A query for each token of the answers, or for each part of them that is marked (see `mark`).

        Args:
            queries: what to explain.
            granularity: `"token"`: `<name>_t0`, `<name>_t1`, ... of each answer; `"span"`: `<name>_s0`, ... of each
                run of tokens that are asked about; `"sequence"`: the queries as they are.

        Raises:
            ConfigError: for another granularity.
            DataError: if the queries are rows, which are asked about as a whole.
            UnsupportedError: if the model is an encoder-decoder, or the method compares texts.
        """
        if granularity != "sequence":
            self._refuse_parts()
        first = 0 if getattr(self.task_of(self.record.stages[-1]), "virtual_tokens", 0) else 1
        return split_queries(self.encode(queries), granularity, self.processing_class, first)

    def mark(self, queries: Queries, spans: Mapping[str, Span | Iterable[Span]]) -> Queries:
        """Queries that ask about parts of their answers only.

        Args:
            queries: what to explain.
            spans: query -> its part, or several: a text that the answer holds, or `(first, end)` in letters. Every
                token that a part touches is asked about. Queries that are not named stay whole.

        Raises:
            DataError: if there is no such query or part, or the queries are rows.
            UnsupportedError: see `split`.
        """
        self._refuse_parts()
        return mark_spans(self.encode(queries), spans, self.processing_class)

    def _refuse_parts(self) -> None:
        if METHODS[self.method].reads_text:
            raise UnsupportedError(f"method={self.method!r} compares whole texts, which have no parts.")
        if self.record.stages[-1].is_encoder_decoder:
            raise UnsupportedError("An encoder-decoder reads its own answer, so it is asked about as a whole.")

    def work(self, queries: Queries, **more: Any) -> Work:
        """Where finished work on these queries is kept: nowhere, if no `cache_dir` was given."""
        if self.cache_dir is None or self._change_model is not None:  # a member of an ensemble that changes the model
            return Work()
        given = {key: self._given[key] for key in ("num_samples", "max_tokens_per_batch", "memory_budget", "seed")}
        identity = {
            "versions": [__version__, torch.__version__],
            "record": record_digest(self.record),
            "settings": self.settings(),
            "given": given,
            "dtype": [str(self.dtype), str(self.vector_dtype)],
            "device": self.device.type,
            "model": None if self.make_model is None else self.make_model.__qualname__,
            "processes": [self.accelerator.process_index, self.accelerator.num_processes, self.vector_shards],
            "queries": [queries.rows, queries.are_rows],
            **more,
        }
        return Work(self.cache_dir / digest(identity)[:32])

    def _notes(self, stages: Iterable[str]) -> str:
        taken = "" if self.taken is None else self.taken[1]
        return "\n".join(note for note in (self.note, taken, self.trust(stages)) if note)

    # ---- queries -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        max_new_tokens: int = 32,
        names: Sequence[str] | None = None,
        batch_size: int = 32,
        **generate_kwargs: Any,
    ) -> Queries:
        """Let the trained model complete prompts, and make queries of what it said.

        Args:
            prompts: texts, or chats (lists of messages) where the tokenizer has a chat template.
            max_new_tokens: longest completion.
            names: by default `q0`, `q1`, ...
            batch_size: prompts generated at once.
            generate_kwargs: for `model.generate`; greedy decoding by default.

        Raises:
            DataError: if a prompt is empty or leaves no room for the completion.
            ConfigError: if `max_new_tokens` is not positive.
        """
        if self.processing_class is None:
            raise DataError(
                "The record holds no tokenizer: train with `processing_class=`, or use Queries.from_dataset."
            )
        refuse_one_text("prompts", prompts)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: a completion has at least one token (32 is usual).")
        prompts = [prompt_text(self.processing_class, prompt) for prompt in prompts]
        last = self.record.stages[-1]
        with nullcontext() if self.shards is None else self.entered(last) as shared:
            model = self.build_model(last) if shared is None else shared.model
            rows: list[dict[str, list[int]]] = []
            for start in self.progress(range(0, len(prompts), batch_size), "generating"):
                texts = prompts[start : start + batch_size]
                rows += complete(
                    model, self.processing_class, texts, self.context_length, max_new_tokens, **generate_kwargs
                )
        completions = [
            self.processing_class.decode([label for label in row["labels"] if label != -100], skip_special_tokens=True)
            for row in rows
        ]
        names = [f"q{i}" for i in range(len(prompts))] if names is None else list(names)
        return self.encode(Queries(names, prompts, completions, rows))

    # ---- scores ------------------------------------------------------------------------------------------------

    def scores(
        self,
        dataset: Dataset | None,
        queries: Queries,
        stage: str | None = None,
        granularity: Granularity = "row",
        query_granularity: QueryGranularity = "sequence",
    ) -> np.ndarray | list[np.ndarray]:
        """Raw scores of a stage's rows, in the order of the dataset.

        Args:
            dataset: the stage's dataset as the Trainer took it; `None` for the rows the record holds. With
                `granularity="token"` it may be some of its rows, with the `source_row` that `attribute` gave them.
            queries: what to explain.
            stage: which stage; may be left out if there is only one.
            granularity: `"row"`, or `"token"` for each label token of the rows: what training on that token did. A
                row's score is their sum. It takes a pass of the row for each token: ask for the rows that matter.
            query_granularity: `"sequence"`, or `"token"` or `"span"` for the parts of each answer (see `split`).

        Returns:
            float32 `[queries, rows]`, nats for `method="source"`; 0 for rows that the stage never trained on, which
            had no influence. Of tokens: for each row float32 `[queries, tokens]`, 0 for those that were no labels.

        Raises:
            DataError: if the dataset is not the recorded one, or a query cannot be used.
            RecordError: if there is no such stage.
            UnsupportedError: of tokens: for a method other than Source, an ensemble, an index, or rows that are no
                text of a decoder.
        """
        record, queries = self.record.stage(stage), self.split(queries, query_granularity)
        check_choice("granularity", granularity, ("row", "token"))
        if granularity == "token":
            return [row.scores for row in row_token_scores(self, queries, record, rows_of(self, record, dataset)[1])]
        rows = self.rows(record) if dataset is None else self.set_dataset(record.name, dataset)
        found = rows.as_given(self._stage_scores(record, queries))
        self._remember(queries, [record.name])
        return found

    def _remember(self, queries: Queries, stages: Iterable[str]) -> None:
        before: list[str] = []
        if self.attributed is not None and same_queries(self.attributed[0], queries):
            before = self.attributed[1]
        self.attributed = (queries, list(dict.fromkeys([*before, *stages])))

    def scores_std(
        self, dataset: Dataset | None, queries: Queries, stage: str | None = None, of_mean: bool = False
    ) -> np.ndarray:
        """How far the members of the ensemble differ about each score: their standard deviation.

        What another member would have said is about this far from `scores`. After `scores` it costs nothing more.

        Args:
            dataset, queries, stage: see `scores`.
            of_mean: the standard error of the mean instead, `std / sqrt(members)`: how far `scores` is from what
                infinitely many members of this kind would give.

        Returns:
            float32 `[queries, rows]`, in the unit of the scores.

        Raises:
            ConfigError: if there is no ensemble, or only one member.
        """
        self._require_members()
        record = self.record.stage(stage)
        rows = self.rows(record) if dataset is None else self.set_dataset(record.name, dataset)
        std = self.ensemble.moments(record, self.encode(queries)).std()
        return rows.as_given((std / self.ensemble.size**0.5 if of_mean else std).astype(np.float32))

    def _require_members(self) -> None:
        if self.ensemble is None or self.ensemble.size < 2:
            raise ConfigError(
                "A standard deviation needs at least two members: give several records, or `ensemble='dropout'` or "
                "'lora' with `ensemble_size=`."
            )

    @naming_the_fix()
    def self_influence(self, dataset: Dataset | None = None, stage: str | None = None) -> np.ndarray:
        """Influence of every row on its own loss, at the cost of a few passes (see `source/self_influence.py`).

        Of an ensemble, the mean over its members.

        Rows that no other row supports come first: mislabelled, rare and memorised ones.

        Args:
            dataset, stage: see `scores`.

        Returns:
            float32 `[rows]`, nats, in the order of the dataset; 0 for rows that never trained.

        Raises:
            UnsupportedError: for a method other than `source`.
            DataError: if the dataset is not the recorded one.
        """
        if self.method != "source":
            raise UnsupportedError(
                f"method={self.method!r} has no self-influence of its own: use method='source', or score a few rows "
                "as queries with `Queries.from_rows`."
            )
        self.record.require_complete()
        record = self.record.stage(stage)
        rows = self.rows(record) if dataset is None else self.set_dataset(record.name, dataset)
        if self.ensemble is not None:
            parts = (member.self_influence(dataset, record.name) for member in self.ensemble.members())
            return (sum(parts) / self.ensemble.size).astype(np.float32)
        found = own_influence(self, record, rows)
        return rows.as_given(found[None].astype(np.float32))[0]

    @naming_the_fix()
    def row_losses(self, stage: str | None = None) -> np.ndarray:
        """Loss of every row of a stage at the stage's final weights: float64 `[rows]` by row number, nats."""
        record = self.record.stage(stage)
        return final_losses(self, record, self.rows(record))

    @naming_the_fix()
    def _stage_scores(self, stage: StageRecord, queries: Queries) -> np.ndarray:
        """Scores by row number. The walk stops where it is and goes on when an earlier stage is asked for."""
        if self.ensemble is not None:
            return self.ensemble.moments(stage, queries).mean.astype(np.float32)
        if self.index is not None:
            return self._index_scores(stage, queries)
        self.record.require_complete()
        key = _walk_key(queries)
        if key not in self._walks:
            self.follow(queries, in_chunks(self, queries, METHODS[self.method]))
        found = self._walked[key]
        while stage.name not in found:
            try:
                done, scores = next(self._walks[key])
            except torch.linalg.LinAlgError as error:
                raise UnsupportedError(
                    f"A curvature has no eigenvalues in numbers ({error}), as where a training diverged: look at its "
                    "loss, and lower its learning rate."
                ) from error
            if self.accelerator.num_processes > 1:
                scores = self.accelerator.reduce(torch.as_tensor(scores, device=self.device)).cpu().numpy()
            if not np.isfinite(scores).all():
                raise UnsupportedError(
                    f"Scores of stage {done.name!r} are not finite: the recorded weights or preconditioner hold "
                    "non-finite values. Run `record.verify()`, and check the training loss for divergence."
                )
            found[done.name] = scores
        return found[stage.name]

    def follow(self, queries: Queries, scores: Scores) -> None:
        """Take the scores of queries from a method that is under way, one stage after another."""
        # One walk at a time: its vectors are as large as the model times the queries.
        self._walks = {_walk_key(queries): scores}
        self._walked[_walk_key(queries)] = {}

    def is_followed(self, queries: Queries) -> bool:
        """Whether scores of these queries are there, or under way."""
        return _walk_key(self.encode(queries)) in self._walks

    def attribute(
        self,
        dataset: Dataset | None,
        queries: Queries,
        stage: str | None = None,
        return_scores: bool = False,
        std: bool = False,
        granularity: Granularity = "row",
        query_granularity: QueryGranularity = "sequence",
    ) -> Dataset | np.ndarray | list[np.ndarray]:
        """Scores as columns of the dataset they belong to.

        Args:
            dataset, queries, stage, granularity, query_granularity: see `scores`.
            return_scores: give the raw array instead.
            std: of an ensemble, also the columns `source_<name>_std` (see `scores_std`).

        Returns:
            The dataset with `source_row` (int64, the row's number in training) and one float32 column
            `source_<name>` per query, ready for `sort`, `filter` and `push_to_hub`. With `granularity="token"` it has
            a list of the row's tokens, `source_tokens`, and a list of float32 for each query,
            `source_<name>_tokens`. Its `info.description` says on what assumption the scores rest, if any, and how
            far to trust them, if that was evaluated (`trust`).

        Raises:
            DataError: also if a column of that name exists.
        """
        if return_scores:
            return self.scores(dataset, queries, stage, granularity, query_granularity)
        record, queries = self.record.stage(stage), self.split(queries, query_granularity)
        if granularity == "token":
            return self._token_columns(record, dataset, queries)
        rows = self.rows(record) if dataset is None else self.set_dataset(record.name, dataset)
        check_names(rows.given, queries.names, std)
        if std:
            self._require_members()
        scores = self.scores(dataset, queries, stage, granularity)
        spread = self.scores_std(dataset, queries, stage) if std else None
        columns = add_score_columns(rows.given, scores, queries.names, spread)
        return with_note(columns, self._notes([record.name]))

    def _token_columns(self, stage: StageRecord, dataset: Dataset | None, queries: Queries) -> Dataset:
        given, numbers = rows_of(self, stage, dataset)
        check_token_names(given, queries.names)
        found = row_token_scores(self, queries, stage, numbers)
        tokens = [token_texts(self.processing_class, row.ids) for row in found]
        columns = add_token_columns(given, numbers, tokens, [row.scores for row in found], queries.names)
        return with_note(columns, self._notes([stage.name]))

    def top(
        self,
        queries: Queries,
        k: int = 10,
        opposing: bool = True,
        stages: Iterable[str] | None = None,
        filter: "str | Path | SourceAttributor | None" = None,
        candidates: int = 1000,
        query_granularity: QueryGranularity = "sequence",
    ) -> Dataset:
        """The rows of every stage that say most about each query, as one long table.

        Args:
            queries: what to explain.
            k: supporting rows (ranks 1 to k) per query and stage.
            opposing: also the k most opposing ones (ranks -1 to -k).
            stages: names of the stages wanted; all by default.
            filter: score only rows that a cheaper method proposes, for very large sets (see `filtered.py`): the name
                of a method such as `"bm25"`, an index (folder or id on the Hub), or an attributor of the same record.
            candidates: rows that the filter proposes per query and stage.
            query_granularity: `"token"` or `"span"` for rows of each part of the answers (see `split`).

        Returns:
            Columns `query`, `stage`, `row`, `rank`, `score`, `text`. Its `info.description` says on what assumption
            the scores rest, if any, and how far to trust them, if that was evaluated (`trust`). With a filter it says
            what share of the best rows the filter is likely to have proposed.

        Raises:
            ConfigError: if `k` is not positive, or the filter or the number of candidates makes no sense.
        """
        if not isinstance(k, Integral) or k < 1:
            raise ConfigError(f"k={k!r}: ask for at least one row.")
        named = [stages] if isinstance(stages, str) else stages
        wanted = [self.record.stage(name) for name in (named or [stage.name for stage in self.record.stages])]
        queries = self.split(queries, query_granularity)
        if filter is not None:
            return filtered_top(self, queries, k, opposing, wanted, filter, candidates)
        parts = []
        for stage in wanted:
            rows = self.rows(stage)
            scores = self._stage_scores(stage, queries)
            text = partial(rows.text, processing_class=self.processing_class)
            # Rows that the Trainer filtered out have a number, but no score.
            parts.append((stage.name, scores[:, rows.trained_rows], rows.trained_rows, text))
        self._remember(queries, [stage.name for stage in wanted])
        return with_note(top_table(parts, queries.names, k, opposing), self._notes([stage.name for stage in wanted]))

    # ---- an index ----------------------------------------------------------------------------------------------

    @naming_the_fix()
    def build_index(self, folder: str | Path, numbers: int | None = None, precision: str = "int8") -> Path:
        """Write an index to a folder, from which new queries are answered without another pass over the rows.

        It costs about as much as attributing a few queries, and holds `numbers` numbers of each row: two or three
        bytes each. A build that was cut off goes on when it is run again. `SourceAttributor(..., index=folder)`
        answers from it, and says how accurate it is (`SourceIndex.accuracy`).

        Args:
            folder: to write to; empty, or with an index that was begun.
            numbers: kept of each row, the more the more accurate; by default 2,048.
            precision: of them, `"int8"` or `"full"`.

        Returns:
            The folder.

        Raises:
            UnsupportedError: for a method other than Source, or an ensemble.
            ConfigError: if a setting is impossible, or the folder holds something else.
        """
        from ..index import NUMBERS, build_index

        return build_index(self, folder, NUMBERS if numbers is None else numbers, precision)

    @naming_the_fix()
    def plan_index(self, numbers: int | None = None, precision: str = "int8") -> Plan:
        """What `build_index` will cost, from a short calibration: `written` is the size of the index.

        Args:
            numbers, precision: as of `build_index`.

        Raises:
            UnsupportedError, ConfigError: as `build_index` does.
        """
        from ..index import NUMBERS, plan_index

        return plan_index(self, NUMBERS if numbers is None else numbers, precision)

    def _open_index(self, index: "str | Path | SourceIndex") -> "SourceIndex":
        from ..index import SourceIndex, refuse_unfit

        found = index if isinstance(index, SourceIndex) else SourceIndex.load(index)
        refuse_unfit(found, self)
        return found

    def _index_scores(self, stage: StageRecord, queries: Queries) -> np.ndarray:
        from ..index import index_scores

        key = json.dumps(queries.rows, sort_keys=True)
        if key not in self._walked:
            self._walked = {key: index_scores(self, queries)}
        return self._walked[key][stage.name]

    # ---- cost -------------------------------------------------------------------------------------------------

    @naming_the_fix()
    def plan(
        self,
        dataset: Dataset | None,
        queries: Queries,
        stage: str | None = None,
        granularity: Granularity = "row",
        query_granularity: QueryGranularity = "sequence",
        filter: "str | Path | SourceAttributor | None" = None,
        candidates: int = 1000,
    ) -> Plan:
        """What an attribution will cost, from a short calibration; nothing else is run.

        For Source, and for the methods that replay the run, it also says what the others would cost, which is the
        better buy, and why.

        Args:
            dataset, queries, stage, granularity, query_granularity: as of `scores`; without `stage`, the first one,
                so that all are walked through.
            filter, candidates: as of `top`: only rows that a cheaper method proposes are scored, of the stage that is
                named, or of all of them.
        """
        record = self.record.stage(stage) if stage or len(self.record.stages) == 1 else self.record.stages[0]
        queries = self.split(queries, query_granularity)
        check_choice("granularity", granularity, ("row", "token"))
        if granularity == "token":
            refuse_tokens(self, [record])
            return plan_tokens(self, queries, record, rows_of(self, record, dataset)[1])
        if dataset is not None:
            self.set_dataset(record.name, dataset)
        if filter is not None:
            return filtered_plan(self, queries, [record] if stage else list(self.record.stages), filter, candidates)
        if METHODS[self.method].reads_text:
            return text_plan(self, queries, list(self.record.stages[record.index :]))
        plan = advised_plan(self, queries, record)
        return plan if self.ensemble is None else self.ensemble.plan(plan)


def _walk_key(queries: Queries) -> str:
    return json.dumps(queries.rows, sort_keys=True)
