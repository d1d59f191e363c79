"""Answers to prompts that come from many threads, made one request after the other by a thread of their own."""

import copy
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sigphi.train.answer_stream import AnswerStream, Piece, TokenLogprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """
    How to answer.

    Args:
        max_new_tokens (`int`): longest answer in tokens.
        temperature (`float`, *optional*, defaults to 0): what logits are divided by before a token is drawn; 0 takes
            the likeliest.
        top_p (`float`, *optional*, defaults to 1): only the likeliest tokens with this probability together are drawn.
        seed (`int`, *optional*): the same one draws the same answers to the same request; by default another one each
            time.
        stop (`Sequence[str]`, *optional*): texts that end an answer.
        n (`int`, *optional*, defaults to 1): how many answers.
        top_logprobs (`int`, *optional*): name each token's probability, and so many of the likeliest ones.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Finished:
    """
    The end of a request's answers.

    Args:
        num_tokens (`int`): tokens that were made for all of them.
    """

    num_tokens: int


class QueueFull(Exception):
    """As many requests wait as may."""


class QueueStopped(Exception):
    """The queue has been stopped before an answer was whole."""


@dataclass
class Generation:
    """
    A request on its way.

    Args:
        inputs: what the processor makes of one prompt: `input_ids`, `attention_mask`, `pixel_values`.
        sampling (`Sampling`): how to answer.
        deliver (`Callable`): gets each [`Piece`], then [`Finished`] or the exception that has ended it, such as
            [`QueueStopped`]; called from the generating thread. Of one that is cancelled nothing more is told.
    """

    inputs: Any
    sampling: Sampling
    deliver: Callable[[Piece | Finished | Exception], None]
    is_cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Nobody wants the answer any more: it is not begun, or ends with its next token."""
        self.is_cancelled = True


class GenerationQueue:
    """
    A model that answers one request at a time, in the order they came in. Use it as a context manager.

    Args:
        model, tokenizer: of the VLM, in evaluation mode. Only this object may use the model from then on.
        max_waiting (`int`, *optional*, defaults to 32): requests that may wait for their turn.
    """

    def __init__(self, model: Any, tokenizer: Any, max_waiting: int = 32) -> None:
        self.model = model
        # Another thread prepares texts meanwhile, and a tokenizer that is encoding cannot decode.
        self.tokenizer = copy.deepcopy(tokenizer)
        # A signal may come in the middle of `put`, and put something itself.
        self._waiting: queue.SimpleQueue[Generation | None] = queue.SimpleQueue()
        self._max_waiting = max_waiting
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def __enter__(self) -> "GenerationQueue":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """End what is being answered with its next token, and answer no more."""
        self._is_stopped = True
        self._waiting.put(None)

    @property
    def is_alive(self) -> bool:
        """Whether requests are still answered."""
        return self._thread.is_alive() and not self._is_stopped

    def submit(self, generation: Generation) -> None:
        """
        Answer a request when its turn comes.

        Raises:
            QueueFull: if too many wait.
            QueueStopped: if no more are answered.
        """
        if self._is_stopped:
            raise QueueStopped
        if self._waiting.qsize() >= self._max_waiting:
            raise QueueFull
        self._waiting.put(generation)

    def _run(self) -> None:
        # What waits when it is stopped is told so, up to the `None` that stands behind it.
        while (generation := self._waiting.get()) is not None:
            if generation.is_cancelled:
                continue
            end = QueueStopped() if self._is_stopped else self._outcome(generation)
            if not generation.is_cancelled:
                generation.deliver(end)

    def _outcome(self, generation: Generation) -> Finished | Exception:
        try:
            num_tokens = self._answer(generation)
        # Whatever it is, the next request is another one.
        except Exception as error:
            logger.exception("a generation has failed")
            return error
        return QueueStopped() if self._is_stopped else Finished(num_tokens)

    @torch.no_grad()
    def _answer(self, generation: Generation) -> int:
        sampling = generation.sampling
        answers = self._streams(sampling)
        logprobs = None if sampling.top_logprobs is None else TokenLogprobs(sampling.top_logprobs)
        watch = _Watch(generation, answers, logprobs, lambda: self._is_stopped)
        if sampling.temperature > 0:
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        self.model.generate(
            **self._inputs(generation.inputs, sampling.n),
            **_drawing(sampling),
            max_new_tokens=sampling.max_new_tokens,
            num_beams=1,
            logits_processor=LogitsProcessorList([] if logprobs is None else [logprobs]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return sum(answer.num_tokens for answer in answers)

    def _streams(self, sampling: Sampling) -> list[AnswerStream]:
        end = self.model.generation_config.eos_token_id
        end_ids = frozenset([] if end is None else [end] if isinstance(end, int) else end)
        return [
            AnswerStream(self.tokenizer, index, end_ids, sampling.max_new_tokens, sampling.stop)
            for index in range(sampling.n)
        ]

    def _inputs(self, inputs: Any, n: int) -> dict[str, torch.Tensor]:
        """The prompt once an answer; its image is read once."""
        inputs = inputs.to(self.model.device)
        features = self.model.model.get_vision_features(inputs["pixel_values"])
        return {
            "input_ids": inputs["input_ids"].repeat(n, 1),  # (n, length)
            "attention_mask": inputs["attention_mask"].repeat(n, 1),
            "image_features": features.repeat(n, 1, 1),  # (n, num_image_tokens, feature_size)
        }


def _drawing(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


class _Watch(StoppingCriteria):
    """Sees each new token, hands on what is certain of the answers, and says which have ended."""

    def __init__(
        self,
        generation: Generation,
        answers: list[AnswerStream],
        logprobs: TokenLogprobs | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.generation, self.answers, self.logprobs, self.is_stopped = generation, answers, logprobs, is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.generation.is_cancelled or self.is_stopped():
            return torch.ones(len(self.answers), dtype=torch.bool, device=input_ids.device)
        for row, (answer, token_id) in enumerate(zip(self.answers, input_ids[:, -1].tolist(), strict=True)):
            if answer.finish_reason is not None:
                continue  # what follows is padding
            likely = None if self.logprobs is None else self.logprobs.of(row, token_id)
            piece = answer.add(token_id, likely)
            if piece is not None:
                self.generation.deliver(piece)
        ended = [answer.finish_reason is not None for answer in self.answers]
        return torch.tensor(ended, device=input_ids.device)  # (batch,)


__all__ = ["Finished", "Generation", "GenerationQueue", "QueueFull", "QueueStopped", "Sampling"]
