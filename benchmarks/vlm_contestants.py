"""One contestant of benchmarks/vlm.py, alone in its process, with a clock at each step of its optimizer.

    python benchmarks/vlm_contestants.py CONTESTANT FOLDER STEPS [its own options ...]

Each is trained by its own entry point: `sigphi train-vlm`, and TRL's `SFTTrainer` as its guide to
vision-language models has it. Writes to standard output, of each step: when it ended, its questions, its supervised
tokens and its positions.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoProcessor, HfArgumentParser, LlavaForConditionalGeneration, PreTrainedModel
from trl import SFTConfig, SFTTrainer
from turns import EnoughError, resident_bytes, say

from sigphi.train import vlm
from sigphi.train.images import load_images

QA, ROWS, IMAGES = "qa.csv", "rows.json", "images.txt"
ENCODER, BASE, LLAVA = "encoder", "base", "llava"
LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "use_rslora": True}
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]


class Clock:
    """Counts what every forward pass gets, and closes a step behind each step of the optimizer."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen = {"questions": 0, "supervised": 0, "positions": 0}
        self.rows: list[dict[str, float]] = []

    def watch(self, model: PreTrainedModel) -> None:
        """Count what `model` is trained on; every answer ends in one end of text."""
        end = model.config.get_text_config().eos_token_id

        def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            labels = kwargs["labels"]
            self.seen["questions"] += int((labels == end).sum())
            self.seen["supervised"] += int((labels != -100).sum())
            self.seen["positions"] += kwargs["input_ids"].numel()

        model.register_forward_pre_hook(count, with_kwargs=True)

    def __call__(self, *_: Any) -> None:
        self.rows.append({"at": time.perf_counter(), **self.seen})
        if len(self.rows) == self.steps:
            raise EnoughError


def train_sigphi(clock: Clock, folder: Path, words: list[str]) -> None:
    """`sigphi train-vlm`."""
    build = vlm.build_model

    def watched(*args: Any) -> PreTrainedModel:
        model = build(*args)
        clock.watch(model)
        return model

    vlm.build_model = watched
    parts = ["--siglip-checkpoint", str(folder / ENCODER), "--language-model", str(folder / BASE)]
    data = ["--input-csv", str(folder / QA), "--images", (folder / IMAGES).read_text(encoding="utf-8")]
    vlm.main([*words, *parts, *data])


def question_rows(folder: Path) -> datasets.Dataset:
    """Prompt, completion and image, a question a row; an image is decoded whenever its row is read."""
    rows = datasets.Dataset.from_json(str(folder / ROWS))
    pictures = load_images((folder / IMAGES).read_text(encoding="utf-8"), "train").select(rows["image_index"])
    images = pictures.select_columns(["img"]).rename_column("img", "image")
    return datasets.concatenate_datasets([rows.remove_columns("image_index"), images], axis=1)


def train_trl(clock: Clock, folder: Path, words: list[str]) -> None:
    """`SFTTrainer` on LLaVA, with LoRA on the language model and a trained projector."""
    (arguments,) = HfArgumentParser([SFTConfig]).parse_args_into_dataclasses(words)  # type: ignore[list-item]
    model = LlavaForConditionalGeneration.from_pretrained(folder / LLAVA, dtype=torch.float32)
    layers = rf".*language_model.*\.({'|'.join(LORA_LAYERS)})"
    projector = ["multi_modal_projector"]
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=question_rows(folder),
        processing_class=AutoProcessor.from_pretrained(folder / LLAVA),
        peft_config=LoraConfig(**LORA, target_modules=layers, modules_to_save=projector, task_type="CAUSAL_LM"),
    )
    clock.watch(model)
    trainer.train()


TRAININGS: dict[str, Callable[[Clock, Path, list[str]], None]] = {"sigphi": train_sigphi, "trl": train_trl}


def main() -> None:
    """Train until everything is measured, and print it."""
    name, folder, steps, *words = sys.argv[1:]
    clock = Clock(int(steps))
    before = resident_bytes()
    register_optimizer_step_post_hook(clock)
    try:
        TRAININGS[name](clock, Path(folder), words)
    except EnoughError:
        pass
    say({"steps": clock.rows, "peak_bytes": resident_bytes() - before})


if __name__ == "__main__":
    main()
