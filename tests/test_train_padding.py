"""Batches of texts of different lengths."""

import numpy as np
import pytest

from sigphi.train.padding import padded_tokens, padding_share, random_batches


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (9, 3), (2, 5), (1, 1)])
def test_batches_hold_each_row_once(num_rows, batch_size):
    batches = random_batches(num_rows, batch_size)
    assert sorted(row for rows in batches for row in rows) == list(range(num_rows))
    assert [len(rows) for rows in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches) == -(-num_rows // batch_size)


def test_the_order_depends_on_the_seed_alone():
    first, again, other = (np.concatenate(random_batches(50, 7, seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)


def test_padding_is_what_a_padded_matrix_holds():
    lengths = np.random.default_rng(0).integers(1, 60, 101)
    batches = random_batches(len(lengths), 8)
    padding = tokens = 0
    for rows in batches:
        longest = max(lengths[row] for row in rows)
        for row in rows:
            padding += sum(position >= lengths[row] for position in range(longest))
            tokens += longest
    assert padding_share(lengths, batches) == pytest.approx(padding / tokens)
    assert padded_tokens(lengths, batches).sum() == tokens


def test_equal_lengths_need_no_padding():
    assert padding_share(np.full(10, 7), random_batches(10, 4)) == 0.0
