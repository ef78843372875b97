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
"""How many tokens a model knows, where it reads tokens at all."""

import pytest
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_source.recording.models import num_embeddings

from ..cases import tiny_gpt2, tiny_llama
from ..heads import tiny_vit


class OfImages(PreTrainedModel):
    """A class of one's own, in which transformers finds no input layer."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.layer = nn.Linear(2, 2)


def test_models_that_read_tokens():
    resized = tiny_gpt2(vocab_size=40)
    resized.resize_token_embeddings(48)  # its head is tied to them
    assert [num_embeddings(each) for each in (tiny_gpt2(vocab_size=40), resized)] == [40, 48]
    assert num_embeddings(tiny_llama()) == tiny_llama().config.vocab_size


@pytest.mark.parametrize("make", [OfImages, tiny_vit, lambda: nn.Linear(2, 2)])
def test_models_that_read_none(make):
    assert num_embeddings(make()) is None
