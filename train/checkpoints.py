"""Reading models that a command is given, with errors that say what is wrong with them."""

import os
import re
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
    if looks_like_path(name) and not Path(name, "config.json").is_file():
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


def check_token_counts(config: SigPhiConfig, processor: Any, name: str) -> None:
    """Raise a [`UserError`] unless processor and model agree on the number of image tokens."""
    if processor.num_image_tokens != config.num_image_tokens:
        raise UserError(
            f"{name}: its processor makes {processor.num_image_tokens} image tokens, its model expects "
            f"{config.num_image_tokens}. Save both from the same run, or correct num_image_tokens in "
            f"processor_config.json."
        )


__all__ = [
    "check_token_counts",
    "commit_on_hub",
    "hub_commit",
    "is_commit",
    "looks_like_path",
    "pinned_revision",
    "read_config",
]
