"""Reading models that a command is given, with errors that say what is wrong with them."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel, SiglipResNetVisionModel
from sigphi.train.errors import UserError, printable

_KINDS = {
    SiglipResNetConfig.model_type: "an encoder that `sigphi train-siglip` wrote",
    SigPhiConfig.model_type: "a VLM that `sigphi train-vlm` wrote",
}
# Beyond these a config is none of a model, and its class may fill the memory before it says so.
_LARGEST_FILE = 10_000_000  # bytes
_LARGEST_NUMBER = 2**31
_MOST_LAYERS = 10_000
# A parameter takes half a byte at least, in 4 bits.
_PARAMETERS_PER_BYTE = 4


def read_config(
    name: str, option: str, *model_types: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """
    The configuration of a model, before any weights load.

    Args:
        name (`str`): a folder or Hub id.
        option (`str`): where the user gave it, for the message, such as `"--siglip-checkpoint"`.
        model_types (`str`): the kinds that fit; any kind without them.
        revision (`str`, *optional*): of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with the model may run.

    Raises:
        UserError: if there is no such model, or it is of another kind; the message names the value and the remedy.
    """
    if looks_like_path(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(f"{option} {name}: there is no model folder with a config.json here.")
    with loading(f"{option} {name}"):
        if os.path.isdir(name):
            for path in Path(name).glob("*config.json"):
                _check_config_file(path)
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
    if model_types and config.model_type not in model_types:
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in model_types)
        raise UserError(f"{option} {name} is a {config.model_type!r} model; give {wanted}.")
    return config


@contextlib.contextmanager
def loading(place: str, remedy: str = "Give a model folder, or a reachable Hub id.") -> Iterator[None]:
    """
    Within it a model, a part of one or a checkpoint that cannot be read is a [`UserError`].

    Args:
        place (`str`): where the user gave it, and its name, such as `"MODEL outputs/vlm"`.
        remedy (`str`, *optional*): what ends the message.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    # Libraries end on a broken file in whatever way they happen to: KeyError, RecursionError, a bare Exception.
    except Exception as error:
        reason = printable(str(error))[:200] or type(error).__name__
        raise UserError(f"{place}: cannot be read ({reason}). {remedy}") from error


def _check_config_file(path: Path) -> None:
    """Raise a `ValueError` if a config is larger than any, or holds a number that none can have."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"its {path.name} has more than {_LARGEST_FILE:,} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"its {path.name} holds no names with values")
    if path.name in ("config.json", "generation_config.json"):  # a tokenizer's longest text may be 10^30 tokens
        _check_numbers(content, "")


def _check_numbers(value: Any, name: str) -> None:
    if name.startswith("output_") or name in ("return_dict", "use_cache"):
        if not isinstance(value, bool | None):
            raise ValueError(f"`{name}` in its configuration has to be true or false")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(part, key)
    elif isinstance(value, list):
        for part in value:
            _check_numbers(part, name)
    elif isinstance(value, int):
        most = _MOST_LAYERS if "layers" in name or "depth" in name else _LARGEST_NUMBER
        if abs(value) > most:
            raise ValueError(f"`{name}` in its configuration is beyond {most}")
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"`{name}` in its configuration is NaN")


def check_weights_suffice(name: str, config: PreTrainedConfig) -> None:
    """
    Check that a folder's files can hold the model that its config describes, before that is made in memory.

    Args:
        name (`str`): of a model of this package; one on the Hub is not checked.
        config (`PreTrainedConfig`): of [`read_config`].

    Raises:
        UserError: if the model has more parameters than the files have room for.
    """
    if not Path(name).is_dir():
        return
    with torch.device("meta"):
        if config.model_type != SigPhiConfig.model_type:
            model = AutoModel.from_config(config)
        elif config.base_language_model is not None:
            model = SiglipResNetVisionModel(config.vision_config)  # what is not in the base or in LoRA
        else:
            model = AutoModelForImageTextToText.from_config(config)
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(path.stat().st_size for path in Path(name).rglob("*.safetensors"))
    if described > _PARAMETERS_PER_BYTE * stored:
        raise UserError(
            f"{name}: its config.json describes {described:,} parameters, and its files of weights hold {stored:,} "
            f"bytes. They are not of one model: give a folder that is whole."
        )


def check_whole(name: str, missing: set[str] | list[str]) -> None:
    """Raise a [`UserError`] if weights of a model are missing, which transformers would draw at random."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"{name}: {len(missing)} of its weights are missing ({names}, ...). Give a folder that is whole."
        )


def read_encoder(name: str, **kwargs: Any) -> SiglipResNetModel:
    """
    The encoder of `--siglip-checkpoint`, with all of its weights.

    Args:
        name (`str`): a folder or Hub id, whose config has been read.
        kwargs: those of `from_pretrained`.

    Raises:
        UserError: if it cannot be read, or weights are missing.
    """
    place = f"--siglip-checkpoint {name}"
    with loading(place):
        check_weights_suffice(name, kwargs.get("config") or AutoConfig.from_pretrained(name))
        model, info = SiglipResNetModel.from_pretrained(name, output_loading_info=True, **kwargs)
    check_whole(place, info["missing_keys"])
    return model


def looks_like_path(name: str) -> bool:
    """A Hub id is `owner/name` or `name`; anything that exists here, or is written as a path, is a folder."""
    return (
        os.path.exists(name)
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or os.sep != "/"
        and os.sep in name
    )


def hub_commit(repo_id: str, revision: str | None = None) -> str:
    """The commit of a model on the Hub that a revision stands for now, by default that of its main branch."""
    # The cache keeps each commit in a folder of its name. (transformers no longer keeps it in the config.)
    return Path(hf_hub_download(repo_id, "config.json", revision=revision)).parent.name


def commit_on_hub(repo_id: str, place: str, revision: str | None = None) -> str:
    """
    As [`hub_commit`], for a command.

    Args:
        repo_id (`str`): a Hub id.
        place (`str`): where the user gave it, for the message, such as `"--text-model"`.
        revision (`str`, *optional*): a branch, tag or commit; by default the main branch.

    Raises:
        UserError: if there is no such model, or the Hub cannot be reached.
    """
    try:
        return hub_commit(repo_id, revision)
    except OSError as error:  # those of huggingface_hub are
        at = "" if revision is None else f" at {revision}"
        raise UserError(
            f"{place} {repo_id}{at}: cannot be read from the Hub ({type(error).__name__}). Check the name, and that "
            "the Hub can be reached."
        ) from error


def pinned_revision(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a model on the Hub stands for now; for a folder, which has none, `None`."""
    return None if looks_like_path(name) else revision if is_commit(revision) else hub_commit(name, revision)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is the full name of a commit, which never stands for anything else."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def check_processor(config: PreTrainedConfig, processor: Any, name: str) -> None:
    """
    Try a processor on a small image and a question, and compare what it makes with what its model reads.

    Args:
        config (`PreTrainedConfig`): of an encoder or a VLM of this package.
        processor: what lies beside it.
        name (`str`): of the model, for the message.

    Raises:
        UserError: if images come out in another size or as no numbers, or tokens that the model has no embedding for.
    """
    size, rows = config.vision_config.image_size, config.text_config.vocab_size
    text = "What is it?"
    if config.model_type == SigPhiConfig.model_type:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # Padded, as batches are.
    inputs = processor(images=Image.new("RGB", (5, 4), "gray"), text=text, padding=True, return_tensors="pt")
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    if pixels.shape != (1, config.vision_config.num_channels, size, size) or not pixels.isfinite().all():
        raise UserError(
            f"{name}: its processor makes images of {' x '.join(map(str, pixels.shape[2:]))}, its model reads "
            f"{size} x {size}. Save both from the same run."
        )
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise UserError(
            f"{name}: its tokenizer has tokens up to {int(ids.max())}, its model reads {rows}. Save both from the "
            f"same run."
        )
    if config.model_type == SigPhiConfig.model_type:
        found = int((ids == config.image_token_id).sum())
        if found != config.num_image_tokens:
            raise UserError(
                f"{name}: its tokenizer gives an image {found} of its model's {config.num_image_tokens} tokens. Save "
                f"both from the same run."
            )


def check_generation(model: PreTrainedModel, name: str) -> None:
    """Raise a [`UserError`] if a special token of the generation settings is no number that a token may have."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(model.generation_config, key)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and (not isinstance(token, int) or abs(token) >= 2**31):
                raise UserError(
                    f"{name}: its generation_config.json has the {key} {printable(str(token))[:50]!r}, which is no "
                    f"token's number. Put that of the tokenizer there."
                )


def check_token_counts(config: SigPhiConfig, processor: Any, name: str) -> None:
    """Raise a [`UserError`] unless processor and model agree on the number of image tokens."""
    if processor.num_image_tokens != config.num_image_tokens:
        raise UserError(
            f"{name}: its processor makes {processor.num_image_tokens} image tokens, its model expects "
            f"{config.num_image_tokens}. Save both from the same run, or correct num_image_tokens in "
            f"processor_config.json."
        )


__all__ = [
    "check_generation",
    "check_processor",
    "check_token_counts",
    "check_weights_suffice",
    "check_whole",
    "commit_on_hub",
    "hub_commit",
    "is_commit",
    "loading",
    "looks_like_path",
    "pinned_revision",
    "read_config",
    "read_encoder",
]
