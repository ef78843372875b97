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
"""The explorer as a Space: what is pushed, and that it starts."""

import json
import runpy

import pytest
import yaml
from typer.testing import CliRunner

from hf_source.cli import app
from hf_source.errors import ConfigError, DataError
from hf_source.explorer.space import push_space, space_files

from ..fake_hub import TOKEN


def test_a_space_is_pushed(hub, monkeypatch):
    pytest.importorskip("gradio", reason="a Space needs the extra `app`")
    url = push_space("me/record", "me/explorer", token=TOKEN, method="bm25")
    assert url.startswith(f"{hub.url}/spaces/me/explorer/commit/")
    found = hub.files("spaces/me/explorer")
    assert json.loads(found["settings.json"]) == {"record": "me/record", "method": "bm25"}
    header = yaml.safe_load(found["README.md"].decode().split("---\n")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and header["sdk_version"]
    assert {"hf_source/__init__.py", "hf_source/explorer/templates/rows.html.j2"} <= set(found)
    assert "torch" in found["requirements.txt"].decode().split() and TOKEN.encode() not in b"".join(found.values())
    assert hub.repositories["spaces/me/explorer"]["private"]  # nobody can read the record
    found["README.md"] = found["README.md"].replace(b"title: Why", b"title: Mine, why") + b"\nBye.\n"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = ["space", "push", "me/record", "me/explorer", "--index", "me/index", "--num-segments", "1"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    kept = json.loads(hub.files("spaces/me/explorer")["settings.json"])
    assert kept["index"] == "me/index" and kept["num_segments"] == 1
    card = hub.files("spaces/me/explorer")["README.md"].decode()
    assert "title: Mine, why" in card and card.endswith("\nBye.\n")  # what its owner wrote stays
    assert yaml.safe_load(card.split("---\n")[1])["sdk_version"] == header["sdk_version"]


def test_its_app_starts(story, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    for name, content in space_files(str(story.path), method="bm25").items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    started = []
    monkeypatch.setattr("hf_source.explorer.app.launch", lambda explorer, **options: started.append(explorer))
    runpy.run_path(str(tmp_path / "app.py"))
    assert started[0].attributor.method == "bm25" and started[0].stages == ["pretrain", "sft"]


def test_what_cannot_be_a_space(hub, story):
    with pytest.raises(ConfigError, match="is on this machine, where a Space cannot read it"):
        push_space(str(story.path), "me/explorer")
    with pytest.raises(ConfigError, match="cannot name a repository"):
        push_space("me/record", "me/a/b")
    pytest.importorskip("gradio")
    with pytest.raises(ConfigError, match="are kept as JSON"):
        push_space("me/record", "me/explorer", model=print)
    with pytest.raises(DataError, match="The Space me/explorer could not be written"):
        push_space("me/record", "me/explorer", token="")
