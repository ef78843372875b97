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
"""What keeps `stepwise` from the exact derivative: other products with the curvature of a step, on the same runs.

The runs, queries and retrainings of `bench_lm_lds.py` (24 queries, or every fourth of them), and for each variant the
LDS and the rank correlation of its scores with those of the exact derivative, averaged over queries. Variants are

- `exact`: the Hessian of the step's batch, as in `unrolled`; `gauss-newton`: its Gauss-Newton part, exactly, for every
  query, neither sampled nor damped;
- `labels`, `normal`, `independent signs`: sampled, with labels of the model, and with normal numbers or signs for each
  class in their place (`probes="signs"` has signs that need fewer random numbers);
- `momentum's share`: the flow of a draw as long as what enters the weights in this very step, `1 - beta1` of it.

    python benchmarks/bench_lm_lds.py --folder build/lm --rows facts hard --only unrolled
    python benchmarks/bench_stepwise.py --folder build/lm --rows facts hard       # writes benchmarks/stepwise.json
    python benchmarks/bench_stepwise.py --folder build/lm --rows facts --leading  # its part on leading directions
"""

from dataclasses import dataclass
from pathlib import Path

import bench_lm_lds as lm
import numpy as np
import results_file
import torch
from scipy.stats import spearmanr

from hf_source import Queries, SourceAttributor, TrainingRecord
from hf_source.evaluation import linear_datamodelling_score, removal_masks
from hf_source.gradients import CausalLMTask, RowGradients, task_labels
from hf_source.source import ExactProducts, Products, SampledProducts, unroll


BETA = 0.9


class ClassNoise(CausalLMTask):
    """Directions `z = sqrt(p) x - p <sqrt(p), x>` of the logits in place of labels, by `x` of every class."""

    def __init__(self, normal: bool) -> None:
        super().__init__()
        self.normal = normal

    def unsmoothed(self):
        """It draws no labels."""
        return self

    def sample_labels(self, outputs, labels, generator):
        """See the class."""
        logits, targets = self.predictions(outputs, labels)
        p = logits.softmax(-1)
        if self.normal:
            x = torch.randn(p.shape, generator=generator)
        else:
            x = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
        z = p.sqrt() * x
        return (z - p * z.sum(-1, keepdim=True)) * (targets != -100)[..., None]

    def row_losses(self, outputs, labels):
        """`<logits, z>`."""
        if not labels.is_floating_point():
            return super().row_losses(outputs, labels)
        return (outputs[:, :-1] * labels).flatten(1).sum(1)


@dataclass
class Variant(SampledProducts):
    """`SampledProducts` with other noise, or with flows of another length."""

    noise: str = "labels"
    share: bool = False

    def __call__(self, gradients, batch, forces, normalizer, step_sizes=None, seed=0):
        """See `Products`."""
        if self.noise != "labels":
            gradients = gradients.with_task(ClassNoise(self.noise == "normal"))
        if self.share:
            step = seed // 7919  # as `RecordedRun` makes it
            step_sizes = {n: size * (1 - BETA) / (1 - BETA ** (step + 1)) for n, size in step_sizes.items()}
        return super().__call__(gradients, batch, forces, normalizer, step_sizes, seed)


class GaussNewtonProducts(Products):
    """`J^T (diag(p) - p p^T) J h` for every vector, without a sample."""

    exact = True

    def __call__(self, gradients, batch, forces, normalizer, step_sizes=None, seed=0):
        """See `Products`."""
        task, names = gradients.task, list(gradients.parameters)
        wanted = list(gradients.parameters.values())
        with gradients._requiring_grad(wanted), torch.enable_grad():
            logits, targets = task.predictions(task.forward(gradients.model, batch), task_labels(task, batch))
            probe = torch.zeros_like(logits, requires_grad=True)
            back = torch.autograd.grad(logits, wanted, probe, create_graph=True)
            along = torch.autograd.grad(back, probe, [forces[name] for name in names], is_grads_batched=True)[0]
            p = logits.detach().softmax(-1)
            turned = (p * along - p * (p * along).sum(-1, keepdim=True)) * (targets != -100)[..., None] / normalizer
            found = torch.autograd.grad(logits, wanted, turned, is_grads_batched=True)
        return dict(zip(names, found, strict=True))


VARIANTS = {
    "exact": ExactProducts(),
    "gauss-newton": GaussNewtonProducts(),
    "labels, 4 draws": Variant(4),
    "labels, 16 draws": Variant(16),
    "normal, 4 draws": Variant(4, noise="normal"),
    "normal, 16 draws": Variant(16, noise="normal"),
    "independent signs, 16 draws": Variant(16, noise="signs"),
    "momentum's share, labels, 4 draws": Variant(4, share=True),
    "momentum's share, normal, 4 draws": Variant(4, noise="normal", share=True),
}


def scores_of(record: TrainingRecord, queries: Queries, products: Products, kept: Path) -> np.ndarray:
    """Scores of a variant, from a file if they are there."""
    if not kept.exists():
        attributor = SourceAttributor(record, method="stepwise", progress=False)
        asked = attributor.encode(queries)
        ((_, scores),) = unroll(
            record.stages,
            attributor.all_rows(),
            lambda gradients: attributor.query_gradients(gradients, asked),
            attributor.walk_settings(),
            attributor.build_model,
            products,
        )
        np.save(kept, scores)
    return np.load(kept)


def leading(record: TrainingRecord, queries: Queries, folder: Path, kind: str) -> dict[str, dict[str, float]]:
    """Leading directions of the queries' gradients followed exactly, the rest by `stepwise`.

    Scores are linear in the gradients, so those of `unrolled` and `stepwise` that bench_lm_lds.py left are mixed.
    """
    attributor = SourceAttributor(record, method="unrolled", progress=False)
    encoded, stage = attributor.encode(queries), record.stages[0]
    model = attributor.build_model(stage)
    gradients = RowGradients(model, attributor.rows(stage).task, list(stage.trainable))
    gradients.check(attributor.rows(stage).collated(attributor.rows(stage).shortest(2), torch.device("cpu")))
    stage.load_weights(model, "final")
    vectors = attributor.query_gradients(gradients, encoded)
    gram = sum(vector.flatten(1).double() @ vector.flatten(1).double().T for vector in vectors.values()).numpy()
    values, modes = np.linalg.eigh(gram)
    exact, losses = np.load(folder / f"{kind}, unrolled.npy"), np.load(folder / f"{kind}-3.losses.npy")
    removed, found = removal_masks(lm.NUM_ROWS, lm.NUM_SUBSETS, lm.FRACTION), {}
    for draws in (4, 16):
        rest = np.load(folder / f"{kind}, stepwise, {draws} draws.npy")
        for rank in (0, 4, 8, 12, 16, 24):
            project = modes[:, len(modes) - rank :] @ modes[:, len(modes) - rank :].T
            lds = linear_datamodelling_score(rest + project @ (exact - rest), removed, losses)
            found[f"{rank} directions, {draws} draws"] = {
                "lds": round(lds.mean, 4),
                "low": round(lds.low, 4),
                "high": round(lds.high, 4),
                "share": round(float(values[len(values) - rank :].sum() / values.sum()), 4),
            }
    return found


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--leading", action="store_true", help="only leading directions, of all queries")
    parser.add_argument("--rows", nargs="+", choices=sorted(lm.PRETRAINING), default=["facts", "hard"])
    parser.add_argument("--every", type=int, default=4, help="of the 24 queries, ask every so-many-th")
    parser.add_argument("--folder", type=Path, required=True, help="that bench_lm_lds.py left")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = results_file.load(args.out)
    removed = removal_masks(lm.NUM_ROWS, lm.NUM_SUBSETS, lm.FRACTION)
    for kind in args.rows:
        record = TrainingRecord.load(args.folder / f"{kind}-3")
        queries = Queries.from_text(*zip(*lm.texts(kind)[2], strict=True)).encode(record.processing_class())
        if args.leading:
            name = f"{kind}, leading directions"
            report[name] = results_file.section({"queries": len(queries)}, None)
            report[name]["results"] = leading(record, queries, args.folder, kind)
            results_file.saver(args.out, report)()
            continue
        chosen = list(range(0, len(queries), args.every))
        losses = np.load(args.folder / f"{kind}-3.losses.npy")[:, chosen]
        name = f"{kind}, {len(chosen)} queries"
        report[name] = results_file.section({"queries": chosen}, report.get(name))
        exact = None
        for label, products in VARIANTS.items():
            if label != "exact" and not any(text in label for text in args.only):
                continue
            kept = args.folder / f"stepwise {name}, {label}.npy"
            scores = scores_of(record, queries.select(chosen), products, kept)
            exact = scores if label == "exact" else exact
            agreement = np.mean([spearmanr(*pair).statistic for pair in zip(scores, exact, strict=True)])
            lds = linear_datamodelling_score(scores, removed, losses)
            report[name]["results"][label] = {
                "lds": round(lds.mean, 4),
                "low": round(lds.low, 4),
                "high": round(lds.high, 4),
                "spearman": round(float(agreement), 4),
            }
            results_file.saver(args.out, report)()
            print(name, label, report[name]["results"][label], flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
