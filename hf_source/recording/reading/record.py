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
"""Reading a training record."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, RecordError
from ...logs import get_logger
from ...paths import checked_path
from ..writer import RECORD_FILE, file_entry, read_record_json
from .hub import download_record, looks_like_hub_id, push_model, push_record
from .stage import StageRecord


if TYPE_CHECKING:
    from .verifying import ReplayCheck

logger = get_logger(__name__)


class TrainingRecord:
    """What training left behind: the stages of one model's life.

    Attributes:
        path: folder of the record.
        stages: list of `StageRecord`, in the order in which they trained.
        repo_id: of the Hub repository that it was loaded from, or `None`.
        left_out: stage -> why it is not among `stages`: a file of it, or of a stage before it, is torn.
        note: what `usable` says of stages that it left out; empty otherwise.

    Example:
        >>> record = TrainingRecord.load("runs/capitals")  # doctest: +SKIP
        >>> record.stage("sft").steps().learning_rate  # doctest: +SKIP
    """

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path = path
        self.data = data
        self.repo_id: str | None = None
        self.left_out: dict[str, RecordError] = {}
        self.note = ""
        self.stages = [StageRecord(self, stage) for stage in data["stages"]]

    def __repr__(self) -> str:
        return f"TrainingRecord({str(self.path)!r}, stages={[stage.name for stage in self.stages]})"

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None, token: str | bool | None = None) -> "TrainingRecord":
        """Open a record; every file it lists must be there and whole in size (`verify` also compares hashes).

        A later stage with a file that is missing or torn is left out with a warning, and so are those after it: what
        trained before does not depend on them.

        Args:
            path: folder of the record, or id of a Hub repository that holds one.
            revision, token: branch, tag or commit on the Hub, and what authenticates there.

        Raises:
            ConfigError: if the path is no path.
            RecordError: if there is no record, a file that every stage needs is missing or torn, or another version
                wrote it.
        """
        fix = (
            "pass the `record_dir` of the training run (by default `<output_dir>/record`), or a record's id on the Hub"
        )
        if isinstance(path, TrainingRecord):
            fix = "it is open already, SourceAttributor(record) takes it as it is"
        folder = checked_path(path, "A training record", fix)
        repo_id = str(path) if not folder.exists() and looks_like_hub_id(str(path)) else None
        if repo_id is not None:
            folder = download_record(repo_id, revision, token)
        record = cls(folder, read_record_json(folder))
        record._check_list(record.data.get("files", {}))
        for index, stage in enumerate(record.stages):
            try:
                record._check_list(stage.data["files"])
            except RecordError as error:
                if not index:
                    raise
                record = record._until(index, error)
                logger.warning(f"{error} Stages before it can be used: {', '.join(s.name for s in record.stages)}.")
                break
        record.repo_id = repo_id
        return record

    def _until(self, index: int, error: RecordError) -> "TrainingRecord":
        """The record without the stages from one on, which `error` is about."""
        found = TrainingRecord(self.path, {**self.data, "stages": self.data["stages"][:index]})
        found.repo_id = self.repo_id
        found.left_out = {stage.name: error for stage in self.stages[index:]} | self.left_out
        return found

    def usable(self) -> "TrainingRecord":
        """The stages that came to their end, up to the first that did not; `note` says what is left out, and why.

        Raises:
            RecordError: if not even the first did.
        """
        complete = next((i for i, stage in enumerate(self.stages) if stage.status != "complete"), len(self.stages))
        if not complete:
            self.require_complete()
        found = self
        if complete < len(self.stages):
            try:
                self.stages[complete].require_complete()
            except RecordError as error:
                found = self._until(complete, error)
        if found.left_out:
            reason = next(iter(found.left_out.values()))
            found.note = (
                f"The model is that of stage {found.stages[-1].name!r}: {', '.join(found.left_out)} left out. {reason}"
            )
        return found

    @classmethod
    def pull(
        cls, repo_id: str, folder: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> "TrainingRecord":
        """Copy a record from the Hub to a folder, and open it.

        Raises:
            RecordError: if there is none, the folder holds another one, or a file is torn.
        """
        folder = Path(folder).expanduser()
        if (folder / RECORD_FILE).exists():
            raise RecordError(f"{folder} holds a record already: choose another folder, or remove it first.")
        return cls.load(download_record(repo_id, revision, token, folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_rows: bool | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload training record",
    ) -> str:
        """Publish the record as a model repository, in one commit, with a card that says what is in it.

        Args:
            repo_id: `"user/name"`; made if it does not exist.
            include_rows: publish the training rows that the record holds, or leave them out. Must be said if it holds
                any.
            private: make the repository private. By default it is, unless the rows of every stage come from datasets
                on the Hub that anybody can read, and so does the model that training started from.
            token: what authenticates; default the one of `hf auth login`.
            revision: branch to push to; made if it does not exist.
            commit_message: of the commit. Of a card that is there, only the section between the markers changes.

        Returns:
            Address of the commit.

        Raises:
            ConfigError: if it is not said what is to happen with the rows, or a public repository was to be private.
            RecordError: if the record is not complete or not whole, or the Hub refuses.
        """
        return push_record(
            self,
            repo_id,
            include_rows,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def push_model_to_hub(
        self,
        repo_id: str,
        stage: str | None = None,
        *,
        record_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Publish the model that a stage ended with, and its tokenizer, in one commit, with a card.

        Args:
            repo_id: `"user/name"`; made if it does not exist.
            stage: its name; the last by default.
            record_id: repository of the record, which the card then names.
            private, token, revision, commit_message: see `push_to_hub`.

        Returns:
            Address of the commit.

        Raises:
            ConfigError: if a public repository was to be private.
            RecordError: if the stage is not complete or its model cannot be rebuilt, or the Hub refuses.
        """
        chosen = self.stage(self.stages[-1].name if stage is None and self.stages else stage)
        given = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
        return push_model(self, repo_id, chosen, record_id, **given)

    def check_sizes(self) -> None:
        """Raise `RecordError` if any listed file is missing or not of its size."""
        for files in self._file_lists():
            self._check_list(files)

    def _check_list(self, files: Mapping[str, dict]) -> None:
        for name in files:
            self.check_size(files, name)

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Sequence[str | Path],
        *,
        dataset: Any,
        args: Any,
        record_dir: str | Path,
        model: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        stage: str = "train",
        num_segments: int | None = None,
        segment_boundaries: Sequence[Any] | None = None,
        record_rows: bool = True,
        record_columns: Sequence[str] | None = None,
        max_length: int | None = None,
        overwrite_stage: bool = False,
    ) -> "TrainingRecord":
        """Build a record, or its next stage, from checkpoints of a run that was not recorded.

        Learning rates are computed by the run's own scheduler and compared with every checkpoint; preconditioners come
        from `optimizer.pt`. Which row was trained on when is not known: visits are *assumed uniform*, and everything
        that is made of the record says so.

        Args:
            checkpoints: folders (or Hub ids, `user/name@revision`) that one run of a Trainer left.
            dataset: its rows, as the Trainer took them.
            args: its `TrainingArguments`, or a dictionary of its settings; `training_args.bin` is not read.
            record_dir: folder of the record.
            model: the model that training started from, with the same parameters frozen, or its path or Hub id; may be
                left out if a checkpoint is of step 0.
            processing_class, data_collator: those of the run.
            stage: name of the stage.
            num_segments: segments of equal summed learning rate; each must hold a checkpoint. Default: up to 3.
            segment_boundaries: own cuts, see `SourceConfig`.
            record_rows, record_columns, max_length, overwrite_stage: see `SourceConfig`.

        Raises:
            RecordError: if checkpoints, model, dataset and args do not fit together; names what differs.
            ConfigError, DataError, UnsupportedError: if something is missing, or cannot be rebuilt.
        """
        from ..config import RecordingOptions
        from .from_checkpoints import record_from_checkpoints

        options = RecordingOptions(
            record_dir=str(record_dir),
            stage=stage,
            segment_boundaries=None if segment_boundaries is None else list(segment_boundaries),
            record_rows=record_rows,
            record_columns=None if record_columns is None else list(record_columns),
            max_length=max_length,
            overwrite_stage=overwrite_stage,
        )
        run = {"args": args, "model": model, "processing_class": processing_class, "data_collator": data_collator}
        record_from_checkpoints(checkpoints, dataset, options, num_segments, **run)
        return cls.load(record_dir)

    def merged(self, num_segments: int | None) -> "TrainingRecord":
        """The record as if its stages had been recorded with fewer segments: neighbouring ones read as one.

        Weights and preconditioner of a segment are averages along it, so that nothing is lost but where in the segment
        they were, and a walk makes fewer passes over the rows.

        Args:
            num_segments: segments of each stage, of as equal summed learning rates as the recorded cuts allow; stages
                that have fewer stay as they are. `None` for those that were recorded.

        Raises:
            ConfigError: if it is not positive, or every stage was recorded with fewer.
        """
        most = max((len(stage.data["segments"]) for stage in self.stages), default=0)
        if num_segments is not None and (type(num_segments) is not int or not 0 < num_segments <= max(most, 1)):
            raise ConfigError(
                f"num_segments={num_segments!r}: the record's stages have up to {most} segments, which can be read as "
                f"1 to {most}. More are recorded by SourceConfig(num_segments=...)."
            )
        if all(len(stage.segments) == min(len(stage.data["segments"]), num_segments or most) for stage in self.stages):
            return self
        found = copy.copy(self)
        found.stages = [stage.merged(num_segments) for stage in self.stages]
        return found

    def stage(self, name: str | None = None) -> StageRecord:
        """The stage of a name; `None` for the only one.

        Raises:
            RecordError: if there is no such stage, or several and no name; lists the names. If the stage was left out,
                why.
        """
        names = [stage.name for stage in self.stages]
        if name is None and len(self.stages) == 1:
            return self.stages[0]
        if name in self.left_out:
            raise self.left_out[name]
        if name not in names:
            said = "holds several stages" if name is None else f"has no stage {name!r}"
            raise RecordError(f"The record {self.path} {said}: choose `stage=` from {names}.")
        return self.stages[names.index(name)]

    def require_complete(self) -> None:
        """Raise if there is no stage, or one is torn or did not come to its end, unless `usable` left it out.

        Raises:
            RecordError: naming the stage, and how to go on.
        """
        if not self.stages:
            raise RecordError(f"The record {self.path} holds no stage yet: train one with SourceTrainer.")
        for error in () if self.note else self.left_out.values():
            raise error
        for stage in self.stages:
            stage.require_complete()

    def processing_class(self) -> Any:
        """The tokenizer of the run, or `None` if it had none."""
        from transformers import AutoTokenizer

        folder = self.path / "tokenizer"
        return AutoTokenizer.from_pretrained(folder) if folder.is_dir() else None

    def verify(self, replay: int = 0) -> list[str]:
        """Re-hash every file, read every step, and replay the first steps of every stage.

        Args:
            replay: optimizer steps of each stage to train again from the recorded rows, and to compare with the
                recorded weights. A stage that cannot be replayed (dropout, rows not stored, ...) is left out with a
                warning.

        Returns:
            Problems, one sentence each; empty if the record is whole.
        """
        problems = self._damages()
        if problems or not replay:
            return problems
        checks = self.check_replays(replay)
        for check in checks:
            if check.note:
                logger.warning(f"Stage '{check.stage}' was not compared with a replay: {check.note}.")
        return [check.problem for check in checks if check.problem]

    def check_replays(self, num_steps: int) -> "list[ReplayCheck]":
        """Replay the first steps of every stage; what was compared, and how well it agreed."""
        from .verifying import check_replay

        return [check_replay(stage, num_steps) for stage in self.stages]

    def _damages(self) -> list[str]:
        problems = list(dict.fromkeys(map(str, self.left_out.values())))
        for files in self._file_lists():
            for name in files:
                try:
                    self.check_hash(files, name)
                except RecordError as error:
                    problems.append(str(error))
        for stage in self.stages if not problems else []:
            try:
                stage.steps()
            except RecordError as error:
                problems.append(str(error))
        return problems

    def _file_lists(self) -> list[Mapping[str, dict]]:
        return [self.data.get("files", {}), *(stage.data["files"] for stage in self.stages)]

    def check_size(self, files: Mapping[str, dict], name: str) -> None:
        """Raise `RecordError` if a listed file is missing or not of its size."""
        file = self.path / name
        if not file.is_file():
            raise self.damaged(name, "it is missing")
        if file.stat().st_size != files[name]["bytes"]:
            raise self.damaged(name, f"it has {file.stat().st_size:,} bytes instead of {files[name]['bytes']:,}")

    def check_hash(self, files: Mapping[str, dict], name: str) -> None:
        """Raise `RecordError` if a listed file does not hold what was recorded."""
        self.check_size(files, name)
        if file_entry(self.path / name)["sha256"] != files[name]["sha256"]:
            raise self.damaged(name, "its content differs from what was recorded")

    def damaged(self, name: str, reason: str) -> RecordError:
        """The error that says what is wrong with a file, and what to do."""
        return RecordError(
            f"{self.path / name} is damaged: {reason}. Restore it from a copy of the record, or train its stage again "
            "(overwrite_stage=True, or resume_from_checkpoint from a checkpoint of that run)."
        )
