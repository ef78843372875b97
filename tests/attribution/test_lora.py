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
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_source import SourceAttributor, SourceTrainer

from ..cases import byte_tokenizer, config, tiny_gpt2
from ..story import chats, facts


# PEFT reads a property that transformers has deprecated; not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_rows_of_the_base_are_scored_through_an_adapter_stage(tmp_path):
    """A full stage, then LoRA on its frozen result: what the adapted model says is attributed to both."""
    model = tiny_gpt2(vocab_size=260)
    tokenizer = byte_tokenizer()
    settings = {"num_segments": 2, "gradient_accumulation_steps": 1}
    args = config(tmp_path, stage="pretrain", max_steps=40, **settings)
    SourceTrainer(model, args, train_dataset=facts(), processing_class=tokenizer).train()
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    args = config(tmp_path, stage="sft", max_steps=20, **settings)
    SourceTrainer(adapted, args, train_dataset=chats(), processing_class=tokenizer).train()

    attributor = SourceAttributor.from_record(tmp_path / "record", num_samples=32, progress=False)
    assert attributor.record.stage("sft").trainable != attributor.record.stage("pretrain").trainable
    queries = attributor.generate(["Peru:", "Q Cuba? A"], max_new_tokens=6)
    for stage, num_rows in (("sft", 4), ("pretrain", 8)):
        scores = attributor.scores(None, queries, stage)
        assert scores.shape == (2, num_rows)
        assert np.isfinite(scores).all()
        assert (np.abs(scores).max(axis=1) > 1e-3).all()

    # An index of all numbers: displacements of the base go into the adapter stage, whose own parameters are new.
    exact = attributor.like(dtype=torch.float64, num_samples=8)
    exact.build_index(tmp_path / "index", numbers=10**6, precision="full")
    quick = exact.like(index=tmp_path / "index")
    for stage in ("sft", "pretrain"):
        expected = exact.scores(None, queries, stage)
        found = quick.scores(None, queries, stage)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
