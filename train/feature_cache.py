"""Features of a frozen tower, computed once and kept in a memory-mapped file that later runs read again."""

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from sigphi.train.errors import UserError
from sigphi.train.fingerprints import digest, tensor_bytes

logger = logging.getLogger(__name__)

# What a name stands for changes with it: raise it when the same inputs give other features.
FORMAT = 1
_TENSOR = "features"
# Row numbers and the features of these rows.
Parts = Iterable[tuple[Sequence[int], torch.Tensor]]
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def cached_features(
    option: str,
    folder: str | None,
    about: dict[str, Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    compute: Callable[[], Parts],
) -> torch.Tensor:
    """
    The features that `about` describes: from their file, or computed and written to it.

    The file is a safetensors file with one tensor, `features`, and `about` in its header. It is written beside its
    name and renamed when it is whole, so that other processes see all of it or nothing.

    Args:
        option (`str`): what switches the cache on and off, such as `"--text-cache"`; `{option}-dir` names the folder.
        folder (`str`, *optional*): where the file lies; by default `sigphi` in the cache folder of Hugging Face.
        about (`dict`): everything that the features depend on, as JSON; the file is named after its hash. `"kind"`
            begins the name.
        shape (`Sequence[int]`): of the features; the first number is that of the rows.
        dtype (`torch.dtype`): float32 or bfloat16.
        compute (`Callable`): loads the tower and gives row numbers with their features, each row once. Only called
            where there is no file.

    Returns:
        `torch.Tensor` of that shape and type, on the CPU, mapped from the file: rows are read when they are used.

    Raises:
        UserError: if the file cannot be written.
    """
    about = {"format": FORMAT, **about}
    path = cache_folder(folder) / f"{about['kind']}-{_name(about)}.safetensors"
    features = _read(path, shape, dtype)
    if features is None:
        check_folder(option, folder)
        with _write_errors(option, path.parent):
            _check_room(path.parent, shape, dtype)
        parts = compute()  # what fails while the tower loads is no fault of the folder
        with _write_errors(option, path.parent):
            _write(path, about, shape, dtype, parts)
        features = _read(path, shape, dtype)
        assert features is not None, f"{path} has just been written"
    logger.info("features of %d %ss: %s", len(features), about["kind"], path)
    return features


def cache_folder(folder: str | None) -> Path:
    """`folder`, or by default `sigphi` in the cache folder of Hugging Face (`HF_HOME`)."""
    return Path(constants.HF_HOME, "sigphi") if folder is None else Path(folder).expanduser()


def check_folder(option: str, folder: str | None) -> None:
    """Raise a [`UserError`] if no file can be made in the folder; arguments as of [`cached_features`]."""
    place = cache_folder(folder)
    with _write_errors(option, place):
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f"{uuid.uuid4().hex}.tmp"
        probe.touch()
        probe.unlink()


def _name(about: dict[str, Any]) -> str:
    return digest([json.dumps(about, sort_keys=True).encode()])[:32]


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _read(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """The features of a file; `None` where it is missing or not what its name promises."""
    if not path.exists():
        return None
    try:
        # Checks the header, and that the file ends where the header says.
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor(_TENSOR)
    except SafetensorError as error:
        logger.warning("%s is damaged (%s): its features are computed again", path, error)
        return None
    if features.shape != torch.Size(shape) or features.dtype != dtype:
        logger.warning(
            "%s holds %s of shape %s: its features are computed again", path, features.dtype, tuple(features.shape)
        )
        return None
    return features


@contextlib.contextmanager
def _write_errors(option: str, folder: Path) -> Iterator[None]:
    """What goes wrong within it is the folder's fault, and the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}-dir {folder}: cannot be written ({error.strerror or error}).\n"
            f"Name another folder, or do without the file: {option} off."
        ) from error


def _check_room(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise an `OSError` if a file of this size has no room in `folder`, before hours go into its content."""
    needed, free = _num_bytes(shape, dtype), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")


def _header(about: dict[str, Any], shape: Sequence[int], dtype: torch.dtype) -> bytes:
    """
    What a safetensors file with one tensor has in front of its numbers.

    The library's own writer needs the whole tensor in memory; the format (a length, JSON, the numbers) is documented.
    """
    content = {
        "__metadata__": {"about": json.dumps(about, sort_keys=True)},
        _TENSOR: {
            "dtype": _SAFETENSORS_TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [0, _num_bytes(shape, dtype)],
        },
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, about: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, parts: Parts) -> None:
    """Write the rows as they come: memory holds one part at a time, and a full disk is an error, no signal."""
    size = _num_bytes(shape, dtype) / 1e6
    logger.info("computing the features of %d %ss once, %.1f MB", shape[0], about["kind"], size)
    header, row_bytes, num_rows = _header(about, shape, dtype), _num_bytes(shape[1:], dtype), 0
    # Another process may be writing the same: each has a file of its own, and the last one's stays.
    partial = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for rows, features in parts:
                assert features.dtype == dtype and features.shape == (len(rows), *shape[1:]), features.shape
                for row, values in zip(rows, features, strict=True):
                    file.seek(len(header) + row * row_bytes)
                    file.write(tensor_bytes(values))
                num_rows += len(rows)
            assert num_rows == shape[0], f"{num_rows} of {shape[0]} rows were computed"
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["cache_folder", "cached_features", "check_folder"]
