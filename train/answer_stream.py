"""The text of an answer while its tokens come, cut at stop strings; and how likely each token was."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor

# What stands for a logarithm of zero, which JSON has no number for.
LEAST_LOGPROB = -9999.0
# What decoding gives for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class Likely(NamedTuple):
    """
    A token with the logarithm of its probability.

    Args:
        token_id (`int`): the token.
        logprob (`float`): at least `LEAST_LOGPROB`.
    """

    token_id: int
    logprob: float


class TokenLogprobs(LogitsProcessor):
    """
    Notes how likely each next token is, before temperature and `top_p` change that.

    Args:
        top (`int`): how many of the likeliest tokens to name beside the one that is taken.
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = scores.float().log_softmax(-1)  # (batch, vocab_size)
        return scores

    def of(self, row: int, token_id: int) -> list[Likely]:
        """The token that the last step has taken in a row of the batch, then the likeliest ones."""
        logprobs = self._logprobs[row]
        values, token_ids = logprobs.topk(self.top)
        pairs = [(token_id, logprobs[token_id].item()), *zip(token_ids.tolist(), values.tolist(), strict=True)]
        return [Likely(one, max(value, LEAST_LOGPROB)) for one, value in pairs]


class Piece(NamedTuple):
    """
    What has become certain of an answer.

    Args:
        choice (`int`): which of the answers to one request.
        text (`str`): goes on behind the piece before.
        tokens (`list[list[Likely]]`): of this text, where that was asked for, see [`TokenLogprobs.of`].
        finish_reason (`str`, *optional*): `"stop"` at the end of the answer, `"length"` where it was cut off.
    """

    choice: int
    text: str
    tokens: list[list[Likely]]
    finish_reason: str | None


@dataclass
class AnswerStream:
    """
    One answer, without white space around it and up to a stop string, none of which is ever shown in part.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        choice (`int`): which of the answers to one request.
        end_ids (`frozenset[int]`): the tokens that end an answer.
        max_new_tokens (`int`): its longest length in tokens.
        stop (`Sequence[str]`, *optional*): texts that end it, and are left out.

    Attributes:
        num_tokens (`int`): how many the model has made, that at the end among them.
        finish_reason (`str`, *optional*): see [`Piece`]; `None` while it goes on.
    """

    tokenizer: Any
    choice: int
    end_ids: frozenset[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    num_tokens: int = field(default=0, init=False)
    finish_reason: str | None = field(default=None, init=False)
    _ids: list[int] = field(default_factory=list, init=False)
    _length: int = field(default=0, init=False)  # letters, those that are not shown yet among them
    _shown: int = field(default=0, init=False)
    _waiting: list[tuple[int, list[Likely]]] = field(default_factory=list, init=False)  # with where each begins

    def add(self, token_id: int, likely: list[Likely] | None = None) -> Piece | None:
        """
        Take the next token.

        Args:
            token_id (`int`): the token.
            likely (`list[Likely]`, *optional*): of [`TokenLogprobs.of`].

        Returns:
            `Piece`, *optional*: what can be shown now.
        """
        self.num_tokens += 1
        is_end = token_id in self.end_ids
        if not is_end:
            self._ids.append(token_id)
            if likely is not None:
                self._waiting.append((self._length, likely))
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).lstrip()
        self._length = len(text)
        cut = first_stop(text, self.stop)
        if cut is not None or is_end:
            self.finish_reason = "stop"
        elif self.num_tokens == self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text = text[:cut].rstrip()
        else:
            text = text.removesuffix(_INCOMPLETE)
            text = text[: len(text) - held_back(text, self.stop)].rstrip()
        return self._piece(text)

    def _piece(self, text: str) -> Piece | None:
        new = text[self._shown :]
        if not new and self.finish_reason is None:
            return None
        self._shown += len(new)
        tokens = [likely for start, likely in self._waiting if start < self._shown]
        self._waiting = self._waiting[len(tokens) :]
        return Piece(self.choice, new, tokens, self.finish_reason)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings in a text begins; `None` without any."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return min(places, default=None)


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many letters at the end of a text may be the beginning of a stop string."""
    longest = 0
    for one in stop:
        for length in range(min(len(one) - 1, len(text)), longest, -1):
            if text.endswith(one[:length]):
                longest = length
                break
    return longest


__all__ = ["LEAST_LOGPROB", "AnswerStream", "Likely", "Piece", "TokenLogprobs", "first_stop", "held_back"]
