"""Short trainings of both stages that can be made anew in any process: to be killed, resumed and compared."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from conftest import LORA, Originals
from safetensors.torch import load_file
from test_train_siglip_trainer import make_images, make_rows
from torch import nn

from sigphi import (
    SiglipResNetModel,
    SiglipResNetProcessor,
    SiglipTrainer,
    SiglipTrainingArguments,
    VlmTrainingArguments,
)
from sigphi.train.collators import SiglipCollator, VlmCollator
from sigphi.train.packing import PackingCollator
from sigphi.train.resumable import ResumableTrainer
from sigphi.train.trainers import VlmTrainer

# Two epochs of four steps, and a part of a third; a checkpoint within an epoch and one at its end.
COMMON: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
COMMON |= {"max_steps": 10, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch", "save_total_limit": 2}
COMMON |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64}
PLAIN: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}
STAGES = ("encoder", "vlm")


def write_parts(path: Path, shared: Originals, make_vlm: Any, base_folder: Path) -> Path:
    """What the trainings start from, as a file that other processes read."""
    vlm = make_vlm(base_language_model=str(base_folder))
    vlm.add_lora(LORA | {"lora_dropout": 0.2})
    for name, parameter in vlm.named_parameters():
        if "lora_B" in name:  # where these are 0, no loss depends on what dropout draws
            nn.init.normal_(parameter, std=0.1)
    encoder = shared["encoder"]
    weights = {"config": encoder.config, "weights": encoder.state_dict()}
    torch.save(
        {"encoder": weights, "vlm": vlm, **{name: shared[name] for name in ("tokenizer", "image_processor")}}, path
    )
    return path


def read_parts(path: Path) -> dict[str, Any]:
    """What [`write_parts`] has written; the encoder is built here, since transformers records states of no other."""
    given: dict[str, Any] = torch.load(path, weights_only=False)
    encoder = SiglipResNetModel(given["encoder"]["config"])
    encoder.load_state_dict(given["encoder"]["weights"])
    encoder.text_model.language_model.requires_grad_(False)
    return given | {"encoder": encoder}


def make_toy(stage: str, parts: Path, folder: Path, **options: Any) -> ResumableTrainer:
    """The trainer of a stage: an encoder whose weights are averaged, or a VLM with LoRA and dropout."""
    given = read_parts(parts)
    torch.manual_seed(0)
    if stage == "encoder":
        return encoder_trainer(given, folder, COMMON | {"ema_decay": 0.9} | options)
    return vlm_trainer(given, folder, COMMON | PLAIN | options)


def encoder_trainer(given: dict[str, Any], folder: Path, options: dict[str, Any]) -> SiglipTrainer:
    """Of the encoder in the file of [`write_parts`]."""
    processor = SiglipResNetProcessor(given["image_processor"], given["tokenizer"])
    return SiglipTrainer(
        model=given["encoder"],
        args=SiglipTrainingArguments(output_dir=str(folder), **options),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        data_collator=SiglipCollator(processor, make_images()),
        processing_class=processor,
    )


def vlm_rows(image_token_id: int) -> datasets.Dataset:
    """64 questions of several lengths."""
    return datasets.Dataset.from_list(
        [
            {
                "image_index": row,
                "prompt_ids": [image_token_id, 5, *range(6, 7 + row % 5)],
                "answer_ids": [20 + row, *range(30, 31 + row % 3), 0],
            }
            for row in range(64)
        ]
    )


def vlm_trainer(
    given: dict[str, Any], folder: Path, options: dict[str, Any], tokens_per_row: int | None = None
) -> VlmTrainer:
    """Of the VLM in the file of [`write_parts`]; LoRA and projector are trained, on rows that may be packed."""
    model = given["vlm"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".multi_modal_projector." in name)
    rows = vlm_rows(model.config.image_token_id)
    features = torch.randn(64, 1, 32, generator=torch.Generator().manual_seed(7))
    return VlmTrainer(
        model=model,
        args=VlmTrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        data_collator=vlm_collator(model.config, features, tokens_per_row),
    )


def vlm_collator(config: Any, features: torch.Tensor, tokens_per_row: int | None) -> VlmCollator:
    """Of padded rows, or of packed ones of this length."""
    if tokens_per_row is None:
        return VlmCollator(config.pad_token_id, image_features=features)
    packed = {"image_token_id": config.image_token_id, "tokens_per_row": tokens_per_row}
    return PackingCollator(config.pad_token_id, image_features=features, **packed)


def train_toy(stage: str, parts: Path, folder: Path, resume: str | None = None, **options: Any) -> None:
    """Train to the end and save."""
    trainer = make_toy(stage, parts, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def end_of(folder: Path, step: int = 10) -> dict[str, Any]:
    """All that a training has come to: the model that it leaves, and everything in its last checkpoint, by name."""
    checkpoint = folder / f"checkpoint-{step}"
    paths = [*folder.glob("*.safetensors"), *folder.glob("lora/*.safetensors"), *checkpoint.rglob("*.safetensors")]
    tensors: dict[str, Any] = {
        f"{path.relative_to(folder)}:{name}": tensor for path in paths for name, tensor in load_file(path).items()
    }
    for path in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")):
        tensors |= flat(torch.load(path, weights_only=False), path.name)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    tensors |= {"global_step": state["global_step"], "epoch": state["epoch"]}
    for entry in state["log_history"]:
        tensors |= {f"log {entry['step']} {key}": entry[key] for key in ("eval_loss", "learning_rate") if key in entry}
    return tensors


def flat(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested dictionaries, lists and tuples, by the path to each."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, item in items for key, leaf in flat(item, f"{name}/{part}").items()}
    return {name: value}


def unequal(some: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """The names under which two ends differ in a single bit."""
    names = some.keys() | others.keys()
    return sorted(
        name for name in names if name not in some or name not in others or not _same(some[name], others[name])
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other
