"""Which texts belong to which images."""

import random
from typing import Any

import pytest
import torch

from sigphi.train.judging import SAYS_NOTHING
from sigphi.train.pairs import pair_ids, pair_masks, stable_id, text_key


def masks(rows: list[dict], facts: dict[str, str], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return pair_masks(**pair_ids(rows, facts), **options)


def naive_pair_masks(rows: list[dict], facts: dict[str, str]) -> tuple[list[list[bool]], list[list[bool]]]:
    positives, ignored = [], []
    for row in rows:
        positive_row, ignored_row = [], []
        for key, fact in facts.items():
            has_text = any(text.strip().lower() == key for text in row["texts"])
            states_it = any(own == fact for own in row["known"])
            knows = any(own.split("=")[0] == fact.split("=")[0] for own in row["known"])
            positive_row.append(has_text or states_it)
            ignored_row.append(fact != "" and not knows and not (has_text or states_it))
        positives.append(positive_row)
        ignored.append(ignored_row)
    return positives, ignored


def random_rows(rng: random.Random, num_rows: int) -> tuple[list[dict], dict[str, str]]:
    statements = [(f"It is a {name}.", f"object={name}") for name in ("cat", "dog", "ship")]
    statements += [(f"A {name} is here.", f"object={name}") for name in ("cat", "dog", "ship")]
    statements += [(f"The color is {name}.", f"color={name}") for name in ("red", "blue")]
    statements += [("A nice picture.", ""), ("Hard to say.", "")]
    rows, facts = [], {}
    for _ in range(num_rows):
        chosen = rng.sample(statements, rng.randint(1, 4))
        known = {fact for _, fact in chosen if fact} | set(rng.sample(["color=red", "size=big"], rng.randint(0, 2)))
        rows.append({"texts": [text for text, _ in chosen], "known": sorted(known)})
        for text, fact in chosen:
            facts.setdefault(text_key(text), fact)
    return rows, facts


@pytest.mark.parametrize("seed", range(10))
def test_with_ignored_duplicates_only_the_texts_of_an_image_are_its_positives(seed):
    rows, facts = random_rows(random.Random(seed), 8)
    naive_positives, naive_ignored = naive_pair_masks(rows, facts)
    positives, ignored = masks(rows, facts, duplicates="ignored")
    own = [[key in {text_key(text) for text in row["texts"]} for key in facts] for row in rows]
    assert positives.tolist() == own
    assert torch.equal(ignored, (torch.tensor(naive_ignored) | torch.tensor(naive_positives)) & ~torch.tensor(own))


@pytest.mark.parametrize("seed", range(10))
def test_pair_masks_equal_the_naive_ones(seed):
    rows, facts = random_rows(random.Random(seed), 8)
    positives, ignored = masks(rows, facts)
    assert positives.dtype == ignored.dtype == torch.bool
    expected = naive_pair_masks(rows, facts)
    assert (positives.tolist(), ignored.tolist()) == expected
    assert not (positives & ignored).any()


def test_a_fact_in_other_words_is_a_positive_and_an_unknown_attribute_is_ignored():
    rows = [
        {"texts": ["It is a cat."], "known": ["object=cat"]},
        {"texts": ["A cat is here."], "known": ["object=cat"]},
        {"texts": ["It is a dog."], "known": ["object=dog"]},
        {"texts": ["The color is red."], "known": ["color=red"]},
        {"texts": ["A nice picture."], "known": []},
    ]
    facts = {text_key(row["texts"][0]): "".join(row["known"]) for row in rows}
    positives, ignored = masks(rows, facts)
    assert positives.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    # What states nothing is a negative of all others; what states a color says nothing of images without a color.
    assert ignored.int().tolist() == [
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
    ]


def test_a_fact_that_no_text_of_the_image_states_counts_too():
    rows = [
        {"texts": ["A nice picture of a cat."], "known": ["object=cat", "color=red"]},
        {"texts": ["It is blue."], "known": ["color=blue"]},
        {"texts": ["It is red."], "known": ["color=red"]},
    ]
    facts = {"a nice picture of a cat.": "", "it is blue.": "color=blue", "it is red.": "color=red"}
    positives, ignored = masks(rows, facts)
    assert positives.int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert not ignored.any()


def test_what_says_nothing_of_an_image_is_ignored_for_every_image():
    rows = [
        {"texts": ["I cannot tell.", "It is a cat."], "known": ["object=cat"]},
        {"texts": ["It is a dog.", "I cannot tell."], "known": ["object=dog"]},
        {"texts": ["A nice picture."], "known": []},
    ]
    facts = {"i cannot tell.": SAYS_NOTHING, "it is a cat.": "object=cat", "a nice picture.": ""}
    positives, ignored = masks(rows, facts)
    assert positives.int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert ignored.int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_no_rows_and_no_texts_give_empty_masks():
    rows, facts = random_rows(random.Random(0), 3)
    ids = pair_ids(rows, facts)
    assert [mask.shape for mask in pair_masks(ids["image_ids"], ids["text_ids"][:0])] == [(3, 0)] * 2
    assert [mask.shape for mask in pair_masks(ids["image_ids"][:0], ids["text_ids"])] == [(0, len(facts))] * 2
    assert pair_ids([{"texts": ["A cat."], "known": []}], {})["text_ids"].shape == (0, 3)


def test_ids_are_the_same_in_every_process_and_differ_by_kind():
    assert (
        stable_id("text", "a cat.") == 235250216269976138
    )  # written down, because Python's own hashes differ between processes
    assert stable_id("text", "a cat.") != stable_id("fact", "a cat.")
    assert stable_id("fact", "") == 0
