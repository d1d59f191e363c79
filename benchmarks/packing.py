"""What packing saves: positions, FLOPs and seconds a question, packed and one by one; writes results/packing.json.

    sigphi data build --images uoft-cs/cifar10 --image-split train --output train.csv
    OMP_NUM_THREADS=1 python benchmarks/packing.py --input-csv train.csv --tokenizer ../shared/models/phi-2

Positions are those of the batches that training would see, of one epoch: 50,000 questions with their answers, 16 image
tokens. FLOPs are those of a training step (LoRA on 16-bit weights, no gradient checkpointing) of a whole Phi-2 over a
mean batch, on tensors without data. Seconds are those that the processor spends on training steps of a small Phi in
this process, in one thread; the settings come one after the other, in two rounds.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from provenance import provenance
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM, PreTrainedTokenizerBase, SiglipImageProcessor

from sigphi import SiglipResNetConfig, SigPhiConfig, SigPhiForConditionalGeneration, VlmTrainingArguments
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.collators import VlmCollator
from sigphi.train.costs import VlmBatch, VlmSetup, vlm_costs
from sigphi.train.packing import (
    PackedBatches,
    PackingCollator,
    packed_row_length,
    packed_shape,
    question_sizes,
)
from sigphi.train.padding import random_batches
from sigphi.train.prompts import prepare_tokenizer, tokenized_rows
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "packing.json"
QUESTIONS, IMAGE_TOKENS, ROUNDS, TIMED_ROWS, TIMED_QUESTIONS = 50_000, 16, 2, 2000, 64
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
# By batch size, or by tokens a batch and a row.
SETTINGS: dict[str, dict[str, int]] = {
    "one by one, batches of 32": {"batch": 32},
    "one by one, batches of 16": {"batch": 16},
    "packed, batches of 32": {"batch": 32, "row": 512},
    "packed, 512 tokens": {"budget": 512, "row": 512},
    "packed, 1024 tokens, rows of 256": {"budget": 1024, "row": 256},
    "packed, 1024 tokens, rows of 512": {"budget": 1024, "row": 512},
    "packed, 1024 tokens": {"budget": 1024, "row": 1024},
    "packed, 4096 tokens, rows of 1024": {"budget": 4096, "row": 1024},
    "packed, 8192 tokens, rows of 2048": {"budget": 8192, "row": 2048},
}


TIMED = (
    "one by one, batches of 32",
    "one by one, batches of 16",
    "packed, batches of 32",
    "packed, 512 tokens",
    "packed, 1024 tokens, rows of 256",
    "packed, 1024 tokens, rows of 512",
)


def read_rows(path: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[dict[str, Any]]:
    """The first questions of a CSV as [`tokenized_rows`] gives them."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, nrows=limit)
    asked = [
        {"question": row[f"Q{k}"], "answer": row[f"A{k}"], "image": int(row["Dataset_Index"])}
        for row in table.to_dict("records")
        for k in range(1, 6)
        if row[f"Q{k}"]
    ][:limit]
    columns: Any = {name: [one[name] for one in asked] for name in ("question", "answer", "image")}
    processor = SigPhiProcessor(SiglipImageProcessor(), tokenizer, num_image_tokens=IMAGE_TOKENS)
    return tokenized_rows(processor, columns, columns["image"])


class Case:
    """One setting: its batches and their shapes."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], image_token_id: int, batch: int = 0, budget: int = 0, row: int = 0
    ):
        sizes = question_sizes(rows, image_token_id)
        self.row = packed_row_length(budget, row, sizes.longest, "--input-csv") if budget else row
        self.batches: list[Any] = random_batches(len(rows), batch) if batch else []
        if budget:
            self.batches = list(PackedBatches(sizes, self.row, budget // self.row))
        parts = [sizes[one] for one in self.batches]
        if row:
            self.shapes = np.array([packed_shape(part, self.row) for part in parts])
        else:
            lengths = [part.prefixes + part.owns for part in parts]
            self.shapes = np.array([(len(one), one.max(), len(one), one.sum()) for one in lengths])
        self.positions = int(self.shapes[:, :2].prod(1).sum())


def figures(
    case: Case,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    distinct: int,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Positions and FLOPs of one setting; a mean batch has the mean number of rows and the mean length."""
    answers = sum(len(row["answer_ids"]) for row in rows) / len(case.batches)
    num_rows, _, images, _ = case.shapes.mean(0)
    length = case.positions / len(case.batches) / round(num_rows)
    batch = VlmBatch(round(num_rows), round(length), round(images), round(answers), 1, round(length))
    questions = len(rows) / len(case.batches)
    encoder = SiglipResNetConfig(include_text_tower=False)
    setup = VlmSetup(
        VlmModelArguments(siglip_checkpoint="-", num_image_tokens=IMAGE_TOKENS, bits=16, lora_r=16, lora_dropout=0.0),
        VlmTrainingArguments(output_dir="-", report_to="none", use_cpu=True, gradient_checkpointing=checkpointing),
        encoder,
        PhiConfig(
            vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
        ),
        tokenizer,
        caches_features=True,
        evaluates=False,
        packs=case.row > 0,
    )
    return {
        "batches": len(case.batches),
        "positions_a_question": round(case.positions / len(rows), 3),
        "of_distinct_tokens": round(case.positions / distinct, 4),
        "phi_2_gflop_a_question": round(vlm_costs(setup, batch).flops / questions / 1e9, 2),
    }


def small_vlm(tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> SigPhiForConditionalGeneration:
    """A VLM on a small Phi with Phi-2's vocabulary and random weights, with LoRA."""
    torch.manual_seed(0)
    encoder = SiglipResNetConfig(include_text_tower=False).vision_config
    text = PhiConfig(vocab_size=51200, use_cache=False, **SMALL)
    config = SigPhiConfig(
        vision_config=encoder,
        text_config=text,
        image_token_id=image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_image_tokens=IMAGE_TOKENS,
    )
    language_model = PhiForCausalLM._from_config(text, attn_implementation="sdpa")
    model = SigPhiForConditionalGeneration.from_parts(config, SiglipResNetVisionModel(encoder), language_model)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    names = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    model.add_lora({"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": names})
    return model.train()


def questions_a_second(model: Any, case: Case, rows: Sequence[dict[str, Any]], collator: VlmCollator) -> float:
    """Of whole training steps, the batches made in them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    done, start = 0, time.process_time()
    for batch in case.batches:
        model(**collator([rows[row] for row in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += len(batch)
        if done >= TIMED_QUESTIONS:
            break
    return done / (time.process_time() - start)


def counted(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Positions and FLOPs of an epoch, by setting."""
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    sizes = question_sizes(rows, image_token_id)
    cases = {name: Case(rows, image_token_id, **setting) for name, setting in SETTINGS.items()}
    prefixes = dict(zip(sizes.keys, sizes.prefixes.tolist(), strict=True))
    distinct = sum(prefixes.values()) + int(sizes.owns.sum())
    return {
        "questions": len(rows),
        "images": len(prefixes),
        "image_tokens": IMAGE_TOKENS,
        "distinct_tokens_a_question": round(distinct / len(rows), 3),
        "settings": {name: figures(case, rows, tokenizer, distinct) for name, case in cases.items()},
    }


def timed(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Questions a second of the processor, by setting and round."""
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    cases = {name: Case(rows, image_token_id, **SETTINGS[name]) for name in TIMED}
    model = small_vlm(tokenizer, image_token_id)
    features = torch.randn(max(row["image_index"] for row in rows) + 1, IMAGE_TOKENS, 2048)
    given: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "image_features": features}
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            collator = VlmCollator(**given)
            if case.row:
                collator = PackingCollator(**given, image_token_id=image_token_id, tokens_per_row=case.row)
            speeds[name].append(round(questions_a_second(model, case, rows, collator), 2))
    return {"model": SMALL, "threads": torch.get_num_threads(), "questions_a_processor_second": speeds}


def main() -> None:
    """Both parts, or the one of `--part`; the other keeps its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input-csv", required=True)
    parser.add_argument("--tokenizer", required=True)
    parts = {"counted": (counted, QUESTIONS), "timed": (timed, TIMED_ROWS)}
    parser.add_argument("--part", choices=parts)
    options = parser.parse_args()
    source = provenance()  # before the file of results is another one than the commit's
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(options.tokenizer))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, (measure, questions) in parts.items():
        if options.part in (None, name):
            rows = read_rows(options.input_csv, tokenizer, questions)
            results[name] = measure(rows, tokenizer) | source
            write_json(RESULTS, results)


if __name__ == "__main__":
    main()
