"""The memory that each recipe of `sigphi train-vlm` needs with Phi-2; writes train/recipes/NAME.json.

    python benchmarks/vlm_recipes.py --input-csv train.csv --images ../shared/data/cifar10 \\
        --language-model ../shared/models/phi-2

The estimate is that of `sigphi plan vlm`, and of Phi-2 no more than its config and tokenizer is read. On a GPU each
recipe is also run for some steps, on a Phi-2 with random weights, and the peak of the device is measured.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipImageProcessor

from sigphi import SiglipResNetConfig, SiglipResNetModel, SiglipResNetProcessor
from sigphi.train import vlm
from sigphi.train.machine import Machine
from sigphi.train.parser import parse_arguments
from sigphi.train.plan import STAGES
from sigphi.train.plan_report import Estimate
from sigphi.train.records import write_json

LIMITS = {"vlm-6gb": 6e9, "vlm-12gb": 12e9, "vlm-24gb": 24e9, "h200": 141e9}
MEASURED_STEPS = 8

logger = logging.getLogger(__name__)


def write_encoder(folder: Path, language_model: str) -> None:
    """A ResNet-50 with a 3x3 stem, 16 cells at 32 pixels, of random weights."""
    config = SiglipResNetConfig(vision_config={"image_size": 32, "stem": "cifar"}, include_text_tower=False)
    SiglipResNetModel(config).save_pretrained(folder)
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipResNetProcessor(image_processor, AutoTokenizer.from_pretrained(language_model)).save_pretrained(folder)


def estimated(words: list[str]) -> dict[str, Any]:
    """What `sigphi plan vlm` foretells: the peak, when it comes, and what lies in memory then."""
    types, read, recipes = STAGES["vlm"]
    model, data, training = parse_arguments([*types], words, "sigphi plan vlm", recipes=recipes)
    estimate = Estimate.of(read(model, data, training), Machine.present(training, tflops=1.0))
    return {
        "estimated_bytes": round(estimate.need),
        "moment": estimate.moment,
        "bytes_at_that_moment": {kind: round(value) for kind, value in estimate.moments[estimate.moment].items()},
    }


def measured(words: list[str], language_model: str, folder: Path) -> int:
    """The peak of the device in a training on random weights; those are written once."""
    base = folder / "base"
    if not base.exists():
        config = AutoConfig.from_pretrained(language_model)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
        AutoTokenizer.from_pretrained(language_model).save_pretrained(base)
    torch.cuda.empty_cache()
    free_before = torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    options = ["--max-steps", str(MEASURED_STEPS), "--save-strategy", "no", "--eval-strategy", "no"]
    vlm.main([*words, *options, "--language-model", str(base), "--output-dir", str(folder / "out")])
    context = torch.cuda.mem_get_info()[1] - free_before - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_reserved() + max(context, 0)


def main() -> None:
    """Estimate each recipe, measure it where there is a GPU, and write what was found beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input-csv", required=True)
    parser.add_argument("--images", default="uoft-cs/cifar10")
    parser.add_argument("--language-model", default="microsoft/phi-2")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    where = provenance()  # before the first file is written
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_encoder(folder / "encoder", options.language_model)
        data = ["--input-csv", options.input_csv, "--images", options.images, "--report-to", "none"]
        for recipe in vlm.RECIPES:
            words = ["--recipe", recipe.stem, *data, "--siglip-checkpoint", str(folder / "encoder")]
            facts = estimated([*words, "--language-model", options.language_model])
            if torch.cuda.is_available():
                facts["measured_bytes"] = measured(words, options.language_model, folder)
            peak = facts.get("measured_bytes", facts["estimated_bytes"])
            facts |= {"limit_bytes": round(LIMITS[recipe.stem]), "fits": peak <= LIMITS[recipe.stem]}
            logger.info("%s: %.2f GB of %.0f GB", recipe.stem, peak / 1e9, LIMITS[recipe.stem] / 1e9)
            write_json(recipe.with_suffix(".json"), facts | where)


if __name__ == "__main__":
    main()
