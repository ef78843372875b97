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
"""Recipes: a training stage as a YAML file, with overrides from the command line.

```yaml
model: gpt2                          # Hub id, folder, or a training record (the stage before this one goes on)
model_config: {model_type: gpt2, n_layer: 2, n_embd: 96}   # instead of `model`: from scratch
tokenizer: gpt2                      # by default the model's
dataset: {path: csv, data_files: facts.csv, split: train}  # arguments of datasets.load_dataset, or a file
peft: {r: 8, target_modules: [c_attn]}                     # arguments of peft.LoraConfig
trainer: sft                         # causal (default), sft and dpo (TRL), classification; see recipe_trainers
training: {output_dir: out/sft, record_dir: runs/capitals, stage: sft, learning_rate: 1.0e-4}   # SourceConfig
```

`training.resume_from_checkpoint: latest` goes on from the newest checkpoint in `output_dir`, if there is one.
"""

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .recipe_trainers import count_labels, kind_of, labelled_rows, recorded


KEYS = ("model", "model_config", "tokenizer", "dataset", "peft", "trainer", "training")

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML recipe and apply `key.subkey=value` overrides.

    Raises:
        ConfigError: if the file is missing or not a mapping, a key is unknown, or an override has no `=`.
    """
    recipe = read_settings(path)
    for override in overrides:
        apply_override(recipe, override)
    unknown = sorted(set(recipe) - set(KEYS))
    if unknown:
        raise ConfigError(f"{path} has the unknown key {unknown[0]!r}; a training recipe has {', '.join(KEYS)}.")
    for key in ("model_config", "peft", "training"):
        if recipe.get(key) is not None and not isinstance(recipe[key], dict):
            raise ConfigError(f"{path}: `{key}` holds a single value; write its settings as `name: value` lines.")
    return recipe


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: if the file is missing, not YAML or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}: give the path of a YAML file.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{path} holds no settings: write `key: value` lines, e.g. `model: gpt2`.")
    return settings


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in nested settings; the value is read as YAML.

    Raises:
        ConfigError: if there is no `=`, the value is not YAML, or `a` is not a mapping.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"Override {override!r} is not of the form key=value, e.g. training.learning_rate=1e-4.")
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"Override {override!r}: {parent!r} holds a single value, not settings of its own.")
    try:
        settings[last] = read_number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r} has a value that is not valid YAML: quote it.") from error


def read_number(value: Any) -> Any:
    """`1e-4` as the number people mean by it: YAML 1.1 reads it as text, for want of a dot."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def train_from_recipe(recipe: Mapping[str, Any]) -> Path:
    """Train one recorded stage as a recipe says.

    Returns:
        The folder of the record.

    Raises:
        ConfigError: if the recipe lacks something or a setting is unknown.
    """
    args, model, tokenizer, rows = _run_of(recipe)
    trainer, _ = recorded(kind_of(recipe))
    reference = {"ref_model": copy.deepcopy(model)} if kind_of(recipe) == "dpo" and not recipe.get("peft") else {}
    run = trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **reference)
    run.train(resume_from_checkpoint=_checkpoint(args))
    return Path(args.record_dir or Path(args.output_dir) / "record")


def _checkpoint(args: Any) -> str | bool | None:
    """What to resume from: a path, or with `latest` the newest checkpoint, if there is one."""
    from transformers.trainer_utils import get_last_checkpoint

    given = args.resume_from_checkpoint
    if given is True or given == "latest":
        return (Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None) or None
    return given or None


def trainer_of(path: str | Path, overrides: Sequence[str] = ()) -> Callable[[Any, int, str], Any]:
    """A recipe as `make_trainer(dataset, seed, output_dir)`: how an evaluation trains its stage again on fewer rows.

    Raises:
        ConfigError: if the recipe lacks something or a setting is unknown.
    """
    recipe = read_recipe(path, overrides)
    if kind_of(recipe) != "causal":
        raise ConfigError(
            f"{path} trains by `trainer: {recipe['trainer']}`, which is not trained again from a recipe: leave it out "
            "(the record says how), or give a `make_trainer` of your own."
        )
    arguments_of(recipe)
    return partial(_trainer, recipe=recipe)


def _trainer(dataset: Any, seed: int, output_dir: str, *, recipe: Mapping[str, Any]) -> Any:
    """An unrecorded Trainer of a recipe."""
    from transformers import Trainer, set_seed

    from .data import CausalLMCollator, prepare_rows

    own = {"seed": seed, "output_dir": output_dir, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = arguments_of({**recipe, "training": {**recipe["training"], **own}})
    set_seed(seed)  # the weights of a model from scratch, and of adapters
    model, tokenizer = load_model(recipe)
    rows = prepare_rows(dataset, tokenizer, args.max_length)
    return Trainer(model, args, train_dataset=rows, data_collator=CausalLMCollator(tokenizer))


def record_from_recipe(recipe: Mapping[str, Any], checkpoints: Sequence[str]) -> Any:
    """Rebuild the record of the run that a recipe describes from its checkpoints.

    Returns:
        The `TrainingRecord`.

    Raises:
        ConfigError: if the recipe lacks something or a setting is unknown.
    """
    from .recording import TrainingRecord

    args, model, tokenizer, rows = _run_of(recipe)
    options = ("stage", "segment_boundaries", "record_rows", "record_columns", "max_length", "overwrite_stage")
    return TrainingRecord.from_checkpoints(
        checkpoints,
        dataset=rows,
        args=args,
        record_dir=args.record_dir or Path(args.output_dir) / "record",
        model=model,
        processing_class=tokenizer,
        num_segments=recipe["training"].get("num_segments"),
        **{option: getattr(args, option) for option in options},
    )


def _run_of(recipe: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Settings, model, tokenizer and rows of a recipe."""
    from transformers import set_seed

    args = arguments_of(recipe)
    rows = load_rows(recipe["dataset"])
    set_seed(args.seed)  # the weights of a model from scratch, and of adapters
    if kind_of(recipe) == "classification":
        model, tokenizer = load_model(recipe, num_labels=count_labels(rows))
        return args, model, tokenizer, labelled_rows(rows, tokenizer, args.max_length)
    model, tokenizer = load_model(recipe)
    return args, model, tokenizer, rows


def arguments_of(recipe: Mapping[str, Any]) -> Any:
    """The `SourceConfig` of a recipe.

    Raises:
        ConfigError: if the recipe lacks something or a setting is unknown.
    """
    _, config = recorded(kind_of(recipe))
    for key in ("dataset", "training"):
        if not recipe.get(key):
            raise ConfigError(f"The recipe has no `{key}`: see `hf-source train --help` for an example.")
    known = {field.name for field in fields(config)}
    unknown = sorted(set(recipe["training"]) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise ConfigError(
            f"training.{unknown[0]} is not a setting of {config.__name__} (or TrainingArguments)."
            + (f" Did you mean {near[0]}?" if near else "")
        )
    try:
        args = config(**{key: read_number(value) for key, value in recipe["training"].items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The `training` settings do not fit together: {_one_line(error)}") from error
    return args


def load_model(recipe: Mapping[str, Any], num_labels: int | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a recipe.

    Args:
        recipe: see above.
        num_labels: of a classifier; a language model by default.

    Raises:
        ConfigError: if neither or both of `model` and `model_config` are given, or a scratch model has no tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    more = {} if num_labels is None else {"num_labels": num_labels}
    source, config = recipe.get("model"), recipe.get("model_config")
    if bool(source) == bool(config):
        raise ConfigError("Give either `model` (a Hub id, folder or record) or `model_config` (from scratch).")
    if config:
        if not recipe.get("tokenizer") or "model_type" not in config:
            raise ConfigError("A model from scratch needs `tokenizer`, and `model_type` in `model_config`.")
        tokenizer = _pretrained(AutoTokenizer, recipe["tokenizer"])
        settings = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, **config}
        settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model_type = settings.pop("model_type")
        model = kind.from_config(AutoConfig.for_model(model_type, **settings, **more))
    elif (Path(source) / "record.json").is_file():
        from .recording import TrainingRecord

        record = TrainingRecord.load(source)
        model = _stage_before(record, (recipe.get("training") or {}).get("stage")).build_model()
        tokenizer = _pretrained(AutoTokenizer, recipe["tokenizer"]) if recipe.get("tokenizer") else None
        tokenizer = tokenizer or record.processing_class()
    else:
        tokenizer = _pretrained(AutoTokenizer, recipe.get("tokenizer") or source)
        # Checkpoints are often bfloat16, in which small updates would round away.
        model = _pretrained(kind, source, dtype=torch.float32, **more)
    if recipe.get("peft"):
        from peft import LoraConfig, get_peft_model

        task = "CAUSAL_LM" if num_labels is None else "SEQ_CLS"
        model = get_peft_model(model, LoraConfig(task_type=task, **recipe["peft"]))
    return model, tokenizer


def _stage_before(record: Any, stage: str | None) -> Any:
    """The stage that a new one goes on from: the last, or the one before a stage that is trained anew."""
    names = [known.name for known in record.stages]
    stages = record.stages[: names.index(stage)] if stage in names else record.stages
    if not stages:
        raise ConfigError(
            f"No stage of the record {record.path} comes before {stage!r}: give `model_config`, or the `model` that "
            "it starts from."
        )
    return stages[-1]


def _pretrained(kind: Any, source: str, **settings: Any) -> Any:
    """`kind.from_pretrained`, with one line where nothing is found."""
    if not Path(source).exists() and str(source).count("/") != 1 and "/" in str(source):
        raise ConfigError(f"There is no folder {source}: give a folder that exists, or a Hub id such as gpt2.")
    try:
        return kind.from_pretrained(source, **settings)
    except OSError as error:
        raise ConfigError(f"{source} is no model or tokenizer that can be loaded: {_one_line(error)}") from error


def load_rows(source: str | Mapping[str, Any]) -> Any:
    """A dataset from a file (`.jsonl`, `.json`, `.csv`, `.parquet`), a saved dataset's folder, or `load_dataset`.

    Args:
        source: a path or Hub id, or arguments of `datasets.load_dataset`.

    Raises:
        ConfigError: if it has several splits and none is chosen, or it is missing or cannot be read.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix in kinds:
            if not path.is_file():
                raise ConfigError(f"There is no file {path}.")
            if not path.stat().st_size:
                raise ConfigError(f"{path} is empty: it should hold rows.")
            source = {"path": kinds[path.suffix], "data_files": str(path), "split": "train"}
        elif (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
            return load_from_disk(str(path))
        else:
            source = {"path": str(source), "split": "train"}
    try:
        dataset = load_dataset(**source)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ConfigError(f"The dataset {source} cannot be read: {_one_line(error.__cause__ or error)}") from error
    if isinstance(dataset, DatasetDict):
        raise ConfigError(f"The dataset has the splits {list(dataset)}: choose one with `dataset.split`.")
    return dataset
