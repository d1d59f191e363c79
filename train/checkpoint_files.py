"""Checkpoint folders that are whole or not there: written aside, synced, renamed, and checked before they are read."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sigphi.hub_card.files import sync, write_whole
from sigphi.train.checkpoints import loading
from sigphi.train.errors import UserError, printable
from sigphi.train.fingerprints import file_digest

# In each checkpoint: the run that it is of, and its files with their sizes and hashes.
RECORD = "sigphi_run.json"
# Where the Trainer, FSDP and DeepSpeed keep the state of the optimizer.
_OPTIMIZER = ("optimizer*", "global_step*")
# Under the output folder: what is not whole yet. The Trainer's uploads to the Hub pass over names that begin so.
ASIDE = "_unfinished"


def seal(folder: Path, run: dict[str, Any]) -> None:
    """
    Bring a folder that is complete to the disk, with a record of its files.

    Args:
        folder (`Path`): of a checkpoint, not yet under its name.
        run (`dict`): what it is of, see [`describe_run`]; as JSON can hold it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    files = {}
    for path in paths:
        sync(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_digest(path)]
    content = json.dumps({"run": run, "files": files}, indent=2) + "\n"
    write_whole(folder / RECORD, content)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)


def publish(aside: Path, folder: Path) -> None:
    """Give a sealed folder its name. One that has the name, of which nobody can go on, is removed."""
    replaced = aside.with_name(f"{folder.name}.replaced")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(aside, folder)
    sync(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def move_files(aside: Path, folder: Path) -> None:
    """
    Bring a model's files to the disk and under their names, its `config.json` last: what has one is whole.

    That of an earlier model goes first: a kill in between leaves a mixture of two models, which does not load without.

    Args:
        aside (`Path`): where they were written, on the same file system; removed.
        folder (`Path`): where they belong. Files of the same names are replaced, others stay.
    """
    paths = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    for path in paths:
        sync(path)
    (folder / "config.json").unlink(missing_ok=True)
    sync(folder)
    for path in sorted(paths, key=lambda path: path == aside / "config.json"):
        target = folder / path.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    sync(folder)
    shutil.rmtree(aside)


def recorded_run(folder: Path) -> dict[str, Any]:
    """The run that a whole checkpoint is of, see [`describe_run`]."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))["run"]


def fault_of(folder: Path) -> str | None:
    """What keeps a checkpoint from being whole, or `None`. Reads all of its files."""
    try:
        files = _recorded_files(folder)
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"its file {name} is missing"
            if path.stat().st_size != size or file_digest(path) != digest:
                return f"its file {name} is damaged"
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        _check_types(state)
        if state.global_step != step_of(folder):
            return f"it was renamed: its {TRAINER_STATE_NAME} is of step {printable(str(state.global_step))[:50]}"
        if not any(True for pattern in _OPTIMIZER for _ in folder.glob(pattern)):
            return "it holds no state of the optimizer, as with --save-only-model"
    except FileNotFoundError as error:
        name = RECORD if error.filename is None else Path(str(error.filename)).name
        return f"it has no {name}: it was not written to its end, or not by this version of sigphi"
    # What a file holds that something else has written: no JSON, or JSON of another form, or nested without end.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {RECORD} or {TRAINER_STATE_NAME} cannot be read"
    return None


def _check_types(state: TrainerState) -> None:
    """Raise a `ValueError` if the log is no list, or something else than a number stands where numbers are added."""
    for name, default in vars(TrainerState()).items():
        kind = int | float if isinstance(default, int | float) else list if name == "log_history" else object
        if not isinstance(getattr(state, name), kind):
            raise ValueError(f"its {name} is of another type")


def _recorded_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of each file, by its name; raises one of several errors if the record is none."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record["run"], dict) or not isinstance(record["files"], dict):
        raise ValueError("the record is of another form")
    return {name: (size, digest) for name, (size, digest) in record["files"].items()}


def reading(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Within it a checkpoint whose files hold something else than they should, whatever its record says, is a
    [`UserError`]."""
    return loading(f"--resume {folder}", "Remove it, to go on from another one.")


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a folder, by their step, whole or not. By their names: clocks jump."""
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if name.fullmatch(path.name)]
    return sorted((path for path in folders if path.is_dir()), key=step_of)


def remove_old(newest: Path, limit: int | None, best: str | None) -> None:
    """
    Remove what a new checkpoint makes superfluous, the oldest first.

    Args:
        newest (`Path`): the new one, whole and under its name. What is of later steps stays.
        limit (`int`, *optional*): how many to keep; without it, or where it is not positive, all.
        best (`str`, *optional*): the checkpoint of the best evaluation, which stays too.
    """
    if limit is None or limit <= 0:
        return
    earlier = [path for path in checkpoints(newest.parent) if step_of(path) < step_of(newest)]
    kept = [path for path in earlier if best is not None and path.resolve() == Path(best).resolve()]
    others = [path for path in earlier if path not in kept]
    for path in others[: max(0, len(others) - max(0, limit - 1 - len(kept)))]:
        # Out of sight in one move: a folder that is half removed would be taken for a broken checkpoint.
        removed = path.parent / ASIDE / f"{path.name}.removed"
        os.replace(path, removed)
        shutil.rmtree(removed)


@contextlib.contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """
    Within it no other run may write into the folder; what a killed one has left unfinished there is removed.

    The saving of a model may be within its run: one that holds the folder already, in the same thread, takes it again.

    Raises:
        UserError: if another run is writing there, or if nothing can be written there.
    """
    aside = output_dir / ASIDE
    lock = FileLock(aside.resolve() / "lock", is_singleton=True)
    if lock.is_locked:
        yield
        return
    with write_errors(output_dir):
        aside.mkdir(parents=True, exist_ok=True)
        try:
            # The system lets go of it when the process ends, however that happens. A moment is what a run that is
            # refused holds it for.
            lock.acquire(timeout=1)
        except Timeout as error:
            raise UserError(
                f"--output-dir {output_dir}: another run is writing there. Wait for it, or name another folder."
            ) from error
    try:
        with write_errors(output_dir):
            for path in aside.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
        yield
    finally:
        # First the folder: whoever finds it gone makes a new one, with a lock of its own.
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def write_errors(output_dir: Path, remedy: str = "Make room or name another folder.") -> Iterator[None]:
    """Within it a file that cannot be written is a [`UserError`] that names the folder and the reason."""
    try:
        yield
    except OSError as error:
        reason: Any = error.strerror or error
    except SafetensorError as error:
        reason = error
    except RuntimeError as error:
        # torch.save has no error of its own for a full disk.
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        reason = "the disk is full, or the file cannot be written"
    else:
        return
    raise UserError(f"--output-dir {output_dir} cannot be written: {reason}. {remedy}")


__all__ = [
    "ASIDE",
    "RECORD",
    "checkpoints",
    "fault_of",
    "move_files",
    "publish",
    "reading",
    "recorded_run",
    "remove_old",
    "seal",
    "sole_run",
    "step_of",
    "write_errors",
]
