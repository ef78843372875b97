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
"""Attributions in a folder and on the Hub: what comes back, who sees it, and what hostile texts can do to the card."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from typer.testing import CliRunner

from hf_source import Queries, SourceAttributor, load_attribution, save_attribution
from hf_source.attribution.tokens import token_influence
from hf_source.cli import app
from hf_source.errors import ConfigError, DataError
from hf_source.hub import source_of
from hf_source.outputs.attribution_files import Attribution
from hf_source.outputs.attribution_tables import aligned, read_parquet, split_names, stage_table, write_parquet
from hf_source.outputs.cards import BEGIN, END, markdown

from ..fake_hub import TOKEN
from ..story import chats, facts


REPO = "me/capitals-attribution"
HOSTILE = [
    "<script>alert(1)</script>",
    "---\nlicense: mine\n---",
    "``` | $x$ ](http://a) **b** {{ 7*7 }}{% raw %}",
    f"{END} <!-- {BEGIN}",
    "'\"\\ : - [a]: #x & é 中 \u202e www.evil.org \x1b[31m",
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def attributor(story):
    return SourceAttributor.from_record(story.path, curvature="identity", progress=False)


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


def bm25(story, **settings):
    """Scores without a model: for tests of what becomes of scores."""
    return SourceAttributor.from_record(story.path, method="bm25", progress=False, **settings)


def pushed(hub, repo_id=REPO):
    return hub.files(f"datasets/{repo_id}")


def header(card: str):
    return yaml.safe_load(card.split("---\n")[1])


def same(found: Attribution, attributor, queries, stages, listed=False):
    """What came back is what the attributor says."""
    assert list(found.stages) == stages and found.settings == attributor.settings()
    encoded = attributor.encode(queries)
    assert list(found.queries) == list(encoded) and found.queries.rows == encoded.rows
    for stage in stages:
        expected = attributor.attribute(attributor.datasets.get(stage), queries, stage)
        scores = attributor.scores(attributor.datasets.get(stage), queries, stage)
        assert found.scores(stage).dtype == np.float32
        np.testing.assert_array_equal(found.scores(stage), scores)
        if listed:
            np.testing.assert_array_equal(np.asarray(found.stages[stage]["source_scores"]).T, scores)
        else:
            assert found.stages[stage].features == expected.features
            assert found.stages[stage][:] == expected[:]
    assert found.top[:] == attributor.top(queries, k=3, stages=stages)[:]
    assert found.top.features == attributor.top(queries, k=3, stages=stages).features


def test_what_is_pushed_comes_back(hub, attributor, queries, caplog, capfd):
    attributor.attribute(facts(), queries, stage="pretrain")
    attributor.set_dataset("sft", chats())
    with caplog.at_level("DEBUG"):
        url = attributor.push_to_hub(REPO, queries, ["pretrain", "sft"], k=3, include_rows=True, token=TOKEN)
    assert url.startswith(f"{hub.url}/datasets/{REPO}/commit/")
    assert sum(" /api/datasets/me/capitals-attribution/commit" in request for request in hub.requests) == 1
    found = load_attribution(REPO, token=TOKEN)
    same(found, attributor, queries, ["pretrain", "sft"])
    assert np.abs(found.scores("pretrain")).min() > 0
    assert TOKEN not in caplog.text + "".join(capfd.readouterr()) and f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN.encode() not in b"".join(pushed(hub).values())
    with pytest.raises(DataError, match="no scores of stage None: choose `stage=` from .'pretrain', 'sft'."):
        found.scores()


def test_what_is_pushed_is_what_was_last_attributed(hub, story, queries):
    attributor = bm25(story)
    with pytest.raises(ConfigError, match="Nothing was attributed yet: pass `queries=`, or call `attribute`"):
        attributor.push_to_hub(REPO, token=TOKEN)
    attributor.top(Queries.from_text(["Q Mali? A"], [" Bamako"]))
    attributor.attribute(facts(), queries, stage="pretrain")
    attributor.push_to_hub(REPO, token=TOKEN)
    assert list(load_attribution(REPO, token=TOKEN).stages) == ["pretrain"]
    assert load_attribution(REPO, token=TOKEN).queries.names == queries.names
    attributor.scores(None, queries, "sft")  # the same queries: another stage of them
    attributor.push_to_hub(REPO, queries, token=TOKEN)
    assert list(load_attribution(REPO, token=TOKEN).stages) == ["pretrain", "sft"]
    other = Queries.from_text(["Q Fiji? A"], [" Suva"])
    attributor.push_to_hub(REPO, other, stages=["sft"], token=TOKEN)
    assert not any("pretrain" in name for name in pushed(hub))  # no file of an earlier attribution stays
    attributor.push_to_hub(REPO, Queries.from_text(["Q Oman? A"], [" Muscat"]), token=TOKEN)
    assert list(load_attribution(REPO, token=TOKEN).stages) == ["pretrain", "sft"]
    for settings, fault in (({"k": 0}, "k=0: at least one row"), ({"stages": []}, "stages is empty")):
        with pytest.raises(ConfigError, match=fault):
            attributor.push_to_hub(REPO, **settings, token=TOKEN)


def test_configs_of_a_folder(story, queries, tmp_path):
    attributor = bm25(story)
    attributor.set_dataset("pretrain", facts())
    folder = attributor.save(tmp_path / "shared", queries, k=3)
    same(load_attribution(folder), attributor, queries, ["pretrain", "sft"])
    rows = load_dataset(str(folder), "default")
    assert load_dataset(str(folder))["sft"][:] == rows["sft"][:]
    assert rows["pretrain"]["text"][:] == facts()["text"][:] and rows["pretrain"]["prompt"][:] == [None] * 8
    assert rows["sft"]["completion"][:] == chats()["completion"][:]
    scores = attributor.scores(None, queries, "sft")
    np.testing.assert_array_equal(np.asarray(rows["sft"]["source_havana"], dtype=np.float32), scores[1])
    top = load_dataset(str(folder), "top_influences", split="train")
    assert top["prompt"][0] == "Peru:" and top["completion"][0] == " Lima" and "Peru" in top["text"][0]
    assert {"query", "stage", "row", "rank", "score"} < set(top.column_names)
    asked = load_dataset(str(folder), "queries", split="train")
    assert asked["name"][:] == queries.names and asked["input_ids"][:] == [r["input_ids"] for r in
                                                                          attributor.encode(queries).rows]  # fmt: skip


def test_tokens_are_saved_and_pushed(hub, attributor, queries, tmp_path):
    """As they were scored; without a word only those that a report has scored, and none of other queries."""
    settings = {"num_samples": 8, "progress": False}
    fresh = SourceAttributor.from_record(attributor.record.path, **settings)
    assert not load_attribution(fresh.save(tmp_path / "plain", queries, k=2)).tokens
    assert not (tmp_path / "plain" / "token_influences").exists()
    folder = fresh.save(tmp_path / "shaded", queries, k=2, shaded=1)
    found = load_attribution(folder)
    expected = token_influence(fresh, queries.select([0]), fresh.top(queries, k=2))
    assert list(found.tokens.answers) == ["lima"] and found.tokens.rows.keys() == expected.rows.keys()
    for own, other in ((found.tokens.answers, expected.answers), (found.tokens.rows, expected.rows)):
        for key, tokens in other.items():
            assert [text for text, _ in own[key]] == [text for text, _ in tokens]
            for (_, one), (_, two) in zip(own[key], tokens, strict=True):
                assert one == two is None or one == pytest.approx(two, rel=1e-3, abs=1e-6)
    assert "Tokens of the first 1 answers" in found.about["remark"]
    table = load_dataset(str(folder), "token_influences", split="train")
    assert table.column_names == ["query", "stage", "row", "pieces", "influence"]
    assert "`token_influences` | `train`" in (folder / "README.md").read_text()
    for row in found.top:  # the tokens of a row add up to its score
        if row["query"] == "lima":
            tokens = found.tokens.rows["lima", row["stage"], row["row"]]
            assert sum(score or 0 for _, score in tokens) == pytest.approx(row["score"], rel=1e-2, abs=1e-4)
    fresh.push_to_hub(REPO, queries, k=2, include_rows=True, token=TOKEN)  # what was scored before goes along
    assert load_attribution(REPO, token=TOKEN).tokens == found.tokens
    fresh.push_to_hub(REPO, queries, k=2, include_rows=True, shaded=0, token=TOKEN)
    assert not load_attribution(REPO, token=TOKEN).tokens
    assert not any(name.startswith("token_influences") for name in pushed(hub))
    other = Queries.from_text(["Q Fiji? A"], [" Suva"])
    fresh.push_to_hub(REPO, other, include_rows=True, token=TOKEN)
    assert not load_attribution(REPO, token=TOKEN).tokens
    with pytest.raises(ConfigError, match="shaded=-1"):
        fresh.save(tmp_path / "none", queries, shaded=-1)


def test_tokens_of_rows_that_are_not_published_are_not_either(hub, attributor, queries):
    public(hub, "me/facts")
    fresh = SourceAttributor.from_record(attributor.record.path, num_samples=8, progress=False)
    fresh.push_to_hub(REPO, queries, k=2, shaded=2, source_datasets={"pretrain": "me/facts"}, token=TOKEN)
    found = load_attribution(REPO, token=TOKEN).tokens
    assert {stage for _, stage, _ in found.rows} == {"pretrain"} and len(found.answers) == 2


def test_tokens_that_are_damaged(story, queries, tmp_path):
    attributor = SourceAttributor.from_record(story.path, num_samples=8, progress=False)
    folder = attributor.save(tmp_path / "f", queries, ["sft"], k=1, shaded=1)
    (file,) = (folder / "token_influences").glob("*.parquet")
    Dataset.from_dict({"query": ["lima"], "stage": ["sft"], "row": [0]}).to_parquet(str(file))
    with pytest.raises(DataError, match="The influence of tokens is damaged"):
        load_attribution(folder)
    file.unlink()
    with pytest.raises(DataError, match="0 of 1 files"):
        load_attribution(folder)


def test_many_queries_are_one_list_per_row(hub, story, tmp_path):
    many = Queries.from_text(["Peru:", "Cuba:", "Fiji:"] * 34, [" Lima", " Havana", " Suva"] * 34)
    attributor = bm25(story)
    attributor.set_dataset("pretrain", facts())
    folder = attributor.save(tmp_path / "many", many, k=3)
    same(load_attribution(folder), attributor, many, ["pretrain", "sft"], listed=True)
    scores = load_dataset(str(folder), "scores", split="sft")
    assert scores.column_names == ["source_row", "source_scores"]
    assert scores.features["source_scores"].length == 102
    np.testing.assert_array_equal(
        np.asarray(scores["source_scores"], dtype=np.float32).T, attributor.scores(None, many, "sft")
    )
    assert not any(name.startswith("source_q") for name in load_dataset(str(folder), "default", split="sft").features)
    attributor.push_to_hub(REPO, many, k=3, include_rows=True, token=TOKEN)
    same(load_attribution(REPO, token=TOKEN), attributor, many, ["pretrain", "sft"], listed=True)
    attributor.push_to_hub(REPO, many, max_columns=102, token=TOKEN)
    assert not any(name.startswith("scores/") for name in pushed(hub))
    clash = Dataset.from_dict({**facts().to_dict(), "source_scores": [0] * 8})
    attributor.set_dataset("pretrain", clash)
    with pytest.raises(DataError, match="scores of 102 queries need a column 'source_scores'"):
        attributor.save(tmp_path / "clash", many)


def test_a_column_that_is_taken_is_refused_before_any_score(story, queries, tmp_path, monkeypatch):
    attributor = bm25(story)
    attributor.set_dataset("pretrain", Dataset.from_dict({**facts().to_dict(), "source_lima": [0] * 8}))
    monkeypatch.setattr(attributor, "_stage_scores", None)
    with pytest.raises(DataError, match="'lima' would need column 'source_lima'"):
        attributor.save(tmp_path / "taken", queries)
    with pytest.raises(TypeError):  # numbers instead of rows: no clash, so scores would be computed
        attributor.save(tmp_path / "taken", queries, include_rows=False)
    assert not (tmp_path / "taken").exists()


# ---- who sees what -------------------------------------------------------------------------------------------------


def content(hub):
    """Every text of a repository, Parquet decoded."""
    import io

    import pyarrow.parquet as pq

    tables = [pq.read_table(io.BytesIO(data)).to_pylist() for name, data in pushed(hub).items() if "parquet" in name]
    plain = [data.decode() for name, data in pushed(hub).items() if "parquet" not in name]
    return json.dumps(tables, ensure_ascii=False) + "".join(plain)


def public(hub, name, **settings):
    hub.repositories[f"datasets/{name}"] = {
        "private": False,
        "branches": {"main": "0"},
        "commits": {"0": {}},
        **settings,
    }


def test_nothing_of_unknown_rows_is_published_unless_that_is_said(hub, story, queries, caplog):
    attributor = bm25(story)
    attributor.push_to_hub(REPO, queries, token=TOKEN)
    assert hub.repositories[f"datasets/{REPO}"]["private"]
    with pytest.raises(DataError, match="no attribution .*hf auth login"):
        load_attribution(REPO, token=False)
    assert "rows of pretrain, sft are not pushed" in caplog.text and "include_rows=True" in caplog.text
    said = content(hub)
    assert "Havana" in said  # that was asked
    for secret in ("Suva", "An odd row", "Muscat", "Fiji"):
        assert secret not in said
    found = load_attribution(REPO, token=TOKEN)
    assert found.stages["sft"].column_names == ["source_row", "source_lima", "source_havana"]
    np.testing.assert_array_equal(found.scores("sft"), attributor.scores(None, queries, "sft"))
    assert found.top["text"][:] == [None] * len(found.top)
    assert found.top["score"][:] == attributor.top(queries)["score"][:]
    assert "rows of pretrain, sft are not published here" in said
    attributor.push_to_hub(REPO, include_rows=True, token=TOKEN)
    assert "Suva" in content(hub) and hub.repositories[f"datasets/{REPO}"]["private"]


def test_open_sources(hub, story, queries):
    public(hub, "me/facts")
    public(hub, "me/gated", gated="auto")
    public(hub, "me/hidden", private=True)
    for number, (sft, private) in enumerate((("me/facts", False), ("me/gated", True), ("me/hidden", True),
                                             ("me/none", True))):  # fmt: skip
        repo = f"me/a{number}"
        bm25(story).push_to_hub(repo, queries, source_datasets={"pretrain": "me/facts", "sft": sft}, token=TOKEN)
        assert hub.repositories[f"datasets/{repo}"]["private"] is private
        found = load_attribution(repo, token=TOKEN)
        assert "text" in found.stages["pretrain"].column_names
        assert ("completion" in found.stages["sft"].column_names) is not private
        assert header(pushed(hub, repo)["README.md"].decode())["source_datasets"] == list(
            dict.fromkeys(["me/facts", sft])
        )
    with pytest.raises(ConfigError, match="source_datasets names stage 'sfd'"):
        bm25(story).push_to_hub(REPO, queries, source_datasets={"sfd": "me/facts"}, token=TOKEN)


def test_a_source_that_the_dataset_names(hub, story, queries):
    """It decides who may see the scores; rows may have gained columns, so they need a word of their owner."""
    public(hub, "me/facts")
    rows = facts()
    rows.info.download_checksums = {"hf://datasets/me/facts@0123/train.parquet": {}}
    assert source_of(rows) == "me/facts" and source_of(rows.map(lambda row: row)) == "me/facts"
    assert source_of(facts()) is None
    attributor = bm25(story)
    attributor.attribute(rows, queries, stage="pretrain")
    attributor.push_to_hub(REPO, token=TOKEN)
    assert not hub.repositories[f"datasets/{REPO}"]["private"]
    assert "text" not in load_attribution(REPO).stages["pretrain"].column_names
    assert header(pushed(hub)["README.md"].decode())["source_datasets"] == ["me/facts"]
    two = {"hf://datasets/me/facts@0123/a": {}, "/home/me/secret.csv": {}}
    rows.info.download_checksums = two
    assert source_of(rows) is None


def test_private_does_not_go_to_a_public_repository(hub, story, queries):
    public(hub, REPO)
    for private in (None, True):
        with pytest.raises(ConfigError, match=f"{REPO} exists and is public, so private=True would not hold"):
            bm25(story).push_to_hub(REPO, queries, private=private, token=TOKEN)
    assert pushed(hub) == {}
    bm25(story).push_to_hub(REPO, queries, private=False, token=TOKEN)
    assert "README.md" in pushed(hub)


def test_a_record_from_the_hub_that_is_private(hub, story, queries):
    public(hub, "me/facts")
    attributor = bm25(story)
    attributor.record.repo_id = "me/record"
    attributor.push_to_hub(REPO, queries, source_datasets="me/facts", token=TOKEN)
    assert hub.repositories[f"datasets/{REPO}"]["private"]
    hub.repositories["me/record"] = {"private": False, "branches": {"main": "0"}, "commits": {"0": {}}}
    attributor.push_to_hub("me/b", queries, source_datasets="me/facts", token=TOKEN)
    assert not hub.repositories["datasets/me/b"]["private"]


def test_without_a_token_and_bad_names(hub, story, queries):
    with pytest.raises(DataError, match=r"could not be pushed to me/capitals[\s\S]*hf auth login") as error:
        bm25(story).push_to_hub(REPO, queries, token=False)
    assert TOKEN not in str(error.value)
    with pytest.raises(ConfigError, match="cannot name a repository"):
        bm25(story).push_to_hub("me/too/many", queries, token=TOKEN)


def test_queries_that_are_rows(hub, story, tmp_path):
    """They may be training rows: their content goes along only where rows do."""
    asked = Queries.from_rows(story.stage("sft").rows().select([0, 1]))
    attributor = SourceAttributor.from_record(story.path, method="grad-dot", progress=False)
    folder = attributor.save(tmp_path / "rows", asked, ["sft"])
    found = load_attribution(folder).queries
    assert found.are_rows and found.rows == asked.rows and "prompt" in found.rows[0]
    attributor.push_to_hub(REPO, asked, ["sft"], token=TOKEN)
    found = load_attribution(REPO, token=TOKEN).queries
    assert found.are_rows and found.rows is None and "Lima" not in content(hub)


# ---- the card ------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements and comments of a text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.comments = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_comment(self, data):
        self.comments.append(data)


def test_hostile_texts(story, tmp_path):
    token_row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}  # the texts are too long for the model
    asked = Queries(HOSTILE, HOSTILE, HOSTILE, [token_row] * len(HOSTILE))
    attributor = bm25(story)
    attributor.note = HOSTILE[0] + HOSTILE[3]
    folder = attributor.save(tmp_path / "hostile", asked, ["pretrain"])
    found = load_attribution(folder)
    assert found.queries.names == HOSTILE and found.queries.completions == HOSTILE
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert header(card)["license"] == "unknown"
    assert [config["config_name"] for config in header(card)["configs"]] == ["default", "top_influences", "queries"]
    seen = Tags(card)
    assert seen.tags == [] and len(seen.comments) == 2
    assert card.count(END) == 1 and card.count("```") == 10 and "](http" not in card.replace("](https://arxiv.org", "")
    assert "\x1b" not in card and "\u202e" not in card and "www.evil" not in card
    assert load_dataset(str(folder), split="pretrain").column_names[-5:] == [f"source_{name}" for name in HOSTILE]


def test_text_for_markdown():
    assert markdown("a <b> & `c` | d\n*e*") == r"a &lt;b&gt; &amp; \`c\` \| d \*e\*"
    assert markdown("x" * 300) == "x" * 197 + r"\.\.\."


def test_the_card_says_what_is_in_it(hub, attributor, queries):
    from hf_source.outputs.trust import store_evaluation

    attributor.push_to_hub(REPO, queries, include_rows=True, token=TOKEN)
    card = pushed(hub)["README.md"].decode()
    assert "negative log\\-likelihood" in card and "in nats" in card and "were not evaluated on this run" in card
    assert "| pretrain | 8 | 40 | 2 | GPT2LMHeadModel | AdamW | recorded | not known |" in card
    assert "| curvature | identity |" in card and "| lima | Peru\\: | Lima |" in card
    assert f'load_dataset("{REPO}", "default", split="pretrain")' in card
    assert f"hf://datasets/{REPO}/data/pretrain-*.parquet" in card and "bae2024training" in card
    for place in (str(attributor.record.path), attributor.record.path.name + "/"):
        assert place not in card + pushed(hub)["attribution.json"].decode()
    entry = {"evaluation": "removal", "stage": "sft", "measure": "LDS", "value": 0.5, "low": 0.4, "high": 0.6,
             "method": "source", "settings": {"num_subsets": 8, "fraction": 0.02}, "per_query": {}}  # fmt: skip
    path = store_evaluation(attributor.record, entry, attributor.settings())
    try:
        attributor.push_to_hub(REPO, include_rows=True, token=TOKEN)
    finally:
        path.unlink()
    found = load_attribution(REPO, token=TOKEN)
    assert "LDS of 0.50 [0.40, 0.60]" in found.trust and found.trust in found.top.info.description
    assert "LDS of 0\\.50 \\[0\\.40\\, 0\\.60\\]" in pushed(hub)["README.md"].decode()


def test_a_method_without_unit(hub, story, queries):
    bm25(story).push_to_hub(REPO, queries, token=TOKEN)
    card = pushed(hub)["README.md"].decode()
    assert "have **no unit**" in card and "in nats" not in card


def test_the_card_of_its_owner_is_kept(hub, story, queries):
    attributor = bm25(story)
    attributor.push_to_hub(REPO, queries, ["sft"], token=TOKEN)
    card = pushed(hub)["README.md"].decode()
    mine = (
        card.replace("license: unknown", "license: mit\nlanguage: en").replace(BEGIN, f"# Mine\n\n{BEGIN}")
        + "\nBye.\n"
    )
    pushed(hub)["README.md"] = mine.replace("nats", "gnats").encode()
    attributor.push_to_hub(REPO, queries, ["pretrain", "sft"], token=TOKEN)
    card = pushed(hub)["README.md"].decode()
    assert header(card)["license"] == "mit" and header(card)["language"] == "en"
    assert header(card)["configs"][0]["data_files"][0]["split"] == "pretrain"
    assert "# Mine\n\n<!-- hf_source begin" in card and card.endswith("\nBye.\n") and "gnats" not in card
    assert card.count(BEGIN) == card.count(END) == 1 and "`pretrain`" in card
    own = "---\nlicense: mit\n---\nOnly my words, \\1.\n"
    pushed(hub)["README.md"] = own.encode()
    attributor.push_to_hub(REPO, queries, ["sft"], token=TOKEN)
    card = pushed(hub)["README.md"].decode()
    assert card.endswith("---\nOnly my words, \\1.\n") and len(header(card)["configs"]) == 3
    pushed(hub)["README.md"] = b"---\na: [\n---\n"
    with pytest.raises(ConfigError, match="header of the card .README.md. is no YAML"):
        attributor.push_to_hub(REPO, queries, ["sft"], token=TOKEN)


def test_saving_again_replaces_and_keeps(story, queries, tmp_path):
    attributor = bm25(story)
    folder = attributor.save(tmp_path / "f", queries, ["pretrain"])
    (folder / "notes.md").write_text("mine")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nBye.\n")
    attributor.save(folder, queries, ["sft"])
    assert list(load_attribution(folder).stages) == ["sft"] and not list(folder.glob("data/pretrain*"))
    assert (folder / "notes.md").read_text() == "mine" and card.read_text().endswith("\nBye.\n")
    again = save_attribution(load_attribution(folder), tmp_path / "g")
    assert load_attribution(again).stages["sft"][:] == load_attribution(folder).stages["sft"][:]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_what_is_not_whole_is_refused(story, queries, tmp_path):
    with pytest.raises(DataError, match="attribution.json does not exist"):
        load_attribution(tmp_path)
    folder = bm25(story).save(tmp_path / "f", queries, ["sft"])
    manifest = folder / "attribution.json"
    good = manifest.read_text()
    for bad, fault in (
        ("{", "damaged"),
        (good.replace('"schema_version": 1', '"schema_version": 2'), "schema version 2, this hf_source reads 1"),
        (good.replace('"split": "sft"', '"split": "../../sft"'), "names a split"),
        (good.replace('"settings"', '"sittings"'), "damaged"),
        (good.replace('"source_lima": "source_lima"', '"source_lima": "gone"'), "lacks column 'gone'"),
    ):
        assert bad != good
        manifest.write_text(bad)
        with pytest.raises(DataError, match=fault):
            load_attribution(folder)
    manifest.write_text(good)
    (file,) = (folder / "data").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        load_attribution(folder)
    file.unlink()
    with pytest.raises(DataError, match="0 of 1 files"):
        load_attribution(folder)


def test_split_names():
    assert split_names(["pre-train", "pre_train", "all", "a.b"]) == {
        "pre-train": "pre_train", "pre_train": "pre_train_2", "all": "all_", "a.b": "a_b",
    }  # fmt: skip


def test_columns_of_several_stages():
    kinds = ClassLabel(names=["no", "yes"])
    first = Dataset.from_dict({"a": [1, 2], "kind": [0, 1]}, Features({"a": Value("int64"), "kind": kinds}))
    second = Dataset.from_dict({"kind": ["x"], "b": [[1.0]], "n": [None]})
    third = Dataset.from_dict({"n": [4]})
    tables, names = aligned({"one": first, "two": second.select([0]), "three": third})
    assert names == {"one": {"a": "a", "kind": "kind"}, "two": {"kind": "kind_two", "b": "b", "n": "n"},
                     "three": {"n": "n"}}  # fmt: skip
    assert tables["one"].features == tables["two"].features == tables["three"].features
    assert tables["one"].features["kind"] == kinds and tables["one"].features["n"] == Value("int64")
    assert tables["one"][1] == {"a": 2, "kind": 1, "kind_two": None, "b": None, "n": None}
    assert tables["two"][0] == {"a": None, "kind": None, "kind_two": "x", "b": [1.0], "n": None}


def test_images_that_are_files_elsewhere_go_along(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for number, path in enumerate(paths):
        PIL.Image.new("RGB", (2, 2), (100 * number, 0, 0)).save(path)
    rows = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    table = stage_table(rows, np.arange(2), np.ones((1, 2), np.float32), ["q0"], 100)
    tables, _ = aligned({"a": table, "b": facts()})
    write_parquet(tables["a"], tmp_path / "data", "a")
    for path in paths:
        Path(path).unlink()
    found = read_parquet(tmp_path / "data", "a")
    assert [image.getpixel((0, 0))[0] for image in found["image"]] == [0, 100]


def test_an_ensemble(story, queries, tmp_path):
    settings = {"method": "grad-dot", "progress": False, "ensemble": "dropout", "ensemble_size": 2, "dropout": 0.1}
    attributor = SourceAttributor.from_record(story.path, **settings)
    expected = attributor.scores(None, queries, "sft")
    found = load_attribution(attributor.save(tmp_path / "f"))
    np.testing.assert_array_equal(found.scores(), expected)
    assert "means over 2 dropout masks" in found.note and found.note in found.stages["sft"].info.description
    assert "means over 2 dropout masks" in (tmp_path / "f" / "README.md").read_text()


def test_large_tables_are_several_files(story, queries, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_source.outputs.attribution_tables._SHARD_BYTES", 100)
    attributor = bm25(story)
    folder = attributor.save(tmp_path / "f", queries, ["pretrain"], k=3)
    files = sorted((folder / "data").glob("*.parquet"))
    assert len(files) > 1
    same(load_attribution(folder), attributor, queries, ["pretrain"])
    assert load_dataset(str(folder), split="pretrain")["source_row"][:] == list(range(8))
    files[-1].unlink()
    with pytest.raises(DataError, match=f"{len(files) - 1} of {len(files)} files"):
        load_attribution(folder)


# ---- the command ---------------------------------------------------------------------------------------------------


def call(*words, code=0):
    result = CliRunner().invoke(app, ["push", *map(str, words)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_command(hub, story, queries, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: TOKEN)
    queries.to_dataset().to_json(str(tmp_path / "asked.jsonl"))
    facts().to_json(str(tmp_path / "facts.jsonl"))
    common = [story.path, REPO, "--queries", tmp_path / "asked.jsonl", "--method", "bm25", "-k", 3]
    dataset = ["--dataset", f"pretrain={tmp_path / 'facts.jsonl'}"]
    out = call(*common, "--stage", "pretrain", *dataset, "--include-rows", "--private")
    assert f"Pushed to {hub.url}/datasets/{REPO}/commit/" in out and TOKEN not in out
    attributor = bm25(story)
    attributor.set_dataset("pretrain", facts())
    same(load_attribution(REPO), attributor, queries, ["pretrain"])
    assert "exists and is public" not in call(*common)
    assert list(load_attribution(REPO).stages) == ["pretrain", "sft"]
    public(hub, "me/facts")
    call(story.path, "me/open", "-p", "Peru:", "-c", " Lima", "--method", "bm25", "--source-dataset", "me/facts",
         "--max-columns", 0)  # fmt: skip
    assert not hub.repositories["datasets/me/open"]["private"] and load_attribution("me/open").listed
    call(story.path, "me/third", "-p", "Peru:", "-c", " Lima", "--method", "bm25", "--public", "--no-include-rows",
         "--source-dataset", "sft=me/facts", "--shaded", 0)  # fmt: skip
    assert not hub.repositories["datasets/me/third"]["private"]
    assert load_attribution("me/third").stages["sft"].column_names == ["source_row", "source_q0"]
    assert "write it as stage=value" in call(*common, "--dataset", "facts.jsonl", code=1)
    assert "Say what to explain" in call(story.path, REPO, "--method", "bm25", code=1)
