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
"""Diffusion: the evaluations of Xie et al. 2024 (arXiv 2401.09031) on 8 x 8 digits, with a small UNet of diffusers.

A UNet of 40 k parameters learns to draw digits (scikit-learn's, 8 x 8), and is recorded. Three questions:

- `outliers`: a few images of another kind (checkerboards) are mixed into the training set. Scores for a query of that
  kind should tell them from the others: AUROC.
- `unique`: how many different rows are among the ten strongest of any query. A method whose scores follow the norms of
  gradients names the same rows for everything.
- `lds`: random tenths of the rows are left out and training is made again, same order and draws; rank correlation of
  predicted and real changes of the queries' losses, with its 95 % interval.

Queries are held-out digits.

    python benchmarks/bench_diffusion.py                     # writes benchmarks/diffusion.json; 5 minutes on one core
"""

import argparse
import time
from pathlib import Path

import numpy as np
import results_file
import torch
import transformers
from datasets import Dataset
from diffusers import DDPMScheduler, UNet2DModel
from scipy.stats import rankdata
from sklearn.datasets import load_digits

from hf_source import DiffusionTask, Queries, SourceAttributor, SourceConfig, SourceDiffusionTrainer, TrainingRecord
from hf_source.evaluation import StackedRetraining, linear_datamodelling_score, removal_masks


NUM_ROWS, NUM_OUTLIERS, NUM_QUERIES, NUM_SUBSETS, FRACTION = 200, 10, 24, 48, 0.1
TRAINING = {
    "per_device_train_batch_size": 20,
    "num_train_epochs": 40,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "num_segments": 3,
    "seed": 0,
}
METHODS = {
    "diffusion-tracin": {"method": "diffusion-tracin"},
    "diffusion-retrac": {"method": "diffusion-retrac"},
    "source ekfac": {"curvature": "ekfac", "num_samples": 400},
    "source joint": {"num_samples": 400},
}


def unet() -> UNet2DModel:
    """Two resolutions, 8 and 16 channels, no attention."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False}
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **sizes, **blocks)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Training images, outliers last, and held-out digits; between -1 and 1."""
    digits = load_digits().images[:, None].astype(np.float32) / 8 - 1
    generator = np.random.default_rng(0)
    chosen = digits[generator.permutation(len(digits))[: NUM_ROWS - NUM_OUTLIERS + NUM_QUERIES]]
    board = (np.indices((8, 8)).sum(axis=0) // 2 % 2 * 2 - 1).astype(np.float32)
    outliers = board + 0.3 * generator.standard_normal((NUM_OUTLIERS, 1, 8, 8)).astype(np.float32)
    return np.concatenate([chosen[NUM_QUERIES:], outliers.clip(-1, 1)]), chosen[:NUM_QUERIES]


def train(folder: Path, images: np.ndarray) -> TrainingRecord:
    """Record the run."""
    quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = SourceConfig(
        output_dir=str(folder / "out"), record_dir=str(folder / "record"), optim="adamw_torch", **TRAINING, **quiet
    )
    rows = Dataset.from_dict({"pixel_values": images.tolist()})
    scheduler = DDPMScheduler(num_train_timesteps=200)
    SourceDiffusionTrainer(unet(), args, train_dataset=rows, noise_scheduler=scheduler).train()
    return TrainingRecord.load(folder / "record")


def auroc(values: np.ndarray) -> float:
    """That an outlier (the last rows) is above another row."""
    ranks = rankdata(values)[-NUM_OUTLIERS:]
    return float((ranks.sum() - NUM_OUTLIERS * (NUM_OUTLIERS + 1) / 2) / (NUM_OUTLIERS * (NUM_ROWS - NUM_OUTLIERS)))


def run(options: argparse.Namespace, folder: Path, report: dict, save) -> None:
    """Every method; `report` is saved after every line."""
    images, held_out = data()
    record = train(folder, images)
    generator = np.random.default_rng(1)
    same_kind = images[-1:] + 0.1 * generator.standard_normal((1, 1, 8, 8)).astype(np.float32)
    queries = Queries.from_rows(Dataset.from_dict({"pixel_values": held_out.tolist()}))
    foreign = Queries.from_rows(Dataset.from_dict({"pixel_values": same_kind.tolist()}))
    removed = removal_masks(NUM_ROWS, NUM_SUBSETS, FRACTION)
    keep = np.concatenate([np.ones((1, NUM_ROWS), dtype=bool), ~removed])
    start = time.perf_counter()
    losses = StackedRetraining(record, queries, chunk=options.chunk, progress=False, cache=options.cache).losses(keep)
    print("retrained in", round(time.perf_counter() - start), "s", flush=True)
    settings = record.stages[0].loss["settings"]
    for name, given in METHODS.items():
        if not any(text in name for text in options.only):
            continue
        attributor = SourceAttributor(record, task=DiffusionTask(**settings), progress=False, **given)
        start = time.perf_counter()
        both = Queries(
            [*queries.names, "foreign"], [*queries.prompts, ""], [*queries.completions, ""],
            [*queries.rows, *foreign.rows], are_rows=True,
        )  # fmt: skip
        found = attributor.scores(None, both)
        seconds = time.perf_counter() - start
        scores, own = found[:-1], found[-1]
        strongest = np.argsort(-scores, axis=1)[:, :10]
        lds = linear_datamodelling_score(scores, removed, losses[1:])
        report["results"][name] = {
            "outlier_auroc": round(auroc(own), 3),
            "unique_in_top_10": int(len(np.unique(strongest))),
            "lds": round(lds.mean, 3),
            "low": round(lds.low, 3),
            "high": round(lds.high, 3),
            "seconds": round(seconds, 1),
        }
        save()
        print(name, report["results"][name], flush=True)


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument("--cache", type=Path, default=Path("build/diffusion"), help="where retrainings are kept")
    parser.add_argument("--chunk", type=int, default=8, help="copies trained at once")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {
        "rows": NUM_ROWS, "outliers": NUM_OUTLIERS, "queries": NUM_QUERIES, "subsets": NUM_SUBSETS,
        "fraction": FRACTION, "training": TRAINING, "command": "python benchmarks/bench_diffusion.py",
    }  # fmt: skip
    results_file.go_on(run, args, settings)


if __name__ == "__main__":
    main()
