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
"""bergson: Source, EK-FAC influence (refined by conjugate gradients too), TrackStar and TRAK.

Settings follow its own leaderboard recipes (GPT-2, six evenly spaced checkpoints in three segments with their
`optimizer.pt`, Adam's preconditioner, EK-FAC, damping .1). It takes the linear layers of the blocks; not embeddings,
norms or the head, and biases (`include_bias`) not in Adam's Source. Its checkpoints come from a plain Trainer, so that
the learning rate of every step is written where it looks for it.

The scale of the curvature is what Source is sensitive to. By default losses are summed over a row's tokens, while the
run was trained on their mean: `mean reduction` is its other setting, and `token scale` keeps the default and divides
the learning rates by the mean number of tokens of a row, which makes both the rows' weights and the eigenvalues those
of the trained objective.
"""

from pathlib import Path

import numpy as np
from bergson.approx_unrolling.pipeline import approx_unrolling_pipeline
from bergson.cli.trackstar import trackstar
from bergson.cli.trak import trak
from bergson.config import (
    ApproxUnrollingConfig,
    AstraConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrakConfig,
)
from bergson.data import load_scores_loss_signed
from bergson.hessians.pipeline import hessian_pipeline
from measured import Export, main
from transformers import AutoConfig


SEGMENTS = 3
# It refuses batches of more tokens than the model's context; this is its own value for "no limit".
NO_LIMIT = int(np.iinfo(np.int64).max)


def index(export: Export, work: Path, **settings) -> IndexConfig:
    """Model, rows and batches."""
    context = AutoConfig.from_pretrained(export.final).max_position_embeddings
    batch = export.about["batch"] * max(len(row["input_ids"]) for row in export.rows("rows"))
    return IndexConfig(
        run_path=str(work / "run"),
        model=str(export.final),
        data=DataConfig(dataset=str(export.folder / "rows")),
        token_batch_size=min(context, batch) if context >= 1024 else NO_LIMIT,
        overwrite=True,
        **settings,
    )


def query(export: Export) -> QuerySetConfig:
    """The queries, one column of scores each."""
    return QuerySetConfig(dataset=str(export.folder / "queries"), aggregation="none")


def signed(folder: Path) -> np.ndarray:
    """Scores `[queries, rows]`, larger = more supportive, as its sign convention says."""
    scores, _ = load_scores_loss_signed(str(folder))
    return -scores.numpy().T


def source(reduction: str = "sum", token_scale: bool = False):
    """Source with Adam's preconditioner."""

    def method(export: Export, work: Path) -> np.ndarray:
        rates = {}
        if token_scale:
            items = export.about["num_items"] / export.about["num_rows"]
            rates = {
                "lr_list": [rate / items for rate in export.segment_rates(SEGMENTS)],
                "step_size_list": [1] * SEGMENTS,
            }
        config = index(export, work, loss_reduction=reduction)
        approx_unrolling_pipeline(
            config,
            HessianConfig(method="kfac", ev_correction=True),
            ApproxUnrollingConfig(
                checkpoints=[str(path) for path in export.checkpoints],
                segments=SEGMENTS,
                use_adam_preconditioner=True,
                query=query(export),
                **rates,
            ),
        )
        return signed(Path(config.run_path) / "scores")

    return method


def ekfac(include_bias: bool = False, damping: float = 0.1, steps: int = 0):
    """EK-FAC influence functions at the final weights."""

    def method(export: Export, work: Path) -> np.ndarray:
        config = index(export, work, include_bias=include_bias)
        hessian_pipeline(
            config,
            HessianConfig(method="kfac", ev_correction=True),
            ScoreConfig(),
            PreprocessConfig(),
            HessianPipelineConfig(
                query=query(export),
                inversion_cfg=InversionConfig(damping_factor=damping),
                astra=AstraConfig(solver="cg", num_steps=steps, batch_size=256, micro_batch_size=8),
            ),
        )
        return signed(Path(config.run_path) / "scores")

    return method


def projected(which: str):
    """TrackStar or TRAK: randomly projected gradients and their second moment."""

    def method(export: Export, work: Path) -> np.ndarray:
        if which == "trackstar":
            config = index(export, work, projection_dim=16)
            trackstar(config, TrackstarConfig(query=query(export), mix_hessians=False))
        else:
            config = index(export, work, projection_dim=2048, projection_target="global", loss_fn="log_odds")
            # Its default of no damping is singular where rows are fewer than dimensions, as here.
            damped = PreprocessConfig(inversion_cfg=InversionConfig(damping_factor=0.1))
            trak(config, TrakConfig(query=query(export), preprocess_cfg=damped))
        return signed(Path(config.run_path) / "scores")

    return method


METHODS = {
    "source (recipe)": source(),
    "source, mean reduction": source("mean"),
    "source, token scale": source(token_scale=True),
    "influence ekfac (recipe)": ekfac(),
    "influence ekfac, with biases": ekfac(include_bias=True),
    "influence ekfac, conjugate gradients": ekfac(damping=10.0, steps=20),
    "trackstar": projected("trackstar"),
    "trak, damping .1": projected("trak"),
}

if __name__ == "__main__":
    main(METHODS, ["bergson", "torch", "transformers"])
