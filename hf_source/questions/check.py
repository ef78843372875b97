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
"""Predictions held against what training again shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ..attribution.attributor import SourceAttributor
from ..attribution.queries import Queries
from ..errors import ConfigError, DataError, UnsupportedError
from ..evaluation.evaluate import stacked_for
from ..evaluation.protocol import Retraining
from ..evaluation.stacked import StackedRetraining
from .scored import Scored


@dataclass(frozen=True)
class Check:
    """What scores predicted of some changes of the training, and what came of them.

    Attributes:
        names: of the changes.
        predicted: float64 `[changes, queries]`, change of what each query measures (its loss: nats).
        measured: the same, by training again.
        how: how training was done again.
        of: what changes.
    """

    names: Sequence[str]
    predicted: np.ndarray
    measured: np.ndarray
    how: str = ""
    of: str = "the queries' loss"

    @property
    def pearson(self) -> float:
        """Correlation of predicted and measured changes, each averaged over the queries; NaN for fewer than 3."""
        return _correlation(_pearson, *self._means)

    @property
    def spearman(self) -> float:
        """Rank correlation of the same."""
        return _correlation(lambda one, two: spearmanr(one, two).statistic, *self._means)

    @property
    def pearson_of_queries(self) -> float:
        """Correlation over all pairs of a change and a query."""
        return _correlation(_pearson, self.predicted.ravel(), self.measured.ravel())

    @property
    def same_sign(self) -> float:
        """Share of the changes whose average effect has the predicted sign."""
        one, two = self._means
        return float(np.mean(np.sign(one) == np.sign(two)))

    @property
    def _means(self) -> tuple[np.ndarray, np.ndarray]:
        return self.predicted.mean(axis=1), self.measured.mean(axis=1)

    def __str__(self) -> str:
        predicted, measured = self._means
        if len(self.names) == 1:
            found = f"predicted {predicted[0]:+.3f}, measured {measured[0]:+.3f}"
        else:
            found = (
                f"{len(self.names)} changes, the predicted sign in {round(self.same_sign * len(self.names))} of them"
            )
            if np.isfinite(self.pearson):
                found += f", Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}"
        return f"Trained again ({self.how}), change of {self.of}: {found}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        figures = {"pearson": self.pearson, "spearman": self.spearman, "pearson_of_queries": self.pearson_of_queries}
        return {
            "names": list(self.names),
            "predicted": self.predicted.tolist(),
            "measured": self.measured.tolist(),
            "how": self.how,
            "of": self.of,
            **{name: value if np.isfinite(value) else None for name, value in figures.items()},
        }


def retraining_for(
    source: Any, queries: Queries, scored: Sequence[Scored], verify: "bool | Retraining"
) -> Retraining | None:
    """How an answer is verified: not at all, many copies at once, or as given.

    Args:
        source: what was asked; only an attributor knows how to train again.
        queries: of the answer.
        scored: its stages; rows of one stage are left out at a time.
        verify: `True` for `StackedRetraining`, or a retraining of the same queries.

    Raises:
        ConfigError: if there is no attributor, or several stages.
        DataError: if the retraining is of other queries or another stage.
    """
    if verify is False or verify is None:
        return None
    if not isinstance(source, SourceAttributor):
        raise ConfigError("verify= trains again from the record, which an attribution has not: ask an attributor.")
    if len(scored) != 1:
        raise ConfigError(
            f"verify= leaves rows of one stage out at a time: choose stage= from {[own.stage for own in scored]}."
        )
    if verify is True:
        return stacked_for(source, source.encode(queries), stage=scored[0].stage, progress=source.show_progress)
    if verify.num_queries != len(queries) or verify.stage.name not in (scored[0].stage, "fake"):
        raise DataError(
            f"The retraining is of {verify.num_queries} queries and stage {verify.stage.name!r}, the question of "
            f"{len(queries)} and {scored[0].stage!r}: make it of the same."
        )
    return verify


def how(retraining: Retraining) -> str:
    """How training is done again, in words."""
    if isinstance(retraining, StackedRetraining):
        return "same order, the rows' items kept in what a batch's loss is divided by"
    return type(retraining).__name__


def measured_changes(retraining: Retraining, weights: np.ndarray, seeds: Sequence[int | None] = (None,)) -> np.ndarray:
    """Change of what each query measures, against training on all rows, mean over seeds: float64 `[changes, queries]`.

    Args:
        retraining: how to train again.
        weights: `[changes, rows]` by row number: 0 leaves a row out, 1 keeps it, 2 counts it twice.
        seeds: see `Retraining.losses`.

    Raises:
        UnsupportedError: for weights other than 0 and 1 if the retraining can only leave rows out.
    """
    weights = np.concatenate([np.ones((1, weights.shape[1])), weights])
    plain = np.isin(weights, (0, 1)).all(axis=1)
    if not plain.all() and not isinstance(retraining, StackedRetraining):
        raise UnsupportedError("Only StackedRetraining can weigh rows: use verify=True, or ask for other actions.")
    found = []
    for seed in seeds:
        losses = np.empty((len(weights), retraining.num_queries))
        losses[plain] = retraining.losses(weights[plain].astype(bool), seed)
        if not plain.all():
            losses[~plain] = retraining.weighted_losses(weights[~plain], seed)
        found.append(losses[1:] - losses[0])
    return np.mean(found, axis=0)


def _correlation(figure: Any, one: np.ndarray, two: np.ndarray) -> float:
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return float("nan")
    return float(figure(one, two))


def _pearson(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.corrcoef(one, two)[0, 1])
