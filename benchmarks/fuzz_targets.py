"""What the fuzz gives its inputs to, as the commands do, and what has to hold where an input is taken."""

import csv
import functools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_seeds import tiny_trainer
from PIL import Image
from transformers import PrinterCallback

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.train.arguments import (
    DataArguments,
    EncoderDataArguments,
    SiglipModelArguments,
    SiglipTrainingArguments,
    VlmModelArguments,
    VlmTrainingArguments,
    check_evaluation,
)
from sigphi.train.chat import Conversation, open_image
from sigphi.train.checkpoint_files import RECORD
from sigphi.train.checkpoints import check_weights_suffice, loading, read_config
from sigphi.train.data_check import check_csv
from sigphi.train.errors import UserError
from sigphi.train.evaluation import load_for_evaluation
from sigphi.train.parser import parse_arguments
from sigphi.train.pictures import FORMATS
from sigphi.train.qa_csv import PAIRS, read_qa_csv
from sigphi.train.resumable import check_checkpoint, newest_checkpoint

# Takes a file or folder, and calls the second argument when a parser has taken the input. It ends as a command would.
Target = Callable[[Path, Callable[[], None]], None]

NUM_IMAGES = {"train": 50_000, "test": 10_000}
# Errors of `sigphi data check` that `read_qa_csv` does not look for: what is said, not how.
CONTENT = {"damaged text", "failure as answer", "wrong Class_Label", "contradicted label", "repeated question"}


class WrongSuccess(AssertionError):
    """An input was taken that should not have been, or for something else than it is."""


def csv_file(path: Path, parsed: Callable[[], None]) -> None:
    """Both readers: what one of them refuses the other may not take, and what is taken is what is there."""
    refusal = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if len(list(csv.reader(file, strict=True))) > 1:
                parsed()
    except (csv.Error, UnicodeDecodeError):
        pass
    try:
        table = read_qa_csv(path, None, NUM_IMAGES)
    except UserError as error:
        refusal = error
    report = check_csv(path)
    errors = {problem.kind for problem in report.problems if problem.is_error}
    if refusal is not None:
        if not errors:
            raise WrongSuccess(f"`data check` finds no error, `read_qa_csv` refuses: {refusal}")
        raise refusal
    if errors - CONTENT:
        raise WrongSuccess(f"`read_qa_csv` takes what `data check` calls {sorted(errors - CONTENT)}")
    taken = table.rows[["split", "dataset_index", "question", "answer"]].itertuples(index=False, name=None)
    if sorted(taken) != sorted(_plain_pairs(path)):
        raise WrongSuccess("the pairs are others than those of a plain reading")


def _plain_pairs(path: Path) -> list[tuple[str, int, str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    pairs = []
    for row in rows:
        cells = dict(zip(header, row, strict=False))
        for pair in PAIRS:
            if cells and cells[f"Q{pair}"] and cells[f"A{pair}"]:
                pairs.append((cells["Split"], int(cells["Dataset_Index"]), cells[f"Q{pair}"], cells[f"A{pair}"]))
    return pairs


def picture(path: Path, parsed: Callable[[], None]) -> None:
    """A picture of a command line: what is taken is RGB, in the size that its file claims."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
            parsed()
    except Exception:  # says what the parser alone makes of it; what the command makes of it follows
        size = None
    opened = open_image(str(path), "synthetic")
    if opened.mode != "RGB" or size not in (opened.size, opened.size[::-1]):
        raise WrongSuccess(f"a picture of {size} was taken for {opened.mode} of {opened.size}")
    if np.asarray(opened).shape != (opened.height, opened.width, 3):
        raise WrongSuccess("the pixels are not there")


def model_config(path: Path, parsed: Callable[[], None]) -> None:
    """The `config.json` of a model, and the model that it describes, without weights."""
    try:
        content = json.loads((path / "config.json").read_bytes())
        if isinstance(content, dict):
            parsed()
    except (ValueError, OSError, RecursionError):
        content = None
    config: Any = read_config(str(path), "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    with loading(f"MODEL {path}"):
        check_weights_suffice(str(path), config)
    for name in ("num_image_tokens", "text_pooling", "image_token_id", "projection_dim", "text_layer"):
        if name in (content or {}) and getattr(config, name, content[name]) != content[name]:
            raise WrongSuccess(f"{name} is {content[name]!r} and was taken for {getattr(config, name)!r}")


STAGES = {
    "siglip": [SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments],
    "vlm": [VlmModelArguments, DataArguments, VlmTrainingArguments],
}


def options_file(path: Path, parsed: Callable[[], None]) -> None:
    """Options of a training by `--config`: each has the value that its line says."""
    try:
        content = yaml.safe_load(path.read_text())
        if isinstance(content, dict):
            parsed()
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        content = None
    stage = path.name.partition(".")[0]
    arguments = parse_arguments(STAGES[stage], ["--config", str(path)], f"sigphi train-{stage}")
    check_evaluation(arguments[1], arguments[2])
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        owner = next((one for one in arguments if name in vars(one)), None)
        if owner is not None and isinstance(value, int) and not isinstance(value, bool):
            found = getattr(owner, name)
            if isinstance(found, int | float) and found != value and name not in ("bf16", "use_cpu"):
                raise WrongSuccess(f"{name} is {value!r} and was taken for {found!r}")


@functools.cache
def _run_of(folder: str) -> dict[str, Any]:
    from sigphi.train.run_identity import describe_run

    return describe_run(tiny_trainer(Path(folder)))


def checkpoints(path: Path, parsed: Callable[[], None]) -> None:
    """The checkpoints of an output folder: what is chosen is gone on from, to the weights of an unbroken run."""
    run = _run_of(str(path))
    try:
        record = json.loads(max(path.glob(f"checkpoint-[!2]*/{RECORD}")).read_bytes())
        if isinstance(record["files"], dict) and isinstance(record["run"], dict):
            parsed()
    except (ValueError, OSError, RecursionError, KeyError, TypeError):
        pass
    chosen = newest_checkpoint(path, run)
    if chosen is None:
        return
    check_checkpoint(chosen, path, run)
    trainer = tiny_trainer(path)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(chosen))
    if trainer.state.global_step != 4:
        raise WrongSuccess(f"the training ended at step {trainer.state.global_step}")


def model_folder(path: Path, parsed: Callable[[], None]) -> None:
    """A model's folder, loaded and asked: its weights are those of its files."""
    names = _names_of_weights(path / "model.safetensors")
    if names:
        parsed()
    config: Any = read_config(str(path), "MODEL", SiglipResNetConfig.model_type, SigPhiConfig.model_type)
    model, processor = load_for_evaluation(str(path))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise WrongSuccess("weights are missing")
    if config.model_type == SigPhiConfig.model_type and config.base_language_model is None:
        missing = {name for name, _ in model.named_parameters()} - names - {"lm_head.weight"}
        if missing:
            raise WrongSuccess(f"weights came from nowhere: {sorted(missing)[:3]}")
    image = Image.new("RGB", (20, 12), "red")
    if config.model_type == SigPhiConfig.model_type:
        Conversation(model, processor, image, max_new_tokens=2).ask("What is it?")
        return
    inputs = processor(images=image, text=["A cat.", "A dog on a mat."], padding=True, return_tensors="pt")
    with torch.no_grad():
        model(**inputs)


def _names_of_weights(path: Path) -> set[str]:
    """Those in the header of a safetensors file, if that can be read."""
    try:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        return set(json.loads(content[8 : 8 + length]))
    except (OSError, ValueError, struct.error, OverflowError):
        return set()


TARGETS: dict[str, Target] = {
    "csv": csv_file,
    "image": picture,
    "config": model_config,
    "yaml": options_file,
    "checkpoint": checkpoints,
    "model folder": model_folder,
}


def signature(error: BaseException) -> str:
    """What tells one traceback from another: its kind, and where in our code or nearest to it it came from."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {re.sub(r'0x[0-9a-f]+|[0-9]+', 'N', str(error))[:100]} at {frames[-1]}"


__all__ = ["CONTENT", "STAGES", "TARGETS", "Target", "WrongSuccess", "signature"]
