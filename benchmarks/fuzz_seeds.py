"""The sound inputs that the fuzz changes: files of all six kinds, made in code."""

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, SiglipImageProcessor, TrainingArguments

from sigphi import (
    SiglipResNetConfig,
    SiglipResNetModel,
    SiglipResNetProcessor,
    SigPhiConfig,
    SigPhiForConditionalGeneration,
    SigPhiProcessor,
)
from sigphi.train.base_lm import train_tokenizer
from sigphi.train.prompts import prepare_tokenizer
from sigphi.train.qa_csv import PAIRS
from sigphi.train.resumable import ResumableTrainer

# A seed is the files of a folder, by their names; the kinds that are one file have one.
Files = dict[str, bytes]

ENCODER_CONFIG = """\
# An encoder.
input_csv: qa.csv
text_model: base
output_dir: {output}
report_to: none
hidden_sizes: [64, 128]
depths: [2, 2]
layer_type: basic
image_size: 32
batch_size: 64
num-epochs: 2.5
learning_rate: 3e-4
eval_strategy: epoch
save_strategy: "no"
augment: true
micro_batch_size: 16
seed: 7
lr_scheduler_kwargs: {{num_cycles: 0.5}}
"""
VLM_CONFIG = """\
input_csv: qa.csv
siglip_checkpoint: encoder
language_model: base
output_dir: {output}
report_to: none
num_image_tokens: 4
bits: 16
lora_r: 4
lora_dropout: 0.1
packing: off
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
max_steps: 100
bf16: false
eval_fraction: 0.2
images: synthetic:200
"""


def csv_seeds() -> list[Files]:
    """A plain file, one with types and short answers, one with cells of several lines and other columns."""
    header = ["Dataset_Index", "Split", *(f"{letter}{pair}" for pair in PAIRS for letter in "QA")]
    plain = [[str(row), "train", f"What is in image {row}?", "A cat.", *[""] * 8] for row in range(6)]
    typed = [*header, *(f"{letter}{pair}" for pair in PAIRS for letter in "TS")]
    rows = [
        [str(row), "test", "What is it?", "A dog.", "Can it fly?", "No.", *[""] * 6, "object", "dog", "can_fly", "no"]
        + [""] * 6
        for row in range(4)
    ]
    odd = [[str(row), "train", f'Say "hi",\nnumber {row}', "é ☃ 猫", *[""] * 8, "more, of it"] for row in range(5)]
    tables = [[header, *plain], [typed, *rows], [[*header, "Image_Number"], *odd]]
    return [{"qa.csv": _csv(table, end)} for table, end in zip(tables, ("\n", "\r\n", "\n"), strict=True)]


def _csv(rows: list[list[str]], end: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    return text.getvalue().encode()


def image_seeds() -> list[Files]:
    """One picture in many formats and modes, one of them turned by its EXIF data."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((36, 24), Image.Resampling.BOX)
    exif = Image.Exif()
    exif[274], exif[305] = 6, "a camera"
    grey = Image.fromarray(np.linspace(-2.0, 5.0, 24 * 36, dtype=np.float32).reshape(24, 36))
    saved: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "PNG", {}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (picture.convert("L"), "PNG", {}),
        (picture.convert("1"), "PNG", {}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 256), "PNG", {}),
        (picture, "JPEG", {"exif": exif.tobytes()}),
        (picture, "JPEG", {"progressive": True}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "GIF", {}),
        (picture, "BMP", {}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (grey, "TIFF", {}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "PPM", {}),
        (picture, "TGA", {}),
    ]
    return [{"picture": _encoded(image, kind, options)} for image, kind, options in saved]


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def yaml_seeds(output: Path) -> list[Files]:
    """Options of both trainings; the file's name says of which."""
    texts = {"siglip.yaml": ENCODER_CONFIG, "vlm.yaml": VLM_CONFIG}
    return [{name: text.format(output=output).encode()} for name, text in texts.items()]


def _tokenizer() -> PreTrainedTokenizerFast:
    return prepare_tokenizer(train_tokenizer(["Question: What is it?\nAnswer: A cat on a mat."] * 4, 300))


def _text_config(tokenizer: PreTrainedTokenizerFast) -> PhiConfig:
    return PhiConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


_VISION: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
_VISION |= {"stem": "cifar", "image_size": 16, "projection_dim": 16}


def model_seeds(folder: Path) -> list[Files]:
    """
    An encoder with its text tower, a VLM that is whole, and one in adapter form.

    Args:
        folder (`Path`): where they are saved, and with them the base of the adapter form, which has to stay.
    """
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    language_model = PhiForCausalLM(_text_config(tokenizer))
    language_model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    image_processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    config = SiglipResNetConfig(vision_config=_VISION, text_config=_text_config(tokenizer), projection_dim=16)
    encoder = SiglipResNetModel(config)
    encoder.save_pretrained(folder / "encoder")
    SiglipResNetProcessor(image_processor, copy.deepcopy(tokenizer)).save_pretrained(folder / "encoder")
    vision_tower: Any = encoder.vision_model
    for name, base in (("vlm", None), ("adapter", str(folder / "base"))):
        vlm_config = SigPhiConfig(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            base_language_model=base,
        )
        vlm = SigPhiForConditionalGeneration.from_parts(
            vlm_config, copy.deepcopy(vision_tower), copy.deepcopy(language_model)
        )
        if base is not None:
            vlm.add_lora({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]})
        vlm.save_pretrained(folder / name)
        SigPhiProcessor(image_processor, copy.deepcopy(tokenizer)).save_pretrained(folder / name)
    return [files_of(folder / name) for name in ("encoder", "vlm", "adapter")]


class Tiny(nn.Module):
    """Two weights that can be trained."""

    _keys_to_ignore_on_save = None  # what the Trainer asks of every model

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.linear(x)[:, 0] - labels) ** 2).mean()}


class Rows(torch.utils.data.Dataset):
    """Eight rows of a straight line."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": torch.tensor([row / 8, 1.0]), "labels": torch.tensor(row / 4)}


def tiny_trainer(folder: Path) -> ResumableTrainer:
    """A training of four steps that saves at each second one."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    options |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(output_dir=str(folder), **options)
    return ResumableTrainer(model=Tiny(), args=arguments, train_dataset=Rows())


def checkpoint_seeds(folder: Path) -> list[Files]:
    """An output folder with two checkpoints."""
    tiny_trainer(folder).train()
    return [files_of(folder)]


def files_of(folder: Path) -> Files:
    """The content of every file below a folder, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def json_of(content: bytes) -> Any:
    """What a JSON file holds."""
    return json.loads(content.decode())


Seeds = Callable[[], list[Files]]

__all__ = [
    "Files",
    "Seeds",
    "checkpoint_seeds",
    "csv_seeds",
    "files_of",
    "image_seeds",
    "json_of",
    "model_seeds",
    "tiny_trainer",
    "yaml_seeds",
]
