"""What answering saves by a shared prefix and what a cache of fixed size costs; writes results/generation_cache.json.

    sigphi data build --images uoft-cs/cifar10 --image-split train --output train.csv
    OMP_NUM_THREADS=1 python benchmarks/generation_cache.py --input-csv train.csv --tokenizer ../shared/models/phi-2

The questions of the first images of the file, about random image features, by a small Phi with random weights that
gives every answer the same number of tokens; a cache of fixed size has room for the longest answer that is allowed, as
in use. Figures are the questions that one second of the processor answers; the settings come one after the other, in
turns, and the ratios are those within a turn. `--part compiled` is about compiled code, which is compiled before the
first turn: `seconds_of_the_first_batch` tells how long that takes.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from packing import IMAGE_TOKENS, SMALL
from provenance import provenance
from transformers import AutoTokenizer, GenerationConfig, PhiConfig, PhiForCausalLM, SiglipImageProcessor

from sigphi import SiglipResNetConfig, SigPhiConfig, SigPhiForConditionalGeneration
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.answering import Answerer
from sigphi.train.prompts import prepare_tokenizer
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "generation_cache.json"
SETTINGS: dict[str, dict[str, bool]] = {
    "prefix once a question, cache that grows": {"shares_prefix": False, "static_cache": False},
    "prefix once an image, cache that grows": {"shares_prefix": True, "static_cache": False},
    "prefix once a question, cache of fixed size": {"shares_prefix": False, "static_cache": True},
    "prefix once an image, cache of fixed size": {"shares_prefix": True, "static_cache": True},
}
COMPILED = {
    "prefix once an image, cache that grows": SETTINGS["prefix once an image, cache that grows"],
    "prefix once an image, compiled": {"shares_prefix": True, "torch_compile": True},
}


def small_vlm(processor: SigPhiProcessor, new_tokens: int) -> SigPhiForConditionalGeneration:
    """A VLM on a small Phi with Phi-2's vocabulary and random weights, whose answers all have `new_tokens` tokens."""
    torch.manual_seed(0)
    encoder = SiglipResNetConfig(include_text_tower=False).vision_config
    text = PhiConfig(vocab_size=51200, **SMALL)
    pad = processor.tokenizer.pad_token_id
    config = SigPhiConfig(
        vision_config=encoder,
        text_config=text,
        image_token_id=processor.image_token_id,
        pad_token_id=pad,
        num_image_tokens=IMAGE_TOKENS,
    )
    language_model = PhiForCausalLM(text)
    model = SigPhiForConditionalGeneration.from_parts(config, SiglipResNetVisionModel(encoder), language_model)
    end = processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, min_new_tokens=new_tokens)
    return model.eval()


def read_questions(path: str, limit: int) -> list[tuple[str, int]]:
    """The first questions of a CSV, each with its image."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, nrows=limit)
    rows = table.to_dict("records")
    asked = [(row[f"Q{pair}"], int(row["Dataset_Index"])) for row in rows for pair in range(1, 6) if row[f"Q{pair}"]]
    return list(dict.fromkeys(asked))[:limit]


def make_answerer(inputs: tuple[Any, ...], longest_answer: int, setting: dict[str, bool]) -> Answerer:
    """One whose cache of fixed size has room for longer answers than are made."""
    answerer = Answerer(*inputs, **setting)
    answerer.longest += longest_answer - answerer.max_new_tokens
    return answerer


def measured(settings: dict[str, Any], make: Callable[[Any], Answerer], turns: int, questions: int) -> dict[str, Any]:
    """Questions a second of the processor, by setting and turn."""
    figures: dict[str, Any] = {}
    # Kept from turn to turn where code is compiled for it; the shared prefix is part of the work of each turn.
    answerers = {name: make(setting) for name, setting in settings.items()}
    for name in settings:
        start = time.perf_counter()
        answerers[name].tokens(answerers[name].batches[0])
        figures[name] = {"seconds_of_the_first_batch": round(time.perf_counter() - start, 2), "questions_a_second": []}
    for _ in range(turns):
        for name, answerer in answerers.items():
            start = time.process_time()
            answerer.forget_prefix()
            for batch in answerer.batches:
                answerer.tokens(batch)
            figures[name]["questions_a_second"].append(round(questions / (time.process_time() - start), 2))
    first = next(iter(figures.values()))["questions_a_second"]
    for one in figures.values():
        ratios = [mine / other for mine, other in zip(one["questions_a_second"], first, strict=True)]
        one["median_ratio_to_the_first"] = round(sorted(ratios)[len(ratios) // 2], 3)
    return figures


def main() -> None:
    """One part; the other keeps its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input-csv", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--part", choices=("caches", "compiled"), default="caches")
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--longest-answer", type=int, default=80)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    source = provenance()  # before the file of results is another one than the commit's
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(options.tokenizer))
    processor = SigPhiProcessor(SiglipImageProcessor(), tokenizer, num_image_tokens=IMAGE_TOKENS)
    pairs = read_questions(options.input_csv, options.questions)
    features = torch.randn(max(image for _, image in pairs) + 1, IMAGE_TOKENS, 2048)
    model = small_vlm(processor, options.new_tokens)
    inputs = (model, processor, features, pairs, options.batch_size, options.new_tokens)
    settings = SETTINGS if options.part == "caches" else COMPILED
    results = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    results[options.part] = {
        "model": SMALL,
        "questions": len(pairs),
        "images": len({image for _, image in pairs}),
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
        "longest_answer": options.longest_answer,
        "shared_tokens": len(Answerer(*inputs, shares_prefix=True).prefix),
        "threads": torch.get_num_threads(),
        "settings": measured(
            settings, partial(make_answerer, inputs, options.longest_answer), options.turns, len(pairs)
        ),
    } | source
    write_json(options.results, results)


if __name__ == "__main__":
    main()
