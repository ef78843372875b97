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
"""Which training rows made the model say this, and in which stage? Source influence for the Hugging Face stack."""

from importlib import import_module
from typing import Any


__version__ = "0.1.0"

# Names load on first use, so that `import hf_source` does not pay for torch and transformers.
_LAZY = {
    "SourceConfig": ".recording",
    "SourceTrainer": ".recording",
    "SourceDiffusionTrainer": ".recording",
    "RecordingMixin": ".recording",
    "TrainingRecord": ".recording",
    "number_rows": ".recording",
    "SourceAttributor": ".attribution",
    "Queries": ".attribution",
    "Attribution": ".outputs.attribution_files",
    "load_attribution": ".outputs.attribution_files",
    "save_attribution": ".outputs.attribution_files",
    "SourceIndex": ".index",
    "RowLossTask": ".gradients",
    "CausalLMTask": ".gradients",
    "DiffusionTask": ".gradients",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
