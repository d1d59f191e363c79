"""How many image tokens a VLM should have: 1, 4 and 16 on the same encoder; writes results/image_tokens.json.

    python benchmarks/image_tokens.py --encoder runs/cpu-small --language-model runs/cifar10/base \
        --input-csv runs/cifar10/train.csv --test-csv runs/cifar10/test.csv --images ../shared/data/cifar10

One token is the image embedding; 4 and 16 are cells of the feature map, pooled to 2x2 and 4x4. Each VLM trains as
`sigphi train-vlm` with train/recipes/cifar10_vlm.yaml on a base of 16 bits, sees the same number of questions, and is
scored on the same test images, whose questions are worded as in no training. A VLM whose folder is complete is not
trained again, and the file is written anew after each. The encoder is a folder of benchmarks/recipes.py.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from cifar10 import RECIPES, run, train_seconds
from provenance import provenance

from sigphi.train.records import LOG_HISTORY, write_json

RESULTS = Path(__file__).parent / "results" / "image_tokens.json"
TOKENS = (1, 4, 16)
FIGURES = ("class_accuracy", "majority/class", "answer_accuracy", "image_gain", "class_image_gain")
PREFIXES = ("accuracy/", "majority/")


def train(options: argparse.Namespace, tokens: int, folder: Path) -> None:
    """One VLM, unless it is there."""
    if (folder / LOG_HISTORY).exists():
        return
    words = ["--config", str(RECIPES / "cifar10_vlm.yaml"), "--num-image-tokens", str(tokens), "--bits", "16"]
    words += ["--siglip-checkpoint", options.encoder, "--language-model", options.language_model]
    words += ["--input-csv", options.input_csv, "--images", options.images, "--output-dir", str(folder)]
    run("sigphi", "train-vlm", *words, "--max-steps", str(options.max_steps))


def score(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Its figures on the test images."""
    words = ["--input-csv", options.test_csv, "--images", options.images, "--batch-size", "256"]
    words += ["--max-images", str(options.max_images)] if options.max_images else []
    run("sigphi", "evaluate", str(folder), *words)
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in results.items() if name in FIGURES or name.startswith(PREFIXES)}
    return kept | {"test_images": results["metadata"]["images"], "train_seconds": train_seconds(folder)}


def main() -> None:
    """Train and score what is missing of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("encoder", "language-model", "input-csv", "test-csv", "images"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/image_tokens"))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--max-steps", type=int, default=1200)
    parser.add_argument("--max-images", type=int, help="only the first so many test images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encoder = json.loads(Path(options.encoder, "test_results.json").read_text(encoding="utf-8"))
    facts = provenance() | {
        "steps": options.max_steps,
        "encoder_zero_shot_top1": encoder["zero_shot_top1"],
        "num_image_tokens": {},
    }
    for tokens in options.tokens:
        folder = options.output_dir / f"tokens-{tokens}"
        train(options, tokens, folder)
        facts["num_image_tokens"][str(tokens)] = score(options, folder)
        write_json(options.results, facts)


if __name__ == "__main__":
    main()
