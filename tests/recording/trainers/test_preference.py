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
"""TRL's `RewardTrainer` and `DPOTrainer`: a row is a pair, with a loss of its own."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import byte_tokenizer, config, tiny_gpt2, tiny_llama
from datasets import Dataset
from received import Received, largest_error
from transformers import LlamaForSequenceClassification

from hf_source import Queries, RecordingMixin, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord
from hf_source.errors import UnsupportedError
from hf_source.gradients import DPOTask, RewardTask
from hf_source.recording import replay
from hf_source.recording.losses import _dpo_loss


pytest.importorskip("trl")
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402


class SourceDPOTrainer(RecordingMixin, DPOTrainer):
    pass


class SourceRewardTrainer(RecordingMixin, RewardTrainer):
    pass


@dataclass
class SourceDPOConfig(DPOConfig, SourceConfig):
    pass


@dataclass
class SourceRewardConfig(RewardConfig, SourceConfig):
    pass


BETA, SMOOTHING, CENTRE, LONG = 0.7, 0.1, 0.3, 3


def pairs():
    words = [
        ("Lima", "Rome"),
        ("Havana", "x"),
        ("Suva", "a city"),
        ("Muscat", "ok"),
        ("Bamako", "?!"),
        ("Lome", "Oslo"),
    ]
    prompts = [f"{index}?" for index in range(len(words))]
    prompts[LONG] += "!" * 30  # too long: dropped
    chosen, rejected = map(list, zip(*words, strict=True))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def encoded(row):
    """Prompt, chosen and rejected tokens of a pair, from its text alone."""
    encode = lambda text: byte_tokenizer()(text)["input_ids"]  # noqa: E731
    return encode(pairs()[row]["prompt"]), *([*encode(pairs()[row][side]), 0] for side in ("chosen", "rejected"))


def llama(kind=None):
    net = tiny_llama(dtype=torch.float64, vocab_size=260, max_position_embeddings=64)
    if kind is None:
        return net
    net.config.num_labels, net.config.pad_token_id = 1, 0
    torch.manual_seed(0)
    net = LlamaForSequenceClassification(net.config).double()
    net.score.weight.data *= 20  # rewards far enough from 0 for their centring to matter
    return net


def arguments(folder, cls, **settings):
    given = config(folder).to_dict()
    names = ("output_dir", "record_dir", "gradient_accumulation_steps", "use_cpu", "lr_scheduler_type", "warmup_steps")
    names += ("weight_decay", "save_strategy", "logging_strategy", "disable_tqdm")
    defaults = {"max_grad_norm": 0.0, "num_train_epochs": 3, "max_length": 28, "bf16": False, "num_segments": 2}
    defaults |= {"per_device_train_batch_size": 2, "activation_checkpointing": False, "learning_rate": 0.001}
    return cls(**{name: given[name] for name in names} | defaults | {"optim": "sgd"} | settings)


def trained(folder, trainer, net, args, **more):
    received = Received()
    run = trainer(
        net, args=args, train_dataset=pairs(), processing_class=byte_tokenizer(), callbacks=[received], **more
    )
    run.train()
    return TrainingRecord.load(folder / "record"), received


def dpo(folder, reference, **settings):
    """One of the ways in which the reference model is known."""
    more = {"ref_model": llama()} if reference == "initial" else {}
    if reference == "adapter_off":
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    options = {"beta": BETA, "label_smoothing": SMOOTHING, "precompute_ref_log_probs": reference == "columns"}
    args = arguments(folder, SourceDPOConfig, **options | settings)
    return trained(folder, SourceDPOTrainer, llama(), args, **more)


def likelihood(net, prompt, completion):
    tokens = torch.tensor([prompt + completion])
    logits = net(tokens).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :].sum()


def dpo_loss(net, row):
    prompt, *both = encoded(row)
    with torch.no_grad():
        before = [likelihood(llama(), prompt, side) for side in both]
    ratios = [likelihood(net, prompt, side) - old for side, old in zip(both, before, strict=True)]
    margin = BETA * (ratios[0] - ratios[1])
    return -torch.nn.functional.logsigmoid(margin)  # TRL 1.16 leaves label_smoothing out of the sigmoid loss


def reward_loss(net, row):
    prompt, *both = encoded(row)
    rewards = []
    for side in both:
        last = len(prompt + side) - 2  # the end is the padding token too, so the reward stands before it
        rewards.append(net.score(net.model(torch.tensor([prompt + side])).last_hidden_state)[0, last, 0])
    return -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]) + CENTRE * (rewards[0] + rewards[1]) ** 2


@pytest.fixture(scope="module", params=["initial", "columns", "adapter_off"])
def dpo_run(request, tmp_path_factory):
    return request.param, *dpo(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    args = arguments(folder, SourceRewardConfig, center_rewards_coefficient=CENTRE, learning_rate=1e-5)
    return trained(folder, SourceRewardTrainer, llama("reward"), args)


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_the_record_of_dpo_explains_every_gradient(dpo_run):
    reference, record, received = dpo_run
    stage = record.stage()
    assert stage.loss["kind"] == "dpo" and stage.loss["settings"]["reference"] == reference
    assert np.flatnonzero(stage.segments[0].num_visits() + stage.segments[1].num_visits()).tolist() == [0, 1, 2, 4, 5]
    assert largest_error(received, stage, stage.build_model(), dpo_loss) < 1e-5  # the fused head sums in float32


def test_the_record_of_rewards_explains_every_gradient(reward_run):
    record, received = reward_run
    assert record.stage().loss["kind"] == "reward"
    assert largest_error(received, record.stage(), llama("reward"), reward_loss) < 1e-5


def test_scores_of_dpo_rows(dpo_run):
    """A query is text, whatever the stage minimised; pairs are credited as they were passed."""
    reference, record, _ = dpo_run
    queries = Queries.from_text(["0?"], ["Lima"])
    dots = SourceAttributor(record, method="grad-dot", dtype=torch.float64, progress=False)
    scored = dots.attribute(pairs(), queries)
    net = record.stage().build_model(torch.float64)
    parameters = [net.get_parameter(name) for name in record.stage().trainable]
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])  # noqa: E731
    prompt, completion, _ = encoded(0)
    asked = gradient(-likelihood(net, prompt, completion[:-1]))
    expected = np.array([0.0 if row == LONG else float(asked @ gradient(dpo_loss(net, row))) for row in range(6)])
    np.testing.assert_allclose(scored["source_q0"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    walker = SourceAttributor(record, num_samples=16, progress=False)
    assert (np.flatnonzero(walker.scores(pairs(), queries)[0]) == [0, 1, 2, 4, 5]).all()
    assert walker.plan(None, queries).seconds > 0


def test_scores_predict_dpo_without_a_pair(dpo_run):
    """Small steps of SGD, so that first order is nearly all there is."""
    _, record, _ = dpo_run
    stage = record.stage()
    scores = SourceAttributor(record, curvature="identity", progress=False)
    scores = scores.scores(pairs(), Queries.from_text(["0?"], ["Lima"]))[0]
    prompt, completion, _ = encoded(0)
    final = replay(stage)
    for name, weight in stage.weights("final").items():
        torch.testing.assert_close(final.get_parameter(name).detach(), weight, rtol=1e-3, atol=1e-5)
    for row in (int(scores.argmax()), int(scores.argmin())):
        without = replay(stage, row_mask=np.arange(6) != row)
        with torch.no_grad():
            change = float(likelihood(final, prompt, completion[:-1]) - likelihood(without, prompt, completion[:-1]))
        assert scores[row] == pytest.approx(change, rel=0.1, abs=0.03 * float(np.abs(scores).max())), row


def test_scores_of_reward_rows(reward_run):
    record, _ = reward_run
    stage = record.stage()
    with pytest.raises(UnsupportedError, match="says no text.*Queries.from_rows"):
        SourceAttributor(record, progress=False).scores(None, Queries.from_text(["a"], ["b"]))
    queries = Queries.from_rows(stage.rows().select_columns(["chosen_ids", "rejected_ids"]).select([0, 3]))
    net = stage.build_model(torch.float64)
    gradient = lambda row: torch.cat(  # noqa: E731
        [g.flatten() for g in torch.autograd.grad(reward_loss(net, row), list(net.parameters()))]
    )
    expected = [[float(gradient(a) @ gradient(b)) if b != LONG else 0.0 for b in range(6)] for a in (0, 4)]
    dots = SourceAttributor(record, method="grad-dot", dtype=torch.float64, progress=False).scores(pairs(), queries)
    np.testing.assert_allclose(dots, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    scores = SourceAttributor(record, num_samples=32, dtype=torch.float64, progress=False).scores(pairs(), queries)
    final = replay(stage)
    for row in (0, 1, 4):
        without = replay(stage, row_mask=np.arange(6) != row)
        for place, asked in enumerate((0, 4)):  # row 3 is not in the record's rows
            with torch.no_grad():
                change = float(reward_loss(without, asked) - reward_loss(final, asked))
            assert scores[place, row] == pytest.approx(change, rel=0.1, abs=0.03 * float(np.abs(scores).max()))


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_sampled_labels_give_the_gauss_newton_matrix(kind):
    """In expectation over the labels, `E[g g^T]` is the second derivative of the loss in the predictions."""
    settings = {"pad_token_id": 0, "beta": BETA, "center_rewards_coefficient": CENTRE}
    task = DPOTask(settings) if kind == "dpo" else RewardTask(settings)
    outputs = torch.tensor([[0.8, -0.4]], dtype=torch.float64)[:, : 1 if kind == "dpo" else 2].repeat(200_000, 1)
    labels = torch.ones_like(outputs)
    outputs.requires_grad_()
    sampled = task.sample_labels(outputs.detach(), labels, torch.Generator().manual_seed(0))
    (grads,) = torch.autograd.grad(task.row_losses(outputs, sampled).sum(), outputs)
    expected = torch.func.hessian(lambda given: task.row_losses(given[None], labels[:1])[0])(outputs[0].detach())
    torch.testing.assert_close(grads.T @ grads / len(grads), expected, rtol=0.02, atol=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ["ipo"]}, r"loss_type=\['ipo'\]: train with loss_type='sigmoid'"),
        ({"use_weighting": True}, "use_weighting weighs pairs"),
        ({"loss_weights": [0.5]}, r"loss_weights=\[0.5\]: leave them out"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type=js_divergence: train with 'reverse_kl'"),
        ({"ld_alpha": 0.5}, "ld_alpha weighs tokens"),
        ({"sync_ref_model": True}, "sync_ref_model moves the reference model"),
    ],
)
def test_other_losses_are_refused_at_attribution(tmp_path, settings, message):
    record, _ = dpo(tmp_path, "initial", max_steps=1, num_segments=1, **settings)
    with pytest.raises(UnsupportedError, match=message):
        SourceAttributor(record, progress=False).scores(None, Queries.from_text(["a"], ["b"]))


class Shuffling(DataCollatorForPreference):
    """A collator of one's own."""


def test_what_else_would_change_the_loss_of_a_pair_is_noted(tmp_path):
    """Told to attribution by the record; the reason names the fix."""
    args = arguments(tmp_path, SourceDPOConfig)
    given = {"args": args, "train_dataset": pairs(), "processing_class": byte_tokenizer(), "ref_model": llama()}
    run = SourceDPOTrainer(llama(), **given)
    assert _dpo_loss(run)[2] is None
    run.aux_loss_enabled = True
    assert "router_aux_loss_coef adds a loss between rows: set it to 0" in _dpo_loss(run)[2]
    run = SourceDPOTrainer(llama(), **given, data_collator=Shuffling(pad_token_id=0))
    assert "it collated with Shuffling: leave data_collator out" in _dpo_loss(run)[2]


def test_another_reference_model_has_to_be_precomputed(tmp_path):
    args = arguments(tmp_path, SourceDPOConfig, max_steps=1, num_segments=1)
    other = llama()
    other.lm_head.weight.data += 0.1
    record, _ = trained(tmp_path, SourceDPOTrainer, llama(), args, ref_model=other)
    with pytest.raises(UnsupportedError, match="set precompute_ref_log_probs=True"):
        SourceAttributor(record, progress=False).scores(None, Queries.from_text(["a"], ["b"]))


def test_a_text_stage_and_a_dpo_stage(tmp_path):
    """Each stage has its own loss; the query goes through both."""
    texts = Dataset.from_dict({"text": ["Peru Lima", "Cuba Havana", "Fiji Suva"]})
    net = tiny_gpt2(vocab_size=260, n_positions=64)
    args = config(tmp_path, stage="sft", max_steps=4, num_segments=1)
    SourceTrainer(net, args, train_dataset=texts, processing_class=byte_tokenizer()).train()
    args = arguments(tmp_path, SourceDPOConfig, stage="dpo", max_steps=4, num_segments=1)
    record, _ = trained(tmp_path, SourceDPOTrainer, net, args, ref_model=copy.deepcopy(net))
    attributor = SourceAttributor(record, num_samples=8, progress=False)
    queries = Queries.from_text(["Peru"], [" Lima"])
    for stage, rows in (("sft", texts), ("dpo", pairs())):
        scores = attributor.scores(rows, queries, stage)
        assert scores.shape == (1, len(rows)) and np.isfinite(scores).all() and np.abs(scores).max() > 0
    texts_of_top = attributor.top(queries, k=1, stages=["dpo"])["text"]
    assert all("?" in text for text in texts_of_top)


def test_an_adapter_for_reference_is_refused(tmp_path):
    """DPOTrainer adds one to a PEFT model that it is given."""
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match=r"adapters \['default', 'ref'\].*`peft_config=`"):
        trained(tmp_path, SourceDPOTrainer, net, arguments(tmp_path, SourceDPOConfig, max_steps=1, num_segments=1))
