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
"""Are the answers of `hf_source.questions` true? A small model with planted errors, held against training again.

A GPT-2 of 63 k parameters learns 400 facts about countries (not recorded), and then, recorded, 256 rows: 128 AdamW
steps of 16. The rows have a contributor, and their truth is known:

* 16 *conflicts*: a fact stated rightly once, and wrongly twice in the same way (another answer of the same relation),
* 20 *errors*: a fact stated wrongly, and never rightly,
* 12 *repeats*: rows stated again, with other spaces, letter case, or one word more at the end,
* 176 other facts. 90 facts are in no row at all.

Parts: `groups` (predicted against measured effect of leaving each contributor out), `why` (without the strongest rows
of the contrast, does the right answer become the likelier one?), `actions` (predicted against measured effect), `keep`
(half of the rows, chosen by influence on 24 facts, judged by 24 others, at equal budget), `missing` (are facts in no
row told from those that are in one?), `duplicates` (repeats found). Every part runs in worlds of other seeds, with
other methods beside Source. Seed 0 is the one on which the rule of `missing` was chosen.

    OMP_NUM_THREADS=1 nice -n 15 python benchmarks/bench_questions.py --keep build/questions

writes `benchmarks/questions.json`, part by part, and goes on from the records and retrainings that it keeps.
"""

import argparse
import copy
import random
import time
from pathlib import Path

import numpy as np
import results_file
import torch
import transformers
from bench_lm_lds import QUIET
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_source import Queries, SourceAttributor, SourceConfig, SourceTrainer, TrainingRecord, questions
from hf_source.data import CausalLMCollator, prepare_rows
from hf_source.demo import load_facts, train_tokenizer
from hf_source.evaluation import StackedRetraining
from hf_source.evaluation.mislabelled import auroc


METHODS = {
    "source": {},
    "influence ekfac": {"method": "influence", "curvature": "ekfac"},
    "grad-dot": {"method": "grad-dot"},
    "bm25": {"method": "bm25"},
}
BEFORE, ROWS, CONFLICTS, ERRORS, REPEATS, UNSEEN = 400, 256, 16, 20, 12, 90
PRETRAINING = {"num_train_epochs": 30, "learning_rate": 3e-3}
FINETUNING = {"max_steps": 128, "learning_rate": 2e-3, "warmup_steps": 8}
BATCH_SIZE, SEGMENTS, NUM_SAMPLES = 16, 3, 1024
SIZES = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24)  # rows of honest contributors, in turn; the rest is the last one's


class World:
    """Facts, rows with a known truth, and the recorded run.

    Args:
        seed: of everything.
        folder: of records and retrainings.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder / f"seed{seed}"
        shuffler, facts = random.Random(seed), load_facts()
        shuffler.shuffle(facts)
        self.before, rest = facts[:BEFORE], facts[BEFORE:]
        self.unseen, rest = rest[:UNSEEN], rest[UNSEEN:]
        self.conflicts, rest = rest[:CONFLICTS], rest[CONFLICTS:]
        self.errors, rest = rest[:ERRORS], rest[ERRORS:]
        self.honest = rest[: ROWS - 3 * CONFLICTS - ERRORS - REPEATS]
        self.answers = {}
        for fact in facts:
            self.answers.setdefault(fact.relation, []).append(fact.completion)
        self.rows = self._rows(shuffler)
        texts = [fact.statement + fact.completion for fact in self.before]
        self.tokenizer = train_tokenizer([*texts, *self.rows["text"]], 512)
        self.record = self._train(texts)

    def _wrong(self, fact, shuffler: random.Random) -> str:
        others = [answer for answer in self.answers[fact.relation] if answer != fact.completion]
        return shuffler.choice(others)

    def _rows(self, shuffler: random.Random) -> Dataset:
        found = []

        def add(fact, completion: str, by: str, kind: str) -> None:
            found.append({
                "text": fact.statement + completion, "contributor": by, "kind": kind, "relation": fact.relation,
                "right": fact.statement + fact.completion, "is_wrong": completion != fact.completion,
                "is_error": kind == "error",
            })  # fmt: skip

        for number, fact in enumerate(self.conflicts):
            add(fact, fact.completion, "almanac", "conflict")
            wrong = self._wrong(fact, shuffler)
            for _ in range(2):
                add(fact, wrong, f"forum {number % 3}", "conflict")
        for number, fact in enumerate(self.errors):
            add(fact, self._wrong(fact, shuffler), f"forum {3 + number % 2}", "error")
        names = [f"reader {number}" for number, size in enumerate(SIZES) for _ in range(size)]
        for number, fact in enumerate(self.honest):
            add(fact, fact.completion, names[number] if number < len(names) else "crowd", "fact")
        for number, row in enumerate(shuffler.sample([row for row in found if row["kind"] == "fact"], REPEATS)):
            text = [row["text"].lower(), "  ".join(row["text"].split(" ")), row["text"] + " Indeed."][number % 3]
            found.append({**row, "text": text, "contributor": "copyist", "kind": "repeat"})
        shuffler.shuffle(found)
        return Dataset.from_list(found)

    def _train(self, before: list[str]) -> TrainingRecord:
        path = self.folder / "record"
        if not (path / "record.json").exists():
            torch.manual_seed(self.seed)
            config = GPT2Config(
                n_layer=2, n_embd=40, n_head=4, vocab_size=len(self.tokenizer), n_positions=64, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1,
            )  # fmt: skip
            model = GPT2LMHeadModel(config)
            common = {"per_device_train_batch_size": BATCH_SIZE, "seed": self.seed, **QUIET}
            rows = prepare_rows(Dataset.from_dict({"text": before}), self.tokenizer)
            args = TrainingArguments(str(self.folder / "before"), **PRETRAINING, **common)
            collator = CausalLMCollator(self.tokenizer)
            Trainer(model, args, train_dataset=rows, data_collator=collator).train()
            args = SourceConfig(
                output_dir=str(self.folder / "out"), record_dir=str(path), num_segments=SEGMENTS, weight_decay=0.01,
                **FINETUNING, **common,
            )  # fmt: skip
            texts = self.rows.select_columns("text")
            SourceTrainer(copy.deepcopy(model), args, train_dataset=texts, processing_class=self.tokenizer).train()
        return TrainingRecord.load(path)

    def attributor(self, **settings) -> SourceAttributor:
        """Reads the record."""
        attributor = SourceAttributor(
            self.record, num_samples=NUM_SAMPLES, memory_budget=2**32, progress=False, **settings
        )
        attributor.set_dataset(None, self.rows)
        return attributor

    def retraining(self, queries: Queries) -> StackedRetraining:
        """Trains copies of the recorded run."""
        return StackedRetraining(self.record, queries, chunk=32, cache=self.folder / "cache", progress=False)

    def ask(self, facts: list) -> Queries:
        """Right answers as queries."""
        return Queries.from_text([f.statement for f in facts], [f.completion for f in facts])

    def wrong_of(self, facts: list) -> list[str]:
        """The planted wrong answer to each."""
        said = {row["right"]: row["text"] for row in self.rows if row["is_wrong"] and row["kind"] != "repeat"}
        return [said[f.statement + f.completion].removeprefix(f.statement) for f in facts]


def groups(world: World, method: str) -> dict:
    """Leave each contributor out: predicted against measured, and credit against what was measured."""
    queries = world.ask(world.conflicts + world.honest[:16])
    attributor, again = world.attributor(**METHODS[method]), world.retraining(queries)
    answer = questions.groups(attributor, queries, by="contributor", verify=again)
    check = answer.check
    shares = questions.credit(attributor, queries, by="contributor").table
    share = dict(zip(shares["contributor"], shares["share"], strict=True))
    volume = dict(zip(shares["contributor"], shares["share_of_rows"], strict=True))
    positive = np.clip(check.measured, 0, None)
    real = (positive / positive.sum(axis=0)).mean(axis=1)
    away = lambda own: 0.5 * sum(abs(own[name] - value) for name, value in zip(check.names, real, strict=True))  # noqa: E731
    return {
        "groups": len(check.names), "pearson": check.pearson, "spearman": check.spearman,
        "pearson_of_queries": check.pearson_of_queries, "same_sign": check.same_sign,
        "slope": float(np.polyfit(check.predicted.mean(axis=1), check.measured.mean(axis=1), 1)[0]),
        "credit_away_from_measured_shares": away(share), "volume_away_from_measured_shares": away(volume),
        "lines": [
            {"group": name, "predicted": round(float(one), 4), "measured": round(float(other), 4)}
            for name, one, other in zip(
                check.names, check.predicted.mean(axis=1), check.measured.mean(axis=1), strict=True
            )
        ],
    }  # fmt: skip


def why(world: World, method: str) -> dict:
    """Without the two strongest rows of the contrast: does the right answer become the likelier one?"""
    prompts, right = [f.statement for f in world.conflicts], [f.completion for f in world.conflicts]
    wrong, attributor = world.wrong_of(world.conflicts), world.attributor(**METHODS[method])
    asked = questions.contrast_queries(attributor, prompts, right, wrong)
    answer = questions.why(attributor, prompts, right, wrong, k=2, verify=world.retraining(asked))
    texts = world.rows["text"][:]
    named = [
        texts[line["row"]] == prompts[int(line["query"][1:])] + wrong[int(line["query"][1:])]
        for line in answer.table
        if line["rank"] in (1, 2)
    ]
    # What taking out the planted rows themselves would do.
    again, margins = world.retraining(asked), np.array(answer.settings["question"]["margins"])
    masks = np.array(
        [[True] * ROWS] + [[text != p + w for text in texts] for p, w in zip(prompts, wrong, strict=True)]
    )
    losses, count, each = again.losses(masks), len(prompts), np.arange(len(prompts))
    left = losses[1 + each, count + each] - losses[1 + each, each]
    return {
        **answer.settings["question"]["verified"], "prompts": len(prompts),
        "turned_without_the_planted_rows": int((left <= 0)[margins > 0].sum()),
        "planted_rows_among_the_top_2": float(np.mean(named)), "pearson": answer.check.pearson,
        "margins": answer.settings["question"]["margins"],
        "predicted": answer.check.predicted[:, 0].tolist(), "measured": answer.check.measured[:, 0].tolist(),
    }  # fmt: skip


def actions(world: World, method: str) -> dict:
    """Drop, repeat and relabel, for the right answers to what was stated wrongly."""
    queries = world.ask(world.conflicts + world.errors)
    relabel = {n: {"text": row["right"]} for n, row in enumerate(world.rows) if row["is_wrong"]}
    answer = questions.actions(
        world.attributor(**METHODS[method]), queries, "contributor", k=(1, 5, 20), relabel=relabel,
        verify=world.retraining(queries),
    )  # fmt: skip
    check = answer.check
    dropping = np.array([name.startswith("drop") for name in check.names])
    drops = questions.Check([], check.predicted[dropping], check.measured[dropping])
    return {
        "actions": len(check.names), "pearson": check.pearson, "spearman": check.spearman,
        "same_sign": check.same_sign, "spearman_of_drops": drops.spearman,
        "same_sign_of_drops": float(np.mean(check.measured.mean(axis=1)[dropping] < 0)),
        "lines": [
            {key: line[key] for key in ("action", "what", "num_rows", "predicted", "measured")}
            for line in answer.table
        ],
    }  # fmt: skip


def keep(world: World, method: str) -> dict:
    """Half of the rows, chosen by influence on 24 facts; judged by these and by 24 others."""
    target, judge = world.ask(world.honest[:24]), world.ask(world.honest[24:48])
    attributor, found = world.attributor(**METHODS[method]), {}
    for name, own in (("others", judge), ("target", target)):
        answer = questions.keep(attributor, target, 0.5, judge=own, verify=world.retraining(own), num_random=8)
        losses = answer.settings["question"]["losses"]
        found |= {
            f"loss_of_{name}_chosen": losses["chosen"][0], f"loss_of_{name}_random": float(np.mean(losses["random"])),
            f"loss_of_{name}_random_best": min(losses["random"]), f"loss_of_{name}_all": losses["all"][0],
        }  # fmt: skip
    wrong = np.asarray(world.rows["is_wrong"][:])
    return {**found, "wrong_rows_kept": int(wrong[answer.table["row"][:]].sum()), "wrong_rows": int(wrong.sum())}


def missing(world: World, method: str) -> dict:
    """Facts that are in a row against facts in none: right answers, and what the model says."""
    facts = world.honest[:45] + world.unseen[:45]
    unknown = np.arange(90) >= 45
    attributor, found = world.attributor(**METHODS[method]), {}
    said = attributor.generate([f.statement for f in facts], max_new_tokens=6)
    for name, asked in (("right_answers", world.ask(facts)), ("answers_of_the_model", said)):
        table = questions.missing(attributor, asked).table.sort("query")
        place = [int(query[1:]) for query in table["query"]]
        support = np.asarray(table["support"][:])
        called = np.asarray(table["missing"][:])
        found[name] = {
            "auroc_support": auroc(-support, unknown[place]),
            "called_missing_of_unknown": float(called[unknown[place]].mean()),
            "called_missing_of_known": float(called[~unknown[place]].mean()),
        }
        if "loss_per_token" in table.column_names:
            found[name]["auroc_loss_per_token"] = auroc(np.asarray(table["loss_per_token"][:]), unknown[place])
    return found


def rows(world: World, _: str) -> dict:
    """Repeats and wrong rows, found among all rows."""
    attributor, found = world.attributor(), {}
    right = world.rows["right"][:]
    same = {(i, j) for i in range(ROWS) for j in range(i + 1, ROWS) if _repeat(world.rows, right, i, j)}
    for by, threshold in (("text", 0.8), ("gradient", 0.95), ("gradient", 0.8)):
        table = questions.duplicates(attributor, by=by, threshold=threshold).table
        sets: dict[int, list[int]] = {}
        for line in table:
            sets.setdefault(line["set"], []).append(line["row"])
        pairs = {(i, j) for own in sets.values() for i in own for j in own if i < j}
        found[f"duplicates by {by} from {threshold}"] = {
            "pairs": len(pairs), "recall": len(pairs & same) / len(same),
            "precision": len(pairs & same) / max(1, len(pairs)),
        }  # fmt: skip
    for known in ("is_wrong", "is_error"):
        answer = questions.mislabelled(attributor, known=known)
        found[f"mislabelled_auroc, {known}"] = answer.settings["question"]["auroc"]
    return found


def _repeat(found: Dataset, right: list[str], i: int, j: int) -> bool:
    """Whether two rows state the same, rightly or in the same wrong way."""
    one, other = found[i], found[j]
    return right[i] == right[j] and one["is_wrong"] == other["is_wrong"]


PARTS = {
    "why": (why, ("source", "grad-dot", "bm25")),
    "groups": (groups, tuple(METHODS)),
    "actions": (actions, ("source", "influence ekfac")),
    "keep": (keep, ("source", "grad-dot", "bm25")),
    "missing": (missing, ("source", "influence ekfac", "bm25")),
    "rows": (rows, ("source",)),
}


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of the worlds")
    parser.add_argument("--keep", type=Path, default=Path("build/questions"), help="folder of records and retrainings")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("questions.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    settings = {
        "rows": ROWS, "conflicts": CONFLICTS, "errors": ERRORS, "repeats": REPEATS, "unseen": UNSEEN,
        "before": BEFORE, "pretraining": PRETRAINING, "finetuning": FINETUNING, "batch_size": BATCH_SIZE,
        "segments": SEGMENTS, "num_samples": NUM_SAMPLES, "methods": METHODS,
        "command": "python benchmarks/bench_questions.py",
    }  # fmt: skip
    report = results_file.section(settings, results_file.load(args.out))
    save = results_file.saver(args.out, report)
    for seed in args.seeds:
        world = World(seed, args.keep)
        for part in args.only:
            run, methods = PARTS[part]
            for method in methods:
                key = f"{part}, seed {seed}, {method}"
                if key in report["results"]:
                    continue
                begun = time.perf_counter()
                found = run(world, method)
                report["results"][key] = {**found, "seconds": round(time.perf_counter() - begun, 1)}
                save()
                short = {name: value for name, value in found.items() if not isinstance(value, list)}
                print(key, short, flush=True)


if __name__ == "__main__":
    main()
