"""Processor of the SigLIP encoder."""

import os
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps
from transformers import ProcessorMixin

from sigphi.configuration.hub_code import HubCodeMixin

# What is scaled has to stay a float32.
_MOST_GRAY = 1e35


def to_rgb(image: Any) -> Any:
    """
    Bring a PIL image of any mode, or an image file, to RGB as a viewer shows it.

    The EXIF orientation is applied, transparency is laid over white, and 16-bit and floating point gray values are
    scaled to 8 bits (by their mode's range, or by the image's own where the mode has none). Anything else (arrays,
    tensors, URLs) is returned as it is.

    Raises:
        ValueError: if a floating point gray value is NaN, infinite or beyond 1e35.
    """
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        with Image.open(image) as opened:
            return to_rgb(opened)
    if not isinstance(image, Image.Image):
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        if not (np.abs(values) < _MOST_GRAY).all():
            raise ValueError(f"a pixel is NaN, infinite or beyond {_MOST_GRAY}")
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and 0 <= values.min() and values.max() < 65536)
        low, high = (0.0, 65535.0) if is_16_bit else (float(values.min()), float(values.max()))
        image = Image.fromarray(np.uint8(255 * (values - low) / max(high - low, 1e-12)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def all_to_rgb(images: Any) -> Any:
    """[`to_rgb`] for an image or nested lists of images."""
    if isinstance(images, (list, tuple)):
        return [all_to_rgb(image) for image in images]
    return to_rgb(images)


class SiglipResNetProcessor(HubCodeMixin, ProcessorMixin):
    r"""
    An image processor and a tokenizer.

    Args:
        image_processor (`SiglipImageProcessor`): resizes and normalises images.
        tokenizer (`PreTrainedTokenizerFast`): the text tower's, with a padding token.
    """

    hub_auto_map: ClassVar[dict[str, str]] = {
        "AutoProcessor": "sigphi.processing.processing_siglip_resnet.SiglipResNetProcessor"
    }

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Prepare images, texts, or both.

        Args:
            images: one image or a list; pictures of any mode and EXIF orientation are brought to RGB.
            text (`str` or `list[str]`, *optional*): one text or a list.

        Returns:
            `BatchFeature`: `pixel_values` of shape `(images, 3, height, width)`, float32; `input_ids` and
            `attention_mask` of shape `(texts, length)`.
        """
        return super().__call__(images=all_to_rgb(images), text=text, **kwargs)


__all__ = ["SiglipResNetProcessor", "all_to_rgb", "to_rgb"]
