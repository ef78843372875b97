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
"""The report: what it says, that nothing in it runs, and how it looks in a browser."""

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor, load_attribution
from hf_source.attribution.tokens import TokenInfluence
from hf_source.cli import app
from hf_source.errors import ConfigError, DataError
from hf_source.outputs.attribution_files import Attribution
from hf_source.outputs.groups import MOST, NONE, OTHERS, column_groups, group_of, grouping_columns
from hf_source.outputs.histogram import BINS, histogram
from hf_source.outputs.numbers import signed
from hf_source.outputs.page import _excerpt, shaded
from hf_source.outputs.report import NOT_MEASURED, write_report
from hf_source.outputs.trust import store_evaluation

from ..browser import chromium
from ..cases import byte_tokenizer, tiny_gpt2
from ..story import chats, facts
from .test_shown import HOSTILE, Page


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def attributor(story):
    found = SourceAttributor.from_record(story.path, num_samples=16, progress=False)
    found.set_dataset("pretrain", facts().add_column("origin", ["atlas"] * 4 + ["wiki"] * 2 + [None] * 2))
    found.set_dataset("sft", chats())
    return found


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


@pytest.fixture(scope="module")
def written(attributor, queries, tmp_path_factory):
    return attributor.report(tmp_path_factory.mktemp("report") / "report.html", queries, k=2)


def texts(path) -> str:
    """Text of a page as people read it."""
    return re.sub(r"\s+", " ", "".join(Page(path.read_text(encoding="utf-8")).texts))


def test_the_report_says_what_the_scores_say(written, attributor, queries):
    said = texts(written)
    for row in attributor.top(queries, k=2):
        assert f"{row['score']:+.4f}" in said
    for stage, rows in (("pretrain", facts()), ("sft", chats())):
        scores = attributor.scores(attributor.datasets[stage], queries, stage)
        for place in range(2):
            assert f"{scores[place].astype(np.float64).sum():+.4f}" in said  # the group of the whole stage
            assert f"{stage}: {(scores[place] > 0).sum()} rows support, {(scores[place] < 0).sum()} oppose" in said
        assert len(rows) == scores.shape[1]
    origin = attributor.scores(attributor.datasets["pretrain"], queries, "pretrain")[0][:4]
    assert f"atlas4{origin.sum():+.4f}" in said and "influence by origin, stage pretrain" in said
    assert NONE in said and "label_of_mine" not in said  # a number of its own for every row is no group
    best = max((row for row in attributor.top(queries, k=2) if row["query"] == "lima"), key=lambda row: row["score"])
    assert f"Its strongest support is row {best['row']} of stage {best['stage']}, worth {best['score']:+.4f}" in said
    assert NOT_MEASURED in said and "hf_source0.1.0" in said and "num_samples16" in said


def test_tokens_are_shaded(written):
    html = written.read_text(encoding="utf-8")
    (answer, _) = re.findall(r'<p class="answertext">(.*?)</p>', html, re.DOTALL)
    assert re.findall(r'<span class="t [^"]*" title="[+-]\d\.\d{4}">(.)</span>', answer) == list(" Lima")
    assert 'class="t u9"' in html and "Figures of the tokens" in html
    assert len(re.findall(r">∎</span>", html)) == 2 * 2 * (2 + 2)  # queries, stages, rows of both directions


def test_saved_scores_give_the_same_report_without_the_model(written, attributor, queries, tmp_path):
    """Shaded too: what the report scored of tokens goes along."""
    attributor.save(tmp_path / "saved", queries, k=2)
    found = load_attribution(tmp_path / "saved")
    again = write_report(tmp_path / "again.html", found).read_text(encoding="utf-8")
    assert again == written.read_text(encoding="utf-8") and 'class="t u9"' in again
    own = texts(attributor.report(tmp_path / "own.html", queries, k=2, shaded=0))
    assert "∎" not in own and "Lima" in own
    for more, expected in (((), texts(written)), (("--shaded", "0"), own)):
        result = CliRunner().invoke(app, ["report", str(tmp_path / "saved"), "-o", str(tmp_path / "cli.html"), *more])
        assert result.exit_code == 0 and texts(tmp_path / "cli.html") == expected
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "saved"), "-p", "x"])
    assert refused.exit_code == 1 and "give the training record instead" in refused.stderr


def test_rows_that_are_withheld(attributor, queries, tmp_path):
    """Nor are their tokens there; those of the answer are, which was asked for."""
    attributor.save(tmp_path / "saved", queries, include_rows=False, shaded=2)
    found = load_attribution(tmp_path / "saved")
    assert found.tokens.rows == {} and list(found.tokens.answers) == queries.names
    said = texts(write_report(tmp_path / "plain.html", found))
    assert "its text is not kept with these scores" in said and "Fiji" not in said


def test_from_a_shell(story, tmp_path):
    rows = tmp_path / "facts.jsonl"
    facts().to_json(str(rows))
    asked = ["-p", "Peru:", "-c", " Lima", "--num-samples", "16", "-k", "1", "--column", "label_of_mine"]
    words = ["report", str(story.path), *asked, "--dataset", f"pretrain={rows}", "--title", "Mine"]
    words += ["-o", str(tmp_path / "r.html")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    said = texts(tmp_path / "r.html")
    assert said.count("Mine") == 2 and "influence by label_of_mine, stage pretrain" in said
    wrong = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "r.pdf")])
    assert "end the name in .html" in wrong.stderr


def test_a_method_without_tokens_or_unit(story, queries, tmp_path):
    plain = SourceAttributor.from_record(story.path, method="bm25", progress=False)
    said = texts(plain.report(tmp_path / "r.html", queries))
    assert "Tokens have no influence of their own here: method='bm25'" in said
    assert "nats" not in said and "probability" not in said
    with pytest.raises(ConfigError, match="shaded=-1"):
        plain.report(tmp_path / "r.html", queries, shaded=-1)
    with pytest.raises(DataError, match="No stage has a column 'sauce' to group by; there are"):
        plain.report(tmp_path / "r.html", queries, columns=["sauce"])


def test_only_the_first_answers_are_shaded(attributor, queries, tmp_path):
    path = attributor.report(tmp_path / "r.html", queries, k=1, shaded=1)
    assert path.read_text(encoding="utf-8").count('class="answertext"') == 1
    assert "Tokens of the first 1 answers" in texts(path)


def test_trust_and_spread(story, queries, tmp_path):
    """What was evaluated is said first, and an ensemble says how far its members differ."""
    settings = {"method": "grad-dot", "ensemble": "dropout", "ensemble_size": 2, "dropout": 0.1, "progress": False}
    several = SourceAttributor.from_record(story.path, **settings)
    entry = {"evaluation": "removal", "method": "mine", "stage": "sft", "measure": "LDS", "value": 0.5}
    entry["settings"] = {"num_subsets": 4, "fraction": 0.25}
    kept = store_evaluation(story, entry, several.settings())
    try:
        path = several.report(tmp_path / "r.html", queries, k=1)
    finally:
        kept.unlink()
    said = texts(path)
    assert "LDS of 0.50 (4 subsets of 25 %" in said and NOT_MEASURED not in said
    std = several.scores_std(None, queries, "sft")
    row = next(row for row in several.top(queries, k=1) if row["stage"] == "sft")
    assert f"± {std[0][row['row']]:.4f}" in said


def test_the_six_lines_of_the_readme(tmp_path, monkeypatch):
    """They run as they are, and no more than six of them are not those of a plain Trainer."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## From a Trainer script .*?```python\n(.*?)```", text, re.DOTALL)
    assert sum("# new" in line or "# was" in line for line in code.splitlines()) == 6
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny_gpt2(vocab_size=260, n_positions=64), "tokenizer": byte_tokenizer(), "dataset": facts()}
    exec(code, given)
    assert "The capital of Hungary is" in texts(tmp_path / "answer.html")


# ---- groups and distributions --------------------------------------------------------------------------------------


def test_groups_of_a_column():
    features = Features({"kind": Value("string"), "label": ClassLabel(names=["no", "yes"]), "id": Value("int64"),
                         "text": Value("string"), "score": Value("float64"), "note": Value("string"),
                         "source_q": Value("int64")})  # fmt: skip
    rows = Dataset.from_dict(
        {
            "kind": ["a", "b", None, "a"],
            "label": [1, 0, -1, 1],
            "id": range(4),
            "text": ["x", "x", "y", "y"],
            "score": [0.5] * 4,
            "note": ["long " * 20] * 2 + ["other"] * 2,
            "source_q": [1, 1, 2, 2],
        },
        features=features,
    )
    scores = np.array([2.0, -4.0, 0.5, -1.0], dtype=np.float32)
    assert grouping_columns(rows) == ["kind", "label"]
    assert grouping_columns(rows, ["id", "text", "elsewhere"]) == ["id", "text"]
    with pytest.raises(DataError, match="'score' makes no groups: its values are double"):
        grouping_columns(rows, ["score"])
    found = column_groups(rows, "kind", scores)
    groups = {group.name: (group.num_rows, group.supporting, group.opposing) for group in found}
    assert groups == {"b": (1, 0.0, -4.0), "a": (2, 2.0, -1.0), NONE: (1, 0.5, 0.0)}
    assert [group.name for group in column_groups(rows, "label", scores)] == ["no", "yes", NONE]
    assert grouping_columns(rows.select([])) == []


def test_small_groups_are_one_group():
    rows = Dataset.from_dict({"n": list(range(30)) * 10})
    scores = np.repeat(np.arange(30.0)[None], 10, 0).reshape(-1)
    groups = column_groups(rows, "n", scores)
    assert len(groups) == MOST + 1 and groups[0].name == "29" and groups[-1].name == OTHERS
    np.testing.assert_allclose(sum(group.net for group in groups), scores.sum())
    assert group_of("all", scores).num_rows == sum(group.num_rows for group in groups) == 300


def test_histogram():
    found = histogram(np.array([5.0, 1.0, 1.0, 1.0, 1.0, -2.0, 0.0]))
    assert found.counts.sum() == 7 and len(found.counts) == BINS and found.largest == 5.0
    assert (found.supporting, found.opposing, found.half) == (5, 1, 1)
    assert [bar["kind"] for bar in found.bars] == ["down", "zero", "up", "up"]
    empty = histogram(np.zeros(3))
    assert empty.half == 0 and [bar["kind"] for bar in empty.bars] == ["zero"]


def test_a_long_row_is_folded_around_its_strongest_token():
    tokens = shaded([("a" * 300, None), *[("word ", 0.1)] * 100, ("here", -2.0), *[(" word", 0.1)] * 100])
    assert tokens[101].kind == "d9" and tokens[1].level == 0 and tokens[0].kind == ""
    found = _excerpt("".join(piece.text for piece in tokens), tokens)
    shown = "".join(piece.text for piece in found["tokens"])
    assert found["before"] and "here" in shown and 400 <= len(shown) <= 410
    assert _excerpt("short", tokens) is None
    assert len(_excerpt("x" * 500, [])["tokens"][0].text) == 400


# ---- hostile texts, and a browser ----------------------------------------------------------------------------------


def attribution(text: str) -> tuple[Attribution, TokenInfluence]:
    """Scores in which everything that can be given is one text."""
    column = f"source_{text}"
    rows = {"source_row": [0, 1, 2, 3], "text": [text] * 4, f"kind of {text}": [text, text, "b", "b"]}
    data = Dataset.from_dict(rows | {column: np.array([2.0, -1.0, 0.5, 0.0], dtype=np.float32)})
    entries = [(0, 1, 2.0), (1, -1, -1.0)]
    top = Dataset.from_list(
        [{"query": text, "stage": stage, "row": row, "rank": rank, "score": score, "text": text}
         for stage in (text, "other") for row, rank, score in entries]
    )  # fmt: skip
    one = {"texts": True, "source": None, "steps": 3, "segments": 1, "model": text, "optimizer": text}
    about = {"unit": text, "measured": text, "k": 1, "layout": "columns", "hf_source": text}
    about |= {"record": {"digest": "0f" * 32, "repo_id": text}, "stages": {text: one, "other": one}}
    queries = Queries.from_text([text], [text], names=[text])
    tokens = TokenInfluence({text: [(text, 1.0), (text, -1.0)]}, {(text, text, 0): [(text, None), (text, 2.0)]})
    stages = {text: data, "other": data}
    return Attribution(queries, stages, top, {"method": text, text: text}, text, text, about), tokens


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(tmp_path, text):
    def page(given: str) -> Page:
        found, tokens = attribution(given)
        path = write_report(tmp_path / "r.html", found, title=given, tokens=tokens, remark=given)
        return Page(path.read_text(encoding="utf-8"))

    harmless, hostile = page("harmless"), page(text)
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert hostile.text.count(text) == harmless.text.count("harmless") > 25
    assert [value for name, value in hostile.attributes if name in ("style", "class", "href", "id")] == [
        value for name, value in harmless.attributes if name in ("style", "class", "href", "id")
    ]


def test_hostile_text_does_not_run(browser, tmp_path):
    found, tokens = attribution("".join(HOSTILE))
    path = write_report(tmp_path / "r.html", found, title="".join(HOSTILE), tokens=tokens)
    with browser.open(path) as seen:
        assert seen.page.locator("h1").count() == 1 and seen.page.locator("script, img").count() == 0
        assert seen.requests == [path.as_uri()] and not seen.errors and not seen.dialogs


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(browser, written, scheme, tmp_path):
    with browser.open(written, scheme) as seen:
        page = seen.page
        assert seen.requests == [written.as_uri()] and not seen.errors
        assert seen.low_contrast() == []
        assert not seen.overflows()
        page.set_viewport_size({"width": 360, "height": 800})
        assert not seen.overflows()
        page.screenshot(path=tmp_path / "shot.png", full_page=True)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", background)[0]) < 60) == (scheme == "dark")
    assert (tmp_path / "shot.png").stat().st_size > 20_000


def test_the_report_by_keyboard(browser, written):
    with browser.open(written) as seen:
        page = seen.page
        first = page.locator("details.answer").first
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert first.get_attribute("open") is None
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.locator("details.more").first.get_attribute("open") is not None


@pytest.mark.parametrize(
    ("score", "read"),
    [(0.0, "+0.0000"), (1.25, "+1.2500"), (-0.0005, "-0.0005"), (0.0004, "+4.0e-04"), (-7.21e-9, "-7.2e-09")],
)
def test_small_scores_can_be_read(score, read):
    assert signed(score) == read
