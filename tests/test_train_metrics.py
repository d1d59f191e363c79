"""The metrics, each beside a naive twin, and beside scikit-learn or SciPy where these have it."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from sigphi.train.metrics import (
    chance_recall_at_k,
    confusion_counts,
    expected_calibration_error,
    fit_linear_probe,
    human_agreement,
    knn_scores,
    label_derangement,
    majority_share,
    per_class_scores,
    rank_correlation,
    recall_at_k,
    token_f1,
    top1_accuracy,
    words,
)


def naive_top1(scores: list[list[float]], targets: list[int]) -> float:
    right = 0
    for row, target in zip(scores, targets, strict=True):
        best = max(range(len(row)), key=lambda column: row[column])
        right += best == target
    return right / len(targets)


def naive_recall(scores: list[list[float]], relevant: list[list[bool]], k: int) -> float:
    found = 0
    for row, wanted in zip(scores, relevant, strict=True):
        ranked = sorted(range(len(row)), key=lambda column: -row[column])
        found += any(wanted[column] for column in ranked[:k])
    return found / len(scores)


def test_top1_equals_the_naive_one():
    scores, targets = torch.randn(40, 7), torch.randint(7, (40,))
    expected = naive_top1(scores.tolist(), targets.tolist())
    assert 0 < expected < 1
    assert top1_accuracy(scores, targets) == pytest.approx(expected)


def test_top1_of_known_scores():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6], [-3.0, -4.0]])
    assert top1_accuracy(scores, torch.tensor([1, 0, 0, 1])) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_recall_equals_the_naive_one_with_several_relevant_items(seed):
    torch.manual_seed(seed)
    scores, relevant = torch.randn(30, 12), torch.rand(30, 12) < 0.15
    relevant[0] = False
    assert (relevant.sum(1) > 1).any()
    ks = (1, 3, 5, 12)
    expected = {k: naive_recall(scores.tolist(), relevant.tolist(), k) for k in ks}
    assert recall_at_k(scores, relevant, ks) == pytest.approx(expected)


def test_recall_counts_a_query_once_and_one_without_relevant_items_as_missed():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    relevant = torch.tensor([[True, True, True], [False, False, True], [False, False, False]])
    assert recall_at_k(scores, relevant, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 2 / 3})


def test_a_k_beyond_the_candidates_counts_all_of_them():
    scores, relevant = torch.randn(4, 3), torch.tensor([[False, False, True]] * 3 + [[False] * 3])
    assert recall_at_k(scores, relevant, (10,)) == {10: 0.75}


def test_chance_recall_is_the_mean_over_every_order():
    relevant = torch.tensor([[True, False, False, False, True], [False, True, False, False, False], [False] * 5])
    orders = list(itertools.permutations(range(5)))
    for k, chance in chance_recall_at_k(relevant, (1, 2, 3, 10)).items():
        mean = sum(recall_at_k(torch.tensor([order] * 3).float(), relevant, (k,))[k] for order in orders) / len(orders)
        assert chance == pytest.approx(mean)


def test_chance_recall_with_only_relevant_items():
    assert chance_recall_at_k(torch.ones(2, 4, dtype=torch.bool), (1, 4)) == {1: 1, 4: 1}


def test_majority_share():
    assert majority_share(["cat"]) == 1
    assert majority_share(["cat", "dog", "cat", "frog"]) == 0.5
    values = random.Random(0).choices("abcd", weights=(5, 1, 1, 1), k=100)
    assert majority_share(values) == max(values.count(value) for value in set(values)) / 100


# Classification ------------------------------------------------------------------------------------------------------


def guesses(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets, of which two thirds agree."""
    targets = torch.randint(classes, (count,))
    return torch.where(torch.rand(count) < 2 / 3, targets, torch.randint(classes, (count,))), targets


def test_confusion_counts_equal_the_naive_ones_and_those_of_scikit_learn():
    predictions, targets = guesses(200, 7)
    naive = [[0] * 7 for _ in range(7)]
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        naive[target][prediction] += 1
    counts = confusion_counts(predictions, targets, 7)
    assert counts.tolist() == naive
    assert counts.tolist() == confusion_matrix(targets, predictions, labels=range(7)).tolist()


def test_class_scores_equal_the_naive_ones_and_those_of_scikit_learn():
    predictions, targets = guesses(200, 7)
    scores = per_class_scores(confusion_counts(predictions, targets, 7))
    for own in range(7):
        hits = sum(p == t == own for p, t in zip(predictions.tolist(), targets.tolist(), strict=True))
        precision, recall = hits / int((predictions == own).sum()), hits / int((targets == own).sum())
        assert scores["precision"][own].item() == pytest.approx(precision)
        assert scores["recall"][own].item() == pytest.approx(recall)
        assert scores["f1"][own].item() == pytest.approx(2 * precision * recall / (precision + recall))
    expected = precision_recall_fscore_support(targets, predictions, labels=range(7))
    assert list(scores) == ["precision", "recall", "f1", "support"]
    for values, reference in zip(scores.values(), expected, strict=True):
        np.testing.assert_allclose(values, reference)


def test_undefined_class_scores_are_nan_as_in_scikit_learn():
    # Class 2 is never predicted, class 3 never true, class 4 neither.
    predictions, targets = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2, 2])
    scores = per_class_scores(confusion_counts(predictions, targets, 5))
    expected = precision_recall_fscore_support(targets, predictions, labels=range(5), zero_division=np.nan)
    for values, reference in zip(scores.values(), expected, strict=True):
        np.testing.assert_allclose(values, reference)
    assert scores["precision"].isnan().tolist() == [False, False, True, False, True]
    assert scores["recall"].isnan().tolist() == [False, False, False, True, True]
    assert scores["f1"].isnan().tolist() == [False, False, False, False, True]


def naive_calibration_error(confidences: list[float], correct: list[bool], num_bins: int) -> float:
    error = 0.0
    for number in range(num_bins):
        inside = [
            (confidence, right)
            for confidence, right in zip(confidences, correct, strict=True)
            if number / num_bins < confidence <= (number + 1) / num_bins or number == 0 and confidence == 0
        ]
        if inside:
            confidence, right = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            error += len(inside) / len(confidences) * abs(confidence - right)
    return error


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_calibration_error_equals_the_naive_one_and_that_of_scikit_learn(num_bins):
    confidences = torch.rand(300, dtype=torch.float64)
    correct = torch.rand(300) < confidences**2
    error = expected_calibration_error(confidences, correct, num_bins)
    assert error == pytest.approx(naive_calibration_error(confidences.tolist(), correct.tolist(), num_bins))
    shares, means = calibration_curve(correct, confidences, n_bins=num_bins)
    sizes = np.histogram(confidences, bins=num_bins, range=(0, 1))[0]
    assert error == pytest.approx((sizes[sizes > 0] / 300 * abs(shares - means)).sum())


def test_calibration_error_of_known_confidences():
    sure_and_right = torch.ones(4, dtype=torch.bool)
    assert expected_calibration_error(torch.ones(4), sure_and_right) == 0
    assert expected_calibration_error(torch.ones(4), ~sure_and_right) == 1
    assert expected_calibration_error(torch.zeros(4), ~sure_and_right) == 0
    # A bin holds its upper edge, so these two are in one, and their faults cancel.
    both = torch.tensor([0.2, 0.15], dtype=torch.float64)
    assert expected_calibration_error(both, torch.tensor([True, False]), 5) == pytest.approx((1 - 0.35) / 2)
    # Apart, they do not.
    apart = torch.tensor([0.2, 0.25], dtype=torch.float64)
    assert expected_calibration_error(apart, torch.tensor([True, False]), 5) == pytest.approx((0.8 + 0.25) / 2)


def test_human_agreement_equals_the_naive_one():
    log_probs = torch.randn(50, 4).log_softmax(1)
    counts = torch.randint(0, 9, (50, 4))
    counts[:, 1] += 1
    counts[0] = torch.tensor([5, 5, 0, 0])  # either of the two is right
    log_probs[0] = torch.tensor([0.1, 0.6, 0.2, 0.1]).log()
    right, crosses, entropies, own, level = [], [], [], [], []
    for row, people in zip(log_probs.tolist(), counts.tolist(), strict=True):
        shares = [count / sum(people) for count in people]
        level.append([count == max(people) for count in people])
        right.append(level[-1][row.index(max(row))])
        crosses.append(-sum(share * log_prob for share, log_prob in zip(shares, row, strict=True)))
        entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
        own.append(-sum(math.exp(log_prob) * log_prob for log_prob in row))
    assert right[0] and 0 < sum(right) < 50
    assert human_agreement(log_probs, counts) == pytest.approx(
        {
            "human_top1": sum(right) / 50,
            "majority/human": max(sum(column) for column in zip(*level, strict=True)) / 50,
            "human_cross_entropy": sum(crosses) / 50,
            "human_entropy": sum(entropies) / 50,
            "uniform/human_cross_entropy": math.log(4),
            "human_entropy_correlation": spearmanr(entropies, own).statistic,
        }
    )


def test_nothing_is_nearer_to_people_than_their_own_shares():
    counts = torch.randint(1, 9, (30, 5))
    shares = counts / counts.sum(1, keepdim=True)
    best = human_agreement(shares.log(), counts)
    assert best["human_cross_entropy"] == pytest.approx(best["human_entropy"], rel=1e-6)
    assert best["human_top1"] == 1 and best["human_entropy_correlation"] == pytest.approx(1)
    uniform = human_agreement(torch.zeros(30, 5).log_softmax(1), counts)
    assert uniform["human_cross_entropy"] == pytest.approx(uniform["uniform/human_cross_entropy"])
    assert math.isnan(uniform["human_entropy_correlation"])


def test_rank_correlation_with_ties_is_that_of_scipy():
    first, second = torch.randint(5, (40,)), torch.randint(5, (40,)).double()
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    # What differs in the last bit alone is a tie.
    wobbling = first + 1e-15 * torch.rand(40, dtype=torch.float64)
    assert rank_correlation(wobbling, second) == pytest.approx(spearmanr(first, second).statistic)


# Classifiers on frozen embeddings ------------------------------------------------------------------------------------


def embeddings(count: int, dim: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions around one of each class, and the classes."""
    labels = torch.randint(classes, (count,))
    return F.normalize(torch.eye(classes, dim)[labels] + 0.5 * torch.randn(count, dim), dim=1), labels


def test_knn_equals_the_naive_one():
    (bank, labels), (queries, _) = embeddings(30), embeddings(11)
    scores = knn_scores(queries, bank, labels, 5, k=7, temperature=0.1, block_size=4)
    assert scores.shape == (11, 5)
    for query, votes in zip(queries, scores, strict=True):
        cosines = [float(query @ other) for other in bank]
        nearest = sorted(range(30), key=lambda row: -cosines[row])[:7]
        expected = [sum(math.exp(cosines[row] / 0.1) for row in nearest if labels[row] == own) for own in range(5)]
        assert votes.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 20])
def test_knn_is_that_of_scikit_learn(k):
    (bank, labels), (queries, _) = embeddings(80), embeddings(40)
    weighted = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = weighted.fit(bank.double(), labels).predict_proba(queries.double())
    scores = knn_scores(queries, bank, labels, 4, k=k)
    np.testing.assert_allclose(scores / scores.sum(1, keepdim=True), expected, rtol=1e-3, atol=1e-6)
    # At a high temperature every neighbor has the same vote.
    plain = KNeighborsClassifier(k, metric="cosine").fit(bank.double(), labels).predict_proba(queries.double())
    scores = knn_scores(queries, bank, labels, 4, k=k, temperature=1e6)
    np.testing.assert_allclose(scores / k, plain, atol=1e-4)


def test_knn_with_fewer_images_than_neighbors_asks_all_of_them():
    (bank, labels), (queries, _) = embeddings(3), embeddings(5)
    torch.testing.assert_close(knn_scores(queries, bank, labels, 4), knn_scores(queries, bank, labels, 4, k=3))


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_linear_probe_is_that_of_scikit_learn(l2):
    (features, labels), (queries, _) = embeddings(150), embeddings(40)
    weight, bias = fit_linear_probe(features, labels, 4, l2)
    expected = LogisticRegression(C=1 / (l2 * 150), tol=1e-8, max_iter=10_000).fit(features.double(), labels)
    np.testing.assert_allclose(weight, expected.coef_, atol=1e-3)
    probabilities = (queries.double() @ weight.t() + bias).softmax(1)
    np.testing.assert_allclose(probabilities, expected.predict_proba(queries.double()), atol=1e-4)


def test_no_step_improves_the_linear_probe():
    features, labels = embeddings(60)
    weight, bias = fit_linear_probe(features, labels, 4, l2=1e-2)

    def naive_loss(weight: torch.Tensor, bias: torch.Tensor) -> float:
        total = 0.0
        for row, label in zip(features.double(), labels.tolist(), strict=True):
            scores = [float(weight[own] @ row + bias[own]) for own in range(4)]
            total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
        return total / 60 + 1e-2 / 2 * sum(float(value) ** 2 for value in weight.flatten())

    best = naive_loss(weight, bias)
    for _ in range(10):
        step = 1e-2 * torch.randn(4, 6, dtype=torch.float64), 1e-2 * torch.randn(4, dtype=torch.float64)
        assert naive_loss(weight + step[0], bias + step[1]) > best


def test_the_linear_probe_says_when_it_was_stopped_early(caplog):
    features, labels = embeddings(60)
    with torch.no_grad():
        fit_linear_probe(features, labels, 4)
    assert not caplog.text
    fit_linear_probe(features, labels, 4, max_iterations=2)
    assert "stopped at a slope of" in caplog.text


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The dog is brown.", "the DOG is brown", 1.0),
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("", "", 0.0),
        ("a brown dog", "a dog", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        # A word counts as often as both have it.
        ("dog dog dog", "dog", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("dog dog", "dog dog cat", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
    ],
)
def test_token_f1_of_known_sentences(answer, reference, expected):
    assert token_f1(answer, reference) == pytest.approx(expected)
    assert token_f1(reference, answer) == pytest.approx(expected)


def naive_token_f1(answer: list[str], reference: list[str]) -> float:
    left, shared = list(reference), 0
    for word in answer:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(answer) + len(reference))


def test_token_f1_equals_the_naive_one():
    rng = random.Random(0)
    for _ in range(50):
        answer, reference = (rng.choices("abcde", k=rng.randint(1, 9)) for _ in range(2))
        assert token_f1(" ".join(answer), ", ".join(reference)) == pytest.approx(naive_token_f1(answer, reference))


def test_words_are_lower_case_and_without_punctuation():
    assert words("It's a Dog, isn't-it? 2 of 3!") == ["it's", "a", "dog", "isn't", "it", "2", "of", "3"]


@pytest.mark.parametrize("seed", range(10))
def test_label_derangement_changes_every_label(seed):
    rng = random.Random(seed)
    labels = [rng.randrange(10) for _ in range(101)]
    permutation = label_derangement(labels, seed)
    assert sorted(permutation.tolist()) == list(range(101))
    assert all(labels[new] != labels[old] for old, new in enumerate(permutation))


def test_every_other_label_takes_the_place_of_a_label_about_equally_often():
    labels = np.repeat(np.arange(10), 500)
    taken = labels[label_derangement(labels.tolist(), 0)]
    counts = np.array([[np.sum(taken[labels == old] == new) for new in range(10)] for old in range(10)])
    # 500 draws over nine labels: 55.6 each, with a standard deviation of 7.
    assert (counts.diagonal() == 0).all()
    assert (np.abs(counts[~np.eye(10, dtype=bool)] - 500 / 9) < 35).all()


@pytest.mark.parametrize("seed", range(10))
def test_label_derangement_works_up_to_half_in_one_class(seed):
    labels = [3, 3, 3, 0, 1, 2]
    permutation = label_derangement(labels, seed)
    assert sorted(permutation.tolist()) == list(range(6))
    assert all(labels[new] != labels[old] for old, new in enumerate(permutation))


def test_label_derangement_depends_on_the_seed_alone():
    labels = [index % 5 for index in range(50)]
    first, again, other = (label_derangement(labels, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_label_derangement_refuses_a_class_with_more_than_half():
    with pytest.raises(ValueError, match="3 of 5 elements in one class"):
        label_derangement([1, 1, 1, 0, 2], 0)


def test_label_derangement_of_nothing():
    assert label_derangement([], 0).tolist() == []
