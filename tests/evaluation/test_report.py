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


import json
import math
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from hf_source.errors import ConfigError, DataError
from hf_source.evaluation import Entry, Report
from hf_source.evaluation.report import figure


HOSTILE = "<script>alert(1)</script> | $x$ ](http://a) \x1b[31m {{ 7*7 }}"


def report(title: str = "A run", method: str = "source") -> Report:
    made = Report(title, {"record": "abc", "seeds": [0, 1]})
    made.add(
        Entry("removal", method, 0.834, 0.79, 0.86, 1.25, {"num_samples": 512}, {"q0": 0.8, "q1": 0.9}, stage="sft")
    )
    made.add(Entry("removal", "bm25", 0.1, -0.05, 0.2, 0.1, {}, {}, stage="sft"))
    made.add(Entry("leave-one-out", method, math.nan, None, None, measure="Spearman"))
    return made


def test_figures():
    assert [figure(value) for value in (0.834, -0.05, 1.0, -1.0, 0.999, 12.3, None, math.nan)] == [
        ".83", "-.05", "1.00", "-1.00", "1.00", "12.30", "-", "-",
    ]  # fmt: skip


def test_a_report_survives_json(tmp_path):
    path = report().to_json(tmp_path / "deep" / "report.json")
    again = Report.from_json(path)
    assert again.to_dict() == json.loads(path.read_text()) == report().to_dict()
    assert again.entries[0] == report().entries[0]
    assert again.settings["versions"]["torch"] and again.settings["machine"]["cores"]
    assert math.isnan(again.entries[2].value)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(DataError, match="no report"):
        Report.from_json(tmp_path / "other.json")


def test_the_table_shows_every_entry():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(report(method=HOSTILE).table())
    said = console.export_text()
    assert ".83 [.79, .86]" in said and "Spearman" in said and "bm25" in said
    assert "\x1b" not in said


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name == "src" for name, _ in attributes)

    def handle_data(self, data):
        self.text.append(data)


def test_pages_are_whole_and_escaped(tmp_path):
    pytest.importorskip("matplotlib")
    made = report(HOSTILE, HOSTILE)
    made.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    html = (tmp_path / "report.html").read_text()
    page = Tags(html)
    assert "script" not in page.tags and "svg" in page.tags
    assert html.count("<svg") == 1 and "<script>alert" not in html
    text = "".join(page.text)
    assert "{{ 7*7 }}" in text and "49" not in text.replace(".49", "")
    assert ".83" in text and "num_samples" in text and "q1" in text
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = [line for line in lines if ".83" in line]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 5
    assert "\\<script\\>" in rows[0] and "\x1b" not in rows[0]


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    first = report(method="$\\frac{broken").plot(tmp_path / "a.svg").read_bytes()
    assert first == report(method="$\\frac{broken").plot(tmp_path / "b.svg").read_bytes()
    assert report().plot(tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="end the name"):
        report().plot(tmp_path / "d.txt")
    with pytest.raises(ConfigError, match="no entry"):
        Report("empty").plot(tmp_path / "d.svg")


def test_without_matplotlib_the_page_has_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"hf_source\[plot\]"):
        report().plot(tmp_path / "a.svg")
    report().write(tmp_path)
    assert "<svg" not in (tmp_path / "report.html").read_text()
