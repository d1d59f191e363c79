"""`sigphi train-siglip` against `open_clip_train` and transformers' Trainer: the same towers, image size, batch, data.

    pip install 'sigphi[bench]'
    python benchmarks/encoder.py --images ../shared/data/cifar10 --output-dir runs/encoder

A ResNet-50 with its usual stem at 32 pixels (timm's, and transformers'), and a frozen BERT of 2 layers of 128 numbers
(the smallest that was published; random weights, so that nothing is downloaded). Five texts an image: sigphi reads an
image with its five texts, the others have a row for each pair. Contestants take turns, each in a process of its own
(benchmarks/encoder_contestants.py); the ratio of a turn compares neighbours in time. Writes results/encoder.json.
"""

import argparse
import csv
import json
import logging
import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from encoder_contestants import HELD_OUT, MAX_TEXT_LENGTH, MEAN, PAIRS, STD, TOWER, class_features
from open_clip.loss import SigLipLoss
from PIL import Image
from provenance import commit, machine
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel
from turns import ratios, run_contestant

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetVisionConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel
from sigphi.train.base_lm import train_tokenizer
from sigphi.train.data_build import build_csv
from sigphi.train.images import decode_images, load_images
from sigphi.train.losses import global_sigmoid_loss
from sigphi.train.records import write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "encoder.json"
QA, OPEN_CLIP = "qa.csv", "open_clip"
TRAIN_IMAGES, HELD_OUT_IMAGES = 5000, 1000
TEXTS, BATCH = 5, 128
WARM_UP = 2

COMMON = f"--learning-rate 1e-3 --weight-decay 0.05 --lr-scheduler-type constant_with_warmup --warmup-steps 20 \
--logging-steps 20 --report-to none --disable-tqdm true --save-strategy no --eval-strategy no --num-train-epochs 100 \
--per-device-train-batch-size {BATCH}"
SIGPHI = f"{COMMON} --stem imagenet --text-pooling mean --max-text-length {MAX_TEXT_LENGTH} --eval-fraction 0"
OPEN_CLIP_WORDS = f"--siglip --lock-text --lock-text-freeze-layer-norm --dataset-type csv --csv-img-key filepath \
--csv-caption-key title --lr 1e-3 --wd 0.05 --lr-scheduler const --warmup 20 --epochs 100 --save-frequency 0 \
--log-every-n-steps 20 --device cpu --image-mean {' '.join(map(str, MEAN))} --image-std {' '.join(map(str, STD))}"

# Name -> program, its options, pairs in a step, steps that are timed behind WARM_UP others.
CONTESTANTS: dict[str, tuple[str, str, int, int]] = {
    "sigphi fp32": ("sigphi", f"{SIGPHI} --bf16 false", TEXTS * BATCH, 8),
    "sigphi recipe": ("sigphi", f"{SIGPHI} --bf16 true --logit-bias-init -4", TEXTS * BATCH, 8),
    "open_clip fp32": ("open_clip", f"{OPEN_CLIP_WORDS} --precision fp32 --batch-size {BATCH}", BATCH, 8),
    "open_clip bf16": ("open_clip", f"{OPEN_CLIP_WORDS} --precision amp_bf16 --batch-size {BATCH}", BATCH, 8),
    "open_clip fp32, as many pairs a step": (
        "open_clip",
        f"{OPEN_CLIP_WORDS} --precision fp32 --batch-size {TEXTS * BATCH}",
        TEXTS * BATCH,
        3,
    ),
    "transformers fp32": ("transformers", f"{COMMON} --remove-unused-columns false", BATCH, 8),
}
TO_ACCURACY = ("open_clip fp32", "sigphi fp32", "sigphi recipe")
ACCURACIES = [level / 20 for level in range(20)]
RATIOS = [
    ("sigphi fp32", "open_clip fp32"),
    ("sigphi fp32", "open_clip fp32, as many pairs a step"),
    ("sigphi fp32", "transformers fp32"),
    ("sigphi recipe", "open_clip fp32"),
    ("sigphi recipe", "open_clip bf16"),
]

logger = logging.getLogger(__name__)


def prepare(folder: Path, images: str) -> None:
    """Questions, the pairs and pictures that `open_clip_train` reads, the text tower, and the held-out images."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    build_csv(folder / QA, images, "train", TRAIN_IMAGES)
    pictures = load_images(images, "train").select(range(TRAIN_IMAGES + HELD_OUT_IMAGES))
    pixels = decode_images(pictures, range(len(pictures)))  # (images, 3, 32, 32)
    pairs = []
    for row in csv.DictReader((folder / QA).open(encoding="utf-8")):
        picture = folder / "pictures" / f"{row['Dataset_Index']}.png"
        Image.fromarray(pixels[int(row["Dataset_Index"])].permute(1, 2, 0).numpy()).save(picture)
        pairs += [{"filepath": str(picture.absolute()), "title": row[f"A{pair + 1}"]} for pair in range(TEXTS)]
    with (folder / PAIRS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, pairs[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(pairs)
    write_tower(folder, [pair["title"] for pair in pairs])
    held_out = {"images": pixels[TRAIN_IMAGES:], "labels": torch.tensor(pictures["label"][TRAIN_IMAGES:])}
    torch.save(held_out | {"class_features": class_features(folder)}, folder / HELD_OUT)


def write_tower(folder: Path, texts: Iterable[str]) -> None:
    """The text tower and its tokenizer, and a model of open_clip with timm's ResNet-50 and that tower."""
    tokenizer = train_tokenizer(texts, 1024)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder / TOWER)
    tokenizer.save_pretrained(folder / TOWER)
    tokenizer.save_pretrained(folder / OPEN_CLIP)
    tower = str((folder / TOWER).absolute())
    vision = {"timm_model_name": "resnet50", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    text: dict[str, Any] = {"hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": MAX_TEXT_LENGTH}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    model = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    write_json(folder / OPEN_CLIP / "open_clip_config.json", {"model_cfg": model})


def words_of(name: str, folder: Path, images: str, workers: int) -> list[str]:
    """The options of a contestant."""
    program, options, _, _ = CONTESTANTS[name]
    output = str(folder / "output" / name.replace(" ", "_").replace(",", ""))
    shutil.rmtree(output, ignore_errors=True)
    if program == "sigphi":
        data = ["--input-csv", str(folder / QA), "--images", images, "--text-model", str(folder / TOWER)]
        return [*options.split(), *data, "--output-dir", output, "--text-cache-dir", f"{output}/texts"]
    if program == "transformers":
        return [*options.split(), "--output-dir", output, "--dataloader-num-workers", str(workers)]
    data = ["--train-data", str(folder / PAIRS), "--csv-separator", "\t", "--workers", str(workers)]
    model = ["--model", f"local-dir:{folder / OPEN_CLIP}", "--logs", output, "--name", "run"]
    return [*options.split(), *data, *model]


def train(name: str, folder: Path, images: str, workers: int, request: dict[str, float]) -> dict[str, Any]:
    """Train a contestant in a process of its own; what it measured."""
    words = words_of(name, folder, images, workers)
    return run_contestant(
        name, "encoder_contestants.py", CONTESTANTS[name][0], str(folder), json.dumps(request), *words
    )


def throughput(turns: int, folder: Path, images: str, workers: int) -> dict[str, Any]:
    """Images and pairs a second, and peak memory, of every contestant in turns."""
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    peaks: dict[str, list[int]] = {name: [] for name in CONTESTANTS}
    for turn in range(turns):
        for name, (_, _, pairs, steps) in CONTESTANTS.items():
            found = train(name, folder, images, workers, {"steps": WARM_UP + steps})
            ticks = found["steps"][WARM_UP - 1 :]
            seconds = statistics.median(after - before for before, after in zip(ticks, ticks[1:], strict=False))
            rates[name].append(pairs / seconds)
            peaks[name].append(found["peak_bytes"])
            logger.info("turn %d, %-38s %7.1f pairs/s", turn, name, rates[name][-1])
    contestants = {}
    for name, (program, options, pairs, _) in CONTESTANTS.items():
        rate = statistics.median(rates[name])
        contestants[name] = {
            "options": " ".join(options.split()),
            "pairs_per_step": pairs,
            "pairs_per_second": round(rate, 1),
            "images_per_second": round(rate / (TEXTS if program == "sigphi" else 1), 1),
            "peak_bytes": round(statistics.median(peaks[name])),
            "pairs_per_second_by_turn": [round(rate, 1) for rate in rates[name]],
        }
    return {"turns": turns, "contestants": contestants, "ratios": ratios(rates, RATIOS)}


def towers(rounds: int) -> dict[str, Any]:
    """
    A training step of each image tower alone, in turns in this process: fp32, images and text embeddings in memory.

    Each has the optimizer, the loss and the order of memory that its trainer has by default.
    """
    torch.manual_seed(0)
    ours = SiglipResNetVisionModel(SiglipResNetVisionConfig(image_size=32)).to(memory_format=torch.channels_last)
    theirs: Any = timm.create_model("resnet50", num_classes=512)
    pixels, texts = torch.randn(BATCH, 3, 32, 32), F.normalize(torch.randn(BATCH, 512), dim=-1)
    scale, bias = torch.tensor(2.3), torch.tensor(-10.0)
    loss = SigLipLoss()
    in_channels_last = pixels.to(memory_format=torch.channels_last)
    sides = {
        "sigphi": (
            ours,
            torch.optim.AdamW(ours.parameters(), fused=True),
            lambda: global_sigmoid_loss(F.normalize(ours(in_channels_last).pooler_output, dim=-1), texts, scale, bias),
        ),
        "open_clip": (
            theirs,
            torch.optim.AdamW(theirs.parameters()),
            lambda: loss(F.normalize(theirs(pixels), dim=-1), texts, scale.exp(), bias),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, (_, optimizer, compute_loss) in sides.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            compute_loss().backward()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: taken[2:] for name, taken in seconds.items()}
    rounds_found = sorted(b / a for a, b in zip(seconds["sigphi"], seconds["open_clip"], strict=True))
    return {
        "images_per_second": {name: round(BATCH / statistics.median(taken), 1) for name, taken in seconds.items()},
        "parameters": {name: sum(p.numel() for p in side[0].parameters()) for name, side in sides.items()},
        "forward_flops_per_image": {name: flops(side[0]) for name, side in sides.items()},
        "ratio": {
            "median": round(statistics.median(rounds_found), 3),
            "quartiles": [round(value, 3) for value in statistics.quantiles(rounds_found, n=4)[::2]],
        },
        "rounds": rounds,
    }


def flops(model: nn.Module) -> int:
    """Floating-point operations of a forward pass over one image."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def to_accuracy(seconds: float, folder: Path, images: str, workers: int) -> dict[str, Any]:
    """
    Open_clip trains for so many seconds; then how long each needs to the highest of [`ACCURACIES`] that it reached.

    The start of the process and the scoring do not count; what sigphi does before its first step, does.
    """
    scores: dict[str, list[tuple[float, float]]] = {}
    accuracy = 1.0
    for name in TO_ACCURACY:
        found = train(name, folder, images, workers, {"seconds": seconds, "accuracy": accuracy})
        scores[name] = [(round(at, 1), round(score, 4)) for at, score in found["scores"]]
        logger.info("%-38s %s", name, scores[name])
        if name == TO_ACCURACY[0]:
            highest = max(score for _, score in scores[name])
            accuracy = max(level for level in ACCURACIES if level <= highest)
    reached = {name: next((at for at, score in found if score >= accuracy), None) for name, found in scores.items()}
    return {"accuracy": accuracy, "held_out_images": HELD_OUT_IMAGES, "seconds": reached, "scores": scores}


def main() -> None:
    """Prepare the data, run what is wanted, and write the result file; parts that do not run keep their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="CIFAR-10: a folder or Hub id")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/encoder"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=180, help="of open_clip's training to the accuracy")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images for the two others")
    parts = ("throughput", "towers", "to_accuracy")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = options.output_dir.absolute()
    prepare(folder, options.images)
    facts = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    where = {"commit": commit(), "machine": machine("open_clip_torch", "timm")}
    common = (folder, options.images, options.workers)
    for part in options.parts:
        if part == "throughput":
            facts[part] = throughput(options.turns, *common) | where
        elif part == "towers":
            facts[part] = towers(rounds=15) | where
        else:
            facts[part] = to_accuracy(options.seconds, *common) | where
        write_json(RESULTS, facts)


if __name__ == "__main__":
    main()
