"""A recipe of `sigphi train-siglip`, run and scored on the 10,000 test images; writes train/recipes/NAME.json.

    python benchmarks/recipes.py cpu-small --processes 2 --images ../shared/data/cifar10 \\
        --text-model runs/cifar10/base --input-csv runs/cifar10/train.csv --test-csv runs/cifar10/test.csv \\
        --output-dir runs/cpu-small

Several processes share the batch of the recipe. A folder that holds a trained encoder is not trained again, and what
was evaluated on the test images is not evaluated again. `train_seconds` are the Trainer's own, with its evaluations,
without loading; `command_seconds` are those of the whole command. On a GPU the share of the peak compares the
operations of all steps with those that it does in the same time multiplying matrices in the precision of the training.

Further options go to `sigphi train-siglip`, for a trial; `--result` then names another file:

    python benchmarks/recipes.py resnet50-32 --images synthetic:64 ... --result trial.json --max-steps 2 --batch-size 8
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from provenance import commit, provenance

from sigphi.train.arguments import EncoderDataArguments, SiglipModelArguments, SiglipTrainingArguments
from sigphi.train.images import load_images
from sigphi.train.machine import measured_speed
from sigphi.train.parser import parse_arguments
from sigphi.train.plan_cases import read_siglip_case
from sigphi.train.records import EVAL_RESULTS, LOG_HISTORY, write_json
from sigphi.train.siglip import RECIPES

ROOT = Path(__file__).parent.parent
RUN = "benchmark.json"
HELD_OUT, TEST = "held_out_results.json", "test_results.json"

# What a recipe has to reach on the test images of CIFAR-10, in how many seconds of training, and what would be better.
TARGETS = {
    "cpu-small": {"zero_shot_top1": 0.88, "train_seconds": 2700.0},
    "resnet50-32": {"zero_shot_top1": 0.94},
}
GOALS = {
    "cpu-small": {"zero_shot_top1": 0.91, "train_seconds": 2700.0},
    "resnet50-32": {"zero_shot_top1": 0.94, "train_seconds": 120.0},
}

logger = logging.getLogger(__name__)


def training_words(options: argparse.Namespace) -> list[str]:
    """The options of `sigphi train-siglip`; the processes share the batch of the recipe."""
    words = ["--recipe", options.recipe, "--input-csv", options.input_csv, "--images", options.images]
    words += ["--output-dir", str(options.output_dir)]
    words += ["--text-model", options.text_model] if options.text_model else []
    words += options.further
    if options.processes > 1:
        words += ["--batch-size", str(share_of_batch(parsed(words)[2].train_batch_size, options.processes))]
    return words


def share_of_batch(batch_size: int, processes: int) -> int:
    """The images of each process."""
    if batch_size % processes > 0:
        raise SystemExit(f"--processes {processes}: they cannot share a batch of {batch_size} images evenly.")
    return batch_size // processes


def parsed(words: list[str]) -> tuple[Any, ...]:
    """The options of the model, of the data and of the training."""
    types = [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments]
    return parse_arguments(types, words, "sigphi train-siglip", recipes=RECIPES)


def train(options: argparse.Namespace) -> None:
    """Unless the folder holds a trained encoder."""
    folder = options.output_dir
    if (folder / LOG_HISTORY).exists():
        return
    command = [sys.executable, "-m", "sigphi.train.siglip"]
    if options.processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
        on_cpu = [] if torch.accelerator.is_available() else ["--use_cpu"]
        command = [sys.executable, "-m", *launcher, "-m", "sigphi.train.siglip", *on_cpu]
    start = time.perf_counter()
    subprocess.run([*command, *training_words(options)], check=True)
    write_json(folder / RUN, {"commit": commit(), "command_seconds": time.perf_counter() - start})


def evaluate(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of the held-out train images, and those of the test images."""
    folder = options.output_dir
    results, held_out, test = (folder / name for name in (EVAL_RESULTS, HELD_OUT, TEST))
    if not held_out.exists():
        held_out.write_text(results.read_text(encoding="utf-8"), encoding="utf-8")
    if not test.exists():
        words = ["--input-csv", options.test_csv, "--images", options.images, "--batch-size", "512"]
        subprocess.run([sys.executable, "-m", "sigphi", "evaluate", str(folder), *words], check=True)
        test.write_text(results.read_text(encoding="utf-8"), encoding="utf-8")
    return {file.stem.removesuffix("_results"): json.loads(file.read_text("utf-8")) for file in (held_out, test)}


def share_of_peak(flops: float, seconds: float, peak: float) -> float:
    """
    The share of its device's peak that a process used.

    Args:
        flops (`float`): operations of all its steps.
        seconds (`float`): that it took.
        peak (`float`): operations a second that the process can do.
    """
    return flops / seconds / peak


def is_met(bounds: dict[str, float] | None, top1: float, seconds: float) -> bool | None:
    """Whether a recipe reached its [`TARGETS`] or [`GOALS`]; `None` where it has none."""
    if bounds is None:
        return None
    return top1 >= bounds["zero_shot_top1"] and seconds <= bounds.get("train_seconds", float("inf"))


def read_run(folder: Path) -> dict[str, Any]:
    """Commit and seconds of the training that `folder` holds."""
    return json.loads((folder / RUN).read_text(encoding="utf-8"))


def facts_of_training(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, steps, images a second, the share of the peak, and the accuracy by epoch."""
    history = json.loads((options.output_dir / LOG_HISTORY).read_text(encoding="utf-8"))
    end = next(entry for entry in history if "train_runtime" in entry)
    model, data, training = parsed(training_words(options))
    case = read_siglip_case(model, data, training)
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    flops = case.costs().flops * case.mean_share * end["step"]
    key = "eval_zero_shot_top1"
    facts = {
        "processes": options.processes,
        "batch_size": options.processes * training.per_device_train_batch_size,
        "steps": end["step"],
        "epochs": training.num_train_epochs,
        "train_seconds": end["train_runtime"],
        "command_seconds": read_run(options.output_dir)["command_seconds"],
        "images_per_second": end["train_samples_per_second"],
        "precision": str(dtype).removeprefix("torch."),
        "tflops_a_process": flops / end["train_runtime"] / 1e12,
        "held_out_zero_shot_top1_by_epoch": [entry[key] for entry in history if key in entry],
    }
    if training.device.type == "cpu":  # whose convolutions are faster than its matrix products
        return facts
    peak = measured_speed(training.device, dtype).flops
    share = share_of_peak(flops, end["train_runtime"], peak)
    return facts | {"matmul_peak_tflops_a_process": peak / 1e12, "share_of_peak": share}


def main() -> None:
    """Run what is missing, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=[path.stem for path in RECIPES])
    parser.add_argument("--images", required=True, help="CIFAR-10: a folder or Hub id")
    parser.add_argument("--input-csv", required=True, help="questions about the train images")
    parser.add_argument("--test-csv", required=True, help="questions about the test images")
    parser.add_argument("--text-model", help="the text tower; by default that of train-siglip")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--result", type=Path, help="by default train/recipes/NAME.json")
    options, options.further = parser.parse_known_args()
    if options.further and options.result is None:
        parser.error(f"{options.further[0]} makes it a trial: name a file for its figures by --result")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options)
    results, training = evaluate(options), facts_of_training(options)
    top1 = results["test"]["zero_shot_top1"]
    seconds = training["train_seconds"]
    facts = {
        "recipe": options.recipe,
        "options": options.further,
        **provenance(),
        "trained_at_commit": read_run(options.output_dir)["commit"],
        "images": {"source": options.images, "format": load_images(options.images, "test")[0]["img"].format},
        "training": training,
        "target": TARGETS.get(options.recipe),
        "is_met": is_met(TARGETS.get(options.recipe), top1, seconds),
        "goal": GOALS.get(options.recipe),
        "goal_is_met": is_met(GOALS.get(options.recipe), top1, seconds),
        **results,
    }
    target = options.result or ROOT / "train" / "recipes" / f"{options.recipe}.json"
    write_json(target, facts)
    logger.info("%s: zero_shot_top1 %.4f after %.0f s", target, top1, seconds)


if __name__ == "__main__":
    main()
