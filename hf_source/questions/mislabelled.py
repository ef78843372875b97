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
"""Which rows are mislabelled? Those that had to be learnt from themselves, as no other row supports them.

A row's self-influence is what its own loss would rise by had it not been trained on (Koh & Liang 2017, arXiv
1703.04730, section 5.4). Wrong rows have a large one, and so have rare and memorised ones: this is a list to check,
not a verdict. Beside it stand the row's loss, which costs next to nothing and is often as good, and with queries
known to be right how much the row opposes them.
"""

import numpy as np

from ..attribution.attributor import SourceAttributor
from ..attribution.methods import METHODS
from ..attribution.queries import Queries
from ..errors import ConfigError, DataError
from ..evaluation.mislabelled import find_mislabelled
from .answer import Answer, answer
from .scored import Scored, scored


ORDERS = ("self-influence", "loss", "opposition")


def mislabelled(
    attributor: SourceAttributor,
    queries: Queries | None = None,
    *,
    order: str = "self-influence",
    known: str | None = None,
    k: int = 20,
    stage: str | None = None,
) -> Answer:
    """The most suspicious rows of a stage.

    Args:
        attributor: with `method="source"` for self-influence.
        queries: rows or texts known to be right, for `order="opposition"`.
        order: what puts rows first: `"self-influence"`, `"loss"`, or `"opposition"` (minus the mean score).
        known: a column of the dataset that says which rows are wrong; the answer then says how well each order does.
        k: rows to list.
        stage: whose rows; may be left out if there is only one.

    Returns:
        An answer whose table has `rank`, `row`, `self_influence`, `loss`, `opposition` (with queries), `text`.

    Raises:
        ConfigError: for an unknown order, or one that needs queries.
        DataError: if `known` is no column of true and false.
    """
    if order not in ORDERS:
        raise ConfigError(f"order={order!r} is unknown; choose one of {', '.join(ORDERS)}.")
    if order == "opposition" and queries is None:
        raise ConfigError("order='opposition' needs `queries=` that are known to be right.")
    if not isinstance(attributor, SourceAttributor) or METHODS[attributor.method].reads_text:
        raise ConfigError("Losses and self-influence need the model: give a SourceAttributor with method='source'.")
    record = attributor.record.stage(stage)
    rows = attributor.rows(record)
    there = np.flatnonzero(np.isin(rows.numbers, rows.trained_rows))
    numbers = rows.numbers[there]
    own = Scored(
        record.name,
        queries,
        np.zeros((0, len(numbers))),
        numbers,
        record.num_rows,
        rows.given.select(there),
        lambda number: rows.text(int(number), attributor.processing_class),
    )
    wrong = None if known is None else _known(own, known)  # before anything is computed
    suspicion = {}
    if attributor.method == "source":
        suspicion["self-influence"] = attributor.self_influence(stage=record.name)[there].astype(np.float64)
    elif order == "self-influence":
        raise ConfigError("Self-influence needs method='source': use `attributor.like(method='source')`.")
    suspicion["loss"] = attributor.row_losses(record.name)[numbers]
    if queries is not None:
        suspicion["opposition"] = -scored(attributor, queries, record.name)[0].mean
    places = np.argsort(-suspicion[order], kind="stable")[:k]
    table = {"rank": list(range(1, len(places) + 1)), "row": numbers[places].tolist()}
    table |= {name.replace("-", "_"): values[places].tolist() for name, values in suspicion.items()}
    table["text"] = [own.text(number) for number in numbers[places]]
    findings = [f"The {len(places)} most suspicious of {len(numbers):,} rows of stage {record.name!r}, by {order}."]
    figures = {}
    if wrong is not None:
        findings += _judged(suspicion, wrong, figures)
    return answer(
        attributor,
        [own],
        "Which rows are mislabelled?",
        table,
        {
            "self_influence": "what the row's own loss would rise by had it not been trained on (nats)",
            "loss": "of the row under the stage's final model (nats)",
            **({"opposition": "minus the mean score for the right queries (nats)"} if queries is not None else {}),
        },
        [*findings, "Rare and memorised rows come up too: look at them before you change anything."],
        order=order,
        auroc=figures,
    )


def _known(own: Scored, column: str) -> np.ndarray:
    values = own.column(column)
    if not set(values) <= {True, False}:
        raise DataError(f"Column {column!r} does not say true or false of each row.")
    return np.asarray(values, dtype=bool)


def _judged(suspicion: dict[str, np.ndarray], wrong: np.ndarray, figures: dict[str, float]) -> list[str]:
    said = []
    for name, values in suspicion.items():
        found = find_mislabelled(values, wrong, k=(int(wrong.sum()),))
        figures[name] = found.auroc.value
        precision = found.precision[int(wrong.sum())].value
        said.append(
            f"By {name}: AUROC {found.auroc.value:.2f} [{found.auroc.low:.2f}, {found.auroc.high:.2f}] (.5 is "
            f"chance); {100 * precision:.0f} % of the first {int(wrong.sum())} rows are wrong."
        )
    return said
