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
"""The walk through segments and stages against section by section of its definition, and against retraining.

Stages are small objects with the reading interface of a training record, so that every constant is the test's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from hf_source.curvature import ExactCurvature, IdentityCurvature, JointCurvature
from hf_source.errors import UnsupportedError
from hf_source.gradients import CausalLMTask
from hf_source.recording import canonical_name
from hf_source.source import Together, WalkSettings, walk, wanted_parameters


# Scores are kept as float32, and every segment rounds its sum once.
SCORE_TOLERANCE = 1e-6


# ------------------------------------------------------------------------------------------------------ a fake record


@dataclass
class FakeSegment:
    index: int
    effective_learning_rate_sum: float
    weights_at: dict[str, torch.Tensor]
    P: dict[str, torch.Tensor]
    Lambda: dict[str, torch.Tensor]
    counts: np.ndarray  # visits of each row
    items: np.ndarray  # loss items of each row
    items_per_normalizer: float = 1.0  # of the number that the batch's loss was divided by
    matrix_sides: dict[str, str] = field(default_factory=dict)
    kept: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # step -> weights

    @property
    def checkpoint_steps(self) -> list[int]:
        return sorted(self.kept)

    def preconditioner(self) -> dict[str, torch.Tensor]:
        return self.P

    def decay(self) -> dict[str, torch.Tensor]:
        return self.Lambda

    def row_weights(self) -> np.ndarray:
        """Visits x learning rate / items of the batch, when all visited rows make one batch."""
        normalizer = (self.counts * self.items).sum() / self.items_per_normalizer
        return self.effective_learning_rate_sum * self.counts / normalizer

    def applied_parts(self) -> list[tuple[list[str], np.ndarray]]:
        return [(list(self.P), self.applied_weights())]

    def applied_weights(self) -> np.ndarray:
        """As if momentum had applied a part of each gradient after the segment, more of it for later rows."""
        return self.row_weights() * np.linspace(0.9, 0.5, len(self.counts))

    def objective_scale(self) -> float:
        return self.items_per_normalizer


@dataclass
class FakeStage:
    name: str
    build: Callable[[], nn.Module]
    trainable: list[str]
    batch: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    segments: list[FakeSegment] = field(default_factory=list)
    continues_parent: bool = True

    @property
    def num_rows(self) -> int:
        return len(self.batch["labels"])

    @staticmethod
    def canonical_name(name: str) -> str:
        return canonical_name(name)

    def load_weights(self, model: nn.Module, which: str | int | tuple[int, int]) -> None:
        if isinstance(which, tuple):
            source = self.segments[which[0]].kept[which[1]]
        else:
            source = self.final if which == "final" else self.segments[which].weights_at
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in self.trainable:
                parameters[name].copy_(source[name])


class FakeRows:
    """A few rows to a batch, longest first, each batch as wide as its longest row."""

    def __init__(self, batch: dict[str, torch.Tensor], batch_size: int) -> None:
        self.batch = batch
        self.batch_size = batch_size
        self.lengths = batch["attention_mask"].sum(dim=1).numpy()
        self.row = self.example = np.arange(len(self.lengths))
        self.task = CausalLMTask()

    def prepare(self, gradients) -> None:
        """Nothing to prepare."""

    def batches(self, numbers: Sequence[int]) -> list[np.ndarray]:
        numbers = np.asarray(numbers)
        numbers = numbers[np.argsort(-self.lengths[numbers], kind="stable")]
        return [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]

    def collated(self, numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        width = int(self.lengths[np.asarray(numbers)].max())
        return {key: value[numbers][:, :width] for key, value in self.batch.items()}

    def shortest(self, count: int) -> list[int]:
        return list(np.argsort(-self.lengths)[:count])


def make_stage(
    name: str,
    build: Callable[[], nn.Module],
    seed: int,
    num_segments: int = 2,
    trainable: Sequence[str] | None = None,
    length: float = 0.05,
    vocabulary: int = oracles.VOCAB,
) -> FakeStage:
    """A stage whose weights wander, with its own rows, preconditioners, weight decays and visits in each segment."""
    model = build()
    trainable = list(trainable or oracles.all_names(model))
    batch = oracles.make_batch((5, 8, 4, 6, 3), seed=seed, vocabulary=vocabulary)
    items = np.array([len(oracles.items_of(labels)) for labels in batch["labels"]])
    weights = {key: value.detach().clone() for key, value in model.named_parameters() if key in trainable}
    stage = FakeStage(name, build, trainable, batch, weights)
    torch.manual_seed(seed)
    for index in range(num_segments):
        weights = {key: value + 0.05 * torch.randn_like(value) for key, value in weights.items()}
        counts = np.array([[1, 2, 0, 2, 1], [1, 0, 1, 1, 3]])[index % 2]
        decay = oracles.decay_by_parameter(model, trainable)
        P = oracles.adam_like(model, trainable, seed=seed + index)
        torch.manual_seed(seed + index)
        stage.segments.append(FakeSegment(index, length * (1 + index), weights, P, decay, counts, items))
    stage.final = {key: value + 0.05 * torch.randn_like(value) for key, value in weights.items()}
    return stage


def finished(stage: FakeStage) -> nn.Module:
    """The stage's model with its final weights: what the next stage starts from."""
    model = stage.build()
    stage.load_weights(model, "final")
    return model


def full_then_full() -> list[FakeStage]:
    first = make_stage("pretrain", lambda: oracles.gpt2(4), seed=10)
    # In the second stage the position table and one norm are frozen.
    names = [name for name in first.trainable if "wpe" not in name and "ln_1" not in name]
    return [first, make_stage("sft", lambda: finished(first), seed=20, trainable=names)]


def full_then_lora() -> list[FakeStage]:
    first = make_stage("pretrain", lambda: oracles.gpt2(4), seed=10)

    def build() -> nn.Module:
        return oracles.with_adapters(finished(first))

    adapters = [name for name in oracles.all_names(build()) if "lora_" in name]
    return [first, make_stage("sft", build, seed=20, trainable=adapters)]


def lora_then_lora() -> list[FakeStage]:
    """Names are PEFT's in both; the base weights, which neither trains, have no part."""
    adapters = [name for name in oracles.all_names(oracles.lora_gpt2(4)) if "lora_" in name]
    first = make_stage("pretrain", lambda: oracles.lora_gpt2(4), seed=10, trainable=adapters)
    return [first, make_stage("sft", lambda: finished(first), seed=20, trainable=adapters)]


# --------------------------------------------------------------------------------------------------------- both sides

QUERIES = oracles.make_batch((6, 7), seed=99)


def query_gradients(queries: dict[str, torch.Tensor]) -> Callable[[Any], dict[str, torch.Tensor]]:
    """`q` as the walk asks for it: gradients of the queries' own losses at the weights the engine's model has."""

    def gradients_of(engine: Any) -> dict[str, torch.Tensor]:
        count = len(queries["labels"])
        result = {name: parameter.new_zeros(count, *parameter.shape) for name, parameter in engine.parameters.items()}
        for name, rows, block in engine.blocks(engine.run(queries)):
            result[name][rows] = block
        return {name: vector.detach() for name, vector in result.items()}

    return gradients_of


def run(
    stages: list[FakeStage], curvature: Any = None, q: Callable | None = None, batch_size: int = 3, **settings
) -> dict[str, np.ndarray]:
    """Scores by stage; as many samples as visits, so that every visit is sampled once."""
    (visits,) = {int(segment.counts.sum()) for stage in stages for segment in stage.segments}
    settings = {"num_samples": visits, "dtype": torch.float64, **settings}
    result = {}
    rows = {stage.name: FakeRows(stage.batch, batch_size) for stage in stages}
    settings = WalkSettings(curvature or ExactCurvature(), **settings)
    for stage, scores in walk(stages, rows, q or query_gradients(QUERIES), settings, lambda stage: stage.build()):
        result[stage.name] = scores
    assert list(result) == [stage.name for stage in reversed(stages)]
    return result


def plain(name: str) -> str:
    """A parameter's name without PEFT's wrapping."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def reference(stages: list[FakeStage], queries: dict[str, torch.Tensor] = QUERIES) -> dict[str, np.ndarray]:
    """Definition of section 2 of the design: dense Gauss-Newton matrix per segment, exponentials, loops over rows."""
    result: dict[str, np.ndarray] = {}
    q = None
    for position in reversed(range(len(stages))):
        stage = stages[position]
        model = oracles.trainable(stage.build())
        ever = {plain(name) for earlier in stages[: position + 1] for name in earlier.trainable}
        names = [name for name in oracles.all_names(model) if plain(name) in ever]
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        if q is None:
            stage.load_weights(model, "final")
            vectors = oracles.row_gradients(model, names, queries)
        else:
            vectors = [q.get(plain(name), np.zeros((len(queries["labels"]), sizes[name]))) for name in names]
            vectors = np.concatenate(vectors, axis=1)
        scores = np.zeros((len(vectors), stage.num_rows))
        for segment in reversed(stage.segments):
            zero = torch.zeros((), dtype=torch.float64)
            P, Lambda = (
                oracles.flat_constant({name: constants.get(name, zero) for name in names}, model, names)
                for constants in (segment.P, segment.Lambda)
            )
            w, s = segment.row_weights(), segment.effective_learning_rate_sum
            # Of the objective that was trained, 1 / s x sum over visits: the mean per item where the loss of a batch
            # was divided by its number of items.
            places = [(segment.index, step) for step in segment.checkpoint_steps] or [segment.index]
            H, gradients = 0.0, 0.0  # of checkpoints: their averages
            for place in places:
                stage.load_weights(model, place)
                part = oracles.gauss_newton(model, names, stage.batch, weights=w) * (w @ segment.items) / s
                H = H + part / len(places)
                gradients = gradients + oracles.row_gradients(model, names, stage.batch) / len(places)
            scoring, vectors = oracles.dense_source(H, P, Lambda, s, vectors)
            for row in range(stage.num_rows):
                scores[:, row] += w[row] / s * scoring @ gradients[row]
        q = {plain(name): block for name, block in oracles.split(vectors, model, names).items()}
        result[stage.name] = scores
    return result


def assert_scores(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Each stage against its own largest score: the walk loses accuracy nowhere."""
    assert set(got) == set(expected)
    for name, scores in expected.items():
        assert got[name].shape == scores.shape
        assert abs(got[name] - scores).max() <= SCORE_TOLERANCE * abs(scores).max(), name


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("stages", [full_then_full, full_then_lora, lora_then_lora])
def test_scores_of_two_stages_of_two_segments(stages):
    stages = stages()
    got, expected = run(stages), reference(stages)
    assert_scores(got, expected)
    for scores in expected.values():  # the earlier stage has not been forgotten altogether
        assert (abs(scores).max(axis=1) > 1e-4).all()
    # A row that no step of a stage visited has no score, one that was visited has.
    for stage in stages:
        visited = sum(segment.counts for segment in stage.segments) > 0
        assert ((got[stage.name] != 0).all(axis=0) == visited).all()


@pytest.mark.parametrize("stages", [full_then_full, full_then_lora])
def test_gradients_and_curvature_are_averaged_over_checkpoints(stages):
    """Where a segment has some; and nowhere, if averages are asked for."""
    stages = stages()
    averages = run(stages)
    torch.manual_seed(5)
    for stage in stages:
        segment = stage.segments[1]
        for step in (3, 7):
            away = {name: 0.1 * torch.randn_like(value) for name, value in segment.weights_at.items()}
            segment.kept[step] = {name: segment.weights_at[name] + noise for name, noise in away.items()}
    (visits,) = {int(segment.counts.sum()) for stage in stages for segment in stage.segments}
    # Twice the visits: every visit is sampled once at each of two checkpoints, and twice where there are averages.
    got = run(stages, checkpoints=True, num_samples=2 * visits)
    assert_scores(got, reference(stages))
    for name, scores in run(stages).items():
        np.testing.assert_array_equal(scores, averages[name])
        assert oracles.relative_error(got[name], scores) > 1e-2


@pytest.mark.parametrize("num_samples", [1, 2, 7])
def test_a_sample_is_shared_out_over_checkpoints(num_samples):
    """Even where there are fewer samples than checkpoints; and scores stay finite."""
    stage = make_stage("only", lambda: oracles.gpt2(4), seed=10, num_segments=1)
    stage.segments[0].kept = {step: stage.segments[0].weights_at for step in (1, 2, 3)}
    scores = run([stage], JointCurvature(), num_samples=num_samples, checkpoints=True)["only"]
    assert np.isfinite(scores).all() and abs(scores).max() > 0


def test_a_checkpoint_at_the_average_weights_changes_nothing():
    stage = make_stage("only", lambda: oracles.gpt2(4), seed=10)
    averages = run([stage], JointCurvature())["only"]
    for segment in stage.segments:
        segment.kept[4] = segment.weights_at
        segment.weights_at = {name: torch.full_like(value, torch.nan) for name, value in segment.weights_at.items()}
    np.testing.assert_array_equal(run([stage], JointCurvature(), checkpoints=True)["only"], averages)


def test_losses_divided_by_something_else_than_their_items():
    """The Trainer may count label tokens that are never predicted: gradients and curvature are both smaller then."""
    stages = full_then_full()
    for segment in stages[0].segments:
        segment.items_per_normalizer = 0.6
    assert_scores(run(stages), reference(stages))


def test_a_lora_stage_carries_influence_to_base_weights():
    """Frozen base weights have no scoring vector in the LoRA stage, but pretraining rows made them."""
    stages = full_then_lora()
    names = wanted_parameters(stages[1].build(), stages)
    assert set(names.values()) >= {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"}
    assert len(names) == len(oracles.all_names(stages[1].build()))
    with_adapters = run(stages)["pretrain"]
    # What the LoRA stage learnt depends on the base: leaving the stage's flow out gives something else.
    skipped = full_then_lora()
    for segment in skipped[1].segments:
        segment.effective_learning_rate_sum = 0.0
    without_flow = run(skipped)["pretrain"]
    assert oracles.relative_error(without_flow, with_adapters) > 1e-2


def test_a_run_cut_in_two_stages_has_the_same_scores():
    """The walk knows no difference between the end of a segment and the end of a stage."""
    whole = make_stage("whole", lambda: oracles.gpt2(4), seed=10, num_segments=3)
    middle = whole.segments[1].weights_at
    first = FakeStage("first", whole.build, whole.trainable, whole.batch, middle, whole.segments[:1])
    later = [FakeSegment(**{**vars(segment), "index": segment.index - 1}) for segment in whole.segments[1:]]
    second = FakeStage("second", whole.build, whole.trainable, whole.batch, whole.final, later)
    together = run([whole])["whole"]
    apart = run([first, second])
    assert abs(apart["first"] + apart["second"] - together).max() <= SCORE_TOLERANCE * abs(together).max()
    assert abs(apart["first"]).max() > 1e-3 * abs(together).max()


def test_joint_walks_like_exact_when_its_samples_span_the_curvature():
    """A statistical check of the whole: with many sampled labels `S^T S` comes near to `H`, and so do the scores."""
    stage = make_stage("only", lambda: oracles.bigram(), seed=10, vocabulary=5)
    for segment in stage.segments:
        segment.P = {"table.weight": torch.tensor(100.0, dtype=torch.float64)}
    q = query_gradients(oracles.make_batch((6, 7), seed=99, vocabulary=5))
    exact = run([stage], q=q)["only"]
    identity = run([stage], IdentityCurvature(), q=q)["only"]
    joint = run([stage], JointCurvature(tail=False), q=q, num_samples=2000, batch_size=250)["only"]
    # 2,000 rows of about 4 items leave an error of 1/sqrt(8000) per eigenvalue, of which the flow passes a part on; no
    # curvature at all, or one wrong by a factor of two, is off by far more.
    assert oracles.relative_error(joint, exact) < 0.05
    assert oracles.relative_error(identity, exact) > 0.3


# ----------------------------------------------------------------------------------------------------- sign and unit


def bigram_run(steps: int, total: float, removed: tuple[int, float] = (-1, 0.0)) -> tuple[FakeStage, dict, float]:
    """Train the convex bigram model for real, by preconditioned gradient descent with decoupled weight decay.

    Two batches take turns. `removed`: a row and the share of it that is left out of the loss (the number of items that
    the loss is divided by stays that of the batch). Gives the run as a stage with one segment per step, the queries,
    and the summed loss of the first of them at the end.
    """
    model = oracles.bigram()
    batch = oracles.make_batch((5, 8, 4, 6), seed=3, vocabulary=5)
    queries = oracles.make_batch((6,), seed=8, vocabulary=5)
    items = np.array([len(oracles.items_of(labels)) for labels in batch["labels"]])
    (name,) = oracles.all_names(model)
    P = oracles.adam_like(model, [name])[name] / 3
    decay, eta = torch.tensor(0.2, dtype=torch.float64), total / steps
    segments = []
    for step in range(steps):
        counts = np.array([[1, 1, 0, 1], [0, 1, 1, 1]])[step % 2]
        weight = model.table.weight
        before = {name: weight.detach().clone()}
        segments.append(FakeSegment(step, eta, before, {name: P}, {name: decay}, counts, items))
        share = counts - removed[1] * (np.arange(4) == removed[0]) * counts
        loss = sum(share[row] * oracles.row_loss(model, *oracles.row_of(batch, row)) for row in range(4))
        (grad,) = torch.autograd.grad(loss / (counts * items).sum(), weight)
        with torch.no_grad():
            weight -= eta * (P * grad + decay * weight)
    final = {name: model.table.weight.detach().clone()}
    stage = FakeStage("run", oracles.bigram, [name], batch, final, segments)
    with torch.no_grad():
        return stage, queries, float(oracles.row_loss(model, *oracles.row_of(queries, 0)))


def test_scores_predict_retraining_with_sign_and_unit():
    """`score = f(without the row) - f(with it)`, in nats: here its derivative, by really training again.

    With a little less or more of a row, one segment per step. The model is convex and its curvature exact, so the only
    error left is that of finite steps.
    """
    share, errors = 1e-4, []
    for steps in (20, 40, 80):
        stage, queries, _ = bigram_run(steps, total=2.0)
        predicted = run([stage], q=query_gradients(queries))["run"][0]
        truth = np.array([
            (bigram_run(steps, 2.0, (row, share))[2] - bigram_run(steps, 2.0, (row, -share))[2]) / (2 * share)
            for row in range(4)
        ])  # fmt: skip
        errors.append(abs(predicted - truth).max() / abs(truth).max())
    assert (np.sign(predicted) == np.sign(truth)).all() and len(set(np.sign(truth))) == 2
    # First order in the step, as segments of one step are.
    assert errors[-1] < 0.02
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0, atol=0.25)


def test_what_a_query_was_trained_on_supports_it():
    """A row equal to the query has a positive score; training on it made the query's loss smaller."""
    stage = make_stage("only", lambda: oracles.gpt2(4), seed=10)
    queries = {key: value[:1] for key, value in stage.batch.items()}
    for curvature in (ExactCurvature(), JointCurvature(), IdentityCurvature()):
        scores = run([stage], curvature, q=query_gradients(queries))["only"][0]
        assert scores[0] > 0 and scores[0] >= scores.max() * 0.99


# ------------------------------------------------------------------------------------------------------- additivity


def test_scores_add_over_queries():
    stages = full_then_full()
    alone = run(stages)

    def total(engine: Any) -> dict[str, torch.Tensor]:
        return {name: vector.sum(dim=0, keepdim=True) for name, vector in query_gradients(QUERIES)(engine).items()}

    together = run(stages, q=total)
    assert_scores(together, {name: scores.sum(axis=0, keepdims=True, dtype=float) for name, scores in alone.items()})


def test_scores_add_over_segments_and_visits():
    """Without curvature and decay nothing is forgotten, so parts of a run score on their own what they do in it."""
    stage = make_stage("only", lambda: oracles.gpt2(4), seed=10)
    for segment in stage.segments:
        segment.Lambda = {}
    whole = run([stage], IdentityCurvature())["only"]
    alone = []
    for kept in range(2):
        part = make_stage("only", lambda: oracles.gpt2(4), seed=10)
        part.segments[1 - kept].effective_learning_rate_sum = 0.0  # every step of it was skipped
        part.segments[kept].Lambda = {}
        alone.append(run([part], IdentityCurvature())["only"])
    assert_scores({"sum": alone[0] + alone[1]}, {"sum": whole})
    # A row counts in the segments that visited it: row 2 in the second only, row 1 in the first only.
    assert (alone[0][:, 2] == 0).all() and (alone[1][:, 1] == 0).all()
    twice = make_stage("only", lambda: oracles.gpt2(4), seed=10)
    for segment in twice.segments:
        segment.Lambda = {}
        # Row 3 is visited twice as often, out of the same learning rate and batch size: twice its score.
        normalizer = (segment.counts * segment.items).sum()
        more = segment.counts * np.where(np.arange(5) == 3, 2, 1)
        segment.row_weights = lambda s=segment.effective_learning_rate_sum, n=normalizer, c=more: s * c / n
    doubled = run([twice], IdentityCurvature())["only"]
    expected = whole.copy()
    expected[:, 3] *= 2
    assert_scores({"": doubled}, {"": expected})


def test_momentum_weighs_visits_by_the_updates_that_applied_them():
    """Rows are drawn for the curvature, and it is averaged, by the visits themselves: only scores change."""
    stages = full_then_full()
    plain_scores, weighed = run(stages), run(stages, momentum=True)
    shares = np.linspace(0.9, 0.5, 5)
    assert_scores(weighed, {name: scores.astype(float) * shares for name, scores in plain_scores.items()})


class RowsOnly(Together):
    """One of two processes that do not meet: it has all of the curvature, and its share of the rows."""

    @property
    def alone(self):
        return True


def test_shares_of_processes_add_up():
    stages = full_then_full()
    whole = run(stages)
    parts = [run(stages, together=RowsOnly(process, 2)) for process in range(2)]
    for name, scores in whole.items():
        np.testing.assert_array_equal(parts[0][name] + parts[1][name], scores)  # each row in one process
        assert all((part[name] != 0).any() for part in parts)


# -------------------------------------------------------------------------------------------------- between two stages


def test_a_stage_that_does_not_start_where_the_last_one_ended_is_refused():
    stages = full_then_full()
    stages[1].continues_parent = False
    with pytest.raises(UnsupportedError, match="'sft' does not start from the weights stage 'pretrain' ended with"):
        run(stages)


def test_a_parameter_of_another_shape_is_refused():
    first = make_stage("first", lambda: oracles.Bigram(4).double(), seed=1, vocabulary=4)
    second = make_stage("second", lambda: oracles.Bigram(5).double(), seed=2, vocabulary=4)
    with pytest.raises(UnsupportedError, match="shape"):
        run([first, second], q=query_gradients(oracles.make_batch((4,), vocabulary=4)))


class BigramWithMore(oracles.Bigram):
    """A part that the next stage throws away, like the head of another task."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Embedding(5, 5)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        output = super().forward(input_ids)
        output.logits = output.logits + torch.tanh(self.more(input_ids))
        return output


def test_a_part_that_the_next_stage_replaced_has_no_way_to_the_answer():
    def build() -> nn.Module:
        torch.manual_seed(5)
        return BigramWithMore().double()

    stages = [
        make_stage("first", build, seed=1, vocabulary=5),
        make_stage("second", oracles.bigram, seed=2, vocabulary=5),
    ]
    queries = oracles.make_batch((6, 7), seed=99, vocabulary=5)
    assert_scores(run(stages, q=query_gradients(queries)), reference(stages, queries))
