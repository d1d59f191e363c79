"""`sigphi search build`: embed the pictures of a folder or set, and keep them in one file that can be searched.

```bash
sigphi search build cifar10.index --encoder outputs/siglip --images uoft-cs/cifar10
sigphi search build own.index --encoder outputs/own --dataset captions --image-column jpg
```
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from sigphi.configuration.configuration_siglip_resnet import SiglipResNetConfig
from sigphi.hub_card.files import written_aside
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetModel
from sigphi.processing.processing_siglip_resnet import SiglipResNetProcessor
from sigphi.train.arguments import refuse_other_source
from sigphi.train.checkpoints import hub_commit, loading, read_config
from sigphi.train.errors import UserError, printable
from sigphi.train.fingerprints import digest, tensor_parts
from sigphi.train.image_texts import check_image_column, read_set
from sigphi.train.images import load_images
from sigphi.train.parser import parse_arguments
from sigphi.train.pictures import PictureError, decode_picture, encoded_bytes
from sigphi.train.records import durable_name

logger = logging.getLogger(__name__)

# What a folder is searched for.
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))

_METADATA_KEY = b"sigphi_search"
_FORMAT = 1


@dataclass
class IndexFacts:
    """
    What an index is of.

    Args:
        encoder (`str`): the folder or Hub id that it was built by.
        encoder_revision (`str`, *optional*): the commit of a Hub id.
        encoder_sha256 (`str`): see [`encoder_fingerprint`].
        images (`str`): a folder, or a source of [`load_images`] or of [`read_set`].
        image_split (`str`, *optional*): the split of a set; `None` for a folder of picture files.
        image_column (`str`, *optional*): the column of a set of [`read_set`]; `None` for all others.
        dataset_config (`str`, *optional*): the configuration of such a set.
        sigphi (`str`): the version that wrote it.
        format (`int`): of the file; another one cannot be read.
    """

    encoder: str
    encoder_revision: str | None
    encoder_sha256: str
    images: str
    image_split: str | None
    image_column: str | None = None
    dataset_config: str | None = None
    sigphi: str = version("sigphi")
    format: int = _FORMAT


@dataclass
class SearchIndex:
    """
    An index in memory.

    Args:
        facts (`IndexFacts`): what it is of.
        names (`list[str]`): of each image: its path within the folder, or split and row of a set (`test:12`).
        labels (`list[str | None]`): the class of each, where the set tells it.
        digests (`list[str]`): of each encoded picture, to tell whether it is still the same.
        embeddings (`np.ndarray` of shape `(images, dim)`): float32, L2-normalised.
    """

    facts: IndexFacts
    names: list[str]
    labels: list[str | None]
    digests: list[str]
    embeddings: np.ndarray


@dataclass
class Pictures:
    """Pictures that are not yet decoded; `cells` has the column `img`, a `datasets.Image(decode=False)`."""

    names: list[str]
    labels: list[str | None]
    cells: datasets.Dataset
    split: str | None


def build_index(
    output: str | Path,
    encoder: str,
    images: str,
    image_split: str | None = None,
    encoder_revision: str | None = None,
    batch_size: int = 128,
    skip_broken: bool = False,
    image_column: str | None = None,
    dataset_config: str | None = None,
) -> tuple[int, list[str]]:
    """
    Embed pictures and write the index, a Parquet file that appears whole or not at all.

    Its columns are `name`, `label`, `digest` and `embedding` (a list of float32), and its metadata holds
    [`IndexFacts`]. Pictures are read one by one and embedded batch by batch, so that neither their size nor their
    number decides how much memory is taken.

    Args:
        output (`str` or `Path`): the file to write; an index that exists is replaced.
        encoder (`str`): folder or Hub id of the encoder; its text tower is not needed.
        images, image_split, image_column, dataset_config (`str`): see [`find_pictures`].
        encoder_revision (`str`, *optional*): of a Hub id.
        batch_size (`int`, *optional*, defaults to 128): images in a step.
        skip_broken (`bool`, *optional*, defaults to `False`): leave pictures out that cannot be read.

    Returns:
        `tuple`: how many images the index holds, and the names of those that were left out.

    Raises:
        UserError: if the encoder or images cannot be loaded, a picture cannot be read, or the file not be written.
    """
    output = Path(output)
    _check_output(output)
    read_config(encoder, "--encoder", SiglipResNetConfig.model_type, revision=encoder_revision)
    pictures = find_pictures(images, image_split, image_column, dataset_config)
    revision = None if Path(encoder).is_dir() else hub_commit(encoder, encoder_revision)
    model, processor = load_encoder(encoder, "--encoder", revision)
    facts = IndexFacts(
        encoder=durable_name(encoder),
        encoder_revision=revision,
        encoder_sha256=encoder_fingerprint(model, processor),
        images=durable_name(images),
        image_split=pictures.split,
        image_column=image_column,
        dataset_config=dataset_config,
    )
    schema = _schema(model.config.projection_dim).with_metadata({_METADATA_KEY: json.dumps(asdict(facts))})
    broken: list[str] = []
    try:
        with written_aside(output) as aside:
            with pq.ParquetWriter(aside, schema) as writer:
                for batch in _batches(pictures, model, processor, batch_size, broken if skip_broken else None):
                    writer.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))
            if len(broken) == len(pictures.names):
                raise UserError(f"{images}: none of its {len(broken)} pictures can be read.")
    except OSError as error:
        raise UserError(f"INDEX {output} cannot be written: {error.strerror}.") from error
    return len(pictures.names) - len(broken), broken


def _check_output(output: Path) -> None:
    if not output.parent.is_dir():
        raise UserError(f"INDEX {output}: there is no folder {output.parent}; create it first.")
    if output.exists():
        try:
            _read_facts(output)
        except UserError as error:
            raise UserError(f"INDEX {output} exists and is no index; give another name, or delete it.") from error


def _schema(dim: int) -> pa.Schema:
    columns = {
        "name": pa.string(),
        "label": pa.string(),
        "digest": pa.string(),
        "embedding": pa.list_(pa.float32(), dim),
    }
    return pa.schema([pa.field(name, kind, nullable=name == "label") for name, kind in columns.items()])


def find_pictures(
    images: str, split: str | None, image_column: str | None = None, dataset_config: str | None = None
) -> Pictures:
    """
    The pictures to be indexed.

    Args:
        images (`str`): a folder with picture files at any depth, or a source of [`load_images`]; with `image_column`
            one of [`read_set`].
        split (`str`, *optional*): of a set, `"test"` by default. With it, a folder is always read as a set.
        image_column (`str`, *optional*): where the pictures are in a set of any columns.
        dataset_config (`str`, *optional*): the configuration of such a set that has several.

    Returns:
        `Pictures`: of a folder in the order of their names, of a set in its own.

    Raises:
        UserError: if there are no pictures.
    """
    folder = Path(images)
    if split is None and image_column is None and folder.is_dir() and not _holds_a_set(folder):
        return _files_of(folder)
    split = split or "test"
    labels: list[str | None]
    if image_column is None:
        rows = load_images(images, split)
        classes = rows.features["label"].names
        labels = [classes[label] for label in rows["label"]]
    else:
        rows = read_set(images, dataset_config, split)
        check_image_column(rows, f"--dataset {images}", image_column)
        rows = rows.select_columns([image_column]).rename_column(image_column, "img")
        labels = [None] * len(rows)
    names = [f"{split}:{row}" for row in range(len(rows))]
    return Pictures(names, labels, rows.cast_column("img", datasets.Image(decode=False)), split)


def _holds_a_set(folder: Path) -> bool:
    return (folder / "cifar-10-batches-py").is_dir() or any(
        path.suffix in (".parquet", ".arrow") for path in folder.rglob("*")
    )


def _files_of(folder: Path) -> Pictures:
    # `datasets`' own reading of a folder takes subfolders named `test` for splits, and drops what lies elsewhere.
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    names = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise UserError(f"--images {folder}: no picture in this folder ({', '.join(sorted(SUFFIXES))}), and no set.")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--images {folder}: rename {printable(name)}, its name is not in UTF-8.") from error
    cells = [{"bytes": None, "path": str(folder / name)} for name in names]
    features = datasets.Features({"img": datasets.Image(decode=False)})
    return Pictures(names, [None] * len(names), datasets.Dataset.from_dict({"img": cells}, features=features), None)


def _batches(
    pictures: Pictures, model: SiglipResNetModel, processor: Any, batch_size: int, broken: list[str] | None
) -> Iterator[dict[str, Any]]:
    """The columns of the index, batch by batch; names of unreadable pictures go to `broken`, or are an error."""
    for start in tqdm(range(0, len(pictures.names), batch_size), desc="images", disable=None, leave=False):
        batch: dict[str, Any] = {"name": [], "label": [], "digest": []}
        pixels = []
        for row, cell in enumerate(pictures.cells[start : start + batch_size]["img"], start):
            try:
                encoded = encoded_bytes(cell)
                image = decode_picture(encoded)
            except (OSError, PictureError) as error:
                _note_broken(pictures.names[row], error, broken)
                continue
            # Resized at once, so that a batch of photographs is never in memory at full size.
            pixels.append(processor(images=image, return_tensors="pt")["pixel_values"])
            batch["name"].append(pictures.names[row])
            batch["label"].append(pictures.labels[row])
            batch["digest"].append(picture_digest(encoded))
        if pixels:
            yield batch | {"embedding": list(embed_pixels(model, torch.cat(pixels)))}


def _note_broken(name: str, error: Exception, broken: list[str] | None) -> None:
    fault = f"{printable(name)} cannot be read ({printable(str(error))})"
    if broken is None:
        raise UserError(f"picture {fault}; remove it, or leave such pictures out by --skip-broken true.") from error
    logger.warning("%s: left out.", fault)
    broken.append(name)


def picture_digest(encoded: bytes) -> str:
    """16 hexadecimal digits that another file does not share by chance."""
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()


@torch.no_grad()
def embed_pixels(model: SiglipResNetModel, pixel_values: torch.Tensor) -> np.ndarray:
    """L2-normalised embeddings, float32, of shape `(images, dim)`."""
    return model(pixel_values=pixel_values.to(model.device)).image_embeds.cpu().numpy()


def load_encoder(name: str, option: str, revision: str | None) -> tuple[SiglipResNetModel, Any]:
    """
    An encoder, in evaluation mode and on the accelerator where there is one, and its processor.

    A text tower that it was saved without is not loaded.

    Raises:
        UserError: if `name` is no encoder of ours; `option` is where the user gave it.
    """
    read_config(name, option, SiglipResNetConfig.model_type, revision=revision)
    with loading(f"{option} {name}"):
        model = SiglipResNetModel.from_pretrained(name, revision=revision or "main")
        processor = SiglipResNetProcessor.from_pretrained(name, revision=revision or "main")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval(), processor


def encoder_fingerprint(model: SiglipResNetModel, processor: Any) -> str:
    """
    A SHA-256 of what decides on embeddings: all weights but the language model's, and how images are prepared.

    Two encoders with the same fingerprint share an embedding space. The language model stands apart because it is
    large, mostly frozen, and loaded only for texts.
    """
    weights = model.state_dict().items()
    counted = {name: tensor for name, tensor in weights if not name.startswith("text_model.language_model.")}
    settings = processor.image_processor.to_dict()
    names = ("size", "resample", "image_mean", "image_std", "rescale_factor")
    prepared = json.dumps([settings[name] for name in names], sort_keys=True).encode()
    return digest(chain(tensor_parts(counted), [prepared]))


def load_index(path: str | Path) -> SearchIndex:
    """
    Read an index. The file is data only: nothing in it is executed.

    Raises:
        UserError: if there is no such file, or it is no index of this version.
    """
    facts = _read_facts(Path(path))
    table = pq.read_table(path)
    kind: Any = table.schema.field("embedding").type if "embedding" in table.column_names else pa.null()
    fits = pa.types.is_fixed_size_list(kind) and table.schema.equals(_schema(kind.list_size))
    if not fits or len(table) == 0:
        raise UserError(f"INDEX {path}: its columns are not those of an index; build it again.")
    values = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    embeddings = values.reshape(len(table), -1)  # (images, dim)
    if not np.isfinite(embeddings).all():
        raise UserError(f"INDEX {path}: it holds embeddings that are no finite numbers; build it again.")
    names, labels, digests = (table[name].to_pylist() for name in ("name", "label", "digest"))
    return SearchIndex(facts, names, labels, digests, embeddings)


def _read_facts(path: Path) -> IndexFacts:
    if not path.is_file():
        raise UserError(f"INDEX {path}: there is no such file; `sigphi search build {path} --encoder ...` makes one.")
    try:
        metadata = pq.read_schema(path).metadata or {}
        fields = json.loads(metadata[_METADATA_KEY])
        if fields["format"] != _FORMAT:
            raise UserError(f"INDEX {path}: version {fields['sigphi']} of sigphi wrote it; build it again.")
        return IndexFacts(**fields)
    except (pa.ArrowException, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"INDEX {path}: this is no file that `sigphi search build` wrote.") from error


def stored_pictures(index: SearchIndex, rows: Sequence[int]) -> list[Image.Image]:
    """
    The pictures behind rows of an index, RGB and upright, read from where they were when it was built.

    Raises:
        UserError: if one cannot be read any more.
    """
    facts, names = index.facts, [index.names[row] for row in rows]
    if facts.image_split is None:
        cells = [{"bytes": None, "path": str(Path(facts.images, name))} for name in names]
    else:
        pictures = find_pictures(facts.images, facts.image_split, facts.image_column, facts.dataset_config)
        place = {name: row for row, name in enumerate(pictures.names)}
        gone = [name for name in names if name not in place]
        if gone:
            raise UserError(f"{facts.images} has no image {printable(gone[0])} any more: build the index again.")
        cells = [pictures.cells[place[name]]["img"] for name in names]
    found = []
    for row, cell in zip(rows, cells, strict=True):
        name = printable(index.names[row])
        try:
            encoded = encoded_bytes(cell)
            found.append(decode_picture(encoded))
        except (OSError, PictureError) as error:
            reason = printable(str(error))
            raise UserError(f"{name} cannot be read any more ({reason}): build the index again.") from error
        if picture_digest(encoded) != index.digests[row]:
            logger.warning("%s has changed since the index was built: build it again.", name)
    return found


@dataclass
class SearchBuildArguments:
    """Options of `sigphi search build`."""

    _argument_group_name = "search build"

    encoder: str = HfArg(help="The trained encoder: a folder or Hub id.")
    encoder_revision: str | None = HfArg(help="Branch, tag or commit of a Hub id.", default=None)
    images: str = HfArg(
        help="Pictures: a folder with picture files at any depth, a Hub id, a folder in its schema, torchvision's "
        "download folder, or 'synthetic'.",
        default="uoft-cs/cifar10",
    )
    dataset: str | None = HfArg(
        help="Instead of --images: any set with a column of pictures, a Hub id or a folder.", default=None
    )
    dataset_config: str | None = HfArg(help="Configuration of a --dataset that has several.", default=None)
    dataset_split: str = HfArg(help="Split of --dataset.", default="train")
    image_column: str = HfArg(help="Column of --dataset with the pictures.", default="image")
    image_split: str | None = HfArg(
        help="Split of a set; 'test' without it. With it, a folder is read as a set.", default=None
    )
    batch_size: int = HfArg(help="Images in a step.", default=128)
    skip_broken: bool = HfArg(
        help="Leave pictures out that cannot be read; otherwise the first is an error.", default=False
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}.")
        refuse_other_source(self, ("images", "image_split"), ("dataset_config", "dataset_split", "image_column"))

    def source(self) -> tuple[str, str | None, str | None, str | None]:
        """The arguments of [`find_pictures`]."""
        if self.dataset is None:
            return self.images, self.image_split, None, None
        return self.dataset, self.dataset_split, self.image_column, self.dataset_config


def main(argv: list[str]) -> None:
    """`sigphi search build INDEX`."""
    options, index = parse_arguments(
        [SearchBuildArguments], argv, "sigphi search build", [("index", None, "file to write")]
    )
    images, split, image_column, dataset_config = options.source()
    count, broken = build_index(
        index,
        options.encoder,
        images,
        split,
        options.encoder_revision,
        options.batch_size,
        options.skip_broken,
        image_column,
        dataset_config,
    )
    left_out = f", {len(broken)} left out that cannot be read" if broken else ""
    sys.stdout.write(f"{index}: {count} images of {images}{left_out}\n")


__all__ = [
    "IndexFacts",
    "SearchBuildArguments",
    "SearchIndex",
    "build_index",
    "decode_picture",
    "embed_pixels",
    "encoder_fingerprint",
    "find_pictures",
    "load_encoder",
    "load_index",
    "main",
    "stored_pictures",
]
