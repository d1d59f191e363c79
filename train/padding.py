"""Batches of texts of different lengths: how much of them is padding, and how large the largest is."""

from collections.abc import Sequence

import numpy as np


def random_batches(num_rows: int, batch_size: int, seed: int = 0) -> list[np.ndarray]:
    """
    An epoch's batches in a random order, the last of which may be smaller.

    Returns:
        `list[np.ndarray]`: the rows of each batch, int64.
    """
    order = np.random.default_rng(seed).permutation(num_rows)
    return [order[start : start + batch_size] for start in range(0, num_rows, batch_size)]


def padded_tokens(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> np.ndarray:
    """
    Tokens of each batch, when all its rows are as long as its longest.

    Args:
        lengths (`np.ndarray` of shape `(rows,)`, int): tokens of each row.
        batches (`Sequence[np.ndarray]`): the rows of each batch.

    Returns:
        `np.ndarray` of shape `(batches,)`, int64.
    """
    return np.array([len(rows) * lengths[rows].max() for rows in batches])


def padding_share(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """The share of the tokens of all batches that is padding, 0 to 1; arguments as those of [`padded_tokens`]."""
    return 1.0 - sum(int(lengths[rows].sum()) for rows in batches) / float(padded_tokens(lengths, batches).sum())


__all__ = ["padded_tokens", "padding_share", "random_batches"]
