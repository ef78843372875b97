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
"""The page and the terminal show text from datasets and models, which may be anything."""

import io
import re
from html.parser import HTMLParser

import pytest
from datasets import Dataset
from rich.console import Console

from hf_source import Queries
from hf_source.outputs.page import Curve, write_page
from hf_source.outputs.tables import describe_columns, print_top, retrieval_table


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'><svg onload=alert(3)>",
    "{{ 7*7 }}{% raw %}",
    "</td></table></details><h1>mine</h1>",
    "&lt;b&gt; & é 中 \u202e",
    "--><!-- <style>*{display:none}</style>",
]
VOID = {"meta", "line", "path"}


def top(query: str = "q0", stage: str = "sft", text: str = "a row", scores=(2.0, -1.0)) -> Dataset:
    return Dataset.from_list(
        [
            {"query": query, "stage": stage, "row": i, "rank": i + 1 if i == 0 else -i, "score": score, "text": text}
            for i, score in enumerate(scores)
        ]
    )


def summary(method: str = "source", stage: str = "sft") -> dict:
    return {method: {stage: {"recall@1": 0.25, "recall@5": 0.5, "mrr": 0.375, "num_queries": 8}}}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on elements that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def page(tmp_path, text: str) -> str:
    """A page on which everything that can be given is one text."""
    queries = Queries.from_text([text], [text], names=[text])
    path = write_page(
        tmp_path / "pages" / "index.html",
        text,
        queries,
        top(text, text, text),
        unit=text,
        marked={(text, text, 0): text},
        summary=summary(text, text),
        curves=[Curve(text, [(1.0, 2.0), (2.0, 1.0)], [1.5])],
        settings={text: text},
    )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(tmp_path, text):
    harmless, hostile = Page(page(tmp_path, "harmless")), Page(page(tmp_path, text))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    # Title and heading; query name, prompt and completion; stage, rows, note, table of figures, caption, settings.
    assert hostile.text.count(text) == harmless.text.count("harmless") > 10
    assert text in dict(hostile.attributes)["aria-label"]


def test_the_page_needs_nothing_else(tmp_path):
    html = page(tmp_path, "plain")
    read = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes


def test_the_page_shows_the_numbers(tmp_path):
    queries = Queries.from_text(["The capital of Peru is", "Cuba:"], [" Lima", " Havana"], names=["lima", "havana"])
    marked = {("lima", "sft", 0): "states it"}
    path = write_page(tmp_path / "index.html", "Capitals", queries, top("lima"), marked=marked, summary=summary())
    read = Page(path.read_text(encoding="utf-8"))
    assert "2 answers" in read.text
    assert [text for text in read.texts if re.fullmatch(r"[+-]\d+\.\d{4}", text)] == ["+2.0000", "-1.0000"]
    assert read.texts.count("states it") == 1
    assert "(nats)" in read.text
    assert "0.250" in read.text and "0.375" in read.text
    # Bars are shares of the strongest row of the answer; the sign colours the row.
    assert [value for name, value in read.attributes if name == "style"] == ["width:100.0%", "width:50.0%"]
    assert [value for name, value in read.attributes if name == "class" and value in ("up", "down")][2:] == [
        "up",
        "down",
    ]


def test_a_page_of_scores_without_unit_and_of_zeros(tmp_path):
    queries = Queries.from_text(["a"], ["b"])
    path = write_page(tmp_path / "index.html", "t", queries, top(scores=(0.0, 0.0)), unit="")
    read = Page(path.read_text(encoding="utf-8"))
    assert "()" not in read.text
    assert "1 answer" in read.texts
    assert ("style", "width:0.0%") in read.attributes


def test_rows_of_other_queries_are_left_out(tmp_path):
    path = write_page(tmp_path / "index.html", "t", Queries.from_text(["a"], ["b"]), top("another", text="unseen"))
    assert "unseen" not in path.read_text(encoding="utf-8")


def test_curve_points_are_scaled_to_the_box():
    curve = Curve("sft", [(0.0, 4.0), (10.0, 2.0), (20.0, 8.0)])
    assert curve.path(100, 50, end=20, top=4) == "M0.0,0.0 L50.0,25.0 L100.0,0.0"  # above the top: cut


# ---- the terminal --------------------------------------------------------------------------------------------------


def printed(queries: Queries, table: Dataset, **settings) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_top(console, queries, table, **settings)
    return console.file.getvalue()


@pytest.mark.parametrize("text", ["[bold]loud[/bold]", "[/]", "[red", "[link=https://a.b]c[/link]", r"\[x]"])
def test_markup_in_texts_is_shown_literally(text):
    queries = Queries.from_text([text], [text], names=[text])
    out = printed(queries, top(text, text, text), marked={(text, text, 0): text}, unit=text)
    heading, columns, first, second = [line for line in out.splitlines() if line.strip()]
    assert heading.count(text) == 3  # name, prompt, completion
    assert text in columns
    assert first.count(text) == 3  # stage, text, note
    assert second.count(text) == 2
    assert "+2.0000" in first and "-1.0000" in second


def test_what_a_terminal_would_obey_is_not_printed():
    text = "a\x1b[2Jb\rc\u202ed"
    out = printed(
        Queries.from_text([text], [text], names=[text]), top(text, text, text), marked={(text, text, 0): text}
    )
    assert not {"\x1b", "\r", "\u202e"} & set(out)
    assert out.count("a\ufffd[2Jb\ufffdc\ufffdd") == 6  # a row's line breaks are spaces
    assert out.count("a\ufffd[2Jb c\ufffdd") == 2


def test_print_top_puts_a_row_on_one_line():
    out = printed(Queries.from_text(["a"], ["b"]), top(text="Q: who?\nA:\tme"), unit="")
    assert "Q: who? A: me" in out
    assert "score  row" in out and "()" not in out


def test_print_top_colours_by_sign():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    print_top(console, Queries.from_text(["a"], ["b"]), top(scores=(-0.5, -1.0)))
    assert "\x1b[32m" not in console.file.getvalue().split("text", 1)[1]  # no green: both rows oppose
    assert console.file.getvalue().count("\x1b[31m") == 2


def test_retrieval_table():
    console = Console(file=io.StringIO(), width=200)
    console.print(retrieval_table(summary("bm25"), "8 right answers"))
    out = console.file.getvalue()
    assert "8 right answers" in out and "sft recall@1" in out
    assert [cell for cell in out.split() if re.fullmatch(r"0\.\d{3}", cell)] == ["0.250", "0.500", "0.375"]


def test_describe_columns():
    rows = Dataset.from_dict({"text": ["a"] * 2000, "source_row": range(2000), "source_a": [0.0] * 2000})
    assert describe_columns(rows, ["a"]) == "2,000 rows with source_row, source_a for 1 query"
    rows = rows.add_column("source_b", [0.0] * 2000).add_column("source_c", [0.0] * 2000)
    assert describe_columns(rows, ["a", "b", "c"]) == (
        "2,000 rows with source_row, source_a, source_b, ... (4 in all) for 3 queries"
    )
