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
"""The explorer as a Space: an app on the Hub that opens a record which is on the Hub too."""

import json
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import ConfigError, DataError
from ..hub import CARD_FILE, HubError, check_repo_id, commit, is_open, present_card
from ..outputs.cards import card


APP = '''\
"""The explorer of hf_source. Settings are in settings.json."""

import json
from pathlib import Path

from hf_source import SourceAttributor
from hf_source.explorer import Explorer, app


settings = json.loads((Path(__file__).parent / "settings.json").read_text(encoding="utf-8"))
attributor = SourceAttributor.from_record(settings.pop("record"), progress=False, **settings)
app.launch(Explorer(attributor), server_name="0.0.0.0")
'''


def space_files(
    record: str, title: str = "Why does the model say that?", old_card: str | None = None, **settings: Any
) -> dict[str, bytes]:
    """What a Space holds: the app, its settings, what it needs, a card, and this library.

    Args:
        record: id of the record on the Hub.
        title: of the Space.
        old_card: that is there, and kept as far as somebody else wrote it.
        settings: of `SourceAttributor`, such as `index="me/my-index"`; JSON-able.
    """
    header = {"title": title, "sdk": "gradio", "sdk_version": _installed("gradio"), "app_file": "app.py"}
    header |= {"tags": ["hf_source", "training-data-attribution"], "models": [record]}
    said = "Rows behind what a model says, with [hf_source](https://arxiv.org/abs/2405.12186)."
    text = card(header, said, old_card, anew=("sdk", "sdk_version", "app_file", "models"))
    needed = [line for line in requires("hf_source") or [] if "extra ==" not in line]
    found = {
        CARD_FILE: text.encode(),
        "app.py": APP.encode(),
        "settings.json": (json.dumps({"record": record, **settings}, indent=1) + "\n").encode(),
        "requirements.txt": ("\n".join(needed) + "\n").encode(),
    }
    package = Path(str(files("hf_source")))
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".j2") or path.name == "py.typed":
            found[f"hf_source/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return found


def push_space(
    record: str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload explorer",
    **settings: Any,
) -> str:
    """Make a Space of the explorer, or bring one up to date, in one commit.

    Args:
        record: id of the record on the Hub (`TrainingRecord.push_to_hub`). If it is private, give the Space a secret
            `HF_TOKEN` that may read it.
        repo_id: of the Space, `"user/name"`.
        private: by default it is, unless anybody can read the record.
        token: what authenticates; default the one of `hf auth login`.
        commit_message: of the commit.
        settings: of `SourceAttributor`, JSON-able.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: if the record is a folder of this machine, a setting is no JSON, or gradio is not installed.
        DataError: if the Hub refuses.
    """
    if Path(record).expanduser().exists():
        raise ConfigError(
            f"{record} is on this machine, where a Space cannot read it: `hf-source record push` it first."
        )
    check_repo_id(record)
    check_repo_id(repo_id)
    private = not is_open(record, "model") if private is None else private
    try:
        space_files(record, **settings)
    except TypeError as error:
        raise ConfigError(f"The settings of a Space are kept as JSON ({error}): leave out objects.") from error

    def operations(api: HfApi, present: list[str]) -> list[CommitOperationAdd]:
        content = space_files(record, old_card=present_card(api, repo_id, "space", present), **settings)
        return [CommitOperationAdd(name, data) for name, data in content.items()]

    try:
        return commit(
            repo_id,
            "space",
            operations,
            private=private,
            token=token,
            revision=None,
            commit_message=commit_message,
            space_sdk="gradio",
        )
    except HubError as error:
        raise DataError(
            f"The Space {repo_id} could not be written ({error}). Check the name, and that you are logged in with a "
            "token that may write there (`hf auth login`)."
        ) from error


def _installed(name: str) -> str:
    try:
        return version(name)
    except ImportError as error:
        raise ConfigError(f"A Space needs {name}: pip install 'hf_source[app]'.") from error
