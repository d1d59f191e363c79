"""Rows that hold many questions: the questions of an image share its tokens, and no question sees another."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sigphi.train.arguments import VlmModelArguments, VlmTrainingArguments
from sigphi.train.collators import IGNORE_INDEX, VlmCollator
from sigphi.train.errors import UserError

logger = logging.getLogger(__name__)

# Segment of the padding behind the last text of a row.
PADDING_SEGMENT = -1
# Orders that are tried for an epoch: one in a few needs a row more than there are places for.
_TRIES = 20
# Kinds of layers that look at other tokens by attention alone. A window that is wider than a question cuts nothing.
_LAYERS = {"full_attention", "sliding_attention"}


# Sizes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionSizes:
    """
    What packing has to know of questions.

    Args:
        keys (`Sequence`): for each question its image with the text up to the image's last token; where two are equal
            the questions may share these tokens.
        prefixes (`np.ndarray` of shape `(questions,)`, int): the number of these tokens.
        owns (`np.ndarray` of shape `(questions,)`, int): the number of tokens behind them, the answer's among them.
    """

    keys: Sequence[Any]
    prefixes: np.ndarray
    owns: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, questions: Sequence[int] | np.ndarray) -> "QuestionSizes":
        return QuestionSizes([self.keys[one] for one in questions], self.prefixes[questions], self.owns[questions])

    @property
    def longest(self) -> int:
        """Tokens of the longest question with its prefix and answer."""
        return int((self.prefixes + self.owns).max())


def question_sizes(rows: Sequence[dict[str, Any]], image_token_id: int) -> QuestionSizes:
    """
    The sizes of questions.

    Args:
        rows: of [`tokenized_rows`].
        image_token_id (`int`): the image placeholder.

    Raises:
        ValueError: if a prompt has no text behind its image; it names the row.
    """
    prefixes = [_prefix_length(row["prompt_ids"], image_token_id) for row in rows]
    for number, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        if prefix == len(row["prompt_ids"]):
            raise ValueError(
                f"The prompt of row {number} ends with its image, so that nothing is left of it beside what it may "
                f"share with other questions: train with packing off, or let the chat template end in text."
            )
    pairs = list(zip(rows, prefixes, strict=True))
    keys = [(row["image_index"], tuple(row["prompt_ids"][:prefix])) for row, prefix in pairs]
    owns = [len(row["prompt_ids"]) - prefix + len(row["answer_ids"]) for row, prefix in pairs]
    return QuestionSizes(keys, np.array(prefixes), np.array(owns))


def _prefix_length(prompt_ids: list[int], image_token_id: int) -> int:
    """Tokens up to the last image placeholder, with it."""
    return max((place + 1 for place, token in enumerate(prompt_ids) if token == image_token_id), default=0)


# Rows ----------------------------------------------------------------------------------------------------------------


def row_starts(sizes: QuestionSizes, tokens_per_row: int) -> list[int]:
    """
    Lay questions one behind the other into rows, a new row where one does not fit.

    No other way to cut this order into rows needs fewer of them.

    Args:
        sizes (`QuestionSizes`): of the questions, in order; neighbours with equal keys share their prefix.
        tokens_per_row (`int`): the longest row; a longer question has a row of its own.

    Returns:
        `list[int]`: the first question of each row, and behind them the number of questions.
    """
    prefixes, owns = sizes.prefixes.tolist(), sizes.owns.tolist()
    shares = [False, *(a == b for a, b in pairwise(sizes.keys))]
    starts = [0]
    filled = 0
    for number in range(len(sizes)):
        filled += owns[number] if shares[number] else prefixes[number] + owns[number]
        if filled > tokens_per_row and number > 0:
            starts.append(number)
            filled = prefixes[number] + owns[number]
    return [*starts, len(sizes)]


def even_row_starts(sizes: QuestionSizes, tokens_per_row: int) -> list[int]:
    """As [`row_starts`], with rows as short as their number allows."""
    longest = max(tokens_per_row, sizes.longest)
    rows = len(row_starts(sizes, longest))
    lengths = range(sizes.longest, longest + 1)
    shortest = bisect_left(lengths, True, key=lambda length: len(row_starts(sizes, length)) <= rows)
    return row_starts(sizes, lengths[shortest])


def packed_shape(sizes: QuestionSizes, tokens_per_row: int) -> tuple[int, int, int, int]:
    """Rows, length of the longest, distinct images, and tokens of a batch, as [`PackingCollator`] lays them."""
    lengths = []
    for start, end in pairwise(even_row_starts(sizes, tokens_per_row)):
        keys = sizes.keys[start:end]
        first = [True, *(a != b for a, b in pairwise(keys))]  # of the row, of an image
        lengths.append(int(sizes.owns[start:end].sum() + sizes.prefixes[start:end][first].sum()))
    return len(lengths), max(lengths), len(set(sizes.keys)), sum(lengths)


# Batches -------------------------------------------------------------------------------------------------------------


def packed_row_length(tokens_per_batch: int, tokens_per_row: int, longest: int, option: str) -> int:
    """
    The longest row of batches with at most `tokens_per_batch` positions.

    Args:
        tokens_per_batch (`int`): positions of a batch.
        tokens_per_row (`int`): the longest row that is wanted, if no question is longer.
        longest (`int`): tokens of the longest question with its prefix and answer.
        option (`str`): what names the questions to the user.

    Raises:
        UserError: if the longest question does not fit into a batch.
    """
    if longest > tokens_per_batch:
        raise UserError(
            f"--tokens-per-batch {tokens_per_batch} is less than the longest question of {option} has, with its image "
            f"and its answer: {longest} tokens. Raise it, or shorten that question."
        )
    rows = min(-(-tokens_per_batch // tokens_per_row), tokens_per_batch // longest)
    return tokens_per_batch // rows


class PackedBatches(Sampler[list[int]]):
    """
    Batches of questions that [`PackingCollator`] lays into at most `rows_per_batch` rows.

    Every epoch the images come in another order, with all their questions one behind the other. Each question comes
    once an epoch, over all processes, and each process has the same number of batches, in every epoch the same: of
    each `world_size` batches in order every process takes one.

    Args:
        sizes (`QuestionSizes`): of all questions.
        tokens_per_row (`int`): the longest row, at least as long as any question.
        rows_per_batch (`int`): rows of a batch at most.
        world_size (`int`, *optional*, defaults to 1): processes that share the batches.
        seed (`int`, *optional*, defaults to 0): the same seed and epoch give the same batches.
        epoch (`Callable[[], float]`, *optional*): the epoch that begins when the batches are asked for. Wrappers that
            skip batches or share them out pass no `set_epoch` on.

    Raises:
        UserError: if there are fewer questions than processes.
    """

    def __init__(
        self,
        sizes: QuestionSizes,
        tokens_per_row: int,
        rows_per_batch: int,
        world_size: int = 1,
        seed: int = 0,
        epoch: Callable[[], float] = lambda: 0.0,
    ) -> None:
        if len(sizes) < world_size:
            raise UserError(f"{len(sizes)} questions cannot be shared by {world_size} processes: use fewer.")
        self.sizes, self.tokens_per_row, self.seed, self.epoch = sizes, tokens_per_row, seed, epoch
        groups: dict[Any, list[int]] = {}
        for question, key in enumerate(sizes.keys):
            groups.setdefault(key, []).append(question)
        self.groups = list(groups.values())
        self.first_rows = self._rows(np.random.default_rng(seed))
        self.num_batches = world_size * -(-len(self.first_rows) // (rows_per_batch * world_size))
        self.most_rows = self.num_batches * rows_per_batch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, int(self.epoch())])
        orders = (self._rows(random) for _ in range(_TRIES))
        rows = next((one for one in orders if len(one) <= self.most_rows), None)
        if rows is None:  # the first order was luckier than all of these: its rows, shuffled
            rows = [self.first_rows[row] for row in random.permutation(len(self.first_rows))]
        while len(rows) < self.num_batches:  # so few rows that some process would go without
            longest = rows.pop(max(range(len(rows)), key=lambda row: len(rows[row])))
            rows += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
        for batch in np.array_split(np.arange(len(rows)), self.num_batches):
            yield [question for row in batch for question in rows[row]]

    def _rows(self, random: np.random.Generator) -> list[list[int]]:
        """The questions of each row, with the images in a random order."""
        order = [question for group in random.permutation(len(self.groups)) for question in self.groups[group]]
        return [order[start:end] for start, end in pairwise(row_starts(self.sizes[order], self.tokens_per_row))]


@dataclass(kw_only=True)
class PackingCollator(VlmCollator):
    """
    A batch of questions with their images and supervised answers, many questions a row.

    Neighbours that ask about the same image, with the same text before it, share these tokens. Position ids begin at 0
    with each image, and behind the shared tokens with each question.

    Args:
        image_token_id (`int`): the image placeholder.
        tokens_per_row (`int`, *optional*, defaults to 512): the longest row, where no question is longer.
    """

    image_token_id: int
    tokens_per_row: int = 512

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: with `image_index` (`int`), `prompt_ids` and `answer_ids` (`list[int]`).

        Returns:
            `dict`: `input_ids`, `labels` (-100 outside the answers), `position_ids`, `segment_ids` and `prefix_ids`
            (see [`SigPhiModel.forward`]) of shape `(packed rows, length)`, and what [`~VlmCollator.image_inputs`]
            gives for the images in the order in which they are in the rows, one that goes on in the next row again.

        Raises:
            ValueError: if a row has no answer tokens; it names the row's position.
        """
        self.check_answers(rows)
        sizes = question_sizes(rows, self.image_token_id)
        packed, images = [], []
        for start, end in pairwise(even_row_starts(sizes, self.tokens_per_row)):
            row = _PackedRow()
            for number in range(start, end):
                if number == start or sizes.keys[number] != sizes.keys[number - 1]:
                    row.add_prefix(rows[number]["prompt_ids"][: sizes.prefixes[number]])
                    images.append(rows[number]["image_index"])
                row.add_question(rows[number]["prompt_ids"][sizes.prefixes[number] :], rows[number]["answer_ids"])
            packed.append(row)
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "position_ids": 0}
        fills |= {"segment_ids": PADDING_SEGMENT, "prefix_ids": PADDING_SEGMENT}
        batch = {
            name: pad_sequence([torch.tensor(getattr(row, name)) for row in packed], True, fill)
            for name, fill in fills.items()
        }
        return batch | self.image_inputs(images)


@dataclass
class _PackedRow:
    """One row, as it grows."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segment_ids: list[int] = field(default_factory=list)
    prefix_ids: list[int] = field(default_factory=list)
    segment: int = -1  # the last one
    prefix: int = -1  # the segment of the last image
    prefix_length: int = 0

    def add_prefix(self, ids: list[int]) -> None:
        """Begin an image, with the text before it."""
        self.prefix, self.prefix_length = self.segment + 1, len(ids)
        self._add(ids, [IGNORE_INDEX] * len(ids), 0)

    def add_question(self, prompt_ids: list[int], answer_ids: list[int]) -> None:
        """Ask about the last image."""
        self._add(prompt_ids + answer_ids, [IGNORE_INDEX] * len(prompt_ids) + answer_ids, self.prefix_length)

    def _add(self, ids: list[int], labels: list[int], first_position: int) -> None:
        self.segment += 1
        self.input_ids += ids
        self.labels += labels
        self.position_ids += range(first_position, first_position + len(ids))
        self.segment_ids += [self.segment] * len(ids)
        self.prefix_ids += [self.prefix] * len(ids)


# What can be packed --------------------------------------------------------------------------------------------------


def choose_packing(
    model: VlmModelArguments, training: VlmTrainingArguments, config: PreTrainedConfig, longest: int
) -> bool:
    """
    Whether a training packs its questions; what decides is logged.

    Args:
        model, training: the options.
        config (`PreTrainedConfig`): of the language model.
        longest (`int`): tokens of the longest question with its image and answer.

    Raises:
        UserError: if the options ask for packing, and the language model cannot keep the questions of a row apart.
    """
    if training.packing == "off":
        return False
    obstacle = _obstacle(model, config, longest)
    if obstacle is None:
        logger.info("packing: on")
        return True
    if training.packing == "auto" and training.tokens_per_batch == 0:
        logger.info("packing: off, because %s", obstacle)
        return False
    option = "--packing on" if training.packing == "on" else f"--tokens-per-batch {training.tokens_per_batch}"
    raise UserError(f"{option}: {obstacle}.")


def _obstacle(model: VlmModelArguments, config: PreTrainedConfig, longest: int) -> str | None:
    """What keeps a language model from keeping the texts of a row apart, if anything does."""
    if model.attn_implementation == "flash_attention_2":
        return "FlashAttention-2 has no mask for shared images (use --attn-implementation auto)"
    return attention_obstacle(config, longest)


def attention_obstacle(config: PreTrainedConfig, longest: int) -> str | None:
    """
    Why a language model's tokens would see more or less of their row than a mask says, if they would.

    Args:
        config (`PreTrainedConfig`): of the language model.
        longest (`int`): tokens of the longest question with its image and answer.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    text: Any = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kind._is_stateful or not kind._supports_attention_backend or not layers <= _LAYERS:
        return f"a language model of the kind {config.model_type!r} cannot keep the questions of a row apart"
    window = getattr(text, "sliding_window", None)
    if window is not None and longest > window:
        return f"the longest question has {longest} tokens, more than the language model's sliding window of {window}"
    return None


__all__ = [
    "PackedBatches",
    "PackingCollator",
    "QuestionSizes",
    "attention_obstacle",
    "choose_packing",
    "even_row_starts",
    "packed_row_length",
    "packed_shape",
    "question_sizes",
    "row_starts",
]
