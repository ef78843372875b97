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

- `outliers`: a few images of another kind (checkerboards) are mixed into 200 training images. Scores for a query of
  that kind should tell them from the others: AUROC.
- `lds`: random tenths of these rows are left out and training is made again, same order and draws; rank correlation of
  predicted and real changes of the losses of held-out digits, with its 95 % interval.
- `unique`: 1,500 digits are learnt, and the model draws 64 images, the queries: how many different rows are among the
  ten strongest of any (`unique_in_top_10`, of 640 places), and in how many of the 64 lists is the row that is in most
  of them (`most_named`)? A row that received timesteps of large gradients is influential for everything, if a method's
  scores follow the norms of gradients. (With as many places as rows, every method would name nearly every row.)

    python benchmarks/bench_diffusion.py            # writes benchmarks/diffusion.json; 15 minutes on one core
    python benchmarks/bench_diffusion.py --parts unique --only retrac
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
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
MANY_ROWS, NUM_DRAWINGS, TIMESTEPS, TOP = 1500, 64, 200, 10
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


def train(folder: Path, images: np.ndarray, **settings: object) -> TrainingRecord:
    """Record the run, or take the one that is there."""
    settings = TRAINING | settings
    folder = folder / hashlib.sha256(json.dumps(settings).encode() + images.tobytes()).hexdigest()[:16]
    if (folder / "done").is_file():
        return TrainingRecord.load(folder / "record")
    quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = SourceConfig(
        output_dir=str(folder / "out"), record_dir=str(folder / "record"), optim="adamw_torch", **settings, **quiet
    )
    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS)
    SourceDiffusionTrainer(unet(), args, train_dataset=rows_of(images), noise_scheduler=scheduler).train()
    (folder / "done").touch()
    return TrainingRecord.load(folder / "record")


def auroc(values: np.ndarray) -> float:
    """That an outlier (the last rows) is above another row."""
    ranks = rankdata(values)[-NUM_OUTLIERS:]
    return float((ranks.sum() - NUM_OUTLIERS * (NUM_OUTLIERS + 1) / 2) / (NUM_OUTLIERS * (NUM_ROWS - NUM_OUTLIERS)))


def rows_of(images: np.ndarray) -> Dataset:
    """Images as the Trainer takes them."""
    return Dataset.from_dict({"pixel_values": images.tolist()})


def drawings(record: TrainingRecord, count: int) -> np.ndarray:
    """What the trained model draws from noise, `[count, 1, 8, 8]`."""
    stage, scheduler = record.stages[0], DDPMScheduler(num_train_timesteps=TIMESTEPS)
    model, generator = stage.build_model().eval(), torch.Generator().manual_seed(1)
    model.load_state_dict(stage.weights("final"))
    images = torch.randn(count, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            images = scheduler.step(model(images, timestep).sample, timestep, images, generator=generator).prev_sample
    return images.clamp(-1, 1).numpy()


def score(record: TrainingRecord, name: str, queries: Queries) -> tuple[np.ndarray, float]:
    """Scores of one of `METHODS`, and the seconds they took."""
    task = DiffusionTask(**record.stages[0].loss["settings"])
    start = time.perf_counter()
    found = SourceAttributor(record, task=task, progress=False, **METHODS[name]).scores(None, queries)
    return found, round(time.perf_counter() - start, 1)


def outliers_and_lds(options: argparse.Namespace, folder: Path, add: Callable[[str, dict], None]) -> None:
    """The small run with images of another kind, and its retrainings."""
    images, held_out = data()
    record = train(folder, images)
    generator = np.random.default_rng(1)
    same_kind = images[-1:] + 0.1 * generator.standard_normal((1, 1, 8, 8)).astype(np.float32)
    queries = Queries.from_rows(rows_of(held_out))
    both = Queries.from_rows(rows_of(np.concatenate([held_out, same_kind])))
    removed = removal_masks(NUM_ROWS, NUM_SUBSETS, FRACTION)
    keep = np.concatenate([np.ones((1, NUM_ROWS), dtype=bool), ~removed])
    start = time.perf_counter()
    losses = StackedRetraining(record, queries, chunk=options.chunk, progress=False, cache=options.cache).losses(keep)
    print("retrained in", round(time.perf_counter() - start), "s", flush=True)
    for name in chosen(options):
        found, seconds = score(record, name, both)
        lds = linear_datamodelling_score(found[:-1], removed, losses[1:])
        figures = {"lds": lds.mean, "low": lds.low, "high": lds.high, "outlier_auroc": auroc(found[-1])}
        add(name, {key: round(float(value), 3) for key, value in figures.items()} | {"seconds": seconds})


def unique_rows(options: argparse.Namespace, folder: Path, add: Callable[[str, dict], None]) -> None:
    """The larger run, and which rows are the strongest of what it draws."""
    digits = load_digits().images[:, None].astype(np.float32) / 8 - 1
    images = digits[np.random.default_rng(0).permutation(len(digits))[:MANY_ROWS]]
    record = train(folder, images, per_device_train_batch_size=50)
    queries = Queries.from_rows(rows_of(drawings(record, NUM_DRAWINGS)))
    for name in chosen(options):
        found, seconds = score(record, name, queries)
        named = np.bincount(np.argsort(-found, axis=1)[:, :TOP].ravel(), minlength=MANY_ROWS)
        figures = {"unique_in_top_10": int((named > 0).sum()), "most_named": int(named.max())}
        add(name, figures | {"seconds_unique": seconds})


PARTS = {"lds": outliers_and_lds, "unique": unique_rows}


def chosen(options: argparse.Namespace) -> list[str]:
    """Methods that were asked for."""
    return [name for name in METHODS if any(text in name for text in options.only)]


def main() -> None:
    """Run and write the results."""
    parser = results_file.parser(__doc__, __file__)
    parser.add_argument(
        "--cache", type=Path, default=Path("build/diffusion"), help="where runs and retrainings are kept"
    )
    parser.add_argument("--chunk", type=int, default=8, help="copies trained at once")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {
        "rows": NUM_ROWS, "outliers": NUM_OUTLIERS, "queries": NUM_QUERIES, "subsets": NUM_SUBSETS,
        "fraction": FRACTION, "training": TRAINING, "command": "python benchmarks/bench_diffusion.py",
        "unique": {"rows": MANY_ROWS, "drawings": NUM_DRAWINGS, "per_device_train_batch_size": 50},
    }  # fmt: skip
    whole = args.only == [""] and len(args.parts) == len(PARTS)
    report = results_file.section(settings, None if whole else results_file.load(args.out))
    save = results_file.saver(args.out, report)

    def add(name: str, figures: dict) -> None:
        report["results"].setdefault(name, {}).update(figures)
        save()
        print(name, figures, flush=True)

    for part in args.parts:
        PARTS[part](args, args.cache, add)


if __name__ == "__main__":
    main()
