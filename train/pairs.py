"""Which texts belong to which images, as numbers that processes can exchange instead of a mask of the whole batch."""

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sigphi.train.judging import SAYS_NOTHING

PADDING = -1


def text_key(text: str) -> str:
    """What makes two texts one: white space around them and case do not count."""
    return text.strip().lower()


@cache
def stable_id(kind: str, value: str) -> int:
    """63 bits of a hash that stand for `value`, the same in every process; 0 for an empty one."""
    digest = blake2b(f"{kind}:{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 if value else 0


def pair_ids(rows: Sequence[dict[str, Any]], facts: dict[str, str]) -> dict[str, torch.Tensor]:
    """
    What [`pair_masks`] reads of a batch.

    Args:
        rows: with `texts` and `known` (`list[str]`: all facts that are known of the image).
        facts (`dict[str, str]`): for each distinct text of the batch, by [`text_key`], what it states.

    Returns:
        `dict` of two `torch.LongTensor`: `image_ids` `(images, width)`, for each image its texts, what is known of it
        and of which attributes something is known, padded with -1; and `text_ids` `(texts, 3)`, for each text itself,
        the fact that it states and that fact's attribute, the last two 0 where it states none. A text that says
        nothing of any image has the negative of its number, which no image has.
    """
    images, texts = [], []
    for row in rows:
        own = {stable_id("text", text_key(text)) for text in row["texts"]}
        known = {stable_id("fact", fact) for fact in row["known"]}
        attributes = {stable_id("attribute", _attribute(fact)) for fact in row["known"]}
        images.append(torch.tensor([*own, *known, *attributes], dtype=torch.long))
    for key, fact in facts.items():
        number = stable_id("text", key)
        number = -number if fact == SAYS_NOTHING else number
        texts.append([number, stable_id("fact", fact), stable_id("attribute", _attribute(fact))])
    return {
        "image_ids": pad_sequence(images, batch_first=True, padding_value=PADDING),
        "text_ids": torch.tensor(texts, dtype=torch.long).view(-1, 3),
    }


def _attribute(fact: str) -> str:
    return fact.partition("=")[0]


def pair_masks(
    image_ids: torch.Tensor, text_ids: torch.Tensor, duplicates: str = "positive"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which texts are positives of which images, and which pairs are unknown.

    A text is a positive of an image that has it, or of which the fact is known that it states. A pair is ignored where
    nothing is known of the attribute that the text is about.

    Args:
        image_ids (`torch.LongTensor` of shape `(images, width)`): see [`pair_ids`].
        text_ids (`torch.LongTensor` of shape `(texts, 3)`): see [`pair_ids`].
        duplicates (`str`, *optional*, defaults to `"positive"`): with `"ignored"`, a text that states a known fact of
            an image that has not this very text is ignored.

    Returns:
        `tuple` of two `torch.BoolTensor` of shape `(images, texts)`: `positives` and `ignored`.
    """
    vocabulary, columns = torch.unique(text_ids, return_inverse=True)  # (values,), (texts, 3)
    places = torch.searchsorted(vocabulary, image_ids)  # (images, width)
    places = torch.where(torch.isin(image_ids, vocabulary), places, len(vocabulary))  # the last place: in no text
    has = torch.zeros(len(image_ids), len(vocabulary) + 1, dtype=torch.bool, device=image_ids.device)
    has.scatter_(1, places, True)
    own, fact, attribute = (has[:, column] for column in columns.t())  # 3 x (images, texts)
    positives = own if duplicates == "ignored" else own | fact
    unknown = ~attribute & (text_ids[:, 2] != 0)
    return positives, (unknown | fact) & ~positives


__all__ = ["pair_ids", "pair_masks", "stable_id", "text_key"]
