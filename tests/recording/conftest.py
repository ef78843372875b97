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
"""Settings of the recording tests."""

import gc

import peft  # noqa: F401
import pytest
import transformers  # noqa: F401
from resuming import run

from hf_source.recording import TrainingRecord


@pytest.fixture(scope="session", autouse=True)
def light_garbage_collection():
    """Every `train()` collects garbage; without what the imports made, that takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Record of the run that was never interrupted (segments at steps 0 and 4, checkpoints at 2, 4, 6, 8, 9)."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return TrainingRecord.load(folder / "record")
