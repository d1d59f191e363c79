"""`sigphi plan` against trainings: the memory that it foretells, and the memory that they take.

    python benchmarks/plan.py --output-dir runs/plan

Each configuration is planned in one process and trained for three steps in another. On a GPU the peak is
`torch.cuda.max_memory_allocated`. On a CPU it is the highest resident memory of the process, read every few
milliseconds, above that behind its imports; once with a heap that gives freed blocks back (`MALLOC_MMAP_THRESHOLD_`),
what the estimate is compared with, and once with the default of glibc, which keeps many of them. No constant of the
estimate is fitted. The result goes to benchmarks/results/plan.json.
"""

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from provenance import commit
from transformers import PhiConfig, PhiForCausalLM, SiglipImageProcessor

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.train import siglip, vlm
from sigphi.train.base_lm import qa_texts, train_tokenizer
from sigphi.train.errors import run_command
from sigphi.train.machine import Machine
from sigphi.train.parser import parse_arguments
from sigphi.train.plan import STAGES
from sigphi.train.plan_report import Estimate
from sigphi.train.records import environment, write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "plan.json"
TRAININGS = {"vlm": vlm.main, "siglip": siglip.main}
SAMPLE_SECONDS = 0.003

# Name -> stage, hidden size and layers of the language model, options.
VLM = "--num-image-tokens 4"
CONFIGURATIONS: dict[str, tuple[str, tuple[int, int], str]] = {
    "lora_fp32": ("vlm", (512, 8), f"{VLM} --bits 16 --bf16 false --gradient-checkpointing false --batch-size 12"),
    "lora_bf16": ("vlm", (768, 6), f"{VLM} --bits 16 --gradient-checkpointing false --batch-size 16"),
    "lora_bf16_checkpointing": ("vlm", (768, 12), f"{VLM} --bits 16 --gradient-checkpointing true --batch-size 24"),
    "qlora_bf16": ("vlm", (512, 12), f"{VLM} --bits 4 --gradient-checkpointing false --batch-size 12"),
    "qlora_fp32_wide": (
        "vlm",
        (1024, 4),
        f"{VLM} --bits 4 --bf16 false --gradient-checkpointing false --batch-size 8",
    ),
    "int8_bf16": ("vlm", (512, 8), f"{VLM} --bits 8 --gradient-checkpointing false --batch-size 12"),
    "full_fp32_checkpointing": ("vlm", (768, 6), f"{VLM} --tuning full --bits 16 --bf16 false --batch-size 8"),
    "full_bf16": ("vlm", (512, 8), f"{VLM} --tuning full --bits 16 --gradient-checkpointing false --batch-size 8"),
    "packed_lora_fp32": (
        "vlm",
        (768, 5),
        f"{VLM} --bits 16 --bf16 false --packing on --gradient-checkpointing false --batch-size 20",
    ),
    "packed_qlora_fp32": (
        "vlm",
        (512, 10),
        f"{VLM} --bits 4 --bf16 false --packing on --gradient-checkpointing false --tokens-per-batch 1024",
    ),
    "packed_full_fp32_checkpointing": (
        "vlm",
        (640, 5),
        f"{VLM} --tuning full --bits 16 --bf16 false --packing on --gradient-checkpointing true --batch-size 16",
    ),
    "encoder_bf16": ("siglip", (128, 2), "--layer-type basic --depths 2 2 2 2 --bf16 true --batch-size 96"),
    "encoder_fp32_checkpointing": ("siglip", (128, 2), "--batch-size 64 --gradient-checkpointing true"),
    "encoder_with_text_tower": ("siglip", (512, 8), "--train-text-tower true --layer-type basic --batch-size 16"),
}

logger = logging.getLogger(__name__)


def write_questions(path: Path, images: int) -> None:
    """Questions and answers that are all about as long, so that every batch is as large as the largest."""
    rows = []
    for image in range(images):
        row: dict[str, Any] = {"Dataset_Index": image, "Split": "train"}
        for pair in range(1, 6):
            row[f"Q{pair}"] = (
                f"Question number {pair} about this picture: " + "what can be seen in this corner of it? " * 4
            )
            row[f"A{pair}"] = f"In corner {pair} of picture {image:04d} " + "there is nothing but one more color. " * 3
        rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_models(folder: Path, questions: Path) -> None:
    """Language models of random weights in each size, and a small encoder."""
    rows = list(csv.DictReader(questions.open(encoding="utf-8")))
    texts = qa_texts(*zip(*[(row[f"Q{pair}"], row[f"A{pair}"]) for row in rows for pair in range(1, 6)], strict=True))
    tokenizer = train_tokenizer(texts, 500)
    for hidden_size, layers in {size for _, size, _ in CONFIGURATIONS.values()}:
        target = folder / f"base_{hidden_size}x{layers}"
        if not target.exists():
            config = PhiConfig(
                vocab_size=16384,
                hidden_size=hidden_size,
                intermediate_size=4 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=hidden_size // 64,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            # In 16 bits, as language models are published.
            PhiForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
            tokenizer.save_pretrained(target)
    vision = {"layer_type": "basic", "embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
    text = PhiConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    encoder = SiglipResNetModel(
        SiglipResNetConfig(vision_config=vision | {"stem": "cifar", "image_size": 32}, text_config=text)
    )
    encoder.save_pretrained(folder / "encoder")
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipResNetProcessor(image_processor, tokenizer).save_pretrained(folder / "encoder")


def words_of(name: str, folder: Path) -> list[str]:
    """The options of a configuration's training."""
    stage, (hidden_size, layers), options = CONFIGURATIONS[name]
    base = str(folder / f"base_{hidden_size}x{layers}")
    models = ["--language-model", base, "--siglip-checkpoint", str(folder / "encoder")]
    return [
        *(models if stage == "vlm" else ["--text-model", base]),
        *("--input-csv", str(folder / "qa.csv"), "--images", "synthetic", "--eval-fraction", "0"),
        *("--max-steps", "3", "--eval-strategy", "no", "--save-strategy", "no", "--report-to", "none"),
        *("--disable-tqdm", "true", "--output-dir", str(folder / name), *options.split()),
    ]


def estimate(stage: str, words: list[str]) -> None:
    """The child process that plans: prints the largest moment, its bytes by kind, and those before training."""
    types, read, _ = STAGES[stage]
    model, data, training = parse_arguments(types, words, f"sigphi plan {stage}")
    imports = resident_bytes(psutil.Process(), private=True)
    case = read(model, data, training)
    machine = Machine.present(training, tflops=1.0)
    planned = Estimate.of(case, machine)
    # A GPU's peak counts tensors alone.
    before = sum(machine.taken.values()) if torch.cuda.is_available() else imports
    sys.stdout.write(json.dumps([planned.moment, planned.moments[planned.moment], before]) + "\n")


def train(stage: str, words: list[str]) -> None:
    """The child process that trains: prints its memory behind the imports, and on a GPU its peak."""
    sys.stdout.write(f"{resident_bytes(psutil.Process())}\n")
    sys.stdout.flush()
    run_command(lambda: TRAININGS[stage](words), f"sigphi train-{stage}")
    if torch.cuda.is_available():
        sys.stdout.write(f"{torch.cuda.max_memory_allocated()}\n")


def resident_bytes(process: psutil.Process, private: bool = False) -> int:
    """Resident memory, or that without shared pages."""
    memory = process.memory_info()
    return memory.rss - (memory.shared if private else 0)


def child(mode: str, stage: str, words: list[str], **variables: str) -> subprocess.Popen:
    """Start this file in a process of its own."""
    command = [sys.executable, __file__, mode, stage, *words]
    everything = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=everything)


def measure(stage: str, words: list[str], **variables: str) -> int:
    """Bytes that a training takes at its highest, see the top of this file."""
    with child("--train", stage, words, **variables) as process:
        assert process.stdout is not None
        before = int(process.stdout.readline())
        watched, highest = psutil.Process(process.pid), 0
        while process.poll() is None:
            highest = max(highest, resident_bytes(watched))
            time.sleep(SAMPLE_SECONDS)
        output = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{stage} {' '.join(words)} ended with {process.returncode}")
    return int(output.split()[-1]) if torch.cuda.is_available() else highest - before


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Estimate and measurements of one configuration."""
    stage, (hidden_size, layers), options = CONFIGURATIONS[name]
    words = words_of(name, folder)
    with child("--estimate", stage, words) as process:
        moment, kinds, before = json.loads(process.communicate()[0].splitlines()[-1])
    estimated = sum(kinds.values()) - before
    measured = measure(stage, words, MALLOC_MMAP_THRESHOLD_=str(256 * 1024))
    by_default = measure(stage, words)
    sizes = f"{estimated / 1e6:6.0f} MB, measured {measured / 1e6:6.0f} MB, by default {by_default / 1e6:6.0f} MB"
    logger.info("%-26s %s, error %+.1f %%", name, sizes, 100 * (estimated / measured - 1))
    return {
        "stage": stage,
        "language_model": {"hidden_size": hidden_size, "layers": layers},
        "options": options,
        "estimated_bytes": round(estimated),
        "measured_bytes": measured,
        "error": round(estimated / measured - 1, 4),
        "measured_bytes_default_heap": by_default,
        "moment": moment,
        "estimated_by_kind": {kind: round(size) for kind, size in kinds.items()},
        "environment": environment(),
    }


def main() -> None:
    """Train what is wanted, and write the result file; those that are not run again keep their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/plan"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_questions(folder / "qa.csv", images=200)
    write_models(folder, folder / "qa.csv")
    facts = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"configurations": {}}
    for name in options.only:
        facts["configurations"][name] = compare(name, folder) | {"commit": commit()}
    facts["cores"] = os.cpu_count()
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, facts)


if __name__ == "__main__":
    children = {"--estimate": estimate, "--train": train}
    if sys.argv[1:2] and sys.argv[1] in children:
        children[sys.argv[1]](sys.argv[2], sys.argv[3:])
    else:
        main()
