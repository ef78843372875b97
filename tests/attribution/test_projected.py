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
"""TRAK, TrackStar, LoGra and DataInf against dense oracles: autograd's gradients, explicit matrices, float64."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_source import Queries, RowLossTask, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.errors import ConfigError, UnsupportedError
from hf_source.gradients import ClassificationTask, RewardTask, Seq2SeqTask
from hf_source.gradients.log_odds import LogOdds
from hf_source.gradients.projection import matrix_shape

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..story import CAPITALS, chats, facts


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def attributor(record, **settings):
    return SourceAttributor.from_record(record.path, **{"progress": False, "dtype": torch.float64, **settings})


@pytest.fixture(scope="module")
def queries():
    return Queries.from_text(["Peru:", "Q Cuba? A"], [" Lima", " Havana"], names=["lima", "havana"])


def nll(model, row):
    """Log-likelihood losses of a row's label tokens."""
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
    asked = [(token, label) for token, label in enumerate(row["labels"][1:]) if label != -100]
    return torch.stack([-logits[token, label] for token, label in asked])


def odds(model, row):
    """`log p / (1 - p)` of each label token, by probabilities."""
    p = torch.exp(-nll(model, row))
    return torch.log(p) - torch.log1p(-p)


def gradient(model, value, names):
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
    return {
        name: (torch.zeros_like(parameters[name]) if grad is None else grad).detach().numpy()
        for name, grad in zip(names, grads, strict=True)
    }


def of_rows(stage):
    rows = [dict(row) for row in stage.rows()]
    return [{"input_ids": row["input_ids"], "labels": row.get("labels") or row["input_ids"]} for row in rows]


class Dense:
    """Everything explicit: gradients of rows and queries at some weights of the last stage's model."""

    def __init__(self, record, queries, stage, value=lambda model, row: nll(model, row).sum(), weights=None):
        last = record.stages[-1]
        self.stage = record.stage(stage)
        self.model = (last if weights is None else self.stage).build_model(torch.float64)
        if weights is not None:
            self.stage.load_weights(self.model, weights)
        own = dict(self.model.requires_grad_(True).named_parameters())
        names = {last.canonical_name(name): name for name in own}
        self.names = [names[self.stage.canonical_name(name)] for name in self.stage.trainable]
        asked = queries.encode(byte_tokenizer(), 32).rows
        self.row_list = of_rows(self.stage)
        self.rows = [gradient(self.model, value(self.model, row), self.names) for row in self.row_list]
        self.asked = [gradient(self.model, value(self.model, row), self.names) for row in asked]

    def flat(self, grads, names=None, matrix=None):
        """Rows of concatenated gradients, `[rows, entries]`."""
        chosen = self.names if names is None else names
        return np.stack([np.concatenate([grad[name].ravel() for name in chosen]) for grad in grads])


# ---- TRAK ----------------------------------------------------------------------------------------------------------


def dense_matrix(walker, dense, stage, seed):
    projection = walker.options.projector(walker, stage, None, seed)
    parts = []
    for name in dense.names:
        size, step = dense.rows[0][name].size, projection.step
        parts += [projection.matrix(name, s, min(s + step, size)).double().numpy() for s in range(0, size, step)]
    return np.concatenate(parts)


def trak_oracle(walker, record, queries, stage, output="log-odds", weights=None, damping=0.0, seed=0):
    """Kernel and diagonal of `Q`."""
    value = {"log-odds": lambda m, r: odds(m, r).sum(), "loss": lambda m, r: -nll(m, r).sum()}[output]
    dense = Dense(record, queries, stage, value, weights)
    matrix = dense_matrix(walker, dense, dense.stage, seed)
    phi, asked = dense.flat(dense.rows) @ matrix, dense.flat(dense.asked) @ matrix
    gram = phi.T @ phi
    gram += damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    weight = [float((1 - torch.exp(-nll(dense.model, row))).mean().detach()) for row in dense.row_list]
    weight = np.array(weight) if output == "log-odds" else np.ones(len(weight))
    return asked @ np.linalg.pinv(gram, rcond=1e-11, hermitian=True) @ phi.T, weight


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize(
    "settings",
    [
        {"projection_dim": 3},
        {"projection_dim": 3, "projection": "normal"},
        {"projection_dim": 64},  # more dimensions than rows: a pseudo-inverse
        {"projection_dim": 64, "damping": 0.2},
        {"projection_dim": 3, "output": "loss"},
    ],
    ids=str,
)
def test_trak_is_a_regression_on_projected_gradients(story, queries, stage, settings):
    walker = attributor(story, method="trak", **settings)
    own = {key: value for key, value in settings.items() if key in ("output", "damping")}
    kernel, weight = trak_oracle(walker, story, queries, stage, **own)
    expected = kernel * weight
    # Scores are handed out in float32; the inverse of a kernel amplifies rounding by its condition number.
    np.testing.assert_allclose(
        walker.scores(None, queries, stage), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_trak_averages_kernels_and_weights_over_segments(story, queries, stage):
    walker = attributor(story, method="trak", projection_dim=3, checkpoints="segments")
    found = [trak_oracle(walker, story, queries, stage, weights=index, seed=7919 * index) for index in range(2)]
    expected = np.mean([kernel for kernel, _ in found], axis=0) * np.mean([weight for _, weight in found], axis=0)
    np.testing.assert_allclose(
        walker.scores(None, queries, stage), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_log_odds_do_not_round_away():
    """A float32 probability of 1 has log-odds all the same."""
    logits = torch.zeros(1, 2, 5)
    logits[0, :, 3] = 40.0
    task = LogOdds(Seq2SeqTask())
    labels = torch.tensor([[3, -100]])
    assert float(task.row_losses(logits, labels)) == pytest.approx(-(40 - np.log(4)), rel=1e-6)
    assert task.complements(logits, labels)[0].tolist() == pytest.approx([4 * np.exp(-40), 1], rel=1e-4)


def test_log_odds_of_a_class_are_its_margin():
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, -100])
    right = logits.softmax(dim=1)[torch.arange(5), labels.clamp_min(0)]
    task = LogOdds(ClassificationTask())
    expected = torch.where(labels >= 0, torch.log1p(-right) - right.log(), 0)
    torch.testing.assert_close(task.row_losses(logits, labels), expected)
    found = task.complements(logits, labels)
    torch.testing.assert_close(found[:4, 0], 1 - right[:4])
    assert found[:, 1].tolist() == [1, 1, 1, 1, 0]


def test_log_odds_of_a_pair_are_its_margin():
    task = LogOdds(RewardTask({"center_rewards_coefficient": 0.5}))
    outputs = torch.tensor([[1.5, 0.3], [-0.5, 2.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert task.row_losses(outputs, labels).tolist() == [-1.5, -0.5]
    assert task.sequences_per_row == 2
    expected = (1 - torch.tensor([1.5, 0.5]).sigmoid()).tolist()
    assert task.complements(outputs, labels)[:, 0].tolist() == pytest.approx(expected)


class Own(RowLossTask):
    def forward(self, model, batch):
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def row_losses(self, outputs, labels):
        losses = torch.nn.functional.cross_entropy(
            outputs[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        return losses.sum(dim=1)

    def num_items(self, labels):
        return (labels[:, 1:] != -100).sum(dim=1)

    def count_items(self, row):
        return sum(label != -100 for label in (row.get("labels") or row["input_ids"])[1:])


def test_trak_asks_for_the_log_odds_of_a_task_of_ones_own(story, queries):
    with pytest.raises(UnsupportedError, match=r"loss of Own .*log_odds\(outputs, labels\).*output='loss'"):
        attributor(story, method="trak", task=Own()).scores(None, queries, "sft")
    assert attributor(story, method="trak", task=Own(), output="loss").scores(None, queries, "sft").any()

    class WithOdds(Own):
        def log_odds(self, outputs, labels):
            return torch.logit(torch.exp(-self.row_losses(outputs, labels)))

    assert attributor(story, method="trak", task=WithOdds()).scores(None, queries, "sft").any()


# ---- TrackStar and LoGra -------------------------------------------------------------------------------------------


def projected(dense, sides, name, grads, scale=None):
    """`vec(L G R^T)` by an explicit Kronecker product."""
    m, n = matrix_shape(torch.Size(dense.rows[0][name].shape))
    left, right = (
        np.eye(k) if side is None else side.double().numpy() for side, k in zip(sides[name], (m, n), strict=True)
    )
    both = np.kron(left, right)
    return np.stack([both @ (grad[name] * (1 if scale is None else scale)).ravel() for grad in grads])


def root_inverse(matrix):
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-10 * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def sides_of(walker, dense, gradients=None):
    from hf_source.gradients import CausalLMTask, RowGradients

    engine = RowGradients(dense.model, CausalLMTask(), dense.names)
    return walker.options.projector(walker, dense.stage, engine).sides


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize(
    "settings",
    [
        {"projection_dim": 9, "damping": 0.0},
        {"projection_dim": 30},
        {"projection_dim": 30, "mix": 0.0},
        {"projection_dim": 30, "mix": 1.0},
        {"projection_dim": 30, "second_moment": False},
    ],
    ids=str,
)
def test_trackstar_is_a_cosine_of_whitened_projections(story, queries, stage, settings):
    walker = attributor(story, method="trackstar", **settings)
    dense = Dense(story, queries, stage)
    sides = sides_of(walker, dense)
    preconditioner = dense.stage.segments[-1].preconditioner()
    mix, damping = walker.options.mix, walker.options.damping
    rows, asked = [], []
    for own, name in zip(dense.stage.trainable, dense.names, strict=True):
        scale = preconditioner[own].double().numpy() if walker.options.second_moment else None
        phi, query = (projected(dense, sides, name, grads, scale) for grads in (dense.rows, dense.asked))
        assert phi.shape[1] <= settings["projection_dim"]
        matrix = mix * query.T @ query / len(query) + (1 - mix) * phi.T @ phi / len(phi)
        root = root_inverse(matrix + damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix)))
        rows.append(phi @ root)
        asked.append(query @ root)
    rows, asked = (np.concatenate(parts, axis=1) for parts in (rows, asked))
    expected = (asked / np.linalg.norm(asked, axis=1)[:, None]) @ (rows / np.linalg.norm(rows, axis=1)[:, None]).T
    np.testing.assert_allclose(walker.scores(None, queries, stage), expected, atol=2e-5)


def logra_oracle(dense, sides, damping, relatif):
    scores = own = 0.0
    for name in sides:
        phi, asked = (projected(dense, sides, name, grads) for grads in (dense.rows, dense.asked))
        hessian = phi.T @ phi / len(phi)
        strength = damping * np.trace(hessian) / len(hessian)
        inverse = np.linalg.inv(hessian + strength * np.eye(len(hessian)))
        scores = scores + asked @ inverse @ phi.T
        own = own + np.einsum("ij,jk,ik->i", phi, inverse, phi)
    return scores / np.sqrt(own) if relatif else scores


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize(
    "settings", [{"rank": 3}, {"rank": 20}, {"rank": 3, "relatif": True, "damping": 0.4}], ids=str
)
def test_logra_is_a_damped_influence_function_of_projections(story, queries, stage, settings):
    walker = attributor(story, method="logra", **settings)
    dense = Dense(story, queries, stage)
    sides = sides_of(walker, dense)
    assert set(sides) == {name for name in dense.names if dense.rows[0][name].ndim > 1}
    expected = logra_oracle(dense, sides, walker.options.damping, walker.options.relatif)
    np.testing.assert_allclose(
        walker.scores(None, queries, stage), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_logra_projects_to_the_leading_directions(story, queries, stage):
    """Covariances by hooks on the plain model; the basis inside the subspace does not matter to the scores."""
    rank = 5
    walker = attributor(story, method="logra", init="pca", rank=rank)
    dense = Dense(story, queries, stage)
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen[module] = (args[0].detach(), output)

    sums = {}
    handles = [
        module.register_forward_hook(keep) for module in dense.model.modules() if type(module).__name__ == "Conv1D"
    ]
    for row in dense.row_list:
        nll(dense.model, row).sum().backward()
        for module, (inputs, output) in seen.items():
            left, right = (part.flatten(0, 1).numpy() for part in (inputs, output.grad))
            old = sums.get(module, (0.0, 0.0))
            sums[module] = (old[0] + left.T @ left, old[1] + right.T @ right)
    for handle in handles:
        handle.remove()

    def leading(matrix):
        return torch.from_numpy(np.linalg.eigh(matrix)[1][:, -rank:].T.copy())

    sides = dict(sides_of(walker, dense))
    names = {parameter: name for name, parameter in dense.model.named_parameters()}
    for module, (left, right) in sums.items():
        sides[names[module.weight]] = (leading(left), leading(right))
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):  # by gradient matrices, tied head included
        right = sum(grad[name].T @ grad[name] for grad in dense.rows)
        sides[name] = (sides[name][0], leading(right))
    assert len(sums) == 8 and len(sides) == 10
    expected = logra_oracle(dense, sides, 0.1, False)
    np.testing.assert_allclose(
        walker.scores(None, queries, stage), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_logra_without_weights_has_nothing_to_project(story, queries):
    walker = attributor(story, method="logra")
    stage = walker.record.stage("sft")
    stage.trainable = [name for name in stage.trainable if name.endswith("bias")]
    with pytest.raises(UnsupportedError, match="'sft' trained no weight.*method='trackstar'"):
        walker.scores(None, queries, "sft")


# ---- DataInf -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A full stage, then LoRA on its frozen result."""
    folder = tmp_path_factory.mktemp("adapted")
    model, tokenizer = tiny_gpt2(vocab_size=260), byte_tokenizer()
    settings = {"num_segments": 2, "gradient_accumulation_steps": 1}
    args = config(folder, stage="pretrain", max_steps=40, **settings)
    SourceTrainer(model, args, train_dataset=facts(), processing_class=tokenizer).train()
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    args = config(folder, stage="sft", max_steps=20, **settings)
    SourceTrainer(get_peft_model(model, lora), args, train_dataset=chats(), processing_class=tokenizer).train()
    return TrainingRecord.load(folder / "record")


def datainf_oracle(dense, damping=0.1):
    """The paper's closed form, term by term."""
    count, scores = len(dense.rows), np.zeros((len(dense.asked), len(dense.rows)))
    for name in dense.names:
        rows, asked = ([grad[name].ravel() for grad in grads] for grads in (dense.rows, dense.asked))
        strength = damping * sum(grad @ grad for grad in rows) / (count * rows[0].size)
        for q, v in enumerate(asked):
            for m, g in enumerate(rows):
                terms = [v @ g - (v @ h) * (h @ g) / (strength + h @ h) for h in rows]
                scores[q, m] += sum(terms) / (count * strength)
    return scores


def test_datainf_is_the_closed_form_of_the_paper(adapted, queries):
    dense = Dense(adapted, queries, "sft")
    assert all("lora_" in name for name in dense.names) and len(dense.names) == 4
    for damping in (0.1, 0.5):
        expected = datainf_oracle(dense, damping)
        got = attributor(adapted, method="datainf", damping=damping).scores(None, queries, "sft")
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_datainf_refuses_full_stages_before_the_work(story, adapted, queries):
    with pytest.raises(UnsupportedError, match="is for LoRA, and stage 'sft' trained .*full_parameters=True"):
        attributor(story, method="datainf").scores(None, queries, "sft")
    with pytest.raises(UnsupportedError, match="stage 'pretrain' trained"):
        attributor(adapted, method="datainf").scores(None, queries, "pretrain")
    got = attributor(adapted, method="datainf", full_parameters=True).scores(None, queries, "pretrain")
    expected = datainf_oracle(Dense(adapted, queries, "pretrain"))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["trak", "trackstar", "logra"])
def test_adapters_and_the_stage_below_them_are_scored(adapted, queries, method):
    walker = attributor(adapted, method=method)
    for stage, rows in (("sft", 4), ("pretrain", 8)):
        got = walker.scores(None, queries, stage)
        assert got.shape == (2, rows) and np.isfinite(got).all() and (np.abs(got).max(axis=1) > 0).all()


# ---- All of them ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "trak": {"projection_dim": 64},
    "trackstar": {},
    "logra": {},
    "datainf": {"full_parameters": True},
}


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_each_finds_the_fact(story, queries, method):
    walker = attributor(story, method=method, dtype=torch.float32, **SETTINGS[method])
    assert walker.scores(None, queries, "sft")[1].argmax() == list(CAPITALS).index("Cuba")
    if method != "datainf":  # full parameters are not its ground
        assert walker.scores(None, queries, "pretrain")[0].argmax() == list(CAPITALS).index("Peru")


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_batches_change_nothing(story, queries, method):
    whole, cut = (
        attributor(story, method=method, max_tokens_per_batch=tokens, **SETTINGS[method]).scores(None, queries, "sft")
        for tokens in (4096, 24)
    )
    np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("trak", {"projection_dim": 0}, "projection_dim=0: at least one.*2048"),
        ("trak", {"projection": "sparse"}, "projection='sparse' is unknown; choose one of rademacher, normal"),
        ("trak", {"output": "margin"}, "output='margin' is unknown; choose one of log-odds, loss"),
        ("trak", {"checkpoints": "all"}, "checkpoints='all' is unknown; choose one of final, segments"),
        ("trak", {"damping": -1.0}, "damping=-1.0: give 0"),
        ("trackstar", {"projection_dim": 0}, "projection_dim=0"),
        ("trackstar", {"mix": 1.5}, "mix=1.5: .* between 0 and 1"),
        ("trackstar", {"damping": -1.0}, "damping=-1.0"),
        ("logra", {"rank": 0}, "rank=0: at least one.*64"),
        ("logra", {"init": "svd"}, "init='svd' is unknown; choose one of random, pca"),
        ("logra", {"damping": -0.1}, "damping=-0.1"),
        ("datainf", {"damping": 0.0}, "damping=0.0: the closed form divides by it"),
    ],
)
def test_settings_that_make_no_sense(story, method, settings, message):
    with pytest.raises(ConfigError, match=message):
        attributor(story, method=method, **settings)


@pytest.mark.parametrize(
    ("method", "settings", "passes"),
    [
        ("trak", {"projection_dim": 64}, 1),
        ("trak", {"projection_dim": 64, "checkpoints": "segments"}, 2),
        ("trackstar", {}, 1),
        ("logra", {"rank": 8}, 1),
        ("logra", {"rank": 8, "init": "pca"}, 2),
        ("datainf", {"full_parameters": True}, 3),
    ],
    ids=str,
)
def test_plan_counts_passes_and_what_is_held(story, queries, method, settings, passes):
    walker = attributor(story, method=method, dtype=torch.float32, **settings)
    plan = walker.plan(None, queries, "pretrain")
    tokens = sum(map(len, story.stage("pretrain").rows()["input_ids"]))
    assert plan.stages[1].score_tokens == passes * tokens and plan.stages[1].sample_tokens == 0
    assert plan.stages[1].num_segments == (2 if settings.get("checkpoints") == "segments" else 1)
    assert "sample columns" not in plan.memory and plan.seconds > 0
    if method == "datainf":
        assert plan.memory["query vectors"] > 2 * 4 * plan.num_parameters
        return
    size = 64 if method == "trak" else sum(p.stop - p.start for p in _projector(walker).parts.values())
    assert plan.memory["projected gradients"] == 16 * (8 + 2) * size
    assert "query vectors" not in plan.memory


def _projector(walker):
    from hf_source.gradients import CausalLMTask, RowGradients

    stage = walker.record.stages[-1]
    engine = RowGradients(walker.build_model(stage), CausalLMTask(), stage.trainable)
    return walker.options.projector(walker, stage, engine)
