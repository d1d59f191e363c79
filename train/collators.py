"""Batches for the two stages: images by index from one tensor, texts tokenised here or before."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.pairs import pair_ids, text_key

IGNORE_INDEX = -100


class Images(Protocol):
    """Images in the size of a model, `(3, size, size)` and uint8 each: a tensor, or what decodes them on demand."""

    def __getitem__(self, indices: torch.Tensor, /) -> torch.Tensor: ...


@dataclass
class SiglipCollator:
    r"""
    A batch of images with all their texts.

    Texts that are equal after stripping and lower-casing are one text of the batch: it is encoded once, and it is a
    positive of every image that has it. A text that states a fact (`"object=deer"`) is a positive of every image of
    which this fact is known, in whatever words; where nothing is known of the attribute (`"object"`), the pair is
    ignored. Otherwise the loss would push an image away from what is true of it. A text that says nothing of an image
    (a refusal) is ignored for every image, its own too.

    Args:
        processor (`SiglipResNetProcessor`): prepares both modalities.
        images (`torch.ByteTensor` of shape `(images, 3, size, size)`, or `StoredImages`): decoded images in the size
            of the model, see [`resize`], which rows name by index.
        max_text_length (`int`, *optional*, defaults to `64`): longest text in tokens.
        text_features (`torch.Tensor` of shape `(texts, hidden_size)`, *optional*): the frozen tower's pooled states,
            precomputed, instead of token ids.
        text_rows (`dict[str, int]`, *optional*): for each text, as [`text_key`] gives it, its row in `text_features`.
    """

    processor: SiglipResNetProcessor
    images: Images
    max_text_length: int = 64
    text_features: torch.Tensor | None = None
    text_rows: dict[str, int] | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows: with `image_index` (`int`), `texts` (`list[str]`), `facts` (`list[str]`: what each text states, see
                [`stated_fact`]) and `known` (`list[str]`: all facts that are known of the image).

        Returns:
            `dict`: `pixel_values` `(images, 3, size, size)`, uint8, which [`SiglipTrainer`] augments and normalises on
            its device, and `image_index` `(images,)`; `input_ids` and `attention_mask` `(texts, length)`, or
            `text_features` `(texts, hidden_size)`; `pairs`, the `image_ids` and `text_ids` of [`pair_ids`]; and
            `return_loss` and `return_logits`, which tell the Trainer that there is a loss, and the model that it need
            not compute logits.
        """
        texts: dict[str, str] = {}  # the first spelling, by key
        facts: dict[str, str] = {}  # what it states, by key
        for row in rows:
            for text, fact in zip(row["texts"], row["facts"], strict=True):
                texts.setdefault(text_key(text), text)
                facts.setdefault(text_key(text), fact)
        image_index = torch.tensor([row["image_index"] for row in rows])
        return {
            "pixel_values": self.images[image_index],
            "image_index": image_index,
            "pairs": pair_ids(rows, facts),
            "return_loss": True,
            "return_logits": False,  # the Trainer's loss makes its own, in chunks
        } | self._text_inputs(texts)

    def _text_inputs(self, texts: dict[str, str]) -> dict[str, torch.Tensor]:
        if self.text_features is not None:
            return {"text_features": self.features_of(texts)}
        tokens = self.processor.tokenizer(
            list(texts.values()),
            padding=True,
            truncation=True,
            max_length=self.max_text_length,
            return_tensors="pt",
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def features_of(self, texts: Iterable[str]) -> torch.Tensor:
        """The rows of `text_features` for these texts, `(texts, hidden_size)`."""
        assert self.text_features is not None and self.text_rows is not None, "the texts are not cached"
        return self.text_features[[self.text_rows[text_key(text)] for text in texts]]


@dataclass
class VlmCollator:
    r"""
    A batch of questions with their images and supervised answers, padded on the right.

    Args:
        pad_token_id (`int`): fills `input_ids`; masked everywhere.
        images (`torch.ByteTensor` of shape `(images, 3, height, width)`, *optional*): decoded images.
        processor (`SigPhiProcessor`, *optional*): prepares `images`.
        image_features (`torch.Tensor` of shape `(images, num_image_tokens, feature_size)`, *optional*): precomputed,
            instead of `images`.
    """

    pad_token_id: int
    images: torch.Tensor | None = None
    processor: SigPhiProcessor | None = None
    image_features: torch.Tensor | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: with `image_index` (`int`), `prompt_ids` and `answer_ids` (`list[int]`).

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` of shape `(rows, length)`, labels being -100 outside the
            answers, and what [`~VlmCollator.image_inputs`] gives for the images of the rows.

        Raises:
            ValueError: if a row has no answer tokens; it names the row's position.
        """
        self.check_answers(rows)
        sequences = [torch.tensor(row["prompt_ids"] + row["answer_ids"]) for row in rows]
        labels = [torch.tensor([IGNORE_INDEX] * len(row["prompt_ids"]) + row["answer_ids"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        return batch | self.image_inputs([row["image_index"] for row in rows])

    def check_answers(self, rows: Sequence[dict[str, Any]]) -> None:
        """Raise a `ValueError` naming the position of the first row without answer tokens."""
        for position, row in enumerate(rows):
            if not row["answer_ids"]:
                raise ValueError(f"Row {position} of the batch has no answer tokens, so nothing in it is supervised.")

    def image_inputs(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """
        `pixel_values` or `image_features` of the images at `indices`, each once; where one comes again, `image_rows`
        of shape `(len(indices),)` tells which of them each is.
        """
        distinct = list(dict.fromkeys(indices))
        rows = {}
        if len(distinct) < len(indices):
            place = {image: row for row, image in enumerate(distinct)}
            rows["image_rows"] = torch.tensor([place[image] for image in indices])
        if self.image_features is not None:
            return {"image_features": self.image_features[distinct]} | rows
        assert self.images is not None, "a collator has `images` or `image_features`"
        return {"pixel_values": preprocess(self.processor, self.images[distinct])} | rows


def preprocess(processor: Any, images: torch.Tensor) -> torch.Tensor:
    """
    Resize and normalise decoded images as the processor does at inference.

    Args:
        processor: with an `image_processor`.
        images (`torch.ByteTensor` of shape `(images, 3, height, width)`): RGB.

    Returns:
        `torch.FloatTensor` of shape `(images, 3, size, size)`.
    """
    return normalize(processor.image_processor, resize(processor.image_processor, images))


def resize(image_processor: Any, images: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    The first half of [`preprocess`]: images in the size of the model, still as bytes, `(images, 3, size, size)`.
    """
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    return image_processor(list(images), **options)["pixel_values"]


def normalize(image_processor: Any, images: torch.Tensor) -> torch.Tensor:
    """
    The second half of [`preprocess`], on the device of the images: `(images, 3, size, size)`, float32.
    """
    by = image_processor
    # A processor keeps lists where it is given lists, and the method takes only what can be hashed.
    mean, std = (tuple(value) if isinstance(value, list) else value for value in (by.image_mean, by.image_std))
    return by.rescale_and_normalize(images, by.do_rescale, by.rescale_factor, by.do_normalize, mean, std)


__all__ = [
    "IGNORE_INDEX",
    "SiglipCollator",
    "VlmCollator",
    "normalize",
    "preprocess",
    "resize",
]
