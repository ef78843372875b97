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
"""Processes that hold a model between them say what one says that holds it whole."""

import json

import numpy as np
import pytest

from .launching import endings, launch
from .shared_runs import SCORED, attributor, record, whole


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a record of one process, and of what two say of it."""
    folder, cases = tmp_path_factory.mktemp("shared"), ("shared", "resumed", "as_launched", "kinds")
    record(folder / "record")
    whole(folder / "whole")
    launch("shared_runs.py", folder, *cases)
    for case in cases:
        assert endings(folder / case) == [None, None]
    return folder


def parts(folder, name):
    return [np.load(file) for file in sorted(folder.glob(f"{name}-*"))]


def assert_close(found, expected):
    """But for float32 sums in another order."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_they_say_what_one_says(folder):
    expected = np.load(folder / "whole.npz")
    assert len(expected) == 2 * len(SCORED) + 5
    for found in parts(folder, "shared"):
        for name in expected:
            assert np.abs(expected[name]).max() > 0
            assert_close(found[name], expected[name])


def test_vectors_may_be_sharded_as_well(folder):
    for found in parts(folder, "vectors"):
        assert_close(found, np.load(folder / "whole.npz")["joint, sft"])


def test_killed_processes_go_on(folder):
    for found in parts(folder, "resumed"):
        assert_close(found, np.load(folder / "whole.npz")["joint, pretrain"])


def test_those_with_less_to_do_go_along(folder):
    facts = [json.loads(file.read_text()) for file in sorted(folder.glob("facts-*"))]
    assert max(each["went"] for each in facts) > 0 and len({each["went"] for each in facts}) > 1


def test_a_plan_counts_the_part_and_two_layers(folder):
    """Of a tiny model with an adapter: 4 bytes a weight."""
    facts = [json.loads(file.read_text()) for file in sorted(folder.glob("facts-*"))]
    own = attributor(folder / "any")
    stage = own.record.stages[-1]
    model = own.build_model(stage)
    size = sum(each.numel() for each in model.parameters())
    layer = sum(each.numel() for each in model.get_base_model().model.layers[0].parameters())
    assert {each["plan"] for each in facts} == {4 * size // len(facts) + 2 * 4 * layer}
