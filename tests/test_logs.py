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
import pytest
from accelerate import PartialState

from hf_source.logs import get_logger


@pytest.mark.parametrize("method", ["warning", "warning_once"])
def test_a_warning_needs_nothing_before_it(monkeypatch, caplog, method):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    getattr(get_logger("hf_source.tests"), method)(f"mind the {method}")
    [record] = caplog.records
    assert record.getMessage().endswith(f"mind the {method}")
    if method == "warning":
        assert record.filename == "test_logs.py"


def test_other_processes_than_the_first_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    state = PartialState()
    state.process_index, state.num_processes = 1, 2
    logger = get_logger("hf_source.tests")
    logger.warning("once for all")
    assert not caplog.records
    logger.warning("of each", main_process_only=False)
    assert "of each" in caplog.text
