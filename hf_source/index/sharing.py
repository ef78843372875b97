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
"""An index on the Hub: its folder as a dataset repository, with a card that says what it is and how good."""

from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..hub import CARD_FILE, HubError, check_repo_id, commit, present_card, refuse_public
from ..outputs.cards import card
from .accuracy import accuracy_note
from .files import MANIFEST, verified


if TYPE_CHECKING:
    from .search import SourceIndex


HEADER = {"tags": ["hf_source", "training-data-attribution"], "viewer": False}
CARD = """# Index for training-data attribution

From this index [hf_source](https://arxiv.org/abs/2405.12186) tells which training rows made a model say
something, for any text, without another pass over the rows:

```python
from hf_source import SourceAttributor, SourceIndex

attributor = SourceAttributor.from_record("RECORD", index="{repo_id}")  # with the training record
index = SourceIndex.load("{repo_id}")  # or with nothing but the model:
scores = index.ask(model, tokenizer, queries, stage="{stage}")  # a score in nats for every row, by number
```

A score is the predicted change of the text's negative log-likelihood had the row been left out: positive rows support
the text. {note}

| setting | value |
| --- | --- |
{table}
"""


def index_card(index: "SourceIndex", repo_id: str, old: str | None = None) -> str:
    """The card; `old` is kept as far as somebody else wrote it."""
    content = index.content
    shown = {
        **index.settings,
        **index.described(),
        "parameters": content["num_parameters"],
        "record": content["record"],
    }
    table = "\n".join(f"| {key} | `{value}` |" for key, value in shown.items())
    note = accuracy_note(content["stages"], index.stages)
    return card(HEADER, CARD.format(repo_id=repo_id, stage=index.stages[-1], note=note, table=table), old)


def push_index(
    index: "SourceIndex",
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Publish. See `SourceIndex.push_to_hub`."""
    check_repo_id(repo_id)
    files = index.content["files"]
    paths = {name: verified(index.folder, name, files) for name in files} | {MANIFEST: index.folder / MANIFEST}

    def operations(api: Any, present: list[str]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        old = [name for name in present if name.startswith("rows/") and name not in paths]
        text = index_card(index, repo_id, present_card(api, repo_id, "dataset", present, revision))
        added = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
        return [CommitOperationAdd(CARD_FILE, text.encode()), *added, *(CommitOperationDelete(name) for name in old)]

    given = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
    try:
        if private:
            refuse_public(repo_id, "dataset", token)
        return commit(repo_id, "dataset", operations, **given)
    except HubError as error:
        raise DataError(
            f"The index could not be pushed to {repo_id} ({error}). Check the name, and that you are logged in with a "
            "token that may write there (`hf auth login`)."
        ) from error
