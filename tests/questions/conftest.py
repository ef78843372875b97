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
from datasets import Dataset

from hf_source import Queries, SourceAttributor

from ..cases import byte_tokenizer, tiny_gpt2, train


PROMPTS, RIGHT, WRONG = ["red:", "two:"], ["hue", "sum"], ["fig", "oak"]


def rows() -> Dataset:
    """Two facts stated rightly by `a`, one of them wrongly by `b`, and other text by `c`."""
    texts = ["red:hue"] * 4 + ["two:sum"] * 4 + ["red:fig"] * 4 + ["odd one", "odd two", "Odd  one", "quite other"]
    return Dataset.from_dict(
        {
            "text": texts,
            "source": ["a"] * 8 + ["b"] * 4 + ["c"] * 4,
            "is_corrupted": [False] * 8 + [True] * 4 + [False] * 4,
        }
    )


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """A recorded run on `rows()`, whose columns the record does not hold."""
    folder = tmp_path_factory.mktemp("questions")
    trainer = {"processing_class": byte_tokenizer()}
    record = train(
        folder, tiny_gpt2(vocab_size=260), rows().select_columns("text"), trainer=trainer, num_train_epochs=8,
        gradient_accumulation_steps=1, weight_decay=0.0,
    )[1]  # fmt: skip
    rows().to_json(str(folder / "rows.jsonl"))
    return record


@pytest.fixture(scope="session")
def attributor(told):
    """With the columns."""
    return SourceAttributor(told, num_samples=32, progress=False, datasets={told.stages[0].name: rows()})


@pytest.fixture(scope="session")
def queries():
    return Queries.from_text(PROMPTS, RIGHT, ["red", "two"])


@pytest.fixture(scope="session")
def scores(attributor, queries):
    return attributor.scores(None, queries).astype(float)
