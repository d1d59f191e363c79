"""What of a model's folder is published: which files, without what only this machine knows, and their hashes."""

import fnmatch
import hashlib
import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from sigphi.hub_card.cards import CARD
from sigphi.hub_card.files import read_json
from sigphi.hub_card.markdown import SOMEWHERE, is_local

RECORD = "file_hashes.json"
# Nothing else leaves the machine: no state of an optimizer, no cache, no log of a tracker, no file of somebody else.
PUBLISHED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "eval_results.json",
    "parity.json",
    "confusion_matrix.json",
    "confusion_matrix.png",
    "predictions.parquet",
    "eval_samples.png",
    "eval_samples.md",
    "training_data.json",
    "training_args.json",
    "log_history.json",
    "loss_curve.png",
)
_WITH_CODE = ("config.json", "processor_config.json")
# What is recorded of a run, where a string that begins with a path is one.
_RECORDS = ("eval_results.json", "parity.json", "training_data.json", "training_args.json", "log_history.json")
# Of the training's options: where things lie here, and who publishes.
_PRIVATE_OPTIONS = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "push_to_hub")
# A tokenizer may know words that look like paths.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


def is_published(name: str) -> bool:
    """Whether a file of this name in a repository is one that a push brings, besides card and code."""
    # fnmatch lets a star stand for slashes too.
    return name == RECORD or any(_matches(name, pattern) for pattern in PUBLISHED)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def release_files(folder: Path) -> tuple[list[str], list[str]]:
    """
    The files of a model's folder that are published, and what is left out.

    Of Python files these are the ones that `auto_map` names, and what they import.

    Args:
        folder (`Path`): the model's.

    Returns:
        `tuple[list[str], list[str]]`: paths inside the folder, of files; and names of other files and folders.
    """
    names = {name.relative_to(folder).as_posix() for pattern in PUBLISHED for name in folder.glob(pattern)}
    names |= _code_files(folder)
    names = {name for name in names if (folder / name).is_file()}
    tops = {name.split("/")[0] for name in names} | {CARD, RECORD}
    return sorted(names), sorted(path.name for path in folder.iterdir() if path.name not in tops)


def _code_files(folder: Path) -> set[str]:
    files: set[str] = set()
    for config in (folder / name for name in _WITH_CODE):
        auto_map = read_json(config).get("auto_map", {}) if config.is_file() else {}
        # `owner/name--module.Class` is code of another repository.
        for module in {name.split(".")[0] for name in auto_map.values() if "--" not in name}:
            path = folder / f"{module}.py"
            if path.is_file():
                files |= {Path(file).name for file in [path, *get_relative_import_files(path)]}
    return files


def stage(folder: Path, target: Path, changes: dict[str, dict[str, Any]]) -> list[str]:
    """
    Put what is published of a model's folder into an empty one, with the hashes of all files in `file_hashes.json`.

    Weights are links where that is possible. JSON files lose what only this machine knows: paths, and options that
    hold some; `config.json` gets the hashes of the weights, against which loading checks them.

    Args:
        folder (`Path`): the model's.
        target (`Path`): an empty folder.
        changes (`dict[str, dict]`): by the name of a JSON file, the values that it gets.

    Returns:
        `list[str]`: names of what was left out.
    """
    names, left_out = release_files(folder)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            _link(folder / name, target / name)
        elif name.endswith(".json") and name not in _VOCABULARIES:
            content = scrubbed(name, read_json(folder / name))
            _write(target / name, content | changes.get(name, {}) if isinstance(content, dict) else content)
        else:
            shutil.copyfile(folder / name, target / name)
    weights = {name: file_hash(target / name) for name in names if name.endswith(".safetensors")}
    _write(target / "config.json", read_json(target / "config.json") | {"weight_hashes": weights})
    hashes = {name: weights.get(name) or file_hash(target / name) for name in names}
    _write(target / RECORD, {"sigphi": version("sigphi"), "sha256": hashes})
    return left_out


def _link(source: Path, target: Path) -> None:
    # A hard link outlives the checkpoint that it is of.
    for link in (os.link, os.symlink):
        try:
            link(source.resolve(), target)
            return
        except OSError:  # another file system; no right to make links
            continue
    shutil.copyfile(source, target)


def scrubbed(name: str, content: Any) -> Any:
    """
    The content of a JSON file without what only this machine knows.

    Args:
        name (`str`): of the file, by which it is known what may be a path.
        content: what is in it.
    """
    if name == "training_args.json":
        content = {
            key: value
            for key, value in content.items()
            if key not in _PRIVATE_OPTIONS and not key.startswith("hub_") and not key.endswith("_token")
        }
    return _without_paths(content, everywhere=name in _RECORDS)


def _without_paths(value: Any, everywhere: bool) -> Any:
    if isinstance(value, dict):
        # Where a config or tokenizer was read from; nothing looks at it when it is loaded.
        named = {key: "" if key in ("_name_or_path", "name_or_path") else value[key] for key in value}
        return {key: _without_paths(part, everywhere) for key, part in named.items()}
    if isinstance(value, list):
        return [_without_paths(part, everywhere) for part in value]
    if everywhere and isinstance(value, str) and is_local(value):
        _, comma, rest = value.partition(",")  # "/data/cifar10, split train"
        return SOMEWHERE + comma + rest
    return value


def file_hash(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(folder: Path, hashes: dict[str, str], names: list[str]) -> dict[str, str]:
    """
    What is wrong with the files of a folder, given the hashes that they should have.

    Args:
        folder (`Path`): where they are.
        hashes (`dict[str, str]`): the SHA-256 of each file in hex, as in `file_hashes.json`.
        names (`list[str]`): every file that is there.

    Returns:
        `dict[str, str]`: by name `"changed"`, `"missing"`, or `"not recorded"`: a file that loading a model could
        read or run, and whose hash nobody has recorded.
    """
    wrong = {}
    for name, expected in hashes.items():
        if name not in names:
            wrong[name] = "missing"
        elif file_hash(folder / name) != expected:
            wrong[name] = "changed"
    wrong |= {name: "not recorded" for name in names if name not in hashes and _is_read_by_loading(name)}
    return dict(sorted(wrong.items()))


def _is_read_by_loading(name: str) -> bool:
    suffixes = (".py", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".jinja")
    return name != RECORD and (name.endswith(suffixes) or (name.endswith(".json") and "/" not in name))


def leaks(folder: Path, secrets: dict[str, str]) -> list[tuple[str, str]]:
    """
    Files that hold what must not be published.

    Args:
        folder (`Path`): what is to be published; of safetensors only the header is read.
        secrets (`dict[str, str]`): texts by what they are. Those that begin with a slash are paths, and not looked
            for in vocabularies.

    Returns:
        `list[tuple[str, str]]`: the name of each such file, and what it holds.
    """
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), _readable(path)
        for what, secret in secrets.items():
            is_word = path.name in _VOCABULARIES and is_local(secret)
            if not is_word and any(form in content for form in _spellings(secret)):
                found.append((name, what))
        if _TOKEN.search(content):
            found.append((name, "a token of the Hub"))
    return found


def _spellings(text: str) -> set[bytes]:
    """As it is, and as JSON writes it."""
    return {text.encode(), json.dumps(text)[1:-1].encode()}


def _readable(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def broken_weights(folder: Path) -> dict[str, str]:
    """Safetensors files that cannot be read, such as one that is cut off, and why; only headers are read."""
    broken = {}
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            broken[path.relative_to(folder).as_posix()] = " ".join(str(error).split())
    return broken


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = [
    "PUBLISHED",
    "RECORD",
    "broken_weights",
    "changed_files",
    "file_hash",
    "is_published",
    "leaks",
    "release_files",
    "scrubbed",
    "stage",
]
