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
"""Ensembles: means over models, whichever way the models come about."""

import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_source import Queries, SourceAttributor, SourceTrainer
from hf_source.attribution import METHODS
from hf_source.attribution.ensembles.base import Moments
from hf_source.attribution.ensembles.dropout import apply_masks
from hf_source.attribution.ensembles.lora import attach, train_adapter
from hf_source.errors import ConfigError, DataError
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.gradients.changes import without_changes

from ..cases import byte_tokenizer, config, tiny_gpt2, tiny_llama
from ..story import facts, tell


REPLAYING_OR_READING = ("auto", "stepwise", "unrolled", "bm25", "embedding")
OF_DIFFUSION = {name for name in METHODS if name.startswith("diffusion-")}  # these score images
GRADIENT_METHODS = sorted(set(METHODS) - set(REPLAYING_OR_READING) - OF_DIFFUSION)
# PEFT reads a property that transformers has deprecated; not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

MASKS = {"ensemble": "dropout", "dropout": 0.2}
ADAPTERS = {"ensemble": "lora", "ensemble_size": 2, "lora_steps": 6}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two more runs of the story, with other seeds."""
    return [tell(tmp_path_factory.mktemp(f"seed{seed}"), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


def attributor(records, **settings):
    records = records if isinstance(records, list) else [records]
    paths = [record.path for record in records]
    return SourceAttributor.from_record(paths, **{"num_samples": 16, "progress": False, **settings})


def named(method):
    """Settings that let a method score the story."""
    return {"method": method} | ({"full_parameters": True} if method == "datainf" else {})


def both(walker, queries):
    """Scores of both stages side by side, the earlier one first, so that one walk gives both."""
    return np.concatenate([walker.scores(None, queries, stage) for stage in ("pretrain", "sft")], axis=1)


# ---- all kinds -----------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(5, 2, 3)) + 100
    moments = Moments()
    for value in values:
        moments.add(value)
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.std(), values.std(axis=0, ddof=1), rtol=1e-9)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_independent_scores_are_means_over_records(story, others, queries, method):
    records = [story, *others]
    single = np.stack([both(attributor(record, **named(method)), queries) for record in records])
    walker = attributor(records, **named(method))
    np.testing.assert_allclose(both(walker, queries), single.mean(axis=0), rtol=1e-5, atol=1e-6 * np.abs(single).max())
    std = np.concatenate([walker.scores_std(None, queries, stage) for stage in ("pretrain", "sft")], axis=1)
    np.testing.assert_allclose(std, single.std(axis=0, ddof=1), rtol=1e-4, atol=1e-6 * np.abs(single).max())
    of_mean = walker.scores_std(None, queries, "sft", of_mean=True)
    np.testing.assert_allclose(of_mean, walker.scores_std(None, queries, "sft") / 3**0.5, rtol=1e-6)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("kind", [MASKS, ADAPTERS], ids=["dropout", "lora"])
def test_members_differ_and_a_seed_repeats_them(story, queries, method, kind):
    kind = {**kind, "ensemble_size": 2, **named(method)}
    walker = attributor(story, **kind)
    first = both(walker, queries)
    assert np.isfinite(first).all()
    assert (walker.scores_std(None, queries, "pretrain").max(axis=1) > 0).all()
    members = [both(member, queries) for member in walker.ensemble.members()]
    np.testing.assert_allclose(first, np.mean(members, axis=0), rtol=1e-5, atol=1e-6 * np.abs(first).max())
    np.testing.assert_array_equal(both(attributor(story, **kind), queries), first)
    assert np.abs(both(attributor(story, **kind, seed=1), queries) - first).max() > 1e-3 * np.abs(first).max()


def test_several_records_with_masks_of_each(story, others, queries):
    walker = attributor([story, others[0]], **MASKS, ensemble_size=2, method="grad-dot")
    members = [member.record.path for member in walker.ensemble.members()]
    assert members == [story.path] * 2 + [others[0].path] * 2
    assert walker.note.endswith("means over 4 dropout masks of 2 independently trained models, 2 of each.")
    assert np.isfinite(both(walker, queries)).all()


def test_asking_in_either_order_gives_the_same(story, others, queries):
    walker = attributor([story, others[0]])
    late_first = walker.scores(None, queries, "sft")
    np.testing.assert_array_equal(both(walker, queries)[:, 8:], late_first)


def test_columns_note_and_top(story, others, queries):
    walker = attributor([story, others[0]])
    scored = walker.attribute(facts(), queries, "pretrain", std=True)
    assert scored.column_names[-4:] == ["source_lima", "source_lima_std", "source_havana", "source_havana_std"]
    np.testing.assert_array_equal(
        np.asarray(scored["source_havana_std"], dtype=np.float32), walker.scores_std(None, queries, "pretrain")[1]
    )
    note = "Scores are means over 2 independently trained models."
    assert walker.note == note
    assert note in scored.info.description
    top = walker.top(queries, k=1, opposing=False)
    assert note in top.info.description
    assert top.filter(lambda row: row["query"] == "lima" and row["stage"] == "pretrain")[0]["text"] == "Peru: Lima."


def test_given_datasets_reach_every_member(story, others, queries):
    shuffled = facts().add_column("source_row", np.arange(8)).shuffle(seed=3)
    walker = attributor([story, others[0]], method="grad-dot")
    got = walker.scores(shuffled, queries, "pretrain")
    as_recorded = attributor([story, others[0]], method="grad-dot").scores(None, queries, "pretrain")
    expected = as_recorded[:, shuffled["source_row"]]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="is not the one that stage 'pretrain' trained on"):
        attributor([story, others[0]], datasets={"pretrain": facts().select(range(3))})


def test_plan_counts_every_member(story, others, queries):
    one = attributor(story).plan(None, queries, "pretrain")
    masks = attributor(story, **MASKS, ensemble_size=5).plan(None, queries, "pretrain")
    runs = attributor([story, *others]).plan(None, queries, "pretrain")
    adapters = attributor(story, **ADAPTERS).plan(None, queries, "pretrain")
    assert (masks.members, runs.members, adapters.members) == (5, 3, 2)
    assert masks.disk == 5 * one.disk
    assert masks.memory == one.memory
    assert adapters.training_tokens > 0
    assert "5 members, one after another, each:" in str(masks)
    assert f"each, after training on {adapters.training_tokens:,} tokens:" in str(adapters)
    assert "members" not in str(one)


def test_another_like_it_and_its_settings(story, others, queries):
    walker = attributor([story, others[0]], **MASKS, ensemble_size=2, method="grad-dot")
    other = walker.like(method="grad-cos")
    assert (other.ensemble.size, other.ensemble.options, other.method) == (4, walker.ensemble.options, "grad-cos")
    assert walker.settings() != attributor(story, method="grad-dot").settings()
    assert walker.settings()["dropout"] == 0.2
    np.testing.assert_array_equal(walker.like().scores(None, queries, "sft"), walker.scores(None, queries, "sft"))
    runs = attributor([story, others[0]]).like(num_samples=8)
    assert (runs.ensemble.size, runs.num_samples) == (2, 8)


def test_self_influence_is_a_mean_too(story, others):
    single = [attributor(record).self_influence(None, "pretrain") for record in (story, others[0])]
    got = attributor([story, others[0]]).self_influence(None, "pretrain")
    np.testing.assert_allclose(got, np.mean(single, axis=0), rtol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ensemble": "boosting"}, "ensemble='boosting' is unknown; choose one of independent, dropout, lora"),
        ({"ensemble": "independent"}, "several recorded runs"),
        ({"ensemble_size": 3}, "ensemble_size=3 needs `ensemble=`"),
        ({"ensemble": "dropout"}, "Stage 'pretrain' trained without dropout of units: .* dropout=0.1"),
        ({"ensemble": "dropout", "dropout": 1.0}, "a probability below 1"),
        ({"ensemble": "dropout", "dropout": -0.1}, "a probability below 1"),
        ({**MASKS, "ensemble_size": 0}, "at least one member"),
        ({"dropout": 0.1}, "dropout= is a setting of ensemble='dropout', but ensemble is None"),
        ({"ensemble": "lora", "dropout": 0.1}, "a setting of ensemble='dropout', but ensemble is 'lora'"),
        ({"ensemble": "lora", "drawz": 1}, "has no setting 'drawz'"),
        ({"ensemble": "lora", "lora_rank": 0}, "lora_rank=0: it must be positive"),
        ({"ensemble": "lora", "lora_learning_rate": -1.0}, "it must be positive"),
        ({"ensemble": "lora", "lora_gradients": "none"}, "choose 'adapter', 'all' or 'both'"),
        ({"ensemble": "lora", "lora_gradients": "adapter"}, "method='source' uses what the record knows"),
        ({"ensemble": "lora", "method": "tracin", "lora_gradients": "both"}, "uses what the record knows"),
        ({**MASKS, "method": "stepwise"}, "method='stepwise' repeats the recorded steps"),
        ({"ensemble": "lora", "method": "unrolled"}, "method='unrolled' repeats the recorded steps"),
        ({**MASKS, "method": "bm25"}, "compares texts"),
    ],
)
def test_settings_that_make_no_sense(story, settings, message):
    with pytest.raises(ConfigError, match=message):
        attributor(story, **settings)


def test_an_unknown_stage_for_adapters(story):
    with pytest.raises(Exception, match="has no stage 'dpo'"):
        attributor(story, ensemble="lora", lora_stage="dpo")


def test_a_spread_needs_members(story, queries):
    with pytest.raises(ConfigError, match="at least two members"):
        attributor(story).scores_std(None, queries, "sft")
    with pytest.raises(ConfigError, match="at least two members"):
        attributor(story, **MASKS, ensemble_size=1).attribute(None, queries, "sft", std=True)


def test_columns_that_exist_are_refused_before_the_work(story, others, queries, monkeypatch):
    walker = attributor([story, others[0]])
    monkeypatch.setattr(walker, "scores", lambda *args: pytest.fail("scores were computed"))
    with pytest.raises(DataError, match="'source_lima_std', which the dataset has already"):
        walker.attribute(facts().add_column("source_lima_std", [0.0] * 8), queries, "pretrain", std=True)


def test_records_that_do_not_belong_together(story, others, tmp_path):
    shutil.copytree(story.path, tmp_path / "copy")
    with pytest.raises(ConfigError, match="is the same run as"):
        SourceAttributor.from_record([story.path, tmp_path / "copy"])
    with pytest.raises(ConfigError, match=r"ensemble_size=3, but there are 2 records"):
        attributor([story, others[0]], ensemble_size=3)
    with pytest.raises(ConfigError, match="There is no record"):
        SourceAttributor.from_record([])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"stage": "again"}, ConfigError, r"has the stages \['again'\]"),
        ({"rows": 7}, DataError, "The rows of stage 'pretrain' of .* are not those of"),
        ({"n_embd": 8, "llama": True}, ConfigError, "The model class of stage 'pretrain'"),
        ({"label_smoothing_factor": 0.1}, ConfigError, "The loss of stage 'pretrain'"),
        ({"n_layer": 1}, ConfigError, "The trained parameters of stage 'pretrain'"),
        ({"tokenizer": False}, ConfigError, "The tokenizers of"),
    ],
    ids=["stages", "rows", "class", "loss", "parameters", "tokenizer"],
)
def test_runs_that_differ_in_more_than_seeds(tmp_path, change, error, message):
    def run(folder, *, stage="pretrain", rows=8, llama=False, tokenizer=True, n_embd=16, n_layer=2, **settings):
        sizes = {} if llama else {"n_layer": n_layer, "n_embd": n_embd, "n_positions": 32}
        model = (tiny_llama if llama else tiny_gpt2)(vocab_size=260, **sizes)
        ids = byte_tokenizer()(facts()["text"][:])["input_ids"]
        dataset = facts().add_column("input_ids", ids).select_columns(["input_ids"]).select(range(rows))
        args = config(folder, stage=stage, max_steps=2, num_segments=1, **settings)
        given = {"processing_class": byte_tokenizer()} if tokenizer else {}
        SourceTrainer(model, args, train_dataset=dataset, **given).train()
        return folder / "record"

    with pytest.raises(error, match=message):
        SourceAttributor.from_record([run(tmp_path / "a"), run(tmp_path / "b", seed=1, **change)])


# ---- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_mask_that_drops_nothing_is_the_method_itself(story, queries, method):
    plain = both(attributor(story, **named(method)), queries)
    masked = attributor(story, **named(method), ensemble="dropout", ensemble_size=1, dropout=0.0)
    np.testing.assert_array_equal(both(masked, queries), plain)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_gradients_of_a_masked_model_are_its_own(story, make):
    """Rules agree with autograd under the mask, alone and in any batch: every row sees one sub-network."""
    model = make(dtype=torch.float64).eval()
    plain = make(dtype=torch.float64).eval()
    apply_masks(model, story.stages[0], 0.3, "0/0")
    gradients = RowGradients(model, CausalLMTask(), [name for name, _ in model.named_parameters()])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 48, (3, 9), generator=generator)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    gradients.check(batch)
    assert not gradients.fallback
    got = {name: grads for name, _, grads in gradients.blocks(gradients.run(batch))}
    for row in range(3):
        model.zero_grad()
        one = {key: value[row : row + 1] for key, value in batch.items()}
        CausalLMTask().row_losses(CausalLMTask().forward(model, one), one["labels"]).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][row], parameter.grad, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
        with without_changes():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_masks_drop_units_and_keep_the_mean(story):
    """About `p` of the units are gone, the same for every row and token; the others are larger by `1 / (1 - p)`."""
    model = tiny_gpt2(n_embd=512)
    seen = []
    apply_masks(model, story.stages[0], 0.25, "0/0")
    model.transformer.drop.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model.eval()(torch.randint(1, 48, (2, 5)))
    inputs, output = seen[0]
    factor = (output / inputs).detach()
    torch.testing.assert_close(factor, factor[:1, :1].expand_as(factor))
    kept = factor[0, 0] > 0
    torch.testing.assert_close(factor[0, 0][kept], torch.full((int(kept.sum()),), 4 / 3))
    assert 0.17 < 1 - kept.float().mean() < 0.33  # four standard deviations of 512 coins


def test_masks_belong_to_the_member_and_the_place(story):
    def mask(place, seed):
        model = tiny_gpt2().eval()
        apply_masks(model, story.stages[0], 0.5, seed)
        return model.get_submodule(place)(torch.ones(1, 1, 16))[0, 0] > 0

    first = mask("transformer.drop", "0/0")
    assert torch.equal(first, mask("transformer.drop", "0/0"))
    assert not torch.equal(first, mask("transformer.drop", "0/1"))
    assert not torch.equal(first, mask("transformer.drop", "1/0"))
    assert not torch.equal(first, mask("transformer.h.0.mlp.dropout", "0/0"))


def test_dropout_of_training_is_taken_up(tmp_path, queries):
    model = tiny_gpt2(vocab_size=260, resid_pdrop=0.1, embd_pdrop=0.0)
    args = config(tmp_path, stage="pretrain", max_steps=10)
    SourceTrainer(model, args, train_dataset=facts(), processing_class=byte_tokenizer()).train()
    queries = queries.select([0])
    settings = {"num_samples": 16, "progress": False, "method": "grad-dot", "ensemble": "dropout", "ensemble_size": 2}
    walker = SourceAttributor.from_record(tmp_path / "record", **settings)
    as_trained = walker.scores(None, queries)
    assert walker.scores_std(None, queries).max() > 0
    member = next(walker.ensemble.members())
    masked = member.build_model(member.record.stages[0]).transformer
    ones = torch.ones(1, 1, 16)
    assert torch.equal(masked.drop(ones), ones)  # trained without dropout of embeddings
    dropped = torch.cat([block.mlp.dropout(ones).flatten() for block in masked.h])
    torch.testing.assert_close(dropped[dropped > 0], torch.full_like(dropped[dropped > 0], 1 / 0.9))
    assert (dropped == 0).any()
    given = SourceAttributor.from_record(tmp_path / "record", dropout=0.5, **settings).scores(None, queries)
    assert np.abs(given - as_trained).max() > 1e-3 * np.abs(as_trained).max()


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def test_an_adapter_computes_what_pefts_does():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = tiny_gpt2(dtype=torch.float64).eval(), tiny_gpt2(dtype=torch.float64).eval()
    settings = LoraConfig(r=3, lora_alpha=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    theirs = get_peft_model(theirs, settings).eval()
    weights = {}
    with torch.no_grad():
        for name, module in theirs.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                pair = [module.lora_A["default"].weight, module.lora_B["default"].weight]
                for part in pair:
                    part.copy_(torch.randn(part.shape, generator=generator))
                weights[name] = tuple(part.detach().double() for part in pair)
    theirs = theirs.double()
    assert attach(ours, weights).keys() == weights.keys()
    ids = torch.randint(1, 48, (2, 7), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-9, atol=1e-9)


def test_an_adapter_learns_the_stage(story):
    walker = attributor(story, **{**ADAPTERS, "lora_stage": "pretrain"}, method="grad-dot")
    stage, options = story.stage("pretrain"), walker.ensemble.options
    weights = train_adapter(walker, stage, options, seed=1)
    model, rows = walker.build_model(stage), walker.rows(stage)
    batch = rows.collated(rows.trained, walker.device)

    def loss():
        with torch.no_grad():
            return float(rows.task.row_losses(rows.task.forward(model, batch), batch["labels"]).sum())

    before = loss()
    adapters = attach(model, weights)
    assert loss() < before
    assert len(adapters) == 8  # four Conv1D in each of two layers; the head is left alone


def test_whose_gradients_are_taken(story, queries):
    """Gradients at the final weights are those of the adapters, of the recorded parameters, or their sum."""
    scores = {
        which: both(attributor(story, **ADAPTERS, method="grad-dot", lora_gradients=which), queries)
        for which in ("", "adapter", "all", "both")
    }
    np.testing.assert_array_equal(scores[""], scores["adapter"])
    total = scores["adapter"] + scores["all"]
    np.testing.assert_allclose(scores["both"], total, rtol=1e-4, atol=1e-5 * np.abs(total).max())
    assert np.abs(scores["adapter"] - scores["all"]).max() > 1e-2 * np.abs(total).max()


def test_gradients_of_adapters_are_autograds(story):
    """The products of `grad-dot` against autograd through the adapted model."""
    queries = Queries.from_text(["Peru:"], [" Lima"])
    walker = attributor(story, **{**ADAPTERS, "ensemble_size": 1}, method="grad-dot")
    got = walker.scores(None, queries, "sft")[0]
    member = next(walker.ensemble.members())
    stage = story.stage("sft")
    model = member.build_model(stage)
    wanted = [parameter for name, parameter in model.named_parameters() if "ensemble_adapter" in name]
    assert len(wanted) == 16

    def gradient(ids, labels):
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        losses = CausalLMTask().row_losses(CausalLMTask().forward(model, batch), batch["labels"])
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(losses.sum(), wanted)])

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    asked = walker.encode(queries).rows[0]
    asked = gradient(asked["input_ids"], asked["labels"])
    expected = torch.stack([asked @ gradient(row["input_ids"], row["labels"]) for row in stage.rows()]).detach()
    # float32 sums over 2 thousand parameters
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
