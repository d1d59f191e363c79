"""Answers in pieces: whatever comes of a text, and at whatever moment, is the text up to its stop string."""

import random
from typing import Any

import pytest
import torch

from sigphi.train.answer_stream import LEAST_LOGPROB, AnswerStream, TokenLogprobs, first_stop, held_back

END = 0


def stream_of(tokenizer: Any, stop: tuple[str, ...] = (), max_new_tokens: int = 1000) -> AnswerStream:
    return AnswerStream(tokenizer, 0, frozenset([tokenizer.eos_token_id]), max_new_tokens, stop)


def run(stream: AnswerStream, tokens: list[int]) -> list[str]:
    """The texts of the pieces; nothing follows the one that has a reason to end."""
    texts = []
    for token in tokens:
        piece = stream.add(token)
        if piece is not None:
            texts.append(piece.text)
            assert piece.finish_reason == stream.finish_reason
        if stream.finish_reason is not None:
            break
    return texts


def naive(text: str, stop: tuple[str, ...]) -> str:
    """The same of a whole text."""
    text = text.lstrip()
    for place in range(len(text)):
        if any(text.startswith(one, place) for one in stop):
            return text[:place].rstrip()
    return text.rstrip()


@pytest.mark.parametrize("seed", range(40))
def test_pieces_make_up_the_text_and_never_take_anything_back(tokenizer, seed):
    draw = random.Random(seed)
    text = "".join(draw.choice(["a", "b", "ab", " ", "\n", "cat", "é", "🚢", "?"]) for _ in range(30))
    stop = tuple(
        "".join(draw.choice("ab \nc?é") for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(0, 3))
    )
    stream = stream_of(tokenizer, stop)
    texts = run(stream, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    assert "".join(texts) == naive(text, stop)
    assert stream.finish_reason == "stop"
    assert not any("\ufffd" in one for one in texts)


def test_a_piece_comes_with_each_word(tokenizer):
    tokens = tokenizer("The cat sits on a leaf.")["input_ids"]
    texts = run(stream_of(tokenizer), [*tokens, tokenizer.eos_token_id])
    assert texts == ["The", " cat", " sits", " on", " a", " leaf", ".", ""]


def test_the_longest_answer_is_cut_off(tokenizer):
    tokens = tokenizer("The cat sits.")["input_ids"]
    stream = stream_of(tokenizer, max_new_tokens=4)
    assert "".join(run(stream, tokens)) == tokenizer.decode(tokens[:4]).strip()
    assert (stream.finish_reason, stream.num_tokens) == ("length", 4)


def test_the_end_of_text_wins_over_the_length(tokenizer):
    stream = stream_of(tokenizer, max_new_tokens=1)
    assert run(stream, [tokenizer.eos_token_id]) == [""]
    assert (stream.finish_reason, stream.num_tokens) == ("stop", 1)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("abc", ["c", "bc"], 1), ("abc", ["d"], None), ("abc", [], None), ("", ["a"], None)],
)
def test_the_first_stop_string(text, stop, expected):
    assert first_stop(text, stop) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a cat", ["cats"], 3),
        ("a cat", ["tap", "at home"], 2),
        ("a cat", ["dog"], 0),
        ("", ["a"], 0),
        ("aa", ["aab"], 2),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(text, stop, expected):
    assert held_back(text, stop) == expected


def test_tokens_are_named_with_the_text_that_they_are_in(tokenizer):
    tokens = tokenizer("a cat and a dog")["input_ids"]
    stream = stream_of(tokenizer, stop=("and",))
    logprobs = TokenLogprobs(top=2)
    text, named = "", []
    for token in tokens:
        logprobs(torch.empty(0), torch.randn(1, len(tokenizer)))
        piece = stream.add(token, logprobs.of(0, token))
        if piece is not None:
            text += piece.text
            named += [likely[0].token_id for likely in piece.tokens]
            assert all(len(likely) == 3 for likely in piece.tokens)
    assert text == "a cat"
    assert tokenizer.decode(named).strip() == "a cat"
    assert named == tokens[: len(named)]


def test_logprobs_are_those_of_the_softmax_and_finite():
    scores = torch.tensor([[1.0, 2.0, -torch.inf, 0.5]])
    logprobs = TokenLogprobs(top=4)
    assert torch.equal(logprobs(torch.empty(0), scores), scores)
    taken, *top = logprobs.of(0, 3)
    expected = scores.softmax(-1)[0].log()
    assert taken == (3, pytest.approx(expected[3].item()))
    assert [one.token_id for one in top] == [1, 0, 3, 2]
    assert [one.logprob for one in top[:3]] == pytest.approx(expected[[1, 0, 3]].tolist())
    assert top[3].logprob == LEAST_LOGPROB
