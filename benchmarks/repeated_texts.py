"""Does it harm to take an equal text of another image for a negative? Writes results/repeated_texts.json.

    OMP_NUM_THREADS=1 python benchmarks/repeated_texts.py --output-dir runs/repeated_texts

Two sets of the same drawn images, questions and answers. In one, 60 % of the answers stand on other rows too; in the
other, a number behind each answer makes it the only one. Three losses:

- `sigphi`: a text is a positive of each image that has it, or of which is known what it states;
- `equal`: a text is a positive of each image that has it, and a negative of all others, as where nothing is known of
  texts (`--dataset`);
- `rows`: each text of each image is a text of its own, a positive of that image and a negative of all others, also
  where it says the same, as in losses over rows of image-text pairs.

(Where no text repeats, `equal` is `rows`.) Figures are of 1,000 images drawn apart: those of [`evaluate_encoder`], and
`matching_accuracy`. A training that was measured is not repeated.
"""

import argparse
import csv
import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import commit, provenance
from torch.nn import functional as F
from transformers import set_seed

from sigphi.modeling.modeling_siglip_resnet import pairwise_logits
from sigphi.train import base_lm
from sigphi.train.arguments import EncoderDataArguments, SiglipModelArguments, SiglipTrainingArguments
from sigphi.train.collators import SiglipCollator
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.data_build import build_csv
from sigphi.train.encoder_data import load_encoder_data
from sigphi.train.encoder_evaluation import class_embeddings, embed_images, evaluate_encoder
from sigphi.train.images import decode_images
from sigphi.train.judging import SAYS_NOTHING
from sigphi.train.pairs import text_key
from sigphi.train.parser import parse_arguments
from sigphi.train.quickstart import TYPES
from sigphi.train.records import write_json
from sigphi.train.siglip import (
    build_encoder,
    complete_encoder,
    encoder_collator,
    encoder_config,
    encoder_processor,
    start_text_projection,
)
from sigphi.train.trainers import SiglipTrainer

RECIPES = Path(__file__).parent.parent / "train" / "recipes"
RESULTS = Path(__file__).parent / "results" / "repeated_texts.json"
IMAGES, TEST_IMAGES = "synthetic", 1000
SHARES = {"repeated": 0.6, "distinct": 0.0}
CASES = (
    ("repeated", "sigphi"),
    ("distinct", "sigphi"),
    ("repeated", "rows"),
    ("repeated", "equal"),
    ("distinct", "rows"),
)
# The quickstart's encoder, whose first stage halves the map too, at twice the rate: a third of the time.
OPTIONS = "--downsample-in-first-stage true --num-epochs 4 --learning-rate 2e-3".split()
FIGURES = ("zero_shot_top1", "matching_accuracy", "ece_sigmoid", "text_to_image_r10", "image_to_text_r10")


class EqualTextsCollator(SiglipCollator):
    """Of a text nothing is known but which images have it; one that says nothing of any image stays so."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As [`SiglipCollator`]'s."""
        return super().__call__(
            [
                row | {"facts": [fact if fact == SAYS_NOTHING else "" for fact in row["facts"]], "known": []}
                for row in rows
            ]
        )


class RowsCollator(SiglipCollator):
    """Every text of every image is a text of its own, which belongs to that image alone."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As [`SiglipCollator`]'s, with as many texts as the images have together."""
        batch = super().__call__(rows)
        texts = [text for row in rows for text in row["texts"]]
        owners = [index for index, row in enumerate(rows) for _ in row["texts"]]
        numbers = torch.arange(1, len(texts) + 1)  # 0 stands for no text
        image_ids = torch.full((len(rows), len(texts)), -1)
        image_ids[owners, numbers - 1] = numbers
        text_ids = F.pad(numbers[:, None], (0, 2))
        return batch | {
            "text_features": self.features_of(texts),
            "pairs": {"image_ids": image_ids, "text_ids": text_ids},
        }


COLLATORS = {"sigphi": SiglipCollator, "equal": EqualTextsCollator, "rows": RowsCollator}


def share_of_repeats(answers: list[str]) -> float:
    """The share of answers that another row has too."""
    counts = Counter(map(text_key, answers))
    return sum(counts[text_key(answer)] > 1 for answer in answers) / len(answers)


def number_answers(source: Path, target: Path, share: float, seed: int = 0) -> float:
    """Put a number of its own behind each answer, but for a random `share`; return the share that repeats."""
    with source.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or ())
    answers = [(row, name) for row in rows for name in names if name in ("A1", "A2", "A3", "A4", "A5") and row[name]]
    counts = Counter(text_key(row[name]) for row, name in answers)
    random.Random(seed).shuffle(answers)
    # What nobody else says cannot repeat: it counts among the numbered ones.
    repeating = [pair for pair in answers if counts[text_key(pair[0][pair[1]])] > 1]
    for number, (row, name) in enumerate(answers if share == 0 else repeating[round(share * len(answers)) :]):
        row[name] += f" Number {number}."
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return share_of_repeats([row[name] for row, name in answers])


def matching_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    How often the sigmoid is on the right side of one half: the mean of the share of images that match their own
    class's text, and the share of other classes' texts that do not match. Always "no", or always "yes", gives 0.5.

    Args:
        logits (`torch.Tensor` of shape `(images, classes)`): of the loss, before the sigmoid.
        labels (`torch.LongTensor` of shape `(images,)`): the class of each image.
    """
    is_class = F.one_hot(labels, logits.shape[1]).bool()  # (images, classes)
    matches = logits > 0
    return (matches[is_class].double().mean() + (~matches[~is_class]).double().mean()).item() / 2


def train(words: list[str], loss: str, test_csv: Path) -> dict[str, float]:
    """`sigphi train-siglip` with these options and loss; what the encoder reaches on the test images."""
    types = [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments]
    model_arguments, data_arguments, arguments = parse_arguments(types, words, "benchmark")
    config, processor = encoder_config(model_arguments), encoder_processor(model_arguments)
    data = load_encoder_data(data_arguments, processor.image_processor)
    collator = encoder_collator(data, config, processor, model_arguments)
    set_seed(arguments.seed)
    model = build_encoder(model_arguments, config)
    start_text_projection(model, collator, data.texts())
    trainer = SiglipTrainer(
        model=model,
        args=arguments,
        train_dataset=data.rows["train"],
        data_collator=COLLATORS[loss](**vars(collator)),
        processing_class=processor,
    )
    trainer.train()
    complete_encoder(model, model_arguments, config)
    return figures_of(model.eval(), processor, test_csv)


@torch.no_grad()
def figures_of(model: Any, processor: Any, test_csv: Path) -> dict[str, float]:
    """[`FIGURES`] of an encoder."""
    test = load_cifar10_qa(test_csv, IMAGES, eval_fraction=1.0)["eval"]
    images, _ = distinct_images(test)
    embeds = embed_images(model, processor, decode_images(images, range(len(images))), 256)  # (images, dim)
    logits = pairwise_logits(embeds, class_embeddings(model, processor), model.logit_scale, model.logit_bias)
    results = evaluate_encoder(model, processor, test)
    results["matching_accuracy"] = matching_accuracy(logits, torch.tensor(images["label"][:]))
    return {name: results[name] for name in FIGURES}


def prepare(folder: Path) -> dict[str, float]:
    """The two sets, the test set and the text tower; returns the share of answers that repeat."""
    all_csv = folder / "all.csv"
    build_csv(all_csv, IMAGES, "train", question_types=TYPES)
    build_csv(folder / "test.csv", IMAGES, "test", num_images=TEST_IMAGES, question_types=TYPES)
    shares = {name: number_answers(all_csv, folder / f"{name}.csv", share) for name, share in SHARES.items()}
    words = ["--config", str(RECIPES / "quickstart_base.yaml"), "--input-csv", str(folder / "repeated.csv")]
    if not (folder / "base" / "config.json").exists():
        base_lm.main([*words, "--output-dir", str(folder / "base")])
    return shares


def run(folder: Path, answers: str, loss: str, seed: int) -> dict[str, Any]:
    """The figures of one training; one that was measured before is not trained again."""
    measured = folder / f"{answers}-{loss}-{seed}.json"
    if not measured.exists():
        words = ["--config", str(RECIPES / "quickstart_siglip.yaml"), *OPTIONS, "--text-model", str(folder / "base")]
        words += ["--input-csv", str(folder / f"{answers}.csv"), "--eval-fraction", "0", "--eval-strategy", "no"]
        words += ["--seed", str(seed), "--report-to", "none", "--text-cache-dir", str(folder / "features")]
        words += ["--output-dir", str(folder / "encoder")]
        about = {"answers": answers, "loss": loss, "seed": seed, "commit": commit()}
        write_json(measured, about | train(words, loss, folder / "test.csv"))
    return json.loads(measured.read_text(encoding="utf-8"))


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each of [`CASES`], the mean of each figure over the seeds, and its least and most."""
    rows = []
    for answers, loss in CASES:
        group = [one for one in runs if (one["answers"], one["loss"]) == (answers, loss)]
        if group:
            row: dict[str, Any] = {"answers": answers, "loss": loss, "seeds": len(group)}
            for name in FIGURES:
                values = [one[name] for one in group]
                row[name] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
            rows.append(row)
    return rows


def main() -> None:
    """Train each case with each seed; write the results after each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    about = provenance() | {"options": " ".join(OPTIONS), "test_images": TEST_IMAGES}
    about["share_of_repeats"] = prepare(options.output_dir)
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for answers, loss in CASES:
            runs.append(run(options.output_dir, answers, loss, seed))
            write_json(options.results, about | {"summary": summary(runs), "runs": runs})


if __name__ == "__main__":
    main()
