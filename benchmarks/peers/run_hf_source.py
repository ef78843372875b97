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
"""This library's methods on the exported run, in its own environment."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import load_from_disk
from measured import Export, main

from hf_source import Queries, SourceAttributor


transformers.logging.set_verbosity_error()

METHODS = {
    "grad-dot": {"method": "grad-dot"},
    "tracin": {"method": "tracin"},
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "influence joint": {"method": "influence", "curvature": "joint"},
    "influence ekfac, conjugate gradients": {"method": "influence", "curvature": "ekfac", "solver": "cg"},
    "source ekfac": {"curvature": "ekfac"},
    "source ekfac-hybrid": {"curvature": "ekfac-hybrid"},
    "source joint": {},
    "source joint, n=256": {"num_samples": 256},
    "source joint, n=256, bfloat16 vectors": {"num_samples": 256, "vector_dtype": "bfloat16"},
    "source joint, n=256, bfloat16 gradients": {"num_samples": 256, "dtype": torch.bfloat16},
    "source joint, n=128": {"num_samples": 128},
    "source joint, n=2048": {"num_samples": 2048},
    "fast-source": {"method": "fast-source"},
    "fast-source, n=128": {"method": "fast-source", "num_samples": 128},
    "fast-source, n=64": {"method": "fast-source", "num_samples": 64},
    "fast-source, n=32": {"method": "fast-source", "num_samples": 32},
    "fast-source, n=32, small batches": {"method": "fast-source", "num_samples": 32, "max_tokens_per_batch": 1024},
    "source joint, one segment": {"num_segments": 1},
    "fast-source, one segment": {"method": "fast-source", "num_segments": 1},
    **{
        f"fast-source, one segment, n={n}": {"method": "fast-source", "num_samples": n, "num_segments": 1}
        for n in (32, 64, 128, 256)
    },
    "fast-source, one segment, n=32, bfloat16": {
        "method": "fast-source",
        "num_samples": 32,
        "num_segments": 1,
        "vector_dtype": "bfloat16",
    },
    "fast-source, n=32, bfloat16": {"method": "fast-source", "num_samples": 32, "vector_dtype": "bfloat16"},
    "fast-source, n=128, bfloat16": {"method": "fast-source", "num_samples": 128, "vector_dtype": "bfloat16"},
    "fast-source, n=64, bfloat16": {"method": "fast-source", "num_samples": 64, "vector_dtype": "bfloat16"},
    "stepwise, 4 draws": {"method": "stepwise", "draws": 4},
    "stepwise, 16 draws": {"method": "stepwise", "draws": 16},
    "unrolled": {"method": "unrolled"},
}


# Of models of which few rows go at once.
LARGE = {"max_tokens_per_batch": 1024, "memory_budget": "5GiB"}


def run(settings: dict):
    """A method of `SourceAttributor`, from opening the record to the scores."""

    def method(export: Export, work: Path) -> np.ndarray:
        about = json.loads((export.folder / "export.json").read_text(encoding="utf-8"))
        queries = Queries.from_dataset(load_from_disk(str(export.folder / "queries")))
        own = settings if about["batch"] == 64 else LARGE | settings
        attributor = SourceAttributor.from_record(about["record"], progress=False, **own)
        return attributor.scores(None, queries)

    return method


if __name__ == "__main__":
    main({name: run(settings) for name, settings in METHODS.items()}, ["torch", "transformers"])
