"""`sigphi push`: publish a model with its processor, its code, its figures and its card on the Hub.

```bash
sigphi push outputs/vlm --repo-id alice/cifar10-vlm
```
"""

import dataclasses
import json
import logging
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedConfig, TrainingArguments
from transformers.hf_argparser import HfArg

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.hub_card.cards import CARD, write_card
from sigphi.hub_card.files import read_record
from sigphi.hub_card.markdown import is_local
from sigphi.hub_card.release import RECORD, broken_weights, is_published, stage
from sigphi.train.checkpoints import commit_on_hub, is_commit, read_config
from sigphi.train.errors import UserError, check_gradio, printable
from sigphi.train.hub import (
    HubRepo,
    PublishArguments,
    check_license,
    check_login,
    check_no_secrets,
    check_repo_id,
    files_in,
    hub_errors,
)
from sigphi.train.parser import parse_arguments
from sigphi.train.records import TRAINING_DATA

logger = logging.getLogger(__name__)

LOADERS = {SiglipResNetConfig.model_type: "AutoModel", SigPhiConfig.model_type: "AutoModelForImageTextToText"}
# What two models have in common that can stand for each other.
_SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PIN = re.compile(r'revision="([0-9a-f]{40})"')


@dataclass
class SourceArguments:
    """Where on the Hub is what a model was made from, when it was made from folders."""

    _argument_group_name = "sources"

    base_language_model: str | None = HfArg(
        help="Hub id of the language model of a VLM in adapter form that was trained on a local folder.", default=None
    )
    text_model: str | None = HfArg(
        help="Hub id of the text tower of an encoder that was trained on a local folder.", default=None
    )
    siglip_checkpoint: str | None = HfArg(
        help="Hub id of the encoder whose image tower is in a VLM, for its card.", default=None
    )


@dataclass
class PushArguments(SourceArguments, PublishArguments):
    """Options of `sigphi push`."""

    _argument_group_name = "push"

    license: str = HfArg(help="License of the model, as the Hub writes it.", default="apache-2.0")
    space: str | None = HfArg(
        help="Publish the page of `sigphi demo` about the VLM too, as the Space OWNER/NAME; made if need be.",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_license(self.license)
        if self.space is not None:
            check_repo_id("--space", self.space)
            check_gradio("--space")


def check_sources(config: PreTrainedConfig, sources: SourceArguments, place: str) -> None:
    """
    Check that a stranger will find what a model reads from elsewhere.

    Args:
        config (`PreTrainedConfig`): of the model.
        sources (`SourceArguments`): what the options name instead of what the config does.
        place (`str`): the model's folder, for messages.

    Raises:
        UserError: if the config names a local folder, and the options nothing instead; or if they name what the
            model has no use for.
    """
    is_vlm = config.model_type == SigPhiConfig.model_type
    has_base = is_vlm and config.base_language_model is not None
    has_tower_elsewhere = not is_vlm and not config.include_text_tower
    given = {
        "--base-language-model": (sources.base_language_model, has_base, "is no VLM in adapter form"),
        "--text-model": (sources.text_model, has_tower_elsewhere, "is no encoder without text tower"),
        "--siglip-checkpoint": (sources.siglip_checkpoint, is_vlm, "is no VLM"),
    }
    for option, (name, has_use, reason) in given.items():
        if name is not None and not has_use:
            raise UserError(f"{option} {name} has no use: {place} {reason}. Leave it out.")
        if name is not None and is_local(name):
            raise UserError(f"{option} {name} is a local folder; give the id of a repository on the Hub.")
    if has_base and sources.base_language_model is None:
        check_base(config.base_language_model, place)
    tower = config.text_model_name_or_path if has_tower_elsewhere else None
    if tower is not None and sources.text_model is None and is_local(tower):
        raise UserError(
            f"{place}: its text tower is the folder {tower}, which nobody else has.\nPublish that (`hf upload "
            f"OWNER/NAME {tower}`) and add --text-model OWNER/NAME, or train with --save-text-tower."
        )


def check_base(name: str, place: str) -> None:
    """
    Check that the language model of an adapter form is on the Hub.

    Args:
        name (`str`): a Hub id, or a folder's absolute path.
        place (`str`): the model's folder or the option, for the message.

    Raises:
        UserError: if it is a folder.
    """
    if is_local(name):
        raise UserError(
            f"{place}: its language model is the folder {name}, which nobody else has.\nPublish that (`hf upload "
            f"OWNER/NAME {name}`) and add --base-language-model OWNER/NAME, or push a form that holds it "
            "(`sigphi merge`)."
        )


def pinned_sources(folder: Path, config: PreTrainedConfig, sources: SourceArguments) -> dict[str, dict[str, Any]]:
    """
    What changes in the files of a model so that they name the commits of what it reads from elsewhere.

    Args:
        folder (`Path`): the model's.
        config (`PreTrainedConfig`): of the model.
        sources (`SourceArguments`): of [`check_sources`].

    Returns:
        `dict[str, dict]`: by the name of a JSON file, its new values.

    Raises:
        UserError: if the Hub does not have a model, or has another one under that name.
    """
    changes: dict[str, dict[str, Any]] = {"config.json": {}}
    if config.model_type == SigPhiConfig.model_type:
        if config.base_language_model is not None:
            options = ("--base-language-model", sources.base_language_model)
            given = (config.base_language_model, config.base_language_model_revision)
            name, commit = _pinned(*options, *given, config.text_config)
            changes["config.json"] = {"base_language_model": name, "base_language_model_revision": commit}
            changes["lora/adapter_config.json"] = {"base_model_name_or_path": name, "revision": commit}
        changes[TRAINING_DATA] = _pinned_encoder(folder, config, sources.siglip_checkpoint)
    elif not config.include_text_tower and (sources.text_model or config.text_model_name_or_path) is not None:
        given = (config.text_model_name_or_path, config.text_model_revision)
        name, commit = _pinned("--text-model", sources.text_model, *given, config.text_config)
        changes["config.json"] = {"text_model_name_or_path": name, "text_model_revision": commit}
    return changes


def _pinned(
    option: str, given: str | None, name: str, revision: str | None, shape: PreTrainedConfig
) -> tuple[str, str]:
    """The model's id and commit; one that the options give has to have the shape of the one that was trained with."""
    if given is None and is_commit(revision):
        assert revision is not None
        return name, revision
    place = option if given else "MODEL: it was made from"
    commit = commit_on_hub(given or name, place, None if given else revision)
    if given is not None:
        found = read_config(given, option, revision=commit).get_text_config()
        for field in _SHAPE:
            if getattr(found, field, None) != getattr(shape, field, None):
                raise UserError(
                    f"{option} {given} has {field} {getattr(found, field, None)}, the model was trained with "
                    f"{getattr(shape, field, None)}: give the same model."
                )
    return given or name, commit


def _pinned_encoder(folder: Path, config: PreTrainedConfig, given: str | None) -> dict[str, Any]:
    """What the record of a VLM's training says of the encoder whose image tower it has."""
    record = read_record(folder / TRAINING_DATA)
    name, commit = record.get("siglip_checkpoint"), record.get("siglip_checkpoint_revision")
    if given is None:
        return {} if name is None or not is_local(name) else {"siglip_checkpoint": None}
    commit = commit_on_hub(given, "--siglip-checkpoint")
    encoder = read_config(given, "--siglip-checkpoint", SiglipResNetConfig.model_type, revision=commit)
    if _tower(encoder) != _tower(config):
        raise UserError(f"--siglip-checkpoint {given} has another image tower than {folder}: give the encoder it has.")
    return {"siglip_checkpoint": given, "siglip_checkpoint_revision": commit}


def _tower(config: PreTrainedConfig) -> dict[str, Any]:
    """The image tower, but for where it was read from and by what."""
    fields = config.vision_config.to_dict()
    return {
        key: value for key, value in fields.items() if key not in ("_name_or_path", "dtype", "transformers_version")
    }


def prepare(folder: Path, target: Path, sources: SourceArguments, token: str | None = None) -> None:
    """
    Put into `target` what is published of a model's folder, but for the card; see [`stage`].

    Args:
        folder (`Path`): the model's.
        target (`Path`): an empty folder.
        sources (`SourceArguments`): see [`pinned_sources`].
        token (`str`, *optional*): the one that publishes, by default that of `huggingface_hub`.

    Raises:
        UserError: if weights are missing or cut off, if a source is not on the Hub, and if a file holds a path of this
            machine or a token.
    """
    config = read_config(str(folder), "MODEL", *LOADERS)
    check_sources(config, sources, str(folder))
    broken = broken_weights(folder)
    if broken:
        name, reason = next(iter(broken.items()))
        raise UserError(f"{folder / name} cannot be read ({reason}). Save the model again.")
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(f"{folder} has no model.safetensors, and nothing else of weights is published. Save it again.")
    left_out = stage(folder, target, pinned_sources(folder, config, sources))
    if left_out:
        logger.info("left out of what is published: %s", printable(", ".join(left_out)))
    check_no_secrets(target, folder, folder, token)


def publish(folder: Path, repo: HubRepo, license: str = "apache-2.0", message: str = "Model with its card") -> Any:
    """
    Make the repository, if need be, and commit `folder` to it at once; then let the card's code name that commit.

    What an earlier push has brought and this one has not disappears in the same commit; other files stay. Where all is
    there already nothing is committed.

    Args:
        folder (`Path`): of [`prepare`]; gets the card.
        repo (`HubRepo`): where to.
        license (`str`, *optional*, defaults to `"apache-2.0"`): for the card.
        message (`str`, *optional*): title of the commit, where the options have none.

    Returns:
        `tuple[CommitInfo, str]`: the last commit, and the name of the one with the weights.

    Raises:
        UserError: if the Hub refuses or cannot be reached. The branch then holds all of one push, never a part.
    """
    repo.make()
    name, head = repo.options.repo_id, repo.head()
    shown = repo.text_at(head, CARD) or ""
    pin = _PIN.search(shown)
    write_card(folder, name, pin[1] if pin else None, license)
    paths = files_in(folder)
    is_up_to_date = pin is not None and (folder / CARD).read_text(encoding="utf-8") == shown
    if not is_up_to_date:
        write_card(folder, name, None, license)
    before = json.loads(repo.text_at(head, RECORD) or '{"sha256": {}}')["sha256"]
    there = [file.rfilename for file in head.siblings]
    old = [file for file in there if (file in before or is_published(file)) and file not in paths]
    commit = repo.commit(paths, old, message, head.sha)
    if commit.oid == head.sha and is_up_to_date:
        assert pin is not None
        return commit, pin[1]
    write_card(folder, name, commit.oid, license)
    follow = _on_branch_of(repo, commit)
    last = follow.commit({CARD: folder / CARD}, [], "The card's code names the commit", commit.oid)
    return (commit if commit.pr_url is not None else last), commit.oid


def _on_branch_of(repo: HubRepo, commit: CommitInfo) -> HubRepo:
    """Where the next commit goes: the pull request that the last one has opened, if it has."""
    revision = repo.options.revision if commit.pr_url is None else commit.pr_revision
    options = dataclasses.replace(repo.options, revision=revision, create_pr=False, commit_message=None)
    return HubRepo(options, "model", repo.api.token, repo.option)


def push_run(
    folder: Path, arguments: TrainingArguments, repo_id: str | None = None, message: str = "End of training"
) -> str:
    """
    Publish the folder of a training, as [`~transformers.TrainingArguments`] say: `hub_model_id`, `hub_revision`,
    `hub_private_repo`, `hub_token`.

    Args:
        folder (`Path`): the model's; a `checkpoint-*` folder will do.
        arguments (`TrainingArguments`): of the training.
        repo_id (`str`, *optional*): where to, by default `hub_model_id`, or the name of `output_dir` among the
            repositories of whoever the token is of.
        message (`str`, *optional*): title of the commit.

    Returns:
        `str`: the address, and the line that loads what was published.

    Raises:
        UserError: as [`prepare`] and [`publish`] do.
    """
    repo_id = repo_id or arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    with hub_errors(repo_id, "--hub-model-id"):
        if "/" not in repo_id:
            repo_id = f"{HfApi(token=arguments.hub_token).whoami()['name']}/{repo_id}"
    options = PublishArguments(repo_id, bool(arguments.hub_private_repo), arguments.hub_revision)
    repo = HubRepo(options, "model", arguments.hub_token, "--hub-model-id")
    # Inside the folder, so that weights need not be copied.
    with tempfile.TemporaryDirectory(prefix=".push-", dir=arguments.output_dir) as staging:
        prepare(folder, Path(staging), SourceArguments(), arguments.hub_token)
        commit, weights = publish(Path(staging), repo, message=message)
        kind = json.loads((Path(staging) / "config.json").read_text(encoding="utf-8"))["model_type"]
    return f"{repo.address(commit)[0]}\n{loading_line(kind, repo_id, weights)}\n"


def loading_line(model_type: str, repo_id: str, commit: str) -> str:
    """The line of Python that loads what was published, and nothing that comes after it."""
    return f'{LOADERS[model_type]}.from_pretrained({json.dumps(repo_id)}, trust_remote_code=True, revision="{commit}")'


def main(argv: list[str]) -> None:
    """`sigphi push MODEL --repo-id OWNER/NAME`: publish, and print the address and the line that loads it."""
    options, model = parse_arguments([PushArguments], argv, "sigphi push", [("model", None, "folder of a model")])
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"MODEL {model}: there is no such folder; give the one that a training left.")
    config = read_config(model, "MODEL", *LOADERS)
    check_sources(config, options, model)
    if options.space is not None and config.model_type != SigPhiConfig.model_type:
        raise UserError(f"--space {options.space}: the page asks a VLM, and {model} is an encoder. Leave it out.")
    check_login(options.repo_id)
    repo = HubRepo(options, "model")
    with tempfile.TemporaryDirectory(prefix="sigphi-") as staging:
        prepare(folder, Path(staging), options)
        space = None
        if options.space is not None:
            from sigphi.train import push_space  # needs gradio

            space = push_space.draft_space(folder, options.repo_id, options.license, options.siglip_checkpoint)
        commit, weights = publish(Path(staging), repo, options.license)
    address, _ = repo.address(commit)
    sys.stdout.write(f"{address}\n{loading_line(config.model_type, options.repo_id, weights)}\n")
    if space is not None:
        sys.stdout.flush()
        space.revision = weights
        sys.stdout.write(f"{push_space.publish_space(space, repo, options.space)}\n")


__all__ = [
    "RECORD",
    "PushArguments",
    "SourceArguments",
    "check_base",
    "check_sources",
    "loading_line",
    "main",
    "pinned_sources",
    "prepare",
    "publish",
    "push_run",
]
