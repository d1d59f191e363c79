"""`sigphi verify`: compare the files of a model with the hashes that were recorded when it was published.

```bash
sigphi verify alice/cifar10-vlm --revision 0123456789abcdef0123456789abcdef01234567
sigphi verify alice/cifar10-vlm --input-csv test.csv
```
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig
from transformers.hf_argparser import HfArg

from sigphi.configuration.hub_code import hub_files
from sigphi.hub_card.files import read_json
from sigphi.hub_card.release import RECORD, changed_files, release_files
from sigphi.train.arguments import PairsArguments
from sigphi.train.checkpoints import looks_like_path, read_config
from sigphi.train.encoder_options import EncoderEvaluationArguments
from sigphi.train.errors import UserError, printable
from sigphi.train.evaluation import EvaluateArguments, evaluate_as_asked
from sigphi.train.parser import parse_arguments
from sigphi.train.push import LOADERS, loading_line
from sigphi.train.records import EVAL_RESULTS

# What a shell is told when a file or a figure differs; 2 is for mistakes in the command.
DIFFERS = 1


@dataclass
class VerifyArguments:
    """What is compared with what."""

    _argument_group_name = "verify"

    revision: str | None = HfArg(
        help="Branch, tag or commit of a repository; by default its main branch.", default=None
    )
    record: str | None = HfArg(
        help="The file_hashes.json to compare with: one that you kept, instead of the one that comes with the model.",
        default=None,
    )
    tolerance: float = HfArg(
        help="With --input-csv or --dataset: by how much a figure may differ from the recorded one.", default=0.005
    )

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise UserError(f"--tolerance must be 0 or more, got {self.tolerance}.")


@dataclass
class FiguresArguments(PairsArguments):
    """What the figures are computed on again; without --input-csv and --dataset they are not."""

    _argument_group_name = "figures"

    def check_source(self) -> None:
        """As that of [`PairsArguments`], but nothing may be given too."""
        if self.input_csv or self.dataset is not None:
            super().check_source()


def local_copy(name: str, revision: str | None) -> Path:
    """
    A folder with the files of a model; those of a repository are downloaded into the cache.

    Args:
        name (`str`): a folder or Hub id.
        revision (`str`, *optional*): of a Hub id.

    Raises:
        UserError: if there is no such model, or the Hub cannot be reached.
    """
    if looks_like_path(name):
        if revision is not None:
            raise UserError(f"--revision {revision} is for a repository, and {name} is a folder; leave it out.")
        if not Path(name).is_dir():
            raise UserError(f"MODEL {name}: there is no such folder; give a folder or the id of a repository.")
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision))
    except (OSError, HFValidationError) as error:  # those of huggingface_hub are OSErrors
        at = "" if revision is None else f" at {revision}"
        raise UserError(
            f"MODEL {name}{at}: cannot be read from the Hub ({type(error).__name__}). Check the name, and that the "
            "Hub can be reached."
        ) from error


def read_record(folder: Path, record: str | None) -> dict[str, str]:
    """
    The recorded hashes by the names of files.

    Args:
        folder (`Path`): where `file_hashes.json` is.
        record (`str`, *optional*): another file of this kind.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    path = folder / RECORD if record is None else Path(record)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in content["sha256"].items()}
    except FileNotFoundError as error:
        what = f"--record {record}" if record else f"MODEL: it has no {RECORD}, which `sigphi push` writes"
        raise UserError(f"{what}: there is nothing to compare with. Give a file of hashes by --record.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no record of hashes ({type(error).__name__}); give another by --record."
        ) from error


def files_of_model(folder: Path) -> list[str]:
    """Every file of a folder but those of the Hub's client, without the checkpoints of a training."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    others = (".", "checkpoint-", "__pycache__")
    return [path.as_posix() for path in paths if not path.parts[0].startswith(others)]


def other_code(folder: Path, config: PreTrainedConfig) -> list[str]:
    """The Python files of a model that are not those which the sigphi that is installed here would ship with it."""
    shipped = hub_files(name.rpartition(".")[0] for name in type(config).hub_auto_map.values())
    names = [name for name in release_files(folder)[0] if name.endswith(".py")]
    return [name for name in names if shipped.get(name) != (folder / name).read_text(encoding="utf-8")]


def differing_figures(
    recorded: dict[str, Any], computed: dict[str, Any], tolerance: float
) -> list[tuple[str, float, float]]:
    """
    Figures that two evaluations have in common and that differ.

    Args:
        recorded (`dict`): content of `eval_results.json`.
        computed (`dict`): the same, computed anew.
        tolerance (`float`): by how much they may differ.

    Returns:
        `list[tuple[str, float, float]]`: name, recorded and computed value.
    """
    numbers = {name: value for name, value in recorded.items() if isinstance(value, (int, float))}
    pairs = [(name, float(value), float(computed[name])) for name, value in numbers.items() if name in computed]
    return [pair for pair in pairs if not math.isclose(pair[1], pair[2], rel_tol=0, abs_tol=tolerance)]


def evaluate_again(folder: Path, arguments: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The recorded figures of a model, and the same computed anew, in a copy: the cache stays as it is.

    Args:
        folder (`Path`): the model's.
        arguments (`tuple`): those of [`evaluate_as_asked`] after the model.

    Raises:
        UserError: if no figures are recorded, or the questions do not go with the model.
    """
    if not (folder / EVAL_RESULTS).exists():
        raise UserError(f"MODEL has no {EVAL_RESULTS}, so there are no figures to compare with; leave out the data.")
    recorded = read_json(folder / EVAL_RESULTS)
    with tempfile.TemporaryDirectory(prefix="sigphi-") as place:
        for name in release_files(folder)[0]:
            path = Path(place, name)
            path.parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                path.symlink_to((folder / name).resolve())
            else:
                path.write_bytes((folder / name).read_bytes())
        return recorded, evaluate_as_asked(place, *arguments)


def main(argv: list[str]) -> None:
    """`sigphi verify MODEL`: name every file that differs from its record, and end with 1 if there is one."""
    options, data, evaluation, encoder, model = parse_arguments(
        [VerifyArguments, FiguresArguments, EvaluateArguments, EncoderEvaluationArguments],
        argv,
        "sigphi verify",
        [("model", None, "a folder or Hub id")],
    )
    folder = local_copy(model, options.revision)
    hashes = read_record(folder, options.record)
    config = read_config(str(folder), "MODEL", *LOADERS)
    wrong = _compare_files(folder, hashes, config)
    if wrong:
        sys.exit(DIFFERS)
    if data.input_csv or data.dataset is not None:
        recorded, computed = evaluate_again(folder, (data, evaluation, encoder))
        if _compare_figures(recorded, computed, options.tolerance):
            sys.exit(DIFFERS)
    if not looks_like_path(model):
        sys.stdout.write(f"{loading_line(config.model_type, model, folder.name)}\n")


def _compare_files(folder: Path, hashes: dict[str, str], config: PreTrainedConfig) -> dict[str, str]:
    """Write which files differ, and whose the code is; see [`changed_files`]."""
    wrong = changed_files(folder, hashes, files_of_model(folder))
    for name, what in wrong.items():
        sys.stdout.write(f"{what}: {printable(name)}\n")
    sys.stdout.write(f"{len(hashes)} files recorded, {len(wrong)} differ\n")
    others = [name for name in other_code(folder, config) if name not in wrong]
    if others:
        sys.stdout.write(f"not as the sigphi installed here ships it: {printable(', '.join(others))}\n")
    return wrong


def _compare_figures(recorded: dict[str, Any], computed: dict[str, Any], tolerance: float) -> bool:
    """Write which figures differ, and return whether any does."""
    differing = differing_figures(recorded, computed, tolerance)
    for name, before, now in differing:
        sys.stdout.write(f"{printable(name)}: recorded {before:.4f}, now {now:.4f}\n")
    compared = sum(isinstance(recorded[name], (int, float)) for name in recorded.keys() & computed.keys())
    sys.stdout.write(f"{compared} figures compared, {len(differing)} differ by more than {tolerance}\n")
    return bool(differing)


__all__ = [
    "FiguresArguments",
    "VerifyArguments",
    "changed_files",
    "differing_figures",
    "local_copy",
    "main",
    "other_code",
]
