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
"""What is written to the Hub and read from it: one commit to a repository, one snapshot of it.

Tokens are handed on to `huggingface_hub` and never appear in a message.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors import ConfigError, DataError


CARD_FILE = "README.md"
UNREACHABLE = (HfHubHTTPError, HTTPError, OSError)
"""What the Hub, or the way to it, fails with (`HTTPError` is that of its HTTP client)."""


class HubError(Exception):
    """The Hub refused or could not be reached; callers say what they wanted of it."""


class NoRepositoryError(HubError):
    """There is no such repository, or it is hidden from who asks."""


def check_repo_id(repo_id: str) -> None:
    """Raise `ConfigError` if a repository cannot have this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} cannot name a repository on the Hub: write user/name. ({error})") from error


def is_open(repo_id: str, repo_type: str) -> bool:
    """Whether anybody can read a repository, without a token or a gate. Not if the Hub does not say so."""
    try:
        info = HfApi(token=False, library_name="hf_source").repo_info(repo_id, repo_type=repo_type)
    except (*UNREACHABLE, HFValidationError):
        return False
    return not info.private and not getattr(info, "gated", False)


def source_of(dataset: Any) -> str | None:
    """The Hub repository that all of a dataset was loaded from, if that can be told."""
    origins = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^/@]+(?:/[^/@]+)?)@", str(name)) for name in origins]
    names = {match[1] if match else None for match in found} or _cached_from(dataset)
    return names.pop() if len(names) == 1 else None


def _cached_from(dataset: Any) -> set[str | None]:
    """Repositories that a dataset's files in the cache of `datasets` are of; `None` for rows that are of none."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return set()
    blocks = getattr(dataset.data, "blocks", [[dataset.data]])
    if any(not hasattr(table, "path") for row in blocks for table in row):  # made in memory
        return {None}
    cache, names = Path(datasets.config.HF_DATASETS_CACHE).resolve(), set()
    for file in dataset.cache_files:
        path = Path(file["filename"]).resolve()
        owner, mark, name = path.relative_to(cache).parts[0].partition("___") if cache in path.parents else ("",) * 3
        # A capital letter becomes one with "_" before it: such a name may stand for several repositories.
        names.add(f"{owner}/{name}" if mark and "_" not in name else None)
    return names


def present_card(
    api: HfApi, repo_id: str, repo_type: str, present: list[str], revision: str | None = None
) -> str | None:
    """The card that a repository has; `None` if it has none."""
    if CARD_FILE not in present:
        return None
    path = api.hf_hub_download(repo_id, CARD_FILE, repo_type=repo_type, revision=revision)
    return Path(path).read_text(encoding="utf-8")


def refuse_public(repo_id: str, repo_type: str, token: str | bool | None) -> None:
    """Raise if a repository that should be private exists and is public; nothing happens if there is none.

    Raises:
        ConfigError: naming the way out.
        HubError: if the Hub refuses or cannot be reached.
    """
    try:
        _require_private(HfApi(token=token, library_name="hf_source"), repo_id, repo_type)
    except RepositoryNotFoundError:
        return
    except UNREACHABLE as error:
        raise HubError(str(error)) from error


def _require_private(api: HfApi, repo_id: str, repo_type: str) -> None:
    if not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ConfigError(
            f"{repo_id} exists and is public, so private=True would not hold. Make it private in its settings on the "
            "Hub first, or choose another repo_id."
        )


def commit(
    repo_id: str,
    repo_type: str,
    operations: Callable[[HfApi, list[str]], list[Any]],
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    space_sdk: str | None = None,
) -> str:
    """Change a repository in one commit; it is made if it does not exist.

    Args:
        repo_id, repo_type: of the repository.
        operations: what to add and to delete, given the files that are there.
        private: make it private; refused where it exists and is public.
        token: what authenticates; default the one of `hf auth login`.
        revision: branch; made if it does not exist.
        commit_message: of the commit.
        space_sdk: of a Space.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: if a public repository was to be private.
        HubError: if the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token, library_name="hf_source")
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk)
        if private:
            _require_private(api, repo_id, repo_type)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        present = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        with warnings.catch_warnings():
            # Parquet belongs to what is pushed here, in model repositories too.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            done = api.create_commit(
                repo_id,
                operations(api, present),
                commit_message=commit_message,
                repo_type=repo_type,
                revision=revision,
            )
    except UNREACHABLE as error:
        raise HubError(str(error)) from error
    return str(done.commit_url)


def snapshot(
    repo_id: str,
    repo_type: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    folder: Path | None = None,
) -> Path:
    """A repository's files, in the Hub's cache or in a folder.

    Raises:
        NoRepositoryError: if there is none.
        HubError: if it cannot be read.
    """
    given = {"revision": revision, "token": token, "local_dir": folder}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return Path(snapshot_download(repo_id, repo_type=repo_type, **given))
    except RepositoryNotFoundError as error:
        raise NoRepositoryError(str(error)) from error
    except (*UNREACHABLE, ValueError) as error:
        raise HubError(str(error)) from error


def dataset_snapshot(
    kind: str, repo_id: str, hint: str = "", *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Files of something that a dataset repository holds and that was not found as a folder.

    Args:
        kind: what it should be, for the message.
        hint: a sentence on how to make one.

    Raises:
        DataError: if there is none, or if it cannot be read.
    """
    try:
        return snapshot(repo_id, "dataset", revision=revision, token=token)
    except NoRepositoryError as error:
        raise DataError(
            f"There is no {kind} {repo_id!r}: neither a folder of that path nor a dataset repository on the Hub. "
            f"{hint}{' ' if hint else ''}Check the spelling; for a private repository run `hf auth login`."
        ) from error
    except HubError as error:
        raise DataError(
            f"There is no folder {repo_id!r}, and the Hub repository of that name could not be read ({error})."
        ) from error
