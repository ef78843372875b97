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
"""The card of published scores: what every column means, how far to trust it, how to load it."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from .cards import card, code, markdown


def configs(splits: Mapping[str, str], listed: bool, tokens: bool = False) -> list[dict[str, Any]]:
    """The `configs:` of the card's header.

    Args:
        splits: stage -> split.
        listed: scores are lists, in a config of their own.
        tokens: the influence of tokens is there.
    """
    stages = lambda folder: [{"split": name, "path": f"{folder}/{name}-*.parquet"} for name in splits.values()]  # noqa: E731
    found = [{"config_name": "default", "default": True, "data_files": stages("data")}]
    if listed:
        found.append({"config_name": "scores", "data_files": stages("scores")})
    for name in ("top_influences", "queries", *(["token_influences"] if tokens else [])):
        files_of_it = [{"split": "train", "path": f"{name}/train-*.parquet"}]
        found.append({"config_name": name, "data_files": files_of_it})
    return found


def attribution_card(content: Mapping[str, Any], repo_id: str | None, old: str | None = None) -> str:
    """The repository's README.

    Args:
        content: what the template shows.
        repo_id: of the repository; `None` for a folder.
        old: the card that is there, kept as far as its owner wrote it.

    Raises:
        ConfigError: if the header of the old card is no YAML.
    """
    from jinja2 import Environment, StrictUndefined

    template = (files("hf_source.outputs") / "templates/attribution_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"text": markdown, "code": code}
    place = repo_id or "path/to/this/folder"
    address = f"hf://datasets/{repo_id}" if repo_id else place
    text = environment.from_string(template).render(**content, place=place, address=address)
    header: dict[str, Any] = {
        "license": "unknown",
        "tags": ["hf_source", "training-data-attribution", "influence-functions", "interpretability"],
        "configs": configs(
            {stage["name"]: stage["split"] for stage in content["stages"]},
            content["listed"],
            content["num_shaded"] > 0,
        ),
    }
    if sources := _unique(stage["source"] for stage in content["stages"]):
        header["source_datasets"] = sources
    return card(header, text, old, anew=["configs"])


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))
