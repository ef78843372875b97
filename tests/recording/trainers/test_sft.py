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
"""TRL's `SFTTrainer` without packing: rows keep their identity through its map, filter and shuffle."""

import numpy as np
import pytest
import torch
from cases import byte_tokenizer
from datasets import Dataset
from received import largest_error

from hf_source import Queries, SourceAttributor
from hf_source.errors import UnsupportedError
from hf_source.recording import replay
from hf_source.recording.losses import describe_loss


pytest.importorskip("trl")
from .sft import chatty_tokenizer, model, nll, sft  # noqa: E402


CAPITALS = {"Peru": "Lima", "Cuba": "Havana", "Fiji": "Suva", "Oman": "Muscat", "Mali": "Bamako", "Togo": "Lome"}
LONG = 2  # its prompt fills the whole length, so TRL drops the row


def completions():
    prompts = [f"{country}?" for country in CAPITALS]
    prompts[LONG] = "?" * 30
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {city}" for city in CAPITALS.values()]})


def chats():
    said = [
        [{"role": "user", "content": country}, {"role": "assistant", "content": city}]
        for country, city in CAPITALS.items()
    ]
    said[1] += [{"role": "user", "content": "!"}, {"role": "assistant", "content": "ok"}]
    return Dataset.from_dict({"messages": said})


def texts():
    return Dataset.from_dict({"text": [f"{country}: {city}." for country, city in CAPITALS.items()]})


def by_hand(kind, row):
    """Tokens of a row, and which of them are asked, from its text alone."""
    encode = lambda text: byte_tokenizer()(text)["input_ids"]  # noqa: E731
    if kind == "completion":
        prompt, completion = encode(completions()[row]["prompt"]), encode(completions()[row]["completion"])
        ids, asked = prompt + completion + [0], [False] * len(prompt) + [True] * (len(completion) + 1)
    elif kind == "text":
        ids = encode(texts()[row]["text"]) + [0]
        asked = [True] * len(ids)
    else:
        ids, asked = [], []
        for message in chats()[row]["messages"]:
            assistant = message["role"] == "assistant"
            before, after = ("A:", [0]) if assistant else ("U:", encode(";"))
            part = encode(message["content"]) + after
            ids += encode(before) + part
            asked += [False] * len(encode(before)) + [assistant] * len(part)
    return ids[:24], asked[:24]


KINDS = {
    "completion": (completions, {"shuffle_dataset": True}),
    "chat": (chats, {"assistant_only_loss": True, "optim": "sgd", "learning_rate": 0.05}),
    "text": (texts, {"padding_free": True, "max_length": None}),
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    rows, settings = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, rows(), sft(folder, rows(), **settings)


def test_the_record_explains_every_gradient(run):
    """Rows are those of the dataset that was passed, and their losses and weights those of training."""
    kind, rows, (record, received, _) = run
    stage = record.stage()
    assert stage.loss["kind"] == "causal_lm" and stage.loss["normalization"] == "tokens"
    assert stage.num_rows == len(rows)
    visits = np.bincount(stage.steps().visits()["row"], minlength=len(rows))
    assert visits.tolist() == [0 if kind == "completion" and row == LONG else 2 for row in range(len(rows))]
    # TRL's fused head sums log-probabilities in float32.
    error = largest_error(received, stage, model(), lambda net, row: nll(net, *by_hand(kind, row)))
    assert error < 1e-5


def test_scores_stand_beside_the_rows_as_they_were_passed(run):
    kind, rows, (record, _, _) = run
    attributor = SourceAttributor(record, method="grad-dot", dtype=torch.float64, progress=False)
    queries = Queries.from_text(["Oman? "], ["Muscat"])
    scored = attributor.attribute(rows, queries)
    assert scored.column_names == [*rows.column_names, "source_row", "source_q0"]
    net = record.stage().build_model(torch.float64)
    parameters = list(net.parameters())
    gradient = lambda *row: torch.cat([g.flatten() for g in torch.autograd.grad(nll(net, *row), parameters)])  # noqa: E731
    tokens = byte_tokenizer()("Oman? Muscat")["input_ids"]
    asked = gradient(tokens, [place >= 6 for place in range(len(tokens))])
    expected = np.array([float(asked @ gradient(*by_hand(kind, row))) for row in range(len(rows))])
    if kind == "completion":
        expected[LONG] = 0.0  # never trained on
    np.testing.assert_allclose(scored["source_q0"], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    source = SourceAttributor(record, num_samples=16, progress=False).scores(rows, queries)
    assert np.isfinite(source).all() and ((source[0] == 0) == (expected == 0)).all()


def test_the_record_replays(run):
    kind, rows, (record, _, _) = run
    again = replay(record.stage(), rows)
    for name, weight in record.stage().weights("final").items():
        torch.testing.assert_close(again.get_parameter(name).detach(), weight, rtol=1e-3, atol=1e-4)


def test_other_loss_types_are_refused_at_attribution(tmp_path):
    record, _, trainer = sft(tmp_path, texts(), loss_type="dft", max_steps=1, num_segments=1)
    with pytest.raises(UnsupportedError, match="loss_type='dft' weighs .* train with loss_type='nll'"):
        SourceAttributor(record, progress=False).scores(None, Queries.from_text(["a"], ["b"]))
    trainer._is_vision_dataset = True
    assert "rows hold images" in describe_loss(trainer)["reason"]


def test_evaluation_is_left_alone(tmp_path):
    record, _, trainer = sft(tmp_path, chats(), max_steps=1, num_segments=1)
    metrics = trainer.evaluate(texts())
    assert np.isfinite(metrics["eval_loss"])
    assert chatty_tokenizer().chat_template == record.processing_class().chat_template
