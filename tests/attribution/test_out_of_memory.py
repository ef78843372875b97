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
"""Where memory runs out, fewer rows go through the model at once, and the scores stay what they were."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_source import Queries, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.budget import NotEnoughMemoryError, Parts
from hf_source.curvature import FisherSample
from hf_source.curvature.columns import Columns
from hf_source.curvature.ekfac import KroneckerMoments
from hf_source.gradients import CausalLMTask, RowGradients
from hf_source.gradients.task import batch_rows
from hf_source.source import Together

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..oracles import make_batch
from ..story import facts


MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"
WIDE = {"num_samples": 16, "progress": False, "max_tokens_per_batch": 4096}


def ask() -> Queries:
    return Queries.from_text(["Peru:", "Q Cuba? A", "Fiji:", "Oman:"], [" Lima", " Havana", " Suva", " Muscat"])


@pytest.fixture()
def small(monkeypatch):
    """A device on which the model has room for so many sequences; gives the sizes of what it was asked to do."""
    forward, tried = GPT2LMHeadModel.forward, []

    def limit(most: int) -> list[int]:
        def limited(self, input_ids=None, **inputs):
            tried.append(len(input_ids))
            if len(input_ids) > most:
                raise torch.OutOfMemoryError(MESSAGE)
            return forward(self, input_ids=input_ids, **inputs)

        monkeypatch.setattr(GPT2LMHeadModel, "forward", limited)
        return tried

    return limit


def attributor(record, **settings) -> SourceAttributor:
    return SourceAttributor.from_record(record.path, **{**WIDE, **settings})


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """But for float32 sums in another order; other labels of the sample would change scores by order one."""
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=5e-5 * np.abs(expected).max())


METHODS = {
    "joint": {},
    "joint in groups": {"memory_budget": 2**18},
    "bfloat16": {"vector_dtype": "bfloat16"},
    "ekfac": {"curvature": "ekfac"},
    "diagonal": {"curvature": "diagonal"},
    "influence": {"method": "influence", "curvature": "ekfac"},
    "influence, joint": {"method": "influence", "memory_budget": 2**18},
    "influence, cg": {"method": "influence", "solver": "cg", "iterations": 2},
    "tracin": {"method": "tracin"},
    "grad-cos": {"method": "grad-cos"},
    "logra": {"method": "logra", "rank": 4, "init": "pca"},
    "trak": {"method": "trak", "projection_dim": 16},
    "datainf": {"method": "datainf", "full_parameters": True},
    "unrolled": {"method": "unrolled"},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=list(METHODS))
def test_every_method_goes_on_with_fewer_rows(story, small, settings):
    expected = attributor(story, **settings).scores(None, ask(), "sft")
    tried = small(3)
    found = attributor(story, **settings).scores(None, ask(), "sft")
    assert max(tried) > 3
    if "vector_dtype" in settings:  # sums of numbers of 8 bits
        np.testing.assert_allclose(found, expected, atol=3e-2 * np.abs(expected).max())
    else:
        assert_same(found, expected)


def test_processes_with_room_for_different_numbers_of_rows_score_each_row_once(tmp_path, small):
    """The exact derivative shares out micro-batches, of which one process makes parts and the other does not."""
    # Adam's first steps divide by numbers next to zero, which would make much of another order of sums.
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd"}
    model, args = tiny_gpt2(vocab_size=260), config(tmp_path, num_segments=1, **batches)
    SourceTrainer(model, args, train_dataset=facts(), processing_class=byte_tokenizer()).train()
    record, parts = TrainingRecord.load(tmp_path / "record"), []
    expected = attributor(record, method="unrolled").scores(None, ask())
    for index, most in enumerate((64, 2)):
        tried = small(most)
        walker = attributor(record, method="unrolled")
        known = replace(walker.walk_settings(), together=Together(index, 2))
        walker.walk_settings = lambda known=known: known
        parts.append(walker.scores(None, ask()))
    assert max(tried) == 4
    assert all(part.any() for part in parts)
    assert_same(sum(parts), expected)


def test_rows_alone_and_an_index_go_on_with_fewer_rows(story, small, tmp_path):
    def results(folder):
        maker = attributor(story)
        answering = attributor(story, index=maker.build_index(folder, numbers=300))
        return maker.self_influence(stage="sft"), maker.row_losses("sft"), answering.scores(None, ask(), "sft")

    expected = results(tmp_path / "before")
    tried = small(3)
    found = results(tmp_path / "after")
    assert max(tried) > 3
    for own, true in zip(found[:2], expected[:2], strict=True):
        assert_same(own, true)
    # Which numbers of a row are kept, and how they are rounded to 8 bits, hangs on rounding.
    np.testing.assert_allclose(found[2], expected[2], atol=1e-2 * np.abs(expected[2]).max())


# ---- the sample -------------------------------------------------------------------------------------------------


def sample_of(**settings) -> FisherSample:
    torch.manual_seed(0)
    model = tiny_gpt2(vocab_size=11, n_positions=16).double()
    gradients = RowGradients(model, CausalLMTask(), [name for name, _ in model.named_parameters()])
    batches = [make_batch((7, 7, 6, 5, 3), seed=1, vocabulary=11), make_batch((5, 4, 4), seed=2, vocabulary=11)]
    gradients.check(batch_rows(batches[0], range(1)))
    return FisherSample(gradients, batches, seed=3, **settings)


def fail_above(monkeypatch, owner, name: str, most: int, rows_of, after: int = 0) -> list[int]:
    """Let a method of the engine fail when it gets more than so many rows, from the so-manieth call on."""
    original, calls = getattr(owner, name), []

    def limited(*args, **kwargs):
        calls.append(rows_of(*args))
        if calls[-1] > most and len(calls) > after:
            raise torch.OutOfMemoryError(MESSAGE)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    return calls


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("probes", ["labels", "signs"])
def test_labels_do_not_depend_on_how_a_batch_was_split(monkeypatch, most, probes):
    expected = sample_of(probes=probes)
    names = list(expected.gradients.parameters)
    matrices = expected.matrices(names)
    fail_above(monkeypatch, CausalLMTask, "forward", most, lambda task, model, batch: len(batch["input_ids"]))
    found = sample_of(probes=probes)
    again = found.matrices(names)
    for own, true in zip(found._labels, expected._labels, strict=True):
        assert torch.equal(own, true)
    for name in names:
        torch.testing.assert_close(again[name], matrices[name])
    second = found.matrices(names)  # the same labels in the next pass
    for name in names:
        torch.testing.assert_close(second[name], matrices[name])


@pytest.mark.parametrize("after", [0, 1, 7])
def test_what_was_half_done_when_memory_ran_out_is_not_counted_twice(monkeypatch, after):
    """Memory runs out while columns are taken: at once, and when some of a batch's are there already."""
    expected = sample_of()
    names = list(expected.gradients.parameters)
    true = {name: columns.whole() for name, columns in expected.columns(names).items()}
    rows = lambda columns, samples, *call: samples.stop - samples.start  # noqa: E731
    calls = fail_above(monkeypatch, Columns, "add", 2, rows, after)
    found = sample_of()
    columns = found.columns(names)
    assert max(calls) > 2 and len(calls) > after
    for name in names:
        torch.testing.assert_close(columns[name].whole(), true[name])


def test_moments_of_half_a_batch_are_taken_anew(story, monkeypatch):
    expected = attributor(story, curvature="ekfac").scores(None, ask(), "sft")
    calls = fail_above(monkeypatch, KroneckerMoments, "add", 2, lambda moments, done, *rest: done.num_rows, 3)
    found = attributor(story, curvature="ekfac").scores(None, ask(), "sft")
    assert max(calls) > 2
    assert_same(found, expected)


def test_a_pass_that_adds_to_vectors_stops_rather_than_count_twice(story, monkeypatch):
    """What groups of parameters add in the last pass cannot be taken back: the error names the setting."""
    joint = importlib.import_module("hf_source.curvature.joint")
    fail_above(monkeypatch, joint, "add_combined", 0, lambda rule, call, rows, *rest: rows, 2)
    with pytest.raises(NotEnoughMemoryError, match="Lower max_tokens_per_batch="):
        attributor(story, memory_budget=2**18).scores(None, ask(), "sft")


# ---- errors -----------------------------------------------------------------------------------------------------


def test_a_row_that_does_not_fit_alone_names_the_settings_and_keeps_what_was_done(story, small, tmp_path, monkeypatch):
    def first_stage_fails(*args, **kwargs):
        raise torch.OutOfMemoryError(MESSAGE)

    expected = attributor(story).scores(None, ask(), "sft")
    asker = attributor(story, cache_dir=tmp_path)
    asker.scores(None, ask(), "sft")
    monkeypatch.setattr(CausalLMTask, "forward", first_stage_fails)
    with pytest.raises(NotEnoughMemoryError, match="memory_budget=.*max_tokens_per_batch=.*cache_dir="):
        asker.scores(None, ask(), "pretrain")
    again = attributor(story, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.scores(None, ask(), "sft"), expected)  # no pass through the model


def test_memory_that_runs_out_elsewhere_names_the_settings(story, monkeypatch):
    joint = importlib.import_module("hf_source.curvature.joint")

    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(joint, "SampleSpace", full)
    with pytest.raises(NotEnoughMemoryError, match="can't allocate memory.*memory_budget="):
        attributor(story).scores(None, ask(), "sft")


def test_other_errors_are_not_tried_again():
    tries = []

    def broken(items):
        tries.append(items)
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        list(Parts()(broken, [1, 2, 3]))
    assert tries == [[1, 2, 3]]


def test_parts_cover_every_item_once_and_later_batches_come_in_as_many():
    parts, tried = Parts(), []

    def compute(items):
        tried.append(len(items))
        if len(items) > 2:
            raise MemoryError
        return sum(items)

    found = list(parts(compute, list(range(7))))
    assert [item for items, _ in found for item in items] == list(range(7))
    assert sum(result for _, result in found) == 21
    tried.clear()
    assert len(list(parts(compute, list(range(7))))) == 4 and max(tried) == 2
    with pytest.raises(NotEnoughMemoryError, match="one row at a time"):
        list(parts(lambda items: compute([0, 0, 0]), [1]))


def test_rows_of_a_batch_stay_padded():
    batch = make_batch((4, 2), vocabulary=5)
    assert batch_rows(batch, range(1, 2))["input_ids"].shape == (1, 4)
