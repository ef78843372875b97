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
"""An index on the Hub, and questions of people who have the model and nothing of the record."""

import shutil

import numpy as np
import pytest
import torch

from hf_source import Queries, SourceAttributor, SourceIndex
from hf_source.errors import ConfigError, DataError

from ..cases import byte_tokenizer
from ..fake_hub import TOKEN


@pytest.fixture(scope="module")
def built(story, tmp_path_factory):
    maker = SourceAttributor(story, num_samples=8, progress=False)
    return maker.build_index(tmp_path_factory.mktemp("index") / "story", numbers=300)


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"])


def test_there_and_back(hub, story, built, queries):
    url = SourceIndex.load(built).push_to_hub("me/story-index", token=TOKEN)
    assert "me/story-index" in url
    pushed = hub.files("datasets/me/story-index")
    assert pushed.keys() >= {"README.md", "index.json", *SourceIndex.load(built).content["files"]}
    assert hub.repositories["datasets/me/story-index"]["private"]
    card = pushed["README.md"].decode()
    assert "From an index: of stage 'pretrain'" in card and "me/story-index" in card and "| numbers | `300` |" in card
    again = SourceIndex.load("me/story-index", token=TOKEN)
    here, there = (SourceAttributor(story, index=index, progress=False) for index in (built, again))
    for stage in ("pretrain", "sft"):
        np.testing.assert_array_equal(here.scores(None, queries, stage), there.scores(None, queries, stage))


def test_rows_of_an_earlier_push_go(hub, built, tmp_path, monkeypatch):
    index = SourceIndex.load(built)
    index.push_to_hub("me/index", token=TOKEN)
    name = index.content["stages"][0]["rows"][0]
    less = {key: value for key, value in index.content["files"].items() if key != name}
    monkeypatch.setitem(index.content, "files", less)
    index.push_to_hub("me/index", token=TOKEN)
    assert name not in hub.files("datasets/me/index")


def test_the_card_of_its_owner_is_kept(hub, built):
    index = SourceIndex.load(built)
    index.push_to_hub("me/index", token=TOKEN)
    files = hub.files("datasets/me/index")
    files["README.md"] = files["README.md"].replace(b"viewer: false", b"viewer: true") + b"\nBye.\n"
    index.push_to_hub("me/index", token=TOKEN)
    card = hub.files("datasets/me/index")["README.md"].decode()
    assert card.endswith("\nBye.\n") and "viewer: true" in card and card.count("# Index for training-data") == 1


def test_a_torn_index_is_not_pushed(hub, built, tmp_path):
    copied = shutil.copytree(built, tmp_path / "copied")
    file = sorted((copied / "rows").iterdir())[0]
    content = file.read_bytes()
    index = SourceIndex.load(copied)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=file.name):
        index.push_to_hub("me/index", token=TOKEN)
    assert not hub.repositories


def test_refusals_of_the_hub(hub, built):
    with pytest.raises(DataError, match="There is no index 'me/nothing'"):
        SourceIndex.load("me/nothing")
    with pytest.raises(ConfigError, match="cannot name a repository"):
        SourceIndex.load(built).push_to_hub("a b", token=TOKEN)
    with pytest.raises(DataError, match="could not be pushed to me/index"):
        SourceIndex.load(built).push_to_hub("me/index", token=False)


def test_the_model_is_enough(story, built, queries):
    index = SourceIndex.load(built)
    model = story.stages[-1].build_model(torch.float32)
    story.stages[-1].load_weights(model, "final")
    expected = SourceAttributor(story, index=built, progress=False)
    for stage in ("pretrain", "sft"):
        found = index.ask(model, byte_tokenizer(), queries, stage)
        scores = expected.scores(None, queries, stage)
        np.testing.assert_allclose(found, scores, rtol=1e-3, atol=1e-5 * np.abs(scores).max())
    with pytest.raises(DataError, match=r"The index has no stage 'dpo': choose `stage=` from \['pretrain', 'sft'\]"):
        index.ask(model, byte_tokenizer(), queries, "dpo")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(DataError, match="not those that the index was built with"):
        index.ask(model, byte_tokenizer(), queries, "sft")
