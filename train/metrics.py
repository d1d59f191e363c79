"""Metrics as pure functions on tensors and strings."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch


def top1_accuracy(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """
    Share of rows whose highest score is at the target.

    Args:
        scores (`torch.Tensor` of shape `(rows, classes)`): any scores that rank.
        targets (`torch.LongTensor` of shape `(rows,)`): the right class of each row.
    """
    return (scores.argmax(1) == targets).float().mean().item()


def recall_at_k(scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int]) -> dict[int, float]:
    """
    Share of queries with a relevant item among the k best-scored, for each k.

    Several items may be relevant to a query (duplicate-aware retrieval). Depends on how many candidates there are: not
    for comparing across candidate sets of different sizes.

    Args:
        scores (`torch.Tensor` of shape `(queries, candidates)`): similarities.
        relevant (`torch.BoolTensor` of shape `(queries, candidates)`): which candidates answer which query.
        ks (`Sequence[int]`): the cut-offs; one beyond the number of candidates counts all of them.
    """
    order = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices  # (queries, max k)
    hits = relevant.gather(1, order)  # (queries, max k)
    return {k: hits[:, :k].any(1).float().mean().item() for k in ks}


def majority_share(values: Sequence[str]) -> float:
    """Accuracy of always giving the commonest of `values`: what a model that sees nothing can reach."""
    return Counter(values).most_common(1)[0][1] / len(values)


def token_f1(answer: str, reference: str) -> float:
    """
    F1 of the words shared by answer and reference, as in SQuAD (Rajpurkar et al., arXiv 1606.05250, section 6.1).

    Measures wording, not truth: a wrong colour in an otherwise equal sentence costs one word. Not for accuracy.
    """
    given, expected = Counter(words(answer)), Counter(words(reference))
    shared = (given & expected).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / given.total(), shared / expected.total()
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """Lower-case words of `text`, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def has_label_derangement(labels: Sequence[int]) -> bool:
    """Whether a permutation exists in which no element keeps its label: no label has more than half of them."""
    return 2 * max(Counter(labels).values(), default=0) <= len(labels)


def label_derangement(labels: Sequence[int], seed: int) -> np.ndarray:
    """
    A random permutation in which no element keeps its label.

    The elements are sorted by label (in a seeded order within each) and shifted by the size of the largest class.

    Args:
        labels (`Sequence[int]`): the label of each element.
        seed (`int`): decides the order within each label.

    Returns:
        `np.ndarray` of shape `(len(labels),)`: for each position the position to take instead.

    Raises:
        ValueError: if one label has more than half of the elements, so that there is no such permutation.
    """
    array = np.asarray(labels)
    largest = max(Counter(labels).values(), default=0)
    if not has_label_derangement(labels):
        raise ValueError(
            f"`labels` has {largest} of {len(array)} elements in one class; no permutation can change every label."
        )
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(array)), array))  # by label, random within
    permutation = np.empty(len(array), dtype=np.int64)
    permutation[order] = np.roll(order, largest)
    return permutation


__all__ = [
    "has_label_derangement",
    "label_derangement",
    "majority_share",
    "recall_at_k",
    "token_f1",
    "top1_accuracy",
    "words",
]
