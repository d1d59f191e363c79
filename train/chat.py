"""One image and a conversation about it: what `ask` and `describe` share."""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessorList, TextStreamer
from transformers.cache_utils import Cache, DynamicLayer

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.modeling.modeling_sigphi import CACHE
from sigphi.processing.processing_siglip_resnet import to_rgb
from sigphi.train.answering import TokenConfidence, can_share_prefix
from sigphi.train.checkpoints import read_config
from sigphi.train.errors import UserError
from sigphi.train.evaluation import load_for_evaluation
from sigphi.train.images import load_images
from sigphi.train.pictures import PictureError, decode_picture
from sigphi.train.predictions import Given
from sigphi.train.prompts import context_length


def open_image(name: str, images: str) -> Image.Image:
    """
    A picture from a file, or a row of an image set.

    Args:
        name (`str`): a file, or `test:12` or `train:12` for a row of `images`.
        images (`str`): the image set that rows count in, see [`load_images`].

    Returns:
        `PIL.Image.Image`: RGB, upright.

    Raises:
        UserError: if there is no such file or row, or the file is no picture.
    """
    row = re.fullmatch(r"(train|test):(\d+)", name)
    if row is not None and not Path(name).exists():
        rows = load_images(images, row[1])
        if int(row[2]) >= len(rows):
            raise UserError(f"IMAGE {name}: {images} has {len(rows)} {row[1]} images, rows 0 to {len(rows) - 1}.")
        return to_rgb(rows[int(row[2])]["img"])
    try:
        return decode_picture(Path(name).read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"IMAGE {name}: there is no such file. Give a picture, or test:12 for a row of --images."
        ) from error
    except (OSError, PictureError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"IMAGE {name}: this is no picture that can be read ({reason}).") from error


def load_vlm(name: str) -> tuple[Any, Any]:
    """The VLM `name` and its processor, or a [`UserError`] when it is another kind of model."""
    read_config(name, "MODEL", SigPhiConfig.model_type)
    return load_for_evaluation(name)


class AnswerStreamer(TextStreamer):
    """
    Writes an answer to standard output while it is made, without white space around it, and a line end behind it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begin()

    def _begin(self) -> None:
        self._has_text, self._white_space = False, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain of the answer. White space waits for the word behind it, which may not come."""
        text = self._white_space + text if self._has_text else text.lstrip()
        shown = text.rstrip()
        self._has_text |= bool(shown)
        self._white_space = text[len(shown) :]
        sys.stdout.write(shown + ("\n" if stream_end else ""))
        sys.stdout.flush()
        if stream_end:
            self._begin()


@dataclass
class Conversation:
    """
    Questions about one image, each answered with the turns before it in view.

    What the model has read is kept: a question costs its own tokens, and not the image and the turns before it again.

    Args:
        model, processor: of the VLM.
        image (`PIL.Image.Image`): what the questions are about.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
        abstain_below (`float`, *optional*): turns that end with less confidence are not in view of later ones.
    """

    model: Any
    processor: Any
    image: Image.Image
    max_new_tokens: int = 80
    abstain_below: float = 0.0
    turns: list[tuple[str, str]] = field(default_factory=list)
    _cache: Cache | None = field(default=None, init=False, repr=False)
    _cached: list[int] = field(default_factory=list, init=False, repr=False)  # the tokens in it

    @torch.no_grad()
    def ask(self, question: str, streamer: TextStreamer | None = None) -> Given:
        """
        The greedy answer. The oldest turns are left out as soon as the context would not hold the answer as well.

        Args:
            question (`str`): about the image.
            streamer (`TextStreamer`, *optional*): gets the tokens of the answer one by one.

        Raises:
            UserError: if the question alone does not fit, or holds the image placeholder.
        """
        if self.processor.image_token in question:
            raise UserError(
                f"the question holds {self.processor.image_token!r}, which stands for the image; leave it out."
            )
        inputs = self._fitting_inputs(question).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        confidence = TokenConfidence()
        tokens = self.model.generate(
            **self._behind_what_is_read(inputs),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([confidence]),
            streamer=streamer,
        )
        if self._cache is not None:
            self._cached = tokens[0, : self._cache.get_seq_length()].tolist()
        new = tokens[:, length:]  # (1, new tokens)
        answer = self.processor.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        given = Given(answer, confidence.means(torch.ones_like(new, dtype=torch.bool))[0])
        if given.confidence >= self.abstain_below:
            self.turns.append((question, answer))
        return given

    def _fitting_inputs(self, question: str) -> Any:
        longest = context_length(self.model.config.text_config) - self.max_new_tokens
        first = 0
        inputs = self._inputs(self.turns, question)
        while inputs["input_ids"].shape[1] > longest:
            first += 1
            if first > len(self.turns):
                length = inputs["input_ids"].shape[1]
                raise UserError(f"the question has {length} tokens, the model reads at most {longest}. Shorten it.")
            inputs = self._inputs(self.turns[first:], question)
        return inputs

    def _behind_what_is_read(self, inputs: Any) -> dict[str, Any]:
        """The inputs with a cache that holds as many of their first tokens as the one of the turn before."""
        ids = inputs["input_ids"][0].tolist()
        common = len(os.path.commonprefix([self._cached, ids[:-1]]))
        excess, self._cached = len(self._cached) - common, []  # what a broken off generation leaves is not known
        if self._cache is None or self.processor.image_token_id in ids[common:]:
            self._cache = self._new_cache(len(ids))
        elif excess:
            self._cache.crop(-excess)
        if self._cache is None:
            return dict(inputs)
        is_new = self._cache.get_seq_length() == 0
        return {name: value for name, value in inputs.items() if is_new or name != "pixel_values"} | {
            CACHE: self._cache
        }

    def _new_cache(self, length: int) -> Cache | None:
        """A cache that can be cut back, where the language model works with one."""
        if not can_share_prefix(self.model, length + self.max_new_tokens):
            return None
        cache = DynamicCache(config=self.model.model.language_model.config)
        return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None

    def _inputs(self, turns: list[tuple[str, str]], question: str) -> Any:
        messages: list[dict[str, Any]] = []
        for user, assistant in [*turns, (question, "")]:
            messages.append({"role": "user", "content": [{"type": "text", "text": user}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
        messages[0]["content"].insert(0, {"type": "image", "image": self.image})
        return self.processor.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


__all__ = ["AnswerStreamer", "Conversation", "load_vlm", "open_image"]
