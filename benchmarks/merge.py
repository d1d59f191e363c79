"""What merging LoRA and quantising change of a VLM's answers and logits; writes results/merge.json.

    python benchmarks/merge.py outputs/vlm16 outputs/vlm4 --input-csv test.csv --images ../shared/data/cifar10

Each MODEL is a folder in adapter form, trained on a base of 16, 8 or 4 bits. Each is exported in several ways to a
scratch folder, loaded from there as a stranger would, and asked the same questions as the adapter form itself. Beside
what the two have in common stands each one's accuracy against the truth. A MODEL of 16 bits is measured a second time
with its own weights stored in bfloat16.
"""

import argparse
import gc
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.forms import export_form
from sigphi.train.answer_scores import JudgedRow, answer_scores, judged_rows
from sigphi.train.data import load_cifar10_qa
from sigphi.train.evaluation import load_for_evaluation
from sigphi.train.parity import Questions, Transcript, compare, questions_of, transcript
from sigphi.train.precision import inference_dtype
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "merge.json"
ACCURACIES = ("answer_accuracy", "class_accuracy")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """An export: its form, what LoRA is merged into, and the precision of what is not quantised."""

    form: str
    base: str
    dtype: str


def cases_of(config: SigPhiConfig) -> list[Case]:
    """The ways to export a model in adapter form."""
    if config.base_bits == 16:
        merged = [Case("merged", "dequantized", dtype) for dtype in ("auto", "bfloat16", "float32")]
        return [*merged, Case("nf4", "dequantized", "auto")]
    pairs = [(form, base) for form in ("merged", "nf4") for base in ("dequantized", "original")]
    return [Case("merged", "dequantized", "bfloat16"), *(Case(form, base, "auto") for form, base in pairs)]


@dataclass(frozen=True)
class Exam:
    """Questions, the truth about them, and how they are asked."""

    questions: Questions
    rows: list[JudgedRow]
    batch_size: int
    max_new_tokens: int

    def transcript(self, folder: str, answers: list[str] | None = None) -> Transcript:
        """What the model in `folder` says."""
        model, processor = load_for_evaluation(folder)
        return transcript(model, processor, self.questions, answers, self.batch_size, self.max_new_tokens)

    def accuracies(self, answers: list[str], suffix: str) -> dict[str, float]:
        """Against the truth, where the questions have any that can be checked."""
        scores = answer_scores(self.rows, {"": answers})
        return {f"{name}_{suffix}": scores[name] for name in ACCURACIES if name in scores}


def measure(exam: Exam, name: str, folder: str, scratch: Path) -> list[dict[str, Any]]:
    """A line for each way to export the model in `folder`."""
    config = SigPhiConfig.from_pretrained(folder)
    before, lines = exam.transcript(folder), []
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    about = {"model": name, "base_bits": config.base_bits, "stored_in": stored, "lora": config.lora}
    for case in cases_of(config):
        with tempfile.TemporaryDirectory(dir=scratch) as output:
            export_form(folder, Path(output), case.form, case.base, case.dtype)
            gc.collect()
            after = exam.transcript(output, before.answers)
            size = sum(path.stat().st_size for path in Path(output).rglob("*.safetensors"))
        accuracies = exam.accuracies(before.answers, "before") | exam.accuracies(after.answers, "after")
        lines.append(about | asdict(case) | compare(before, after) | accuracies | {"megabytes": round(size / 1e6, 2)})
        logger.info("%s", lines[-1])
    return lines


def main() -> None:
    """Measure every MODEL; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--input-csv", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--image-split")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dataset = load_cifar10_qa(options.input_csv, options.images, options.image_split, 1.0)["eval"].shuffle(seed=0)
    dataset = dataset.select(range(min(options.questions, len(dataset))))
    questions = questions_of(dataset, Path(options.input_csv).name)
    exam = Exam(questions, judged_rows(dataset), options.batch_size, options.max_new_tokens)
    about = {"questions_from": questions.source, "images": options.images, "arithmetic": str(inference_dtype())}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in options.models:
            lines += measure(exam, Path(folder).name, folder, Path(scratch))
            if SigPhiConfig.from_pretrained(folder).base_bits == 16:
                rounded = Path(scratch, "rounded")
                export_form(folder, rounded, "adapter", dtype="bfloat16")
                lines += measure(exam, f"{Path(folder).name}, in bfloat16", str(rounded), Path(scratch))
            write_json(options.results, provenance() | about | {"lines": lines})


if __name__ == "__main__":
    main()
