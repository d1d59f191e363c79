"""Reading models that a command is given, with errors that say what is wrong with them."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.train.errors import UserError

_KINDS = {
    SiglipResNetConfig.model_type: "an encoder that `sigphi train-siglip` wrote",
    SigPhiConfig.model_type: "a VLM that `sigphi train-vlm` wrote",
}


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
    if _looks_like_path(name) and not Path(name, "config.json").is_file():
        raise UserError(f"{option} {name}: there is no model folder with a config.json here.")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
    # What a config's own checks refuse is no ValueError.
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{option} {name}: cannot be read ({reason}). Give a model folder, or a reachable Hub id."
        ) from error
    if model_types and config.model_type not in model_types:
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in model_types)
        raise UserError(f"{option} {name} is a {config.model_type!r} model; give {wanted}.")
    return config


def _looks_like_path(name: str) -> bool:
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


def check_token_counts(config: SigPhiConfig, processor: Any, name: str) -> None:
    """Raise a [`UserError`] unless processor and model agree on the number of image tokens."""
    if processor.num_image_tokens != config.num_image_tokens:
        raise UserError(
            f"{name}: its processor makes {processor.num_image_tokens} image tokens, its model expects "
            f"{config.num_image_tokens}. Save both from the same run, or correct num_image_tokens in "
            f"processor_config.json."
        )


__all__ = ["check_token_counts", "hub_commit", "read_config"]
