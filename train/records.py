"""The files that a run leaves beside its model."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from sigphi.hub_card.files import read_record, write_whole
from sigphi.train.arguments import DataArguments, PairsArguments
from sigphi.train.checkpoint_files import write_errors
from sigphi.train.checkpoints import looks_like_path, pinned_revision
from sigphi.train.data import data_facts
from sigphi.train.image_texts import pairs_facts

EVAL_RESULTS = "eval_results.json"
TRAINING_DATA = "training_data.json"
LOG_HISTORY = "log_history.json"
PARITY = "parity.json"


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; the file appears whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def durable_name(name: str) -> str:
    """A model's name as a saved config has to hold it: a folder's absolute path, a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def write_training_data(
    folder: Path,
    train: datasets.Dataset,
    arguments: DataArguments,
    encoder: str | None = None,
    vlm_checkpoint: str | None = None,
    made_from: Mapping[str, tuple[str | None, str | None]] | None = None,
) -> None:
    """
    Record what a model was trained on, so that an evaluation can leave it out.

    Args:
        folder (`Path`): the model's.
        train (`datasets.Dataset`): the training split, of [`load_data`] or of [`hold_out`].
        arguments (`DataArguments`): its source and how it was split.
        encoder (`str`, *optional*): the encoder that the model was built on; what that has seen counts too.
        vlm_checkpoint (`str`, *optional*): the same of the VLM that the training started from.
        made_from (`dict[str, tuple[str, str]]`, *optional*): the models that this one was made from and their
            revisions, by the option that named each; of those on the Hub the commits are recorded.

    Raises:
        UserError: if it cannot be written.
    """
    if isinstance(arguments, PairsArguments) and arguments.dataset is not None:
        names = ("dataset", "dataset_config", "dataset_split")
        facts = pairs_facts(train) | {name: getattr(arguments, name) for name in names}
        facts["dataset"] = durable_name(arguments.dataset)
    else:
        facts = data_facts(train) | {"images": durable_name(arguments.images)}
    facts |= {"eval_fraction": arguments.eval_fraction, "split_seed": arguments.split_seed}
    for kind, earlier in (("encoder", encoder), ("vlm_checkpoint", vlm_checkpoint)):
        if earlier is not None and training_record(earlier):
            facts[kind] = training_record(earlier)
    for option, (name, revision) in (made_from or {}).items():
        if name is not None:
            facts |= {option: durable_name(name), f"{option}_revision": pinned_revision(name, revision)}
    with write_errors(folder, "Make room, and run it again with --resume."):
        write_json(folder / TRAINING_DATA, facts | {"environment": environment()})


def training_record(model: str) -> dict[str, Any]:
    """
    What a model's folder or repository records of its training, see [`write_training_data`]; else nothing.

    Raises:
        UserError: if the record is broken.
    """
    path = file_of(model, TRAINING_DATA)
    return {} if path is None else read_record(path)


def file_of(model: str, name: str) -> Path | None:
    """
    A file in a model's folder or repository, if there is one.

    Args:
        model (`str`): a folder or Hub id.
        name (`str`): of the file.
    """
    path = Path(model, name)
    if path.exists():
        return path
    if looks_like_path(model):
        return None
    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:  # also where there is no network, and no copy in the cache
        return None


def environment() -> dict[str, str]:
    """Versions and machine, for every file of results."""
    names = ("sigphi", "torch", "transformers", "datasets", "peft", "accelerate")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "accelerator": accelerator,
    }


__all__ = [
    "EVAL_RESULTS",
    "LOG_HISTORY",
    "PARITY",
    "TRAINING_DATA",
    "durable_name",
    "environment",
    "file_of",
    "training_record",
    "write_json",
    "write_training_data",
]
