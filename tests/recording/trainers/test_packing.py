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
"""Packed sequences credit the rows whose tokens they hold, in each of TRL's three ways to pack."""

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, tiny_gpt2
from datasets import Dataset
from received import largest_error

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.gradients import RowGradients
from hf_source.recording import replay


pytest.importorskip("trl")
from trl import SFTTrainer  # noqa: E402

from .sft import SourceSFTConfig, chatty_tokenizer, model, nll, sft  # noqa: E402


STRATEGIES = ["bfd", "bfd_split", "wrapped"]
LENGTH = 16


def rows():
    words = ["Lima", "Havana is it", "Suva", "a long row of very many letters", "Oman", "Togo or Lome", "Mali", "x"]
    prompts = [f"{index}:" for index in range(len(words))]
    return Dataset.from_dict({"prompt": prompts, "completion": words, "source": list("abcdefgh")})


def packed(folder, strategy, **settings):
    options = {"packing": True, "packing_strategy": strategy, "max_length": LENGTH, "optim": "sgd"}
    return sft(folder, rows(), **options | {"per_device_train_batch_size": 2, "learning_rate": 0.02} | settings)


@pytest.fixture(scope="module", params=STRATEGIES)
def run(request, tmp_path_factory):
    return request.param, *packed(tmp_path_factory.mktemp(request.param), request.param, shuffle_dataset=True)


def test_sequences_are_those_of_trl(run, tmp_path):
    strategy, record, _, trainer = run
    same = {"packing": True, "packing_strategy": strategy, "max_length": LENGTH, "seed": trainer.args.seed}
    args = SourceSFTConfig(str(tmp_path), **same, shuffle_dataset=True, use_cpu=True, activation_checkpointing=False)
    plain = SFTTrainer(model(), args, train_dataset=rows(), processing_class=chatty_tokenizer()).train_dataset
    for column in plain.column_names:
        assert trainer.train_dataset[column][:] == plain[column][:], column
    stage = record.stage()
    assert (stage.packing, stage.num_rows, stage.num_examples) == (strategy, len(rows()), len(plain))
    lettered = {letter: row for row, text in enumerate(rows()["completion"]) for letter in text}
    assert len(lettered) > 8
    for ids, owners in zip(plain["input_ids"], trainer.train_dataset["row_ids"], strict=True):
        for row in set(owners):  # every row's tokens stand in its own text
            text = rows()[row]["prompt"] + rows()[row]["completion"] + "<eos>"
            own = [token for token, owner in zip(ids, owners, strict=True) if owner == row]
            assert byte_tokenizer().decode(own) in text


def test_rows_come_back_with_what_is_known_of_them(run):
    """A packed sequence holds tokens of many rows; their texts and other columns are kept beside it."""
    _, record, _, _ = run
    attributor = SourceAttributor(record, method="bm25", progress=False)
    given = attributor.rows(record.stage()).given
    assert len(given) and {row["source_row"]: row["source"] for row in given} == {
        row: "abcdefgh"[row] for row in given["source_row"][:]
    }
    for row in given:
        assert (row["prompt"], row["completion"]) == (rows()[row["source_row"]]["prompt"],
                                                      rows()[row["source_row"]]["completion"])  # fmt: skip


def example_loss(trainer, strategy):
    """The loss of a packed sequence, from what packing means: documents alone, or one text."""
    examples = trainer.train_dataset

    def loss(net, number):
        example = examples[number]
        ids, asked = example["input_ids"], [label != -100 for label in example["labels"]]
        if strategy == "wrapped":
            return nll(net, ids, asked)
        ends = np.cumsum(example["seq_lengths"])
        starts = ends - example["seq_lengths"]
        return sum(nll(net, ids[a:b], asked[a:b]) for a, b in zip(starts, ends, strict=True))

    return loss


def test_the_record_explains_every_gradient(run):
    strategy, record, received, trainer = run
    assert largest_error(received, record.stage(), model(), example_loss(trainer, strategy)) < 1e-5


def test_pieces_add_up_to_their_sequence(run):
    strategy, record, _, trainer = run
    attributor = SourceAttributor(record, dtype=torch.float64, progress=False)
    stage = record.stage()
    # GPT-2, since Llama's norms and angles are float32 whatever the weights are.
    pieces, net = attributor.rows(stage), tiny_gpt2(dtype=torch.float64, vocab_size=260)
    engine = RowGradients(net, pieces.task, [name for name, _ in net.named_parameters()])
    loss, several = example_loss(trainer, strategy), 0
    for number in range(stage.num_examples):
        own = pieces.pieces_of([number])
        several += len(own) > 1
        assert pieces.row[own].tolist() == list(dict.fromkeys(trainer.train_dataset[number]["row_ids"]))
        parameters = list(engine.parameters.values())
        truth = torch.autograd.grad(loss(net, number), parameters, materialize_grads=True)
        done = engine.run(pieces.collated(own, torch.device("cpu")))
        summed = {name: 0 for name in engine.parameters}
        for name, _, block in engine.blocks(done):
            summed[name] = summed[name] + block.sum(dim=0)
        for found, expected in zip(summed.values(), truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert several > 1


def test_scores_predict_training_without_a_rows_labels(run):
    """Small steps of SGD, so first order is nearly all there is; a row may have pieces in several sequences."""
    _, record, _, _ = run
    stage = record.stage()
    attributor = SourceAttributor(record, curvature="identity", dtype=torch.float64, progress=False)
    queries = Queries.from_text(["1:"], ["Havana"])
    scored = attributor.attribute(rows(), queries)
    assert scored["source_row"] == list(range(len(rows())))
    tokens = byte_tokenizer()("1:Havana")["input_ids"]
    query = lambda net: nll(net, tokens, [place > 1 for place in range(len(tokens))])  # noqa: E731
    final = replay(stage)
    scores = np.asarray(scored["source_q0"])
    for row in {int(scores.argmax()), int(scores.argmin()), 3}:
        without = replay(stage, row_mask=np.arange(len(rows())) != row)
        with torch.no_grad():
            change = float(query(without) - query(final))
        assert scores[row] == pytest.approx(change, rel=0.1, abs=2e-2 * np.abs(scores).max()), row


def test_rows_of_the_record_are_put_together_again(run):
    strategy, record, _, _ = run
    attributor = SourceAttributor(record, num_samples=16, progress=False)
    queries = Queries.from_text(["1:"], ["Havana"])
    scored = attributor.attribute(None, queries)
    assert scored["source_row"] == list(range(len(rows())))
    given = attributor.attribute(rows(), queries)
    assert scored["source_q0"] == given["source_q0"]
    top = attributor.top(queries, k=1)
    whole = {row: rows()[row]["prompt"] + rows()[row]["completion"] for row in range(len(rows()))}
    assert all(strategy == "bfd" or sorted(row["text"]) == sorted(whole[row["row"]]) for row in top)
    assert attributor.plan(None, queries).stages[0].num_rows == len(rows())


def test_rows_that_see_each_other_are_refused(tmp_path, monkeypatch):
    """As with an attention that knows nothing of positions that start anew."""
    forward = type(model()).forward

    def leaking(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model()), "forward", leaking)
    with pytest.raises(UnsupportedError, match="lets each row attend to the rows before it.*wrapped"):
        packed(tmp_path, "bfd")
