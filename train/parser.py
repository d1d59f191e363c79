"""Command-line options from dataclasses, with defaults from a YAML file and errors of one line."""

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from sigphi.train.errors import UserError, printable

# Of a file of options, in characters, and of what a message shows of it.
_LONGEST_FILE = 1_000_000
_LONGEST_SHOWN = 500
_DEEPEST = 20
_LARGEST = 2**63


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: list[str] | None,
    program: str,
    positionals: Sequence[tuple[str, str | None, str]] = (),
    recipes: Sequence[Path] = (),
) -> tuple[Any, ...]:
    """Read the command line into one instance of each dataclass.

    Every field is an option, written with dashes or underscores. `--config FILE.yaml` names a flat mapping of field
    names to values; it gives defaults, which options on the command line override, and may hold required ones. Its
    values go through the same conversion and the same checks as those of options.

    Args:
        dataclass_types (`Sequence[type]`):
            The dataclasses, such as a subclass of [`~transformers.TrainingArguments`]. A class may name the group
            of `--help` for the fields that it declares by a class attribute `_argument_group_name`; these groups
            come first.
        argv (`list[str]`, *optional*):
            The words of the command line after the program's name, by default those of this process.
        program (`str`):
            What the user typed to get here, such as `"sigphi train-siglip"`.
        positionals (`Sequence[tuple]`, *optional*):
            The arguments without a flag, each as its name, `nargs` of argparse (`None` for one that must be given),
            and help text.
        recipes (`Sequence[Path]`, *optional*):
            Files like those for `--config`, which `--recipe NAME` chooses by their names without suffix.

    Returns:
        `tuple`: the instances, in the order of `dataclass_types`, then the values of `positionals`.

    Raises:
        UserError: for an unknown option or key, a bad or missing value, an unreadable file, and options that a
            dataclass refuses together.

    Example:

    ```python
    >>> import dataclasses
    >>> from sigphi.train.parser import parse_arguments

    >>> @dataclasses.dataclass
    ... class Options:
    ...     learning_rate: float = 1e-4

    >>> parse_arguments([Options], ["--learning-rate", "3e-4"], "sigphi train-siglip")
    (Options(learning_rate=0.0003),)
    ```
    """
    words = sys.argv[1:] if argv is None else argv
    files = {path.stem: path for path in recipes}
    given = CommandParser(program, [], list(files), add_help=False).parse_known_args(words)[0]
    parser = CommandParser(program, dataclass_types, list(files))
    for name, nargs, help_text in positionals:
        parser.add_argument(name, nargs=nargs, help=help_text)
    if files and given.recipe is not None and given.config is not None:
        raise UserError("--recipe and --config both give defaults: leave one of them out.")
    if given.config is not None:
        parser.read_config(Path(given.config))
    elif files and given.recipe is not None:
        parser.read_config(files[given.recipe])
    namespace = parser.parse_words(words)
    return parser.dataclasses_of(namespace) + tuple(getattr(namespace, name) for name, _, _ in positionals)


class CommandParser(HfArgumentParser):
    """An [`~transformers.HfArgumentParser`] with `--config` and with errors that are [`UserError`]s.

    Args:
        program (`str`): what the user typed to get here, such as `"sigphi train-siglip"`.
        dataclass_types (`Sequence[type]`): the dataclasses whose fields become options.
        recipes (`Sequence[str]`, *optional*): the names that `--recipe` takes; without any there is no such option.
        kwargs: passed on to [`argparse.ArgumentParser`].
    """

    def __init__(
        self, program: str, dataclass_types: Sequence[type], recipes: Sequence[str] = (), **kwargs: Any
    ) -> None:
        # The default usage line lists every option, and a TrainingArguments has 130.
        usage = "%(prog)s [options]"
        super().__init__(prog=program, usage=usage, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of defaults for the options below")
        if recipes:
            self.add_argument("--recipe", choices=recipes, help="defaults that were tried, instead of a --config file")
        self.dataclass_types = list(dataclass_types)
        self._add_fields()

    def _add_fields(self) -> None:
        fields_of_group: dict[str, list[dataclasses.Field]] = {}
        named_groups = set()
        for dataclass_type in self.dataclass_types:
            type_hints = get_type_hints(dataclass_type)
            for field in _init_fields(dataclass_type):
                field.type = type_hints[field.name]
                owner = _declaring_class(dataclass_type, field.name)
                title = vars(owner).get("_argument_group_name", f"{owner.__module__}.{owner.__qualname__}")
                fields_of_group.setdefault(title, []).append(field)
                if "_argument_group_name" in vars(owner):
                    named_groups.add(title)
        # What a class of ours declares stands before the many inherited options, and sorting keeps the order else.
        for title in sorted(fields_of_group, key=lambda title: title not in named_groups):
            group = self.add_argument_group(title)
            for field in fields_of_group[title]:
                self._parse_dataclass_field(group, field)

    def read_config(self, path: Path) -> None:
        """Take the values of a YAML file as defaults.

        Args:
            path (`Path`): a file with a flat mapping of field names or aliases to values.
        """
        actions = self._actions_of_keys()
        given: set[str] = set()
        for key, node in _read_mapping(path):
            place = f"{path}, line {node.start_mark.line + 1}"
            action = actions.get(key.replace("-", "_"))
            shown = _shown(key)
            if action is None:
                raise UserError(f"{place}: there is no option `{shown}`.{_did_you_mean(key, actions)}")
            if action.dest in given:
                raise UserError(f"{place}: `{shown}` was given before; remove one of the two lines.")
            given.add(action.dest)
            self.set_defaults(**{action.dest: self._value_of(action, node, f"{place}: `{shown}`")})
            action.required = False

    def _value_of(self, action: argparse.Action, node: yaml.Node, place: str) -> Any:
        try:
            return self._get_values(action, _words(node, action))
        except (argparse.ArgumentError, ValueError, TypeError, yaml.YAMLError) as error:
            reason = error.message if isinstance(error, argparse.ArgumentError) else error
            raise UserError(f"{place}: {_shown(str(reason))}") from error

    def _actions_of_keys(self) -> dict[str, argparse.Action]:
        """Return the options that take a value, by their names as written in a YAML file."""
        return {
            flag.lstrip("-").replace("-", "_"): action
            for flag, action in self._option_string_actions.items()
            if flag.startswith("--") and action.nargs != 0 and action.dest not in ("config", "recipe")
        }

    def parse_words(self, words: list[str]) -> argparse.Namespace:
        """Read `words`, those of the command line after the program's name."""
        self._reject_unknown_options(words)
        namespace, unexpected = self.parse_known_args(words)
        if unexpected:
            self.error(f"unexpected argument `{unexpected[0]}`")
        return namespace

    def dataclasses_of(self, namespace: argparse.Namespace) -> tuple[Any, ...]:
        """One instance of each dataclass, in the order of `dataclass_types`, from the options that were read."""
        return tuple(self._build(dataclass_type, namespace) for dataclass_type in self.dataclass_types)

    def _reject_unknown_options(self, words: list[str]) -> None:
        # argparse reports a missing option before an unknown one, though a misspelt option causes both.
        for word in words:
            flag = word.split("=")[0]
            if word == "--":
                return
            if re.fullmatch(r"--(\w+[-_])?token", flag) and flag in self._option_string_actions:
                self.error(
                    f"`{flag}`: whoever lists this machine's processes reads a token there; make a new one and log in "
                    "by `hf auth login` or set HF_TOKEN"
                )
            if re.fullmatch(r"--\S+", flag) and flag not in self._option_string_actions:
                flags = [known for known in self._option_string_actions if "_" not in known]
                self.error(f"there is no option `{flag}`.{_did_you_mean(flag.replace('_', '-'), flags)}")

    def _build(self, dataclass_type: Callable[..., Any], namespace: argparse.Namespace) -> Any:
        values = {field.name: getattr(namespace, field.name) for field in _init_fields(dataclass_type)}
        for name, value in values.items():
            self._check_number(name, value)
        try:
            return dataclass_type(**values)
        except UserError as error:
            if len(str(error)) <= 2 * _LONGEST_SHOWN:
                raise
            raise UserError(f"{str(error)[: 2 * _LONGEST_SHOWN]} ...") from error
        except (ValueError, OverflowError, OSError) as error:
            # The classes check their values in `__post_init__`, and these come from the user.
            self.error(_shown(str(error)))

    def _check_number(self, name: str, value: Any) -> None:
        """Refuse what no option means: NaN, infinity, and integers that no library takes."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= _LARGEST:
                self.error(f"--{name.replace('_', '-')} {str(number)[:20]}: it has to be a number up to 2**63")

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a [`UserError`] instead of printing the usage of every option."""
        without_twins = re.sub(r"--\w*_\w*/(?=--)", "", message).removesuffix(".")
        end = "" if without_twins.endswith("?") else "."
        raise UserError(f"{without_twins}{end} See `{self.prog} --help`.")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Lists each option once, in its form with dashes, with its aliases and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "_" not in flag]
        if not flags:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(flags) + value


def _init_fields(dataclass_type: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(dataclass_type) if field.init]


def _declaring_class(dataclass_type: type, name: str) -> type:
    return next(owner for owner in dataclass_type.__mro__ if name in inspect.get_annotations(owner))


def _did_you_mean(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    closest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{closest[0]}`?" if closest else ""


def _shown(text: str) -> str:
    """On one line that can be read: what is shown may be a whole file."""
    line = printable(text)
    return line if len(line) <= _LONGEST_SHOWN else f"{line[:_LONGEST_SHOWN]} ..."


class _Loader(yaml.SafeLoader):
    """A safe loader that reads `1e-3` as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_mapping(path: Path) -> list[tuple[str, yaml.Node]]:
    """Return the keys of a YAML file, each with its value as a node, which knows its line and how it is written."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_FILE + 1)
        if len(text) > _LONGEST_FILE:
            raise UserError(
                f"`--config {path}` has more than {_LONGEST_FILE:,} characters, and is no file of options."
            )
        _check_events(path, text)
        root = yaml.compose(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"`--config {path}` cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"`--config {path}` is not YAML: {_shown(str(error))}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"`--config {path}` has to hold lines of the form `name: value`.")
    return [(str(key.value), value) for key, value in root.value]


def _check_events(path: Path, text: str) -> None:
    """Refuse what grows when it is put together: aliases, which stand for any size, and nesting without end."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        place = f"`--config {path}`, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{place}: write the value out in place of the alias *{_shown(event.anchor)}.")
        if depth > _DEEPEST:
            raise UserError(f"{place}: nested more than {_DEEPEST} deep, and no option is.")


def _words(node: yaml.Node, action: argparse.Action) -> list[str]:
    """Return a YAML value as the words that stand for it on a command line.

    A scalar is taken as it is written, because YAML reads `save_strategy: no` as `False`.
    """
    if node.tag == "tag:yaml.org,2002:null" or node.value == []:
        raise ValueError("has no value, give one or remove the line")
    if isinstance(node, yaml.MappingNode):
        return [json.dumps(yaml.load(yaml.serialize(node), _Loader))]
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:
            raise ValueError("holds a NUL character")
        return [node.value]
    if action.nargs not in ("+", "*"):
        raise ValueError("takes one value, got a list")
    return [word for item in node.value for word in _words(item, action)]


__all__ = ["CommandParser", "parse_arguments"]
