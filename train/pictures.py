"""Pictures from files that anybody may have made: decoded within bounds, or refused by one kind of error."""

import io
import warnings
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from sigphi.train.errors import printable

# Other decoders of PIL stay out: that of EPS runs a program on what it is given.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


class PictureError(ValueError):
    """Bytes that are no picture which can be decoded; the message says why."""


class LargePictureError(PictureError):
    """A picture of more pixels than are decoded."""


def decode_picture(encoded: bytes, formats: tuple[str, ...] = FORMATS, most_pixels: int | None = None) -> Image.Image:
    """
    A picture from the bytes of its file.

    Args:
        encoded (`bytes`): of any format of `formats`.
        formats (`tuple[str, ...]`, *optional*): some of [`FORMATS`], all of them by default.
        most_pixels (`int`, *optional*): `PIL.Image.MAX_IMAGE_PIXELS`, 89 million, by default.

    Returns:
        `PIL.Image.Image`: RGB, upright, see [`to_rgb`].

    Raises:
        PictureError: if it cannot be decoded; a [`LargePictureError`] if it has more pixels than are allowed. The
            cause of one of no format that is allowed is an `UnidentifiedImageError` of PIL.
    """
    # Takes seconds, and commands that only read a CSV and labels do without.
    from sigphi.processing.processing_siglip_resnet import to_rgb

    try:
        with warnings.catch_warnings():
            # Up to twice as many pixels PIL only warns of, and decodes a gigabyte out of a file of a few kilobytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Of broken metadata it warns, too, and reads the picture.
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(io.BytesIO(encoded), formats=formats) as image:
                if most_pixels is not None and image.width * image.height > most_pixels:
                    raise LargePictureError(f"{image.width} x {image.height} pixels, more than {most_pixels}")
                return to_rgb(image)
    except LargePictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LargePictureError(printable(str(error))) from error
    # A broken file ends its decoder in whatever way it happens to: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        # Behind the bracket stands an address in memory.
        reason = printable(str(error)).split(" <")[0] or type(error).__name__
        raise PictureError(reason) from error


def encoded_bytes(cell: dict[str, Any] | None) -> bytes:
    """
    The file behind a cell of `datasets.Image(decode=False)`.

    Raises:
        PictureError: if the cell has none.
        OSError: if it cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise PictureError("the row has no picture")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if "://" not in cell["path"]:
        return Path(cell["path"]).read_bytes()
    with fsspec.open(cell["path"]) as file:  # a path may lead into an archive
        return file.read()


__all__ = ["FORMATS", "LargePictureError", "PictureError", "decode_picture", "encoded_bytes"]
