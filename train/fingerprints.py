"""Hashes that tell one content from another: files, tensors, and what else a result depends on."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def digest(parts: Iterable[Any]) -> str:
    """A SHA-256 over bytes and other buffers, one behind the other, in hexadecimal."""
    value = hashlib.sha256()
    for part in parts:
        value.update(part)
    return value.hexdigest()


def folder_digest(folder: Path, patterns: Sequence[str]) -> str:
    """A hash over the names and contents of a folder's files that one of the glob patterns finds."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return digest(f"{path.relative_to(folder)} {file_digest(path)}\n".encode() for path in paths)


def file_digest(path: Path) -> str:
    """A SHA-256 over the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """For [`digest`]: name, type, shape and numbers of each tensor, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor as a buffer, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


__all__ = ["digest", "file_digest", "folder_digest", "tensor_bytes", "tensor_parts"]
