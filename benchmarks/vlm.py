"""`sigphi train-vlm` against TRL's `SFTTrainer`: the same language model, image tokens, questions and precision.

    pip install 'sigphi[bench]'
    python benchmarks/vlm.py --images ../shared/data/cifar10 --tokenizer ../shared/models/phi-2

Both train LoRA and a projector on a Phi of 6 layers x 256 with Phi-2's vocabulary, 16 image tokens, float32. sigphi
has its ResNet-50 at 32 pixels; TRL has transformers' LLaVA, whose image tower is a SigLIP ViT of as many FLOPs. TRL
runs as it comes (with batches of 16), and in the fastest of the settings of [`GRID`]. Contestants take turns, each in
a process of its own (benchmarks/vlm_contestants.py). Operations are those of a whole Phi-2, counted on tensors without
data. Writes results/vlm.json.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import Case, figures, read_rows
from peft import LoraConfig, get_peft_model
from provenance import commit, machine
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PhiForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
)
from turns import ratios, run_contestant
from vlm_contestants import BASE, ENCODER, IMAGES, LLAVA, LORA, LORA_LAYERS, QA, ROWS

from sigphi import SiglipResNetConfig, SiglipResNetModel, SiglipResNetProcessor, SigPhiProcessor
from sigphi.train.data import load_cifar10_qa
from sigphi.train.data_build import build_csv
from sigphi.train.packing import question_sizes
from sigphi.train.padding import random_batches
from sigphi.train.prompts import prepare_tokenizer
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "vlm.json"
TRAIN_IMAGES, IMAGE_TOKENS, PATCH = 2000, 16, 8
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
PHI_2 = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
VISION = {"image_size": 32, "stem": "cifar"}
VOCABULARY = 51200
# A ViT whose forward pass at 32 pixels and 16 patches takes as long as ResNet-50's with a 3x3 stem.
VIT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}

SIGPHI = f"--num-image-tokens {IMAGE_TOKENS} --bits 16 --bf16 false --lora-r {LORA['r']} --lora-alpha \
{LORA['lora_alpha']} --lora-dropout 0 --eval-fraction 0 --eval-strategy no --save-strategy no --report-to none \
--disable-tqdm true --logging-steps 100 --num-epochs 100"
TRL = "--bf16 false --use_cpu true --eval_strategy no --save_strategy no --report_to none --disable_tqdm true \
--logging_steps 100 --num_train_epochs 100 --learning_rate 2e-4"
BATCHES = "--per_device_train_batch_size"
# Name -> program and its options.
CONTESTANTS = {
    "sigphi, no feature cache": ("sigphi", f"{SIGPHI} --feature-cache off"),
    "sigphi, feature cache": ("sigphi", f"{SIGPHI} --feature-cache on"),
    "sigphi fastest, no feature cache": (
        "sigphi",
        f"{SIGPHI} --feature-cache off --gradient-checkpointing false --tokens-per-batch 1024",
    ),
    "sigphi fastest, feature cache": (
        "sigphi",
        f"{SIGPHI} --feature-cache on --gradient-checkpointing false --tokens-per-batch 1024",
    ),
    "TRL default, batches of 16": ("trl", f"{TRL} {BATCHES} 16"),
}
GRID = {
    f"batches of {size}{', a worker' if workers else ''}": (
        "trl",
        f"{TRL} {BATCHES} {size} --gradient_checkpointing false --dataloader_num_workers {workers}",
    )
    for size in (8, 16, 32, 64)
    for workers in (0, 1)
}
FASTEST = "TRL fastest"
PARTS = ("operations", "grid", "throughput")
WARM_UP, TIMED_QUESTIONS = 2, 256
RATIOS = [
    (ours, theirs)
    for ours in ("sigphi, no feature cache", "sigphi fastest, no feature cache", "sigphi fastest, feature cache")
    for theirs in ("TRL default, batches of 16", FASTEST)
]

logger = logging.getLogger(__name__)


def prepare(folder: Path, images: str, tokenizer_name: str) -> None:
    """The questions, and both models from the same random language model."""
    folder.mkdir(parents=True, exist_ok=True)
    build_csv(folder / QA, images, "train", TRAIN_IMAGES)
    (folder / IMAGES).write_text(images, encoding="utf-8")
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_name))
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = PhiConfig(vocab_size=VOCABULARY, **SMALL, **ids)
    base = PhiForCausalLM(text)
    base.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    encoder = SiglipResNetModel(SiglipResNetConfig(vision_config=VISION, include_text_tower=False))
    encoder.save_pretrained(folder / ENCODER)
    SiglipResNetProcessor(image_processor, tokenizer).save_pretrained(folder / ENCODER)
    write_llava(folder / LLAVA, base, image_processor, tokenizer)
    write_rows(folder, SigPhiProcessor(image_processor, tokenizer))


def write_llava(folder: Path, base: PhiForCausalLM, image_processor: Any, tokenizer: Any) -> None:
    """LLaVA on the same language model."""
    vision = SiglipVisionConfig(image_size=32, patch_size=PATCH, vision_use_head=False, **VIT)
    config = LlavaConfig(
        vision_config=vision,
        text_config=base.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.weight = base.lm_head.weight  # Phi's bias, which LLaVA has not, is still 0
    model.save_pretrained(folder)
    strategy = {"vision_feature_select_strategy": "full", "patch_size": PATCH}
    LlavaProcessor(image_processor, tokenizer, image_token="<image>", **strategy).save_pretrained(folder)


def prompt_template(processor: SigPhiProcessor) -> str:
    """sigphi's own prompt for a picture and `<question>`."""
    content = [{"type": "image"}, {"type": "text", "text": "<question>"}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def write_rows(folder: Path, processor: SigPhiProcessor) -> None:
    """What TRL reads: sigphi's own prompts and answers as texts."""
    questions = load_cifar10_qa(folder / QA, (folder / IMAGES).read_text(encoding="utf-8"), eval_fraction=0.0)["train"]
    template = prompt_template(processor)
    end = processor.tokenizer.eos_token
    rows = [
        {
            "image_index": index,
            "prompt": template.replace("<question>", asked),
            "completion": f" {answer.strip()}{end}",
        }
        for index, asked, answer in zip(
            questions["dataset_index"], questions["question"], questions["answer"], strict=True
        )
    ]
    write_json(folder / ROWS, rows)


# Speed and memory ----------------------------------------------------------------------------------------------------


def measure(name: str, program: str, options: str, folder: Path) -> dict[str, float]:
    """Questions and supervised tokens a second behind the first steps, positions a question, and peak memory."""
    words = [*options.split(), "--output_dir", str(folder / "output" / name.replace(" ", "_").replace(",", ""))]
    if "--feature-cache on" in options:
        words += ["--image-cache-dir", str(folder / "features")]
    size = int(options.split(BATCHES)[1].split()[0]) if BATCHES in options else 32
    steps = WARM_UP + max(TIMED_QUESTIONS // size, 3)
    found = run_contestant(name, "vlm_contestants.py", program, str(folder), str(steps), *words)
    first, last = found["steps"][WARM_UP - 1], found["steps"][-1]
    seconds, done = last["at"] - first["at"], {key: last[key] - first[key] for key in first}
    figures_found = {
        "questions_per_second": done["questions"] / seconds,
        "supervised_tokens_per_second": done["supervised"] / seconds,
        "positions_per_question": done["positions"] / done["questions"],
        "peak_bytes": found["peak_bytes"],
    }
    logger.info("%-40s %s", name, {key: round(value, 1) for key, value in figures_found.items()})
    return figures_found


def grid(folder: Path) -> dict[str, Any]:
    """Questions a second of TRL in each setting of [`GRID`], and the name of the fastest."""
    found = {name: measure(f"TRL, {name}", *case, folder)["questions_per_second"] for name, case in GRID.items()}
    speeds = {name: round(speed, 2) for name, speed in found.items()}
    return {"questions_per_second": speeds, "fastest": max(found, key=lambda name: found[name])}


def throughput(turns: int, folder: Path, best: str) -> dict[str, Any]:
    """All contestants and the setting `best` of TRL in turns."""
    contestants = CONTESTANTS | {FASTEST: GRID[best]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for turn in range(turns):
        logger.info("turn %d", turn)
        for name, case in contestants.items():
            found[name].append(measure(name, *case, folder))
    by_turn = {name: [row["questions_per_second"] for row in rows] for name, rows in found.items()}
    peaks = {name: [row["peak_bytes"] for row in rows] for name, rows in found.items()}
    medians = {
        name: {"options": " ".join(contestants[name][1].split())}
        | {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
        | {"questions_per_second_by_turn": [round(value, 2) for value in by_turn[name]]}
        for name, rows in found.items()
    }
    return {
        "turns": turns,
        "contestants": medians,
        "ratios": ratios(by_turn, RATIOS),
        "memory_ratios": ratios(peaks, RATIOS),
    }


# Operations ----------------------------------------------------------------------------------------------------------


def tower_flops(folder: Path) -> dict[str, int]:
    """Of a forward pass of each image tower over one image."""
    ours = SiglipResNetModel.from_pretrained(folder / ENCODER).vision_model
    theirs = LlavaForConditionalGeneration.from_pretrained(folder / LLAVA).model.vision_tower
    found = {}
    for name, tower in (("sigphi", ours), ("llava", theirs)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower.eval()(torch.zeros(1, 3, 32, 32))
        found[name] = counter.get_total_flops()
    return found


def trl_flops(shape: tuple[int, int], supervised: int, checkpointing: bool) -> float:
    """
    Of a step of TRL on the language model of a whole Phi-2: its own head over the supervised positions, LoRA.

    Args:
        shape (`tuple[int, int]`): rows and padded length of the batch.
        supervised (`int`): answer tokens in it.
        checkpointing (`bool`): whether activations are computed again in the backward pass.
    """
    with torch.device("meta"):
        model: Any = PhiForCausalLM._from_config(PhiConfig(vocab_size=VOCABULARY, **PHI_2), attn_implementation="sdpa")
        backbone = get_peft_model(model.model, LoraConfig(**LORA, target_modules=LORA_LAYERS))
        embeddings = torch.empty(*shape, PHI_2["hidden_size"], requires_grad=True)  # of a trained projector
        mask = torch.empty(shape[0], 1, shape[1], shape[1], dtype=torch.bool)  # made here, it is not looked into
    model.lm_head.requires_grad_(False)
    backbone.train()
    if checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        hidden = backbone(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        model.lm_head(hidden.flatten(0, 1)[:supervised]).sum().backward()
    return counter.get_total_flops()


def operations(folder: Path, tokenizer_name: str) -> dict[str, Any]:
    """FLOPs of a question in training at full size, and positions of it."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_name))
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    rows = read_rows(str(folder / QA), tokenizer, 10**9)
    sizes = question_sizes(rows, image_token_id)
    prefixes = dict(zip(sizes.keys, sizes.prefixes.tolist(), strict=True))
    distinct = sum(prefixes.values()) + int(sizes.owns.sum())
    towers = tower_flops(folder)
    found: dict[str, Any] = {"image_tower_flops": towers, "questions": len(rows), "images": len(prefixes)}
    for name, setting, checkpointing in (
        ("sigphi default", {"batch": 32, "row": 512}, True),
        ("sigphi, 1,024 tokens a step", {"budget": 1024, "row": 512}, True),
        ("sigphi, 1,024 tokens a step, no checkpointing", {"budget": 1024, "row": 512}, False),
    ):
        case = Case(rows, image_token_id, **setting)
        step = figures(case, rows, tokenizer, distinct, checkpointing)
        images = sum(len({rows[row]["image_index"] for row in batch}) for batch in case.batches)
        found[name] = step["phi_2_gflop_a_question"] + towers["sigphi"] * images / len(rows) / 1e9
    lengths, answers = sizes.prefixes + sizes.owns, np.array([len(row["answer_ids"]) for row in rows])
    for name, size, checkpointing in (
        ("TRL default", 8, True),
        ("TRL, batches of 16", 16, True),
        ("TRL, batches of 16, no checkpointing", 16, False),
    ):
        batches = [lengths[one] for one in random_batches(len(rows), size)]
        length = round(float(np.mean([one.max() for one in batches])))
        flops = trl_flops((size, length), round(float(answers.mean() * size)), checkpointing)
        found[name] = flops / size / 1e9 + towers["llava"] / 1e9
    found = {name: round(value, 1) if isinstance(value, float) else value for name, value in found.items()}
    return found | {"distinct_tokens_a_question": round(distinct / len(rows), 2), "unit": "GFLOP a question"}


def main() -> None:
    """Prepare the data, run what is wanted, and write the result file; parts that do not run keep their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="CIFAR-10: a folder or Hub id")
    parser.add_argument("--tokenizer", default="microsoft/phi-2", help="Phi-2's: a folder or Hub id")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/vlm_speed"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="throughput needs the grid, run before or now"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = options.output_dir.absolute()
    prepare(folder, options.images, options.tokenizer)
    facts = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    where = {"commit": commit(), "machine": machine("trl", "peft")}
    for part in [part for part in PARTS if part in options.parts]:
        if part == "operations":
            found = operations(folder, options.tokenizer)
        elif part == "grid":
            found = grid(folder)
        else:
            found = throughput(options.turns, folder, facts["grid"]["fastest"])
        facts[part] = found | where
        write_json(RESULTS, facts)


if __name__ == "__main__":
    main()
