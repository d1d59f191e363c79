"""Both stages on real CIFAR-10 from random weights, scored on the 10,000 test images.

    python benchmarks/cifar10.py --images ../shared/data/cifar10 --output-dir runs/cifar10

Each stage runs as `sigphi train-...` with its recipe in train/recipes/, in its own process; a stage whose folder is
complete is not run again. The result goes to benchmarks/results/cifar10.json.
"""

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

from provenance import commit, provenance

from sigphi.train.records import LOG_HISTORY, write_json

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "train" / "recipes"
RESULTS = Path(__file__).parent / "results" / "cifar10.json"

# Beside each stage's model: what it was trained by. Stages may have been trained at different times.
COMMIT = "commit.txt"
STAGES = ("base", "siglip", "vlm", "vlm_full")

logger = logging.getLogger(__name__)


def run(*words: str) -> None:
    """Run a command of this package in a process of its own."""
    logger.info("%s", " ".join(words))
    subprocess.run([sys.executable, "-m", *words], check=True)


def build_data(folder: Path, images: str) -> None:
    """Five questions about each image of both splits; those about test images in wordings that training never sees."""
    for split, phrasing in (("train", "train"), ("test", "held-out")):
        if not (folder / f"{split}.csv").exists():
            options = ("--images", images, "--image-split", split, "--phrasing", phrasing)
            run("sigphi", "data", "build", *options, "--output", str(folder / f"{split}.csv"))


def train(folder: Path, images: str, wanted: list[str]) -> None:
    """The stages of [`STAGES`] that are wanted: language model, encoder, and the VLM by QLoRA and in full."""
    base, encoder = str(folder / "base"), str(folder / "siglip")
    parts = ("--siglip-checkpoint", encoder, "--language-model", base)
    stages: dict[str, tuple[str, ...]] = {
        "base": ("sigphi.train.base_lm",),
        "siglip": ("sigphi", "train-siglip", "--text-model", base),
        "vlm": ("sigphi", "train-vlm", *parts),
        "vlm_full": ("sigphi", "train-vlm", *parts),
    }
    for name in wanted:
        command = stages[name]
        if not (folder / name / LOG_HISTORY).exists():
            recipe = ("--config", str(RECIPES / f"cifar10_{name}.yaml"), "--output-dir", str(folder / name))
            run(*command, *recipe, "--input-csv", str(folder / "train.csv"), "--images", images)
            (folder / name / COMMIT).write_text(commit(), encoding="utf-8")


def train_seconds(folder: Path) -> float:
    """The Trainer's own `train_runtime` of a stage, without loading and evaluation afterwards."""
    history = json.loads((folder / LOG_HISTORY).read_text(encoding="utf-8"))
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry)


def evaluate(folder: Path, images: str, name: str) -> dict[str, dict[str, float]]:
    """Score a stage on the test images; the figures of its held-out train images are kept beside them."""
    target = folder / name / "test_results.json"
    if not target.exists():
        results = folder / name / "eval_results.json"
        held_out = results.read_text(encoding="utf-8")
        options = ("--input-csv", str(folder / "test.csv"), "--images", images, "--batch-size", "512")
        run("sigphi", "evaluate", str(folder / name), *options)
        target.write_text(results.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / name / "held_out_results.json").write_text(held_out, encoding="utf-8")
    files = {"test": target, "held_out": folder / name / "held_out_results.json"}
    return {split: json.loads(file.read_text(encoding="utf-8")) for split, file in files.items()}


def main() -> None:
    """Run what is missing, and write the result file of the models that are evaluated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="CIFAR-10: a folder or Hub id")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run and to report")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    build_data(options.output_dir, options.images)
    train(options.output_dir, options.images, options.stages)
    names = [name for name in options.stages if name != "base"]
    if not names:
        return
    results = {name: evaluate(options.output_dir, options.images, name) for name in names}
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {
        **provenance(),
        "images": "JPEG copy of CIFAR-10 (quality about 75); figures are a point or two below those on the original",
        "train_seconds": {name: train_seconds(options.output_dir / name) for name in options.stages},
        "trained_at_commit": {name: (options.output_dir / name / COMMIT).read_text() for name in options.stages},
        "test": {name: result["test"] for name, result in results.items()},
        "held_out": {name: result["held_out"] for name, result in results.items()},
    }
    write_json(RESULTS, facts)


if __name__ == "__main__":
    main()
