"""Ship the code of a custom class beside whatever `save_pretrained` writes.

The classes of this package live in several folders and import each other by full name
(`from sigphi.configuration.configuration_x import C`). A Hub repository is flat, and loading with
`trust_remote_code=True` follows only one-dot imports (`from .configuration_x import C`). [`HubCodeMixin`] bridges the
two when a config or a processor is saved.
"""

import ast
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import cached_file

# Where and how a repository is read.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
PACKAGE = "sigphi"
_IMPORT = re.compile(rf"^(\s*from\s+){PACKAGE}(?:\.\w+)*\.(\w+)(?=\s+import\b)", re.MULTILINE)
_MODULE = re.compile(rf"^\s*from\s+({PACKAGE}(?:\.\w+)+)\s+import\b", re.MULTILINE)


def flatten(source: str) -> str:
    """Rewrite `from sigphi.a.b import c` to `from .b import c` in Python `source`.

    Raises:
        ValueError: if `source` holds an import that a flat repository cannot resolve (`import sigphi.a.b`,
            `from . import b`, `from ..a import b`).
    """
    flat = _IMPORT.sub(r"\1.\2", source)
    for node in ast.walk(ast.parse(flat)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or _is_flat(node):
            continue
        raise ValueError(
            f"line {node.lineno}: `{ast.unparse(node)}` cannot be shipped to a flat repository; "
            f"write `from {PACKAGE}.x.y import z`"
        )
    return flat


def _is_flat(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether a flat repository can resolve the import, given that ours are already rewritten."""
    if isinstance(node, ast.Import):
        return all(alias.name.split(".")[0] != PACKAGE for alias in node.names)
    if node.level == 0:
        return (node.module or "").split(".")[0] != PACKAGE
    return node.level == 1 and node.module is not None and "." not in node.module


def hub_files(modules: Iterable[str]) -> dict[str, str]:
    """Flat source by file name, for `modules` (full names) and everything of this package that they import.

    Raises:
        ValueError: if two modules share a file name, or one is a package.
    """
    files: dict[str, str] = {}
    seen: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"{module}: there is no such module to ship")
        path = Path(spec.origin)
        if path.name in files or path.name == "__init__.py":
            raise ValueError(
                f"{module}: {path.name} cannot be shipped to a flat repository (name taken, or a package)"
            )
        source = path.read_text(encoding="utf-8")
        files[path.name] = flatten(source)
        todo += _MODULE.findall(source)
    return files


def check_weights(name: str | os.PathLike, hashes: dict[str, str] | None, **kwargs: Any) -> None:
    """
    Check that files of weights are those that were published.

    Args:
        name (`str` or `os.PathLike`): the repository or folder that they were loaded from.
        hashes (`dict[str, str]`, *optional*): the SHA-256 of each file in hex; without them nothing is checked.
        kwargs: those of `from_pretrained`, of which the ones that say where the files are count.

    Raises:
        OSError: if a file is another one; the message names it.
    """
    place = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "subfolder") if kwargs.get(key) is not None}
    for file, expected in (hashes or {}).items():
        with open(cached_file(name, file, **place), "rb") as weights:
            found = hashlib.file_digest(weights, "sha256").hexdigest()
        if found != expected:
            raise OSError(
                f"{name}: {file} is not the file that was published: its SHA-256 begins with {found[:12]}, "
                f"config.json records {expected[:12]}. Download it again, or read docs/hub.md if you changed it."
            )


def check_public(config: PreTrainedConfig, field: str) -> None:
    """
    Check that a model which a config names can be read by others, before the config is published.

    Raises:
        ValueError: if the field holds a folder of this machine.
    """
    name = getattr(config, field)
    if name is not None and (os.path.isabs(name) or os.path.isdir(name)):
        raise ValueError(
            f"`config.{field}` is {name}, a folder of this machine, without which nobody can use what is published. "
            f"Publish that folder first, and set `config.{field}` to its id on the Hub."
        )


class HubCodeMixin:
    """First base of a config or processor class: a folder that it saves loads without this package.

    `hub_auto_map` names the classes in full, by Auto class; the saved JSON's `auto_map` gets the flat names. The hook
    sits on the config, not on the model, because `PreTrainedModel.save_pretrained` saves the config between the two
    moments that decide which files are uploaded.
    """

    hub_auto_map: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as the next base class does, with `auto_map` and the flat `.py` files beside it.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, made where it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): upload afterwards, as `push_to_hub(repo_id, ...)`.
            kwargs: `repo_id` and the further arguments of `push_to_hub`.
        """
        if isinstance(self, PreTrainedConfig):
            self.weight_hashes: dict | None = None  # of weights that are saved anew, these would be those of others
        self.auto_map = {auto: ".".join(name.split(".")[-2:]) for auto, name in self.hub_auto_map.items()}
        saved = super().save_pretrained(save_directory)  # type: ignore[misc]
        # A class that was itself loaded from a repository is copied by transformers.
        if type(self).__module__.split(".")[0] == PACKAGE:
            for name, source in hub_files(name.rpartition(".")[0] for name in self.hub_auto_map.values()).items():
                Path(save_directory, name).write_text(source, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)  # type: ignore[attr-defined]
        return saved


class HubConfigMixin(HubCodeMixin):
    """The same of a config class, which takes no default values for a folder without `config.json`."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As the next base class does.

        Raises:
            OSError: if there is no `config.json`, as in the folder of a model whose saving was broken off.
        """
        content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if not content:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json: its files may be of several models.")
        return content, kwargs


__all__ = ["HUB_ARGUMENTS", "HubCodeMixin", "HubConfigMixin", "check_public", "check_weights", "flatten", "hub_files"]
