"""One image and a conversation about it: what `ask` and `describe` share."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.processing.processing_siglip_resnet import to_rgb
from sigphi.train.checkpoints import read_config
from sigphi.train.errors import UserError
from sigphi.train.evaluation import load_for_evaluation
from sigphi.train.images import load_images


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
        with Image.open(name) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise UserError(
            f"IMAGE {name}: there is no such file. Give a picture, or test:12 for a row of --images."
        ) from error
    except (UnidentifiedImageError, IsADirectoryError, Image.DecompressionBombError, OSError) as error:
        raise UserError(f"IMAGE {name}: this is no picture that can be read ({error}).") from error


def load_vlm(name: str) -> tuple[Any, Any]:
    """The VLM `name` and its processor, or a [`UserError`] when it is another kind of model."""
    read_config(name, "MODEL", SigPhiConfig.model_type)
    return load_for_evaluation(name)


@dataclass
class Conversation:
    """
    Questions about one image, each answered with the turns before it in view.

    Args:
        model, processor: of the VLM.
        image (`PIL.Image.Image`): what the questions are about.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
    """

    model: Any
    processor: Any
    image: Image.Image
    max_new_tokens: int = 80
    turns: list[tuple[str, str]] = field(default_factory=list)

    @torch.no_grad()
    def ask(self, question: str) -> str:
        """
        The greedy answer. The oldest turns are left out as soon as the context would not hold the answer as well.

        Raises:
            UserError: if the question alone does not fit, or holds the image placeholder.
        """
        if self.processor.image_token in question:
            raise UserError(
                f"the question holds {self.processor.image_token!r}, which stands for the image; leave it out."
            )
        longest = self.model.config.text_config.max_position_embeddings - self.max_new_tokens
        first = 0
        inputs = self._inputs(self.turns, question)
        while inputs["input_ids"].shape[1] > longest:
            first += 1
            if first > len(self.turns):
                length = inputs["input_ids"].shape[1]
                raise UserError(f"the question has {length} tokens, the model reads at most {longest}. Shorten it.")
            inputs = self._inputs(self.turns[first:], question)
        tokens = self.model.generate(
            **inputs.to(self.model.device), max_new_tokens=self.max_new_tokens, do_sample=False
        )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.turns.append((question, answer))
        return answer

    def _inputs(self, turns: list[tuple[str, str]], question: str) -> Any:
        messages: list[dict[str, Any]] = []
        for user, assistant in [*turns, (question, "")]:
            messages.append({"role": "user", "content": [{"type": "text", "text": user}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
        messages[0]["content"].insert(0, {"type": "image", "image": self.image})
        return self.processor.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


__all__ = ["Conversation", "load_vlm", "open_image"]
