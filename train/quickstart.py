"""The whole pipeline at small size: data, both stages, evaluation, questions, artifacts and a report.

    sigphi quickstart --output-dir runs/quickstart

Runs on a CPU without a network. The images are drawn in code, the models start from random weights.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging
from transformers.hf_argparser import HfArg

from sigphi.train import base_lm, siglip, vlm
from sigphi.train.chat import Conversation, load_vlm
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.data_build import build_csv
from sigphi.train.encoder_options import EncoderEvaluationArguments, encoder_options
from sigphi.train.errors import run_command
from sigphi.train.evaluation import evaluate_folder
from sigphi.train.judging import is_correct
from sigphi.train.parser import parse_arguments
from sigphi.train.records import environment, write_json
from sigphi.train.report import Answered, markdown_table, picture_grid

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
IMAGES = "synthetic"
# The types that a tiny model learns in two minutes.
TYPES = (
    "object",
    "category",
    "yes_no_class",
    "comparison",
    "habitat",
    "counting",
    "dominant_color",
    "background_color",
    "description",
)

# What the report shows of all figures; the rest is in the models' eval_results.json.
ENCODER_FIGURES = ("zero_shot_top1", "majority/zero_shot", "image_to_text_r10", "text_to_image_r10")
VLM_FIGURES = (
    "eval_loss",
    "class_accuracy",
    "majority/class",
    "answer_accuracy",
    "answer_accuracy_shuffled_image",
    "answer_accuracy_blank_image",
    "image_gain",
)


@dataclass
class QuickstartArguments:
    """The quickstart's options."""

    _argument_group_name = "quickstart"

    output_dir: str = HfArg(help="Folder for data, models and report.", default="runs/quickstart")
    test_images: int = HfArg(help="Held-out images, drawn apart from those of training, to evaluate on.", default=500)


def main(argv: list[str] | None = None) -> None:
    """`sigphi quickstart`: prints one table; leaves `report.md`, the encoder and the VLM."""
    (options,) = parse_arguments([QuickstartArguments], argv, "sigphi quickstart")
    transformers_logging.set_verbosity_error()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    train_csv, test_csv = folder / "train.csv", folder / "test.csv"
    with _Timed(seconds, "data"):
        build_csv(train_csv, IMAGES, "train", question_types=TYPES)
        build_csv(test_csv, IMAGES, "test", num_images=options.test_images, question_types=TYPES)
    base, encoder, features = str(folder / "base"), str(folder / "siglip"), str(folder / "features")
    vlm_options = ["--siglip-checkpoint", encoder, "--language-model", base, "--image-cache-dir", features]
    stages: list[tuple[str, Any, list[str]]] = [
        ("base", base_lm, []),
        ("siglip", siglip, ["--text-model", base, "--text-cache-dir", features]),
        ("vlm", vlm, vlm_options),
    ]
    for name, module, arguments in stages:
        with _Timed(seconds, name):
            recipe = ["--config", str(RECIPES / f"quickstart_{name}.yaml"), "--input-csv", str(train_csv)]
            module.main([*recipe, "--output-dir", str(folder / name), *arguments])
    test = load_cifar10_qa(test_csv, IMAGES, eval_fraction=1.0)["eval"]
    with _Timed(seconds, "evaluation"):
        compared = encoder_options(EncoderEvaluationArguments(), test, IMAGES)
        results = {
            "siglip": evaluate_folder(str(folder / "siglip"), test, **compared),
            "vlm": evaluate_folder(str(folder / "vlm"), test),
        }
    answered = ask_some(folder / "vlm", test, count=3)
    answered[0].image.save(folder / "sample.png")
    write_report(folder, results, answered, seconds)
    sys.stdout.write(_figures_table(results))
    for one in answered:
        sys.stdout.write(f"\n{one.question}\n  true:  {one.true_answer}\n  given: {one.given_answer}\n")
    total = sum(seconds.values())
    sys.stdout.write(
        f"\n{total:.0f} s. Report: {folder / 'report.md'}; models: {folder / 'siglip'}, {folder / 'vlm'}\n"
    )


class _Timed:
    """Says what runs, and notes how long it took."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        sys.stdout.write(f"== {self.name}\n")
        sys.stdout.flush()
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start


def ask_some(model_name: Path, dataset: Any, count: int) -> list[Answered]:
    """Ask the saved VLM the first question that can be checked about each of the first `count` images."""
    model, processor = load_vlm(str(model_name))
    images, positions = distinct_images(dataset)
    answered = []
    for image_index in range(count):
        rows = [dataset[row] for row, position in enumerate(positions) if position == image_index]
        row = next(row for row in rows if row["short_answer"])
        image = images[image_index]["img"]
        given = Conversation(model, processor, image).ask(row["question"]).text
        correct = is_correct(given, row["short_answer"], row["question_type"])
        answered.append(Answered(image, row["question"], row["answer"], given, correct))
    return answered


def _figures_table(results: dict[str, Any]) -> str:
    rows = [("encoder", name, f"{results['siglip'][name]:.3f}") for name in ENCODER_FIGURES]
    rows += [("VLM", name, f"{results['vlm'][name]:.3f}") for name in VLM_FIGURES]
    return markdown_table(("model", "figure", "value"), rows)


def write_report(folder: Path, results: dict[str, Any], answered: list[Answered], seconds: dict[str, float]) -> None:
    """Write `report.md` with its pictures, and the same facts as `report.json`."""
    picture_grid([one.image for one in answered], columns=len(answered)).save(folder / "samples.png")
    questions = [
        (number, one.question, one.true_answer, one.given_answer, "yes" if one.correct else "no")
        for number, one in enumerate(answered, 1)
    ]
    curves = (
        "![Loss of the encoder over the steps](siglip/loss_curve.png)",
        "![Loss of the VLM over the steps](vlm/loss_curve.png)",
    )
    text = f"""# sigphi quickstart

{_figures_table(results)}
Every figure is over {results["vlm"]["metadata"]["images"]} images that no training saw. `majority/...` is what a
model that sees nothing can reach; `image_gain` is the accuracy with the right image minus that with another image.

![The images of the questions below, numbered](samples.png)

{markdown_table(("image", "question", "true answer", "given answer", "right"), questions)}
| encoder | VLM |
| --- | --- |
| {" | ".join(curves)} |

{markdown_table(("stage", "seconds"), [(name, f"{value:.0f}") for name, value in seconds.items()])}"""
    (folder / "report.md").write_text(text, encoding="utf-8")
    facts = {"results": results, "seconds": seconds, "environment": environment()}
    write_json(folder / "report.json", facts)


__all__ = ["main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.quickstart")
