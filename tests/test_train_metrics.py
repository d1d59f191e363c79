"""The metrics, each beside a naive twin."""

import random

import numpy as np
import pytest
import torch

from sigphi.train.metrics import (
    label_derangement,
    majority_share,
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


def test_majority_share():
    assert majority_share(["cat"]) == 1
    assert majority_share(["cat", "dog", "cat", "frog"]) == 0.5
    values = random.Random(0).choices("abcd", weights=(5, 1, 1, 1), k=100)
    assert majority_share(values) == max(values.count(value) for value in set(values)) / 100


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


def test_label_derangement_works_up_to_half_in_one_class():
    labels = [3, 3, 3, 0, 1, 2]
    permutation = label_derangement(labels, 0)
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
