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
"""Records of older versions stay readable.

`tests/data/record_v1` was written by the first version of the format: a GPT-2 of 1,472 parameters, trained on facts
with AdamW and then on questions with SGD. `record_v1_expected.json` holds what that version computed from it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import config

from hf_source import Queries, SourceAttributor, SourceTrainer, TrainingRecord
from hf_source.errors import RecordError
from hf_source.recording import replay
from hf_source.recording.schema import _UPGRADES, SCHEMA_VERSION, upgraded


DATA = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((DATA / "record_v1_expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record():
    return TrainingRecord.load(DATA / "record_v1")


def test_version_1_is_whole_and_complete(record):
    before = (DATA / "record_v1" / "record.json").read_bytes()
    assert json.loads(before)["schema_version"] == 1
    assert record.data["schema_version"] == SCHEMA_VERSION
    assert record.verify() == []
    record.require_complete()
    assert [stage.name for stage in record.stages] == ["pretrain", "sft"] and record.stage("sft").continues_parent
    assert [len(stage.segments) for stage in record.stages] == [2, 1]
    assert all(stage.data["visits"] == "recorded" for stage in record.stages)
    assert (DATA / "record_v1" / "record.json").read_bytes() == before  # reading rewrites nothing


def test_version_1_builds_its_model(record):
    ids = torch.tensor([record.processing_class()("Peru: Lima")["input_ids"]])
    with torch.no_grad():
        loss = record.stage("sft").build_model()(ids, labels=ids).loss
    assert float(loss) == pytest.approx(EXPECTED["loss_of_peru_lima"], rel=1e-5)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_version_1_replays(record, name):
    stage = record.stage(name)
    model = replay(stage, stage.rows())
    start, final = stage.weights("initial"), stage.weights("final")
    moved = torch.cat([(final[n] - start[n]).flatten() for n in final]).norm()
    error = torch.cat([(p.detach() - final[n]).flatten() for n, p in model.named_parameters()]).norm()
    assert error < 1e-4 * moved  # float32, perhaps on another processor


@pytest.mark.parametrize("name", list(EXPECTED["scores"]))
def test_version_1_attributes_as_it_did(name):
    """In float64, so that nothing but a change of meaning moves a score by 1e-5 of the largest."""
    case = EXPECTED["scores"][name]
    attributor = SourceAttributor.from_record(
        DATA / "record_v1", dtype=torch.float64, progress=False, **case["settings"]
    )
    queries = Queries.from_text(**EXPECTED["query"])
    for stage, expected in case["scores"].items():
        scores = attributor.attribute(None, queries, stage, return_scores=True)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_stage_after_version_1_is_written_in_the_present_version(record, tmp_path):
    shutil.copytree(DATA / "record_v1", tmp_path / "record")
    stage = record.stage("sft")
    args = config(tmp_path, stage="third", max_steps=2, num_segments=1)
    rows = stage.rows().remove_columns("source_row")
    SourceTrainer(stage.build_model(), args, train_dataset=rows, processing_class=record.processing_class()).train()
    again = TrainingRecord.load(tmp_path / "record")
    assert json.loads((tmp_path / "record" / "record.json").read_text())["schema_version"] == SCHEMA_VERSION
    assert again.verify() == [] and again.stage("third").continues_parent


def test_every_version_has_its_upgrade():
    assert sorted(_UPGRADES) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "2"])
def test_unknown_versions_are_refused(version):
    data = {"schema_version": version, "library_versions": {"hf_source": "9.1"}, "stages": []}
    with pytest.raises(RecordError, match=rf"schema version {version}, .* 1 to {SCHEMA_VERSION}. Install .*\(9.1\)"):
        upgraded(data, Path("record.json"))
