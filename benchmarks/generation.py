"""Questions answered a second: sigphi against `generate` of transformers' LLaVA; writes results/generation.json.

    python benchmarks/vlm.py --images ../shared/data/cifar10 --tokenizer ../shared/models/phi-2 --parts operations
    python benchmarks/generation.py --images ../shared/data/cifar10

On the parts that the first command makes: both have the same small Phi with Phi-2's vocabulary and random weights, 16
image tokens, and image towers of equal FLOPs. Both read the same pictures and questions, five an image, and give every
answer the same number of tokens, greedily, in float32. LLaVA's batches are as its processor pads them, in the order of
the file and, as a second contestant, sorted by length. A contestant's time begins with decoded pictures and ends with
texts. Contestants take turns in one process, at each of the batch sizes; the ratios are those within a turn of each
one's best batch size, which is that of its median.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from provenance import commit, machine
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, LlavaProcessor
from turns import ratios
from vlm import IMAGE_TOKENS, prompt_template
from vlm_contestants import BASE, ENCODER, LLAVA, QA

from sigphi import SigPhiProcessor
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor, to_rgb
from sigphi.train.answering import generate_answers
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.qlora import build_vlm
from sigphi.train.records import write_json
from sigphi.train.vlm_evaluation import encode_images

RESULTS = Path(__file__).parent / "results" / "generation.json"
OURS, THEIRS, SORTED = "sigphi", "LLaVA, in the order of the file", "LLaVA, sorted by length"

logger = logging.getLogger(__name__)


class Exam(NamedTuple):
    """Questions about pictures: `asked` holds the number of the picture and the question."""

    pictures: list[Image.Image]
    asked: list[tuple[int, str]]


def read_exam(folder: Path, images: str, num_images: int) -> Exam:
    """The questions about the first images of the file."""
    rows = load_cifar10_qa(folder / QA, images, eval_fraction=0.0)["train"]
    pictures, numbers = distinct_images(rows)
    asked = [pair for pair in zip(numbers, rows["question"], strict=True) if pair[0] < num_images]
    return Exam([to_rgb(picture) for picture in pictures.select(range(num_images))["img"]], asked)


def make_sigphi(folder: Path, exam: Exam, new_tokens: int) -> Callable[[int], list[str]]:
    """Answers all questions in batches of some size."""
    encoder = SiglipResNetModel.from_pretrained(folder / ENCODER)
    parts = SiglipResNetProcessor.from_pretrained(folder / ENCODER)
    language_model = AutoModelForCausalLM.from_pretrained(folder / BASE)
    processor = SigPhiProcessor(parts.image_processor, parts.tokenizer, num_image_tokens=IMAGE_TOKENS)
    names = {"siglip_checkpoint": str(folder / ENCODER), "language_model": str(folder / BASE)}
    arguments = VlmModelArguments(**names, bits=16, tuning="full", num_image_tokens=IMAGE_TOKENS)
    model = build_vlm(encoder.vision_model, language_model, processor.tokenizer, arguments).eval()
    model.generation_config.min_new_tokens = new_tokens
    images, questions = zip(*exam.asked, strict=True)

    def answer(batch_size: int) -> list[str]:
        pixels = torch.stack([pil_to_tensor(picture) for picture in exam.pictures])
        features = encode_images(model, processor, pixels)
        given = generate_answers(model, processor, features, images, questions, batch_size, new_tokens)
        return [one.text for one in given]

    return answer


def make_llava(folder: Path, exam: Exam, new_tokens: int, by_length: bool) -> Callable[[int], list[str]]:
    """The same with LLaVA, as its documentation has it: a padded batch, `generate`, `batch_decode`."""
    model = LlavaForConditionalGeneration.from_pretrained(folder / LLAVA).eval()
    processor: Any = LlavaProcessor.from_pretrained(folder / LLAVA)
    processor.tokenizer.padding_side = "left"
    template = prompt_template(SigPhiProcessor(processor.image_processor, processor.tokenizer))
    asked = [(number, template.replace("<question>", question)) for number, question in exam.asked]
    order = sorted(range(len(asked)), key=lambda row: len(asked[row][1])) if by_length else list(range(len(asked)))

    def answer(batch_size: int) -> list[str]:
        answers: dict[int, str] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            answers |= zip(rows, answer_batch([asked[row] for row in rows]), strict=True)
        return [answers[row] for row in range(len(asked))]

    @torch.inference_mode()
    def answer_batch(batch: Sequence[tuple[int, str]]) -> list[str]:
        images = [exam.pictures[number] for number, _ in batch]
        inputs = processor(images=images, text=[text for _, text in batch], padding=True, return_tensors="pt")
        lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        tokens = model.generate(**inputs, **lengths, do_sample=False)
        return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def measure(contestants: dict[str, Callable[[int], list[str]]], exam: Exam, sizes: list[int], turns: int) -> Any:
    """Questions a second of each contestant at each batch size, by turn."""
    found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in contestants}
    for turn in range(-1, turns):  # the first one warms up
        for name, answer in contestants.items():
            for size in sizes if turn >= 0 else sizes[:1]:
                start = time.perf_counter()
                answers = answer(size)
                seconds = time.perf_counter() - start
                if len(answers) != len(exam.asked):
                    raise RuntimeError(f"{name} gave {len(answers)} answers to {len(exam.asked)} questions.")
                if turn >= 0:
                    found[name][size].append(len(answers) / seconds)
                    logger.info("turn %d, %s, batches of %d: %.1f", turn, name, size, found[name][size][-1])
    return found


def summary(found: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Each contestant at its best batch size, and the ratios."""
    best = {name: max(by_size, key=lambda size: statistics.median(by_size[size])) for name, by_size in found.items()}
    by_turn = {name: found[name][size] for name, size in best.items()}
    return {
        "contestants": {
            name: {
                "best_batch_size": best[name],
                "questions_per_second": round(statistics.median(by_turn[name]), 2),
                "by_batch_size_and_turn": {
                    str(size): [round(one, 2) for one in values] for size, values in by_size.items()
                },
            }
            for name, by_size in found.items()
        },
        "ratios": ratios(by_turn, [(OURS, THEIRS), (OURS, SORTED)]),
    }


def main() -> None:
    """Measure all contestants and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="CIFAR-10: a folder or Hub id")
    parser.add_argument("--parts-dir", type=Path, default=Path("runs/vlm_speed"))
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = {"commit": commit(), "machine": machine()}
    exam = read_exam(options.parts_dir, options.images, options.num_images)
    contestants = {
        OURS: make_sigphi(options.parts_dir, exam, options.new_tokens),
        THEIRS: make_llava(options.parts_dir, exam, options.new_tokens, by_length=False),
        SORTED: make_llava(options.parts_dir, exam, options.new_tokens, by_length=True),
    }
    found = measure(contestants, exam, options.batch_sizes, options.turns)
    counts = {"images": len(exam.pictures), "questions": len(exam.asked), "new_tokens": options.new_tokens}
    write_json(options.results, counts | {"turns": options.turns} | summary(found) | source)


if __name__ == "__main__":
    main()
