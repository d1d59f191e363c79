"""The command `sigphi search`: find pictures by a text, or by another picture.

```bash
sigphi search build cifar10.index --encoder outputs/siglip --images uoft-cs/cifar10
sigphi search cifar10.index "a truck" --top 10 --grid results.png
```
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from transformers.hf_argparser import HfArg
from transformers.utils import is_faiss_available

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel
from sigphi.train import search_index
from sigphi.train.checkpoints import read_config
from sigphi.train.encoder_evaluation import ZERO_SHOT_PROMPTS, embed_texts
from sigphi.train.errors import UserError, printable, run_command
from sigphi.train.parser import parse_arguments
from sigphi.train.pictures import PictureError, decode_picture
from sigphi.train.search_index import (
    IndexFacts,
    SearchIndex,
    embed_pixels,
    encoder_fingerprint,
    load_encoder,
    load_index,
    stored_pictures,
)

_CELL, _GAP, _CAPTION = 144, 8, 16


@dataclass
class Hit:
    """
    A picture that was found.

    Args:
        row (`int`): in the index.
        cosine (`float`): between its embedding and the query's.
        probability (`float`, *optional*): for a text, the model's sigmoid: how likely the text belongs to the picture.
    """

    row: int
    cosine: float
    probability: float | None = None


def nearest(embeddings: np.ndarray, query: np.ndarray, top: int) -> list[Hit]:
    """
    The `top` embeddings with the highest inner product with `query`, best first; all when there are fewer.

    Exact: every embedding is compared.

    Args:
        embeddings (`np.ndarray` of shape `(images, dim)`): float32, L2-normalised.
        query (`np.ndarray` of shape `(dim,)`): likewise.
        top (`int`): how many.
    """
    import faiss

    flat = faiss.IndexFlatIP(embeddings.shape[1])
    flat.add(embeddings)
    cosines, rows = flat.search(query[None], min(top, len(embeddings)))  # (1, top) each
    return [Hit(int(row), float(cosine)) for row, cosine in zip(rows[0], cosines[0], strict=True)]


def search_text(
    index: SearchIndex,
    text: str,
    top: int = 10,
    encoder: str | None = None,
    templates: Sequence[str] = ZERO_SHOT_PROMPTS,
) -> list[Hit]:
    """
    The pictures of an index that fit a text best.

    Args:
        index (`SearchIndex`): see [`load_index`].
        text (`str`): the query, such as "a truck".
        top (`int`, *optional*, defaults to 10): how many.
        encoder (`str`, *optional*): another copy of the index's encoder, by default the one that the index names.
        templates (`Sequence[str]`, *optional*, defaults to [`ZERO_SHOT_PROMPTS`]): wordings, each with `{}` where the
            query goes; the embeddings of all are averaged, as for zero-shot classification. An encoder that was
            trained on few wordings understands no others. `("{}",)` takes the query as it is.

    Raises:
        UserError: if the encoder cannot be read or is another one than the index was built by, its text tower is not
            at hand, or the text is empty or longer than those of training (`--max-text-length`).
    """
    if not text.strip():
        raise UserError("the query is empty; say what the pictures should show.")
    model, processor = index_encoder(index.facts, encoder, with_text_tower=True)
    texts = [template.replace("{}", text) for template in templates]
    longest = processor.tokenizer.model_max_length
    length = max(map(len, processor.tokenizer(texts)["input_ids"]))
    if length > longest:
        raise UserError(f"the query has {length} tokens, the encoder reads {longest}; shorten it.")
    embeds = embed_texts(model, processor, texts, batch_size=len(texts))  # (templates, dim)
    query = F.normalize(embeds.mean(0), dim=-1).numpy()  # (dim,)
    scale, bias = model.logit_scale.float().exp().item(), model.logit_bias.float().item()
    hits = nearest(index.embeddings, query, top)
    return [Hit(hit.row, hit.cosine, float(torch.tensor(scale * hit.cosine + bias).sigmoid())) for hit in hits]


def search_image(index: SearchIndex, image: str, top: int = 10, encoder: str | None = None) -> list[Hit]:
    """
    The pictures of an index that are most like another one.

    Args:
        index, top, encoder: as of [`search_text`].
        image (`str`): a file, or an image of the index by its name, whose embedding is at hand.

    Raises:
        UserError: if there is no such picture, or it or the encoder cannot be read.
    """
    if not Path(image).is_file() and image in index.names:
        if encoder is not None:
            raise UserError(f"--encoder is of no use: the index holds the embedding of {image}; leave it out.")
        return nearest(index.embeddings, index.embeddings[index.names.index(image)], top)
    try:
        picture = decode_picture(Path(image).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"--image {image}: there is no such file, and no such image in the index.") from error
    except (OSError, PictureError) as error:
        raise UserError(f"--image {image}: this is no picture that can be read ({printable(str(error))}).") from error
    model, processor = index_encoder(index.facts, encoder)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]  # (1, 3, height, width)
    return nearest(index.embeddings, embed_pixels(model, pixels)[0], top)


def index_encoder(
    facts: IndexFacts, encoder: str | None = None, with_text_tower: bool = False
) -> tuple[SiglipResNetModel, Any]:
    """
    The encoder that an index was built by, and its processor.

    Args:
        facts (`IndexFacts`): the index's.
        encoder (`str`, *optional*): where the encoder is now; where it was then without it.
        with_text_tower (`bool`, *optional*, defaults to `False`): whether texts are to be embedded.

    Raises:
        UserError: if it cannot be read, or is another encoder.
    """
    name, revision = (facts.encoder, facts.encoder_revision) if encoder is None else (encoder, None)
    option = "--encoder" if encoder is not None else "the index's encoder"
    config = read_config(name, option, SiglipResNetConfig.model_type, revision=revision)
    if with_text_tower and not config.include_text_tower:
        _check_text_tower(name, config)
    model, processor = load_encoder(name, option, revision)
    found = encoder_fingerprint(model, processor)
    if found != facts.encoder_sha256:
        raise UserError(
            f"{option} {name} is not the one that the index was built by ({found[:12]}, not "
            f"{facts.encoder_sha256[:12]}): build the index again, or give the encoder of that time by --encoder."
        )
    if with_text_tower and not config.include_text_tower:
        model.load_text_tower()
    return model, processor


def _check_text_tower(name: str, config: SiglipResNetConfig) -> None:
    remedy = "Search by --image, or give a copy with its text tower by --encoder."
    if config.text_model_name_or_path is None:
        raise UserError(f"{name} was saved without its text tower, and does not say which it is. {remedy}")
    try:
        read_config(config.text_model_name_or_path, "its text tower", revision=config.text_model_revision)
    except UserError as error:
        raise UserError(f"{name} was saved without its text tower: {error}\n{remedy}") from error


def result_table(index: SearchIndex, hits: Sequence[Hit]) -> str:
    """The hits as aligned lines, best first; a column that says nothing is left out."""
    columns = {
        "rank": [str(rank) for rank in range(1, len(hits) + 1)],
        "cosine": [f"{hit.cosine:.4f}" for hit in hits],
        "probability": ["" if hit.probability is None else f"{hit.probability:.4f}" for hit in hits],
        "label": [printable(index.labels[hit.row] or "") for hit in hits],
        "image": [printable(index.names[hit.row]) for hit in hits],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    widths = [max(len(cell) for cell in (name, *cells)) for name, cells in shown.items()]
    lines = [list(shown), *zip(*shown.values(), strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return "".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() + "\n" for line in padded)


def result_grid(index: SearchIndex, hits: Sequence[Hit], columns: int = 5) -> Image.Image:
    """The pictures that were found, best first in rows of `columns`, each with its rank, score and label or name."""
    columns = min(columns, len(hits))
    rows = -(-len(hits) // columns)
    across, down = _CELL + _GAP, _CELL + _CAPTION + _GAP
    grid = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), "white")
    draw = ImageDraw.Draw(grid)
    for place, (hit, picture) in enumerate(zip(hits, stored_pictures(index, [hit.row for hit in hits]), strict=True)):
        left, top = _GAP + place % columns * across, _GAP + place // columns * down
        scale = _CELL / max(picture.size)
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), method)
        grid.paste(fitted, (left + (_CELL - fitted.width) // 2, top + (_CELL - fitted.height) // 2))
        score = hit.cosine if hit.probability is None else hit.probability
        caption = f"{place + 1}: {score:.3f} {printable(index.labels[hit.row] or Path(index.names[hit.row]).name)}"
        while draw.textlength(caption) > _CELL:
            caption = caption[:-1]
        draw.text((left, top + _CELL + 2), caption, fill="black")
    return grid


@dataclass
class SearchArguments:
    """Options of `sigphi search`."""

    _argument_group_name = "search"

    image: str | None = HfArg(
        help="Search by this picture instead of a text: a file, or an image of the index as the table names it.",
        default=None,
    )
    top: int = HfArg(help="How many pictures to find.", default=10)
    template: list[str] | None = HfArg(
        help="Wordings with {} where the text goes, whose embeddings are averaged; those of zero-shot evaluation "
        "without it. '{}' takes the text as it is.",
        default=None,
    )
    grid: str | None = HfArg(help="PNG file for the pictures with their scores.", default=None)
    encoder: str | None = HfArg(
        help="Where the index's encoder is, when it is no longer where it was; another encoder is an error.",
        default=None,
    )

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top must be at least 1, got {self.top}.")
        for template in self.template or ():
            if "{}" not in template:
                raise UserError(f"--template {template!r} has to hold {{}}, where the text goes.")
        if self.template is not None and self.image is not None:
            raise UserError("--template words a text, and --image is none: leave one of them out.")
        if self.grid is not None and not self.grid.lower().endswith(".png"):
            raise UserError(f"--grid {self.grid}: a PNG is written; give a name that ends in .png.")
        if self.grid is not None and not Path(self.grid).parent.is_dir():
            raise UserError(f"--grid {self.grid}: there is no folder {Path(self.grid).parent}; create it first.")


def main(argv: list[str] | None = None) -> None:
    """`sigphi search INDEX "a red truck"`: a table, and a picture of the results."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["build"]:
        search_index.main(words[1:])
        return
    options, path, query = parse_arguments(
        [SearchArguments],
        words,
        "sigphi search",
        [
            ("index", None, "file that `sigphi search build` wrote (`sigphi search build --help`)"),
            ("query", "?", "what the pictures should show, such as 'a red truck'"),
        ],
    )
    if (query is None) == (options.image is None):
        raise UserError("give a text or --image FILE to search by, one of both. See `sigphi search --help`.")
    if not is_faiss_available():
        raise UserError("searching needs faiss: pip install 'sigphi[search]'")
    index = load_index(path)
    if query is not None:
        hits = search_text(index, query, options.top, options.encoder, options.template or ZERO_SHOT_PROMPTS)
    else:
        hits = search_image(index, options.image, options.top, options.encoder)
    sys.stdout.write(result_table(index, hits))
    if options.grid is not None:
        _write_grid(options.grid, result_grid(index, hits))


def _write_grid(path: str, grid: Image.Image) -> None:
    try:
        grid.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"--grid {path} cannot be written: {error.strerror}.") from error
    sys.stdout.write(f"{path}: written\n")


__all__ = ["Hit", "index_encoder", "main", "nearest", "result_grid", "result_table", "search_image", "search_text"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.search")
