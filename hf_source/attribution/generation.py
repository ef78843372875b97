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
"""Let a model complete prompts, as token rows in which only the completion is asked about."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import CausalLMCollator
from ..errors import DataError


def prompt_text(processing_class: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> str:
    """A prompt as the model reads it: a chat goes through the tokenizer's template."""
    if isinstance(prompt, str):
        return prompt
    return processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def complete(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase,
    prompts: list[str],
    context_length: int | None,
    max_new_tokens: int,
    **generate_kwargs: Any,
) -> list[dict[str, list[int]]]:
    """Completions of prompts, generated together.

    Args:
        model: causal or encoder-decoder language model.
        processing_class: its tokenizer.
        prompts: texts.
        context_length: tokens that the model can hold, where that is known.
        max_new_tokens: longest completion.
        generate_kwargs: for `model.generate`; greedy decoding by default.

    Returns:
        Rows with `input_ids` and `labels`, -100 where nothing is asked.

    Raises:
        DataError: if a prompt is empty or leaves no room for the completion.
    """
    encoded = [processing_class(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise DataError("A prompt is empty: give at least one token to start from.")
        if context_length is not None and len(ids) + max_new_tokens > context_length:
            raise DataError(
                f"Prompt {prompt[:40]!r} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} it does not "
                f"fit the context of {context_length}: shorten it or ask for fewer tokens."
            )
    pad, eos = CausalLMCollator(processing_class).pad_token_id, processing_class.eos_token_id
    longest = max(map(len, encoded))
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    # What a decoder goes on from stands at the right; an encoder reads from the left, as in training.
    padded = lambda row, value: row + value if encoder_decoder else value + row  # noqa: E731
    ids = [padded(row, [pad] * (longest - len(row))) for row in encoded]
    mask = [padded([1] * len(row), [0] * (longest - len(row))) for row in encoded]
    ids, mask = (torch.tensor(part, device=model.device) for part in (ids, mask))
    settings = {"do_sample": False, "pad_token_id": pad, "eos_token_id": eos, **generate_kwargs}
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **settings)
    if encoder_decoder:  # the output starts with the decoder's first token
        longest = 1
    rows = []
    for prompt_ids, tokens in zip(encoded, output[:, longest:].tolist(), strict=True):
        # A model that ends at once has said "nothing more": its end token is then what there is to explain.
        completion = tokens[: max(1, tokens.index(eos))] if eos in tokens else tokens
        if encoder_decoder:
            rows.append({"input_ids": prompt_ids, "labels": completion})
        else:
            rows.append({"input_ids": prompt_ids + completion, "labels": [-100] * len(prompt_ids) + completion})
    return rows
