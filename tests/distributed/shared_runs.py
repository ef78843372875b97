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
"""What processes that hold a model between them run: `shared_runs.py FOLDER CASE ...` (see `two_runs.py`)."""

import json
import os
import sys
from pathlib import Path


sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cases import byte_tokenizer, random_rows, tiny_gpt2, tiny_llama, train  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from two_runs import RANK, WORLD, main  # noqa: E402

from hf_source import Queries, SourceAttributor  # noqa: E402
from hf_source.attribution import calibration  # noqa: E402
from hf_source.gradients import CausalLMTask, ClassificationTask, RowGradients, Seq2SeqTask  # noqa: E402
from hf_source.gradients.shards import Shards  # noqa: E402
from hf_source.source import score_rows  # noqa: E402


SMALL = {"vocab_size": 260, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2}
ADAPTER = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

SCORED = {
    "joint": {},
    "groups": {"tail": False, "memory_budget": 2**16},  # of parameters, and not as many in each process
    "ekfac": {"curvature": "ekfac"},
    "averages": {"method": "fast-source"},
    "run again": {"gradient_checkpointing": True},
    "narrow": {"vector_dtype": "bfloat16"},
}
"""Settings of attributions."""


# ---- Records, made by one process ----


def record(folder):
    """Two stages, of which the first has several checkpoints in each segment, and the second trains an adapter."""
    model, shared = tiny_llama(vocab_size=260), {"checkpoints_per_segment": 2, "num_segments": 2}
    tokenizer = {"processing_class": byte_tokenizer()}
    train(folder, model, random_rows(22), trainer=tokenizer, stage="pretrain", **shared)
    model = get_peft_model(model, LoraConfig(**ADAPTER))
    train(folder, model, random_rows(13, seed=2), trainer=tokenizer, stage="sft", num_segments=1)


def attributor(folder, **settings):
    """In batches of about 3 rows, so that there are several to share out, and not as many for each process."""
    settings = {"num_samples": 16, "max_tokens_per_batch": 36, "progress": False} | settings
    return SourceAttributor.from_record(folder.parent / "record" / "record", **settings)


def ask():
    return Queries.from_dataset(random_rows(3, seed=7))


def found(folder, **more):
    """All that an attributor says: of each stage with each of the settings, and of rows alone."""
    result = {}
    for name, settings in SCORED.items():
        own = attributor(folder, **settings, **more)
        for stage in ("sft", "pretrain"):
            result[f"{name}, {stage}"] = own.scores(None, ask(), stage)
    own = attributor(folder, **more)
    result["tokens"] = np.concatenate([np.ravel(row) for row in token_scores(own)])
    result["self-influence"] = own.self_influence(stage="pretrain")
    result["losses"] = own.row_losses("sft")
    said = own.generate(["ab", "b"], max_new_tokens=5)
    result["generated"] = np.concatenate([row["input_ids"] for row in said.rows])
    result["top"] = np.asarray(own.top(ask(), k=2, stages="sft", filter="bm25", candidates=6)["score"])
    return result


def token_scores(own):
    scores = own.scores(None, ask(), "sft", granularity="token")
    return [tokens for query in scores for tokens in query]


# ---- Cases ----


def whole(folder):
    """By one process, which holds all."""
    np.savez(folder.parent / "whole.npz", **found(folder))


def shared(folder):
    """By several, of which each holds a part; and how often each went along with the others."""
    went, original = [], Shards._go_along
    Shards._go_along = lambda self, what: went.append(what) or original(self, what)
    np.savez(folder.parent / f"shared-{RANK}.npz", **found(folder, shard_model=True))
    own = attributor(folder, shard_model=True, vector_shards=WORLD)
    # Plans time as many batches as a process has time for, and leave nobody in a pass.
    calibration._LONG = 5.0 * RANK
    own.plan(None, ask(), "sft", granularity="token")
    own.plan(None, ask(), "sft", filter="bm25", candidates=6)
    assert own.shards._model is None  # let go
    np.save(folder.parent / f"vectors-{RANK}.npy", own.scores(None, ask(), "sft"))
    facts = {"went": len(went), "plan": attributor(folder, shard_model=True).plan(None, ask(), "sft").memory["model"]}
    (folder.parent / f"facts-{RANK}.json").write_text(json.dumps(facts))


def resumed(folder):
    """Killed in the middle of a segment's rows, and run again."""
    kept, original = folder.parent / "kept", SourceAttributor.walk_settings
    calls = []

    class KilledError(Exception):
        pass

    def limited(self):
        def progress(batches, title):
            for batch in batches:
                calls.append(batch)
                if len(calls) > 4:
                    raise KilledError
                yield batch

        settings = original(self)
        settings.progress = progress
        return settings

    SourceAttributor.walk_settings = limited
    try:
        attributor(folder, shard_model=True, cache_dir=kept).scores(None, ask(), "pretrain")
        raise AssertionError("was not killed")
    except KilledError:
        SourceAttributor.walk_settings = original
    scores = attributor(folder, shard_model=True, cache_dir=kept).scores(None, ask(), "pretrain")
    np.save(folder.parent / f"resumed-{RANK}.npy", scores)


def as_launched(folder):
    """What `accelerate launch --use_fsdp` says, but for methods that hold the model whole."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    try:
        assert attributor(folder).shards is not None
        assert attributor(folder, shard_model=False).shards is None
        assert attributor(folder, method="grad-dot").shards is None
        assert attributor(folder, curvature="exact").shards is None
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]
    assert attributor(folder).shards is None
    assert attributor(folder, shard_model=True).like(num_samples=4).shards is not None
    assert attributor(folder, shard_model=True).like(method="grad-dot").shards is None


KINDS = {
    "gpt2": (tiny_gpt2, CausalLMTask, {}),
    "llama": (lambda: tiny_llama(tie_word_embeddings=True), CausalLMTask, {}),
    "lora": (lambda: get_peft_model(tiny_llama(), LoraConfig(**ADAPTER)), CausalLMTask, {}),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=10, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        Seq2SeqTask,
        {"labels": torch.tensor([[8, 9, 1], [5, 1, -100]])},
    ),
    "bert": (
        lambda: BertForSequenceClassification(
            BertConfig(**SMALL, num_attention_heads=2, max_position_embeddings=16, num_labels=3)
        ),
        ClassificationTask,
        {"labels": torch.tensor([2, 0])},
    ),
}


def kinds(folder):
    """Products of rows' gradients of some parameters, which are not the same in each process, nor as many."""
    ids = torch.tensor([[3, 4, 5, 1], [6, 7, 1, 0]])
    for make, task, own in KINDS.values():
        torch.manual_seed(0)
        model = make().double()
        labels = ids.masked_fill(ids == 0, -100)
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels} | own
        # A table of biases is looked up by its weight, and so refused.
        names = [key for key, each in model.named_parameters() if each.requires_grad and "relative" not in key]
        gradients = RowGradients(model, task(), names)
        gradients.check(batch)
        torch.manual_seed(1)
        vectors = {key: torch.randn(2, *each.shape, dtype=each.dtype) for key, each in gradients.parameters.items()}
        parts = [{key: vectors[key]} for key in names[RANK :: 2 * WORLD]] + [vectors] * (1 + RANK)
        expected = [score_rows(gradients, batch, part) for part in parts]
        shards = Shards(torch.device("cpu"))
        shards.take(gradients, batch)
        assert all(isinstance(each, DTensor) for each in model.parameters())
        assert sum(each.to_local().numel() for each in model.parameters()) < 0.7 * sum(
            each.numel() for each in model.parameters()
        )
        for part, products in zip(parts, expected, strict=True):
            if RANK == 0:
                with torch.no_grad():  # a pass that is no way back
                    gradients.task.forward(model, batch)
            np.testing.assert_allclose(score_rows(gradients, batch, part), products, rtol=1e-9, atol=1e-12)
        shards.settle()


CASES = {case.__name__: case for case in (record, whole, shared, resumed, as_launched, kinds)}

if __name__ == "__main__":
    main(CASES)
