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
from collections import Counter

import pytest
import torch

from hf_source.data import IGNORE_INDEX, prepare_rows
from hf_source.demo import facts as facts_module
from hf_source.demo.facts import (
    MAX_POSITIONS,
    Fact,
    build_model,
    is_right,
    load_facts,
    pretrain_rows,
    queries,
    row_texts,
    sft_rows,
    train_tokenizer,
)
from hf_source.demo.recipe import STAGES
from hf_source.errors import UnsupportedError


pytest.importorskip("countryinfo", reason='the demo\'s facts come from `pip install "hf_source[demo]"`')


@pytest.fixture(scope="module")
def facts():
    return load_facts()


@pytest.fixture(scope="module")
def pretrain(facts):
    return pretrain_rows(facts)


@pytest.fixture(scope="module")
def sft(facts):
    return sft_rows(facts)


@pytest.fixture(scope="module")
def tokenizer(pretrain, sft):
    return train_tokenizer(row_texts(pretrain, sft))


def test_how_many_facts(facts, pretrain, sft):
    assert Counter(fact.relation for fact in facts) == {
        "capital": 248,
        "subregion": 251,
        "currency": 239,
        "demonym": 237,
    }
    assert len(pretrain) == len(facts) == 975
    assert len(sft) == 124


def test_no_fact_twice_and_none_empty(facts):
    assert len({(fact.country, fact.relation) for fact in facts}) == len(facts)
    assert all(fact.country.strip() and fact.answer.strip() for fact in facts)


def test_a_known_country(facts, pretrain):
    rows = [text for text, country in zip(pretrain["text"], pretrain["country"], strict=True) if country == "Hungary"]
    assert rows[0] == "The capital of Hungary is Budapest."
    assert {fact.relation: fact.answer for fact in facts if fact.country == "Hungary"} == {
        "capital": "Budapest",
        "subregion": "Eastern Europe",
        "currency": "HUF",
        "demonym": "Hungarian",
    }


def test_an_abbreviation_gets_no_second_full_stop():
    assert Fact("United States", "capital", "Washington D.C.").completion == " Washington D.C."
    assert Fact("Hungary", "capital", "Budapest").completion == " Budapest."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Rome", "Rome"),
        (["HRK", "EUR"], "HRK"),
        ("Bosnian,Herzegovinian", "Bosnian"),
        ([], None),
        ("", None),
        (None, None),
    ],
)
def test_first_value(value, expected):
    assert facts_module._first_value(value) == expected


def test_rows_state_their_fact(facts, pretrain, sft):
    for row, fact in zip(pretrain, facts, strict=True):
        assert (row["country"], row["relation"], row["answer"]) == (fact.country, fact.relation, fact.answer)
        assert row["text"] in {fact.statement + fact.completion, fact.question + fact.completion}
    for row in sft:
        assert row["country"] in row["prompt"]
        assert row["completion"] == Fact(row["country"], row["relation"], row["answer"]).completion


def test_both_forms_of_every_relation_but_the_queried(pretrain):
    forms = Counter((row["relation"], row["text"].startswith("Q:")) for row in pretrain)
    assert forms["capital", True] == 0
    for relation in ("subregion", "currency", "demonym"):
        assert 0.4 < forms[relation, True] / (forms[relation, True] + forms[relation, False]) < 0.6


@pytest.mark.parametrize("form", ["question", "statement"])
def test_each_query_has_one_row_per_stage(facts, pretrain, sft, form):
    asked = queries(facts, form)
    texts, taught = list(pretrain["text"]), list(zip(sft["country"], sft["relation"], strict=True))
    assert len(asked) == 248
    for query in asked:
        fact = Fact(query["country"], query["relation"], query["answer"])
        rows = [row for row, text in enumerate(texts) if text.startswith((fact.statement, fact.question))]
        assert rows == [query["pretrain_row"]]
        assert fact.country in texts[rows[0]]
        assert fact.answer in texts[rows[0]]
        rows = [row for row, key in enumerate(taught) if key == (fact.country, fact.relation)]
        assert rows == ([] if query["sft_row"] is None else [query["sft_row"]])
    assert sum(row is not None for row in asked["sft_row"]) == len(sft) == 124


def test_a_question_is_the_sft_row_and_a_statement_the_pretraining_row(facts, pretrain, sft):
    for query in queries(facts, "question"):
        if query["sft_row"] is not None:
            row = sft[query["sft_row"]]
            assert (query["prompt"], query["completion"]) == (row["prompt"], row["completion"])
    for query in queries(facts, "statement"):
        assert query["prompt"] + query["completion"] == pretrain[query["pretrain_row"]]["text"]


def test_names_suit_columns_and_differ(facts):
    names = queries(facts)["name"]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name.isascii() for name in names)
    assert {"hungary", "sao_tome_and_principe", "virgin_islands_u_s"} <= set(names)


@pytest.mark.parametrize(
    ("generated", "answer", "right"),
    [
        (" Budapest.", "Budapest", True),
        (" Budapest", "Budapest", True),
        (" Washington D.C.", "Washington D.C.", True),
        (" Budapest. The", "Budapest", False),
        (" Panama", "Panama City", False),
        ("", "Budapest", False),
    ],
)
def test_is_right(generated, answer, right):
    assert is_right(generated, answer) is right


def test_everything_is_deterministic(facts, pretrain, sft, tokenizer):
    again = load_facts()
    assert again == facts
    assert pretrain_rows(again).to_dict() == pretrain.to_dict()
    assert sft_rows(again).to_dict() == sft.to_dict()
    assert train_tokenizer(row_texts(pretrain, sft)).get_vocab() == tokenizer.get_vocab()


def test_tokenizer_reads_back_what_it_wrote(pretrain, sft, tokenizer):
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for text in row_texts(pretrain, sft):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_answers_have_the_same_tokens_in_both_stages(facts, pretrain, sft, tokenizer):
    rows = prepare_rows(sft, tokenizer)
    for query in queries(facts):
        if query["sft_row"] is not None:
            answer = [label for label in rows[query["sft_row"]]["labels"] if label != IGNORE_INDEX]
            stated = [*tokenizer(pretrain[query["pretrain_row"]]["text"])["input_ids"], tokenizer.eos_token_id]
            assert stated[-len(answer) :] == answer


def test_rows_fit_the_model(pretrain, sft, tokenizer):
    for dataset in (pretrain, sft):
        assert max(len(ids) for ids in prepare_rows(dataset, tokenizer)["input_ids"]) <= MAX_POSITIONS


def test_model_is_small_tied_and_reproducible(tokenizer):
    state = torch.random.get_rng_state()
    model, same, other = build_model(tokenizer), build_model(tokenizer), build_model(tokenizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.num_parameters() == 328_320
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def test_a_pretraining_batch_is_learnt(pretrain, tokenizer):
    model = build_model(tokenizer)
    rows = prepare_rows(pretrain.select(range(16)), tokenizer)
    batch = tokenizer.pad({"input_ids": list(rows["input_ids"])}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    optimizer = torch.optim.AdamW(model.parameters(), lr=STAGES["pretrain"]["learning_rate"])
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_settings_are_training_arguments(stage, tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **STAGES[stage])
    assert args.learning_rate == STAGES[stage]["learning_rate"]


def test_without_the_package_the_error_names_the_fix(monkeypatch):
    monkeypatch.setattr(facts_module, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'pip install "hf_source\[demo\]"'):
        load_facts()
