"""Metrics as pure functions on tensors and strings."""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


def top1_accuracy(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """
    Share of rows whose highest score is at the target.

    Args:
        scores (`torch.Tensor` of shape `(rows, classes)`): any scores that rank.
        targets (`torch.LongTensor` of shape `(rows,)`): the right class of each row.
    """
    return (scores.argmax(1) == targets).double().mean().item()


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
    return {k: hits[:, :k].any(1).double().mean().item() for k in ks}


def chance_recall_at_k(relevant: torch.Tensor, ks: Sequence[int]) -> dict[int, float]:
    """
    What [`recall_at_k`] is on average when the candidates are ranked at random.

    Of n candidates, r of them relevant, none is among the first k with probability `C(n - r, k) / C(n, k)`.

    Args:
        relevant (`torch.BoolTensor` of shape `(queries, candidates)`): which candidates answer which query.
        ks (`Sequence[int]`): the cut-offs.
    """
    num_candidates = relevant.shape[1]
    irrelevant = num_candidates - relevant.sum(1).double()  # (queries,)
    draws = torch.arange(min(max(ks), num_candidates))
    # The draws without replacement, one after the other: (queries, max k)
    missed = ((irrelevant[:, None] - draws).clamp(min=0) / (num_candidates - draws)).cumprod(1)
    return {k: 1 - missed[:, min(k, num_candidates) - 1].mean().item() for k in ks}


def majority_share(values: Sequence[str]) -> float:
    """Accuracy of always giving the commonest of `values`: what a model that sees nothing can reach."""
    return Counter(values).most_common(1)[0][1] / len(values)


# Classification ------------------------------------------------------------------------------------------------------


def confusion_counts(predictions: torch.Tensor, targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    How often each class was taken for which.

    Args:
        predictions, targets (`torch.LongTensor` of shape `(rows,)`): classes.
        num_classes (`int`): how many there are.

    Returns:
        `torch.LongTensor` of shape `(num_classes, num_classes)`: a row for each true class, a column for each
        predicted one.
    """
    cells = torch.bincount(targets * num_classes + predictions, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def per_class_scores(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Precision, recall, F1 and number of rows of each class, from [`confusion_counts`].

    Returns:
        `dict`: `precision`, `recall`, `f1` (float64) and `support` (int64), each of shape `(num_classes,)`. What is
        undefined is NaN: the precision of a class that was never predicted, the recall of one that has no row.
    """
    hits, support, predicted = counts.diagonal().double(), counts.sum(1), counts.sum(0)
    return {
        "precision": hits / predicted,
        "recall": hits / support,
        "f1": 2 * hits / (predicted + support),
        "support": support,
    }


def expected_calibration_error(confidences: torch.Tensor, correct: torch.Tensor, num_bins: int = 15) -> float:
    """
    Mean gap between confidence and accuracy over bins of equal width (Guo et al., arXiv 1706.04599, equation 3).

    Says nothing of accuracy: a model that gives every class its share of the data is calibrated.

    Args:
        confidences (`torch.Tensor` of shape `(rows,)`): probabilities, 0 to 1.
        correct (`torch.BoolTensor` of shape `(rows,)`): whether what was given this probability came true.
        num_bins (`int`, *optional*, defaults to 15): bin m of M holds the confidences in ((m - 1) / M, m / M].
    """
    confidences = confidences.double()
    inner_edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(confidences, inner_edges)  # (rows,)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, correct.double() - confidences)
    return gaps.abs().sum().item() / len(confidences)


def human_agreement(log_probs: torch.Tensor, human_counts: torch.Tensor) -> dict[str, float]:
    """
    How far the probabilities of a classifier are those of people who labelled the same images (Peterson et al., "Human
    uncertainty makes classification more robust", ICCV 2019).

    Args:
        log_probs (`torch.Tensor` of shape `(images, classes)`): log probabilities.
        human_counts (`torch.Tensor` of shape `(images, classes)`): how many people chose each class, at least one a
            row.

    Returns:
        `dict`: `human_top1`, the share of images whose likeliest class is the one that most people chose (one of them
        where several are level), beside `majority/human`, that of the best constant guess; `human_cross_entropy`, the
        mean of `-sum_c p_people(c) log p_model(c)` in nats, between `human_entropy`, which is its least value, and
        `uniform/human_cross_entropy`, that of equal probabilities; `human_entropy_correlation`, Spearman's between
        the entropies of model and people (NaN when one of them is constant): do they doubt the same images?
    """
    log_probs = log_probs.double()
    shares = human_counts.double() / human_counts.sum(1, keepdim=True)  # (images, classes)
    chosen_most = human_counts == human_counts.amax(1, keepdim=True)  # (images, classes)
    human_entropy = torch.special.entr(shares).sum(1)  # (images,)
    model_entropy = torch.special.entr(log_probs.exp()).sum(1)  # (images,)
    return {
        "human_top1": chosen_most.gather(1, log_probs.argmax(1, keepdim=True)).double().mean().item(),
        "majority/human": chosen_most.double().mean(0).max().item(),
        "human_cross_entropy": -(shares * log_probs).sum(1).mean().item(),
        "human_entropy": human_entropy.mean().item(),
        "uniform/human_cross_entropy": math.log(shares.shape[1]),
        "human_entropy_correlation": rank_correlation(human_entropy, model_entropy),
    }


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's correlation of two tensors of shape `(rows,)`, ties at their mean rank; NaN if one is constant."""
    # Sums of the same terms in another order differ in the last bits, which must not break a tie.
    ranks = [pd.Series(values.double().numpy()).round(12).rank() for values in (first, second)]
    return float(ranks[0].corr(ranks[1]))


# Classifiers on frozen embeddings ------------------------------------------------------------------------------------


def knn_scores(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block_size: int = 1024,
) -> torch.Tensor:
    """
    Votes of the k nearest neighbors, each with the weight `exp(cosine / temperature)` (Wu et al., arXiv 1805.01978,
    section 3.4; k as in DINO, Caron et al., arXiv 2104.14294).

    Args:
        queries (`torch.Tensor` of shape `(queries, dim)`): L2-normalised embeddings to classify.
        bank (`torch.Tensor` of shape `(bank, dim)`): L2-normalised embeddings with known classes.
        bank_labels (`torch.LongTensor` of shape `(bank,)`): these classes.
        num_classes (`int`): how many there are.
        k (`int`, *optional*, defaults to 20): neighbors that vote; all when the bank has fewer.
        temperature (`float`, *optional*, defaults to 0.07): small: the nearest decide.
        block_size (`int`, *optional*, defaults to 1024): queries compared with the bank at once.

    Returns:
        `torch.Tensor` of shape `(queries, num_classes)`, float32.
    """
    votes = torch.zeros(len(queries), num_classes)
    for start in tqdm(range(0, len(queries), block_size), desc="kNN", disable=None, leave=False):
        rows = slice(start, start + block_size)
        similarity = queries[rows] @ bank.t()  # (block, bank)
        similarity, neighbors = similarity.topk(min(k, len(bank)), dim=1)  # (block, k)
        votes[rows].scatter_add_(1, bank_labels[neighbors], (similarity / temperature).exp())
    return votes


@torch.enable_grad()
def fit_linear_probe(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, l2: float = 1e-4, max_iterations: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Multinomial logistic regression: the least mean cross-entropy plus `l2 / 2` times the squared weights.

    The same as scikit-learn's `LogisticRegression(C=1 / (l2 * rows))`. Starts from zeros, so that it depends on
    nothing but its arguments; by L-BFGS in float64.

    Args:
        features (`torch.Tensor` of shape `(rows, dim)`): what to classify by.
        labels (`torch.LongTensor` of shape `(rows,)`): the classes.
        num_classes (`int`): how many there are.
        l2 (`float`, *optional*, defaults to 1e-4): how much large weights cost; the bias is free.
        max_iterations (`int`, *optional*, defaults to 1000): a warning says when these were not enough.

    Returns:
        `tuple`: weight `(num_classes, dim)` and bias `(num_classes,)`, float64.
    """
    features = features.double()
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    tolerance = 1e-6
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    bar = tqdm(desc="linear probe", unit="step", disable=None, leave=False)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.t() + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        bar.update()
        return loss.item()

    optimizer.step(closure)
    bar.close()
    closure()
    slope = max(parameter.grad.abs().max().item() for parameter in (weight, bias) if parameter.grad is not None)
    if slope > tolerance:
        logger.warning("the linear probe stopped at a slope of %.1e, its figure may be low", slope)
    return weight.detach(), bias.detach()


# Texts ---------------------------------------------------------------------------------------------------------------


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
    A random permutation in which no element keeps its label; every other label takes its place about equally often.

    A uniform permutation is drawn; each element that keeps its label then trades its place with a random element for
    which the trade is right on both sides. While no label has more than half of the elements, there is one.

    Args:
        labels (`Sequence[int]`): the label of each element.
        seed (`int`): of every draw.

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
    permutation = rng.permutation(len(array))
    for kept in np.flatnonzero(array[permutation] == array):
        if array[permutation[kept]] == array[kept]:  # no earlier trade has changed it
            fits = np.flatnonzero((array != array[kept]) & (array[permutation] != array[kept]))
            other = rng.choice(fits)
            permutation[[kept, other]] = permutation[[other, kept]]
    return permutation


__all__ = [
    "chance_recall_at_k",
    "confusion_counts",
    "expected_calibration_error",
    "fit_linear_probe",
    "has_label_derangement",
    "human_agreement",
    "knn_scores",
    "label_derangement",
    "majority_share",
    "per_class_scores",
    "rank_correlation",
    "recall_at_k",
    "token_f1",
    "top1_accuracy",
    "words",
]
